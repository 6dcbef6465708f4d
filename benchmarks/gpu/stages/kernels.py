"""Each op on the calls of a training step: every backend beside plain torch and inductor, against
what the device can do in the same rounds (mae_fast/bench/ops.py). Attention has a stage of its own.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.gpu.calls import Case, cases
from benchmarks.gpu.device import smi
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from mae_fast.bench import ops
from mae_fast.bench.timing import share

MODELS, BATCH = ("vit_base", "vit_large"), 64
ROUNDS = 10
Beside = Callable[[Setting, Case], dict[str, Callable]]


def items(setting: Setting) -> Iterator[Item]:
    limits = setting.limits()
    found = [case for case in cases(setting, MODELS, BATCH) if case.call.op != "attention"]
    for case in found:
        yield from items_of(setting, case, limits)
    for case in setting.some(found, 2):
        yield from items_of(setting, case, limits, inductor)


def items_of(
    setting: Setting, case: Case, limits: dict, beside: Beside | None = None
) -> Iterator[Item]:
    """A case in each of its directions; `beside`: what else is timed there."""
    for direction in ops.DIRECTIONS[: 1 + case.call.differentiable]:
        named = f"{case.name} {direction}" + (f" {beside.__name__}" if beside else "")
        yield Item(named, partial(measure, setting, case, direction, limits, beside))


def inductor(setting: Setting, case: Case) -> dict[str, Callable]:
    torch._dynamo.reset()  # dynamo gives up after eight shapes
    reference = case.call.reference()
    return {"inductor": torch.compile(reference, dynamic=False, backend=setting.compiler)}


def plan(setting: Setting, model: str) -> ops.Plan:
    rounds = setting.rounds(ROUNDS)
    return ops.Plan((), model, setting.batch(BATCH), 0.9, "bf16", setting.device, rounds)


def measure(
    setting: Setting, case: Case, direction: str, limits: dict, beside: Beside | None
) -> dict:
    """The record of one call in one direction."""
    others = beside(setting, case) if beside else {}
    how = plan(setting, case.model)
    ready = ops.ready_call(how, case.call, case.two, direction, others)
    return told(ops.measure(how, ready, limits, setting.clock(cold=True)))


def told(record: dict) -> dict:
    words = (
        f"{name} {1e6 * statistics.median(s):.0f} us {share(record['limits'], record, s):.0%}"
        for name, s in record["seconds"].items()
    )
    return {**record, "conditions": smi(), "told": "; ".join(words)}
