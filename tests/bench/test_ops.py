"""`mae-fast bench ops`: every op has calls, what is wrong is not timed, records hold what was."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mae_fast import cli
from mae_fast.bench import machine, ops
from mae_fast.bench.baselines.ops import baseline
from mae_fast.bench.calls import Call, calls
from mae_fast.bench.engines import config_of
from mae_fast.bench.ops import Plan
from mae_fast.bench.records import problems, read
from mae_fast.errors import BackendError
from mae_fast.ops import OPS
from mae_fast.ops.add_layer_norm import add_layer_norm
from mae_fast.ops.work import outputs, work

QUICK = Plan(model="quick", rounds=2)


def test_the_command_times_an_op_and_records_it(tmp_path, capsys):
    out = tmp_path / "ops.jsonl"
    command = ["bench", "ops", "--ops", "masked_mse", "--quick", "--out", str(out)]
    assert cli.main(command) == 0
    assert "official" in capsys.readouterr().out
    for record, direction in zip(read(out), ops.DIRECTIONS, strict=True):
        assert (record["op"], record["direction"]) == ("masked_mse", direction)
        assert record["seconds"].keys() >= {"reference", "official"}
        backends = record["seconds"].keys() | record["declined"].keys()
        assert backends == {"cpp", "triton", "cuda", "reference", "official"}
        assert {len(samples) for samples in record["seconds"].values()} == {2}
    assert cli.main(["bench", "ops", "--ops", "masked_mes"]) == 2
    assert "unknown op 'masked_mes' (known: adamw" in capsys.readouterr().err


def test_all_ops_have_calls():
    """By default each op in each phase: the call that does most of a step; adamw apart."""
    found = [call for call, _ in QUICK.cases()]
    assert {call.op for call in found} == OPS.keys() - {"adamw"}
    assert {c.phase for c in found if c.op == "attention"} == {"encoder", "decoder"}
    every = [call for call, _ in Plan(ops=("linear",), model="quick").cases()]
    # 2 + 2 blocks of q, k, v, proj, fc1, fc2; k, q, v of mask tokens; decoder_embed; the head.
    assert sum(call.count for call in every) == 24 + 3 + 2


@pytest.mark.parametrize("first", [0, 2])
def test_the_work_of_a_norm_whose_sum_goes_on_in_part(first):
    """Its gradient is of that part; and what such a call is said to give is what it gives."""
    x, y = torch.randn(3, 7, 8).bfloat16(), torch.randn(3, 7, 8)
    args = x, y, torch.ones(8), torch.zeros(8), 1e-6, torch.bfloat16, first
    _, backward = work("add_layer_norm", args)
    assert backward.bytes == 3 * 8 * (7 * (2 + 4 + 4) + (7 - first) * 4)
    given = [(out.shape, out.dtype) for out in add_layer_norm(*args)]
    assert outputs("add_layer_norm", args) == given


@pytest.mark.parametrize("op", [op for op in OPS if op != "adamw"])
def test_what_an_op_replaces_gives_the_same(op):
    """Outputs and gradients of the official expression, brought into the op's form."""
    cfg = config_of("quick")
    found = [c for c in calls(cfg, 2, 0.75, torch.float32) if c.op == op]
    found += [ops.by_channel(found[0], cfg)] if op == "masked_mse" else []
    assert found
    for call in (c.real() for c in found):
        made = baseline(op, call.args)
        theirs = ops.replace(call, args=made.args).both(made.function, made.theirs)
        ops._agree(
            call, made.name, made.ours(*theirs()), call.both(call.reference())(), torch.float32
        )


def test_a_backend_that_is_wrong_is_not_timed():
    x, w, b = torch.randn(4, 16), torch.ones(16), torch.zeros(16)
    call = Call("layer_norm", (x, w, b, 1e-6))
    right = call.reference()

    def wrong(*args):
        return right(*args) * 1.01

    def wrong_gradient(*args):
        out = right(*args)
        return out + 0.01 * (out - out.detach())

    def decline(*args):
        raise BackendError("not here")

    beside = {"right": right, "wrong": wrong, "back": wrong_gradient, "absent": decline}
    ready = ops.ready_call(QUICK, call, call, "forward_backward", beside)
    record = ops.measure(QUICK, ready, machine.limits(True))
    assert {"reference", "right"} <= record["seconds"].keys()
    assert not record["seconds"].keys() & {"wrong", "back", "absent"}
    assert record["declined"]["absent"] == "not here"
    assert "layer_norm float32[4,16]: result 0" in record["wrong"]["wrong"]
    assert "layer_norm float32[4,16]: result 1" in record["wrong"]["back"]
    assert problems(record) == []


def test_the_command_fails_where_an_op_is_wrong(monkeypatch, capsys):
    usable = ops._usable
    monkeypatch.setattr(ops, "_usable", lambda *args: (*usable(*args)[:2], {"cpp": "it is 2"}))
    assert cli.main(["bench", "ops", "--ops", "patchify_gather", "--quick"]) == 2
    said = capsys.readouterr()
    assert "patchify_gather: wrong: cpp: it is 2" in said.out and "it is 2" in said.err


def test_the_table_has_every_backend():
    limits = {"copy": {"bytes": 10, "seconds": [1.0, 1.0]}}
    record = {"kind": "op", "op": "bias_gelu", "shape": "[2]", "direction": "forward"}
    record |= {"bytes": 5, "flop": 0, "baseline": "torch", "limits": limits}
    record |= {
        "declined": {"cuda": "not here"},
        "seconds": {"cpp": [1.0, 1.0], "torch": [2.0, 3.0]},
    }
    call = {"kind": "call", "op": "linear", "baseline": "reference"}
    call["seconds"] = {"public": [2e-6], "reference": [1e-6]}
    _, _, *rows, note = ops.table([record, call]).splitlines()
    assert [row.split() for row in rows] == [
        ["bias_gelu", "[2]", "forward", "cpp", "1000.000", "0%", "50%", "2.50x", "torch"],
        ["bias_gelu", "[2]", "forward", "torch", "2500.000", "40%", "21%", "1.00x", "torch"],
        ["linear", "smallest", "call", "public", "0.0020"],
        ["linear", "smallest", "call", "reference", "0.0010"],
    ]
    assert note == "bias_gelu: declined: cuda: not here"


def test_adamw_by_backend():
    ready = ops.ready_adamw(QUICK, config_of("quick"), "decoder_blocks")
    record = ops.measure(QUICK, ready, machine.limits(True))
    assert {"torch", "reference", "official"} <= record["seconds"].keys()
    assert problems(record) == [] and record["bytes"] > 0


@pytest.mark.parametrize("op", OPS)
def test_the_smallest_call_runs_by_every_way(op):
    ways = ops.smallest(op)
    for way in ways.values():
        way()
    assert ways.keys() >= {"public", "reference"}
    assert json.dumps(ops.time_smallest("layer_norm", 1)["seconds"])


def test_the_smallest_call_s_time_is_of_one(monkeypatch):
    monkeypatch.setattr(ops.timeit, "timeit", lambda function, number: 0.5 * number)
    seconds = ops.time_smallest("layer_norm", 2)["seconds"]
    assert seconds["public"] == seconds["reference"] == [0.5, 0.5]


class Moved(TorchDispatchMode):
    """The bytes of the tensors that operators are given."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.bytes += sum(t.nbytes for t in args if torch.is_tensor(t))
        return func(*args, **(kwargs or {}))


def test_a_limit_is_what_it_moves_or_computes():
    copy, *products = machine.limits(True).values()
    with Moved() as moved:
        copy.run()
    assert (copy.unit, copy.amount) == ("bytes", moved.bytes)
    for product in products:
        with FlopCounterMode(display=False) as counter:
            product.run()
        assert (product.unit, product.amount) == ("flop", counter.get_total_flops())


@pytest.mark.parametrize("direction", ops.DIRECTIONS)
def test_the_work_of_a_record_is_of_its_direction(direction):
    call = Call("layer_norm", (torch.randn(4, 16), torch.ones(16), torch.zeros(16), 1e-6))
    fields = ops.ready_call(QUICK, call, call, direction, {}).fields
    forward, backward = call.work()
    assert fields["bytes"] == forward.bytes + (direction != "forward") * backward.bytes


def test_of_each_op_in_each_phase_the_most_work_is_timed():
    every = calls(config_of(QUICK.model), QUICK.clips, QUICK.ratio, torch.float32)
    *most, _ = (call for call, _ in QUICK.cases())
    assert {(c.phase, c.op) for c in most} == {(c.phase, c.op) for c in every}
    for one in most:
        same = (c for c in every if (c.phase, c.op) == (one.phase, one.op))
        assert ops._amount(one) == max(map(ops._amount, same))


def test_caches_are_cold_but_in_a_quick_run(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "clock", lambda device, cold: asked.append(cold) or (lambda f: 1.0))
    for model in ("vit_base", QUICK.model):
        ops.measure(Plan(model=model), ops.Ready({"a": lambda: None}, {}), machine.limits(True))
    assert asked == [True, False]
