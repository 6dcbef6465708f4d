"""Gradients of several processes: what is added up, when, and in which order."""

import subprocess
import sys

import pytest
import steps_of_ranks
import torch
import torch.distributed as dist
from steps_of_ranks import CASES, take
from torch import nn

from mae_fast.buckets import ALIGNED, Buckets


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """{case: [of rank 0, of rank 1]}"""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, steps_of_ranks.__file__, str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return {name: [torch.load(out / f"{name}.{i}.pt") for i in (0, 1)] for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_both_batches(case, ranks):
    zero, one = ranks[case]
    alone = take(CASES[case][0], graph=False)
    assert zero["buckets"] > 3
    assert torch.equal(zero["weights"], one["weights"])
    losses, norms = (zero["rows"] + one["rows"])[:, 0] / 2, zero["rows"][:, 1]
    assert torch.equal(norms, one["rows"][:, 1])
    torch.testing.assert_close(losses, alone["rows"][:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norms, alone["rows"][:, 1], rtol=1e-5, atol=0)
    # Where a gradient is next to nothing, Adam's step follows its sign.
    assert float((zero["weights"] - alone["weights"]).abs().mean()) < 1e-6


@pytest.mark.parametrize("accum", [1, 3])
def test_a_graph_holds_what_ranks_tell_each_other(accum, ranks):
    """What is replayed gives the same bits as what is run."""
    for eager, graph in zip(ranks[f"{accum}"], ranks[f"{accum}graph"], strict=True):
        assert torch.equal(eager["rows"], graph["rows"])
        assert torch.equal(eager["weights"], graph["weights"])
        several = {(True, False), (False, False), (False, True)}
        assert set(graph["captured"]) == (several if accum > 1 else {(True, True)})


@pytest.fixture
def group(monkeypatch):
    """A group of one, in which a bucket's sums come in the order that this lists, and are twice
    what was given."""
    order = []

    def doubled(flat, async_op):
        order.append(flat)
        flat.mul_(2)
        return type("Work", (), {"wait": lambda self: None})()

    monkeypatch.setattr(dist, "all_reduce", doubled)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield order
    dist.destroy_process_group()


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(5, 5) for name in "abc"})


def test_only_the_block_adds_up_and_each_bucket_once(group):
    model = a_model()
    buckets = Buckets(model, size=1)  # one for every parameter
    x = torch.randn(3, 5)
    model["c"](model["b"](model["a"](x))).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert not group
    with buckets.added_up():
        model["c"](model["b"](model["a"](x))).sum().backward()
    assert [id(flat) for flat in group] == [id(b.flat) for b in buckets.buckets]
    for (name, p), b in zip(reversed(list(model.named_parameters())), buckets.buckets, strict=True):
        assert torch.equal(p.grad, 4 * before[name])  # two backwards, and the doubling
        assert p.grad is b.views[0] and b.params[0] is p


def test_the_order_is_that_of_the_parameters_whatever_is_ready_first(group):
    """Other ranks may be ready in another order, and their sums would meet others."""
    model = a_model()
    buckets = Buckets(model, size=1)
    with buckets.added_up():  # a's gradients come before c's
        model["c"](torch.ones(1, 5)).sum().backward()
        first = len(group)
        model["a"](torch.ones(1, 5)).sum().backward()
        assert len(group) == first == 2
        model["b"](torch.ones(1, 5)).sum().backward()
        assert len(group) == 6
    assert [id(flat) for flat in group] == [id(b.flat) for b in buckets.buckets]


def test_a_parameter_without_a_gradient_stays_without(group):
    """A frozen one is in no bucket; one that is not used adds nothing, and is not decayed."""
    model = a_model()
    model["b"].requires_grad_(False)
    buckets = Buckets(model, size=1 << 20)
    assert [len(b.params) for b in buckets.buckets] == [4]
    buckets.buckets[0].flat.fill_(9.0)  # of the step before
    with buckets.added_up():
        model["c"](torch.ones(1, 5)).sum().backward()
    assert model["a"].weight.grad is None and model["b"].weight.grad is None
    assert torch.equal(model["c"].bias.grad, torch.full((5,), 2.0))
    assert not buckets.buckets[0].views[-1].any()


def test_gradients_begin_where_16_bytes_may_be_read(group):
    model = nn.ParameterList([torch.zeros(3), torch.zeros(5, 7), torch.zeros(2, dtype=torch.half)])
    buckets = Buckets(model)
    assert [b.flat.dtype for b in buckets.buckets] == [torch.half, torch.float32]
    assert [v.storage_offset() for v in buckets.buckets[1].views] == [0, ALIGNED]
    assert [v.shape for v in buckets.buckets[1].views] == [(5, 7), (3,)]


def test_an_error_in_backward_adds_up_nothing_later(group):
    model = a_model()
    buckets = Buckets(model, size=1)
    with pytest.raises(ValueError, match="mine"), buckets.added_up():
        raise ValueError("mine")
    model["c"](torch.ones(1, 5)).sum().backward()  # whose buckets are the first
    assert not group
