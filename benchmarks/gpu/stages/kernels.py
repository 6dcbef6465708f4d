"""Each op on the calls of a training step: every backend beside plain torch and inductor, against
what the device can do in the same rounds (mae_fast/bench/ops.py).

Attention is a stage of its own: by every backend that is here, ours, libraries, each of torch's
kernels. Its times are kernels/measured_backends.json, by which the op chooses, also in `steps`.
"""

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu.records import MEASURED, Item
from benchmarks.gpu.setting import Setting, smi
from mae_fast.bench import calls as package
from mae_fast.bench import ops
from mae_fast.bench.calls import Call
from mae_fast.bench.timing import share
from mae_fast.kernels import configs
from mae_fast.ops.attention import measured_key

MODELS, BATCH, ROUNDS = ("vit_base", "vit_large"), 64, 10
ATTENTION_MODELS = ("vit_large", "vit_base", "vit_huge16")


class Case(NamedTuple):
    """A call of a model's step, and the same on two clips, small enough to check in fp64."""

    name: str
    model: str
    call: Call
    two: Call


def items(setting: Setting) -> Iterator[Item]:
    limits = setting.limits()
    found = [case for case in cases(setting, MODELS, BATCH) if case.call.op != "attention"]
    yield from items_of(setting, found, limits)
    yield from items_of(setting, setting.some(found, 2), limits, inductor=True)


def items_of_attention(setting: Setting) -> Iterator[Item]:
    found = [c for c in cases(setting, ATTENTION_MODELS, BATCH) if c.call.op == "attention"]
    yield from items_of(setting, found, setting.limits())
    setting.write_table("measured_backends.json", rows(setting.records.all()))


def items_of(
    setting: Setting, found: Iterable[Case], limits: dict, inductor: bool = False
) -> Iterator[Item]:
    """Cases in each of their directions; `inductor` is timed there too."""
    for case in found:
        for direction in ops.DIRECTIONS[: 1 + case.call.differentiable]:
            name = f"{case.name} {direction}" + " inductor" * inductor
            yield Item(name, partial(measure, setting, case, direction, limits, inductor))


def calls(setting: Setting, model: str, batch: int) -> list[Call]:
    """Each different call of one forward in bf16, at 90%; the rehearsal takes the first of an op,
    and of attention all."""
    found = package.calls(setting.cfg(model), setting.batch(batch), 0.9, torch.bfloat16)
    by_op: dict[str, list[Call]] = {}
    for call in found:
        by_op.setdefault(call.op, []).append(call)
    del by_op["linear"]  # torch's there, and the limit itself
    kept = [of if op == "attention" else setting.some(of) for op, of in by_op.items()]
    return [call for of in kept for call in of]


def cases(setting: Setting, models: Iterable[str], batch: int) -> list[Case]:
    """The different calls of some models: the decoder's are the same in most."""
    found: dict[tuple[str, str], Case] = {}
    for model in setting.some(models):
        for call, two in zip(calls(setting, model, batch), calls(setting, model, 2), strict=True):
            name = f"{model} {call.op} {call.shape}"
            found.setdefault((call.op, call.shape), Case(name, model, call, two))
    return list(found.values())


def plan(setting: Setting, model: str) -> ops.Plan:
    rounds = setting.rounds(ROUNDS)
    return ops.Plan((), model, setting.batch(BATCH), 0.9, "bf16", setting.device, rounds)


def measure(setting: Setting, case: Case, direction: str, limits: dict, inductor: bool) -> dict:
    """The record of one call in one direction; with its row of the table, where it has one."""
    others = {}
    if inductor:
        torch._dynamo.reset()  # dynamo gives up after eight shapes
        reference = case.call.reference()
        others["inductor"] = torch.compile(reference, dynamic=False, backend=setting.compiler)
    how = plan(setting, case.model)
    ready = ops.ready_call(how, case.call, case.two, direction, others)
    record = told(ops.measure(how, ready, limits, setting.clock(cold=True)))
    if case.call.op == "attention":
        width, keys = case.call.args[1].shape[-1], case.call.args[1].shape[1]
        row = measured_key(width, keys, torch.bfloat16, direction != "forward")
        record |= {"width": width, "keys": keys, "row": row}
        record["architecture"] = configs.architecture()
    return record


def told(record: dict) -> dict:
    words = (
        f"{name} {1e6 * statistics.median(s):.0f} us {share(record['limits'], record, s):.0%}"
        for name, s in record["seconds"].items()
    )
    return {**record, "conditions": smi(), "told": "; ".join(words)}


def rows(records: Iterable[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """{(architecture, row): {backend: milliseconds of all calls of a step in this row}}."""
    found = of_a_step(
        ((str(r["architecture"]), r["row"]), r["calls_a_step"], r["seconds"])
        for r in records
        if "row" in r and r["status"] == MEASURED
    )
    return {key: {name: 1e3 * s for name, s in of.items()} for key, of in found.items()}


def of_a_step(
    taken: Iterable[tuple[Hashable, int, dict[str, list[float]]]],
) -> dict[Hashable, dict[str, float]]:
    """{row: {way: seconds of all its calls in a step}} of (row, calls a step, {way: samples}): of
    the ways that took every call of the row."""
    found, sums = defaultdict(lambda: defaultdict(list)), {}
    for row, count, seconds in taken:
        for way, samples in seconds.items():
            found[row][way].append(count * statistics.median(samples))
    for row, ways in found.items():
        most = max(map(len, ways.values()))
        sums[row] = {way: sum(each) for way, each in ways.items() if len(each) == most}
    return sums
