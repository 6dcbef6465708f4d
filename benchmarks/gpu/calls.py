"""The calls of the ops that a training step makes, at the sizes of a stage."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from benchmarks.gpu.setting import Setting
from mae_fast.bench import calls as package
from mae_fast.bench.calls import Call


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


def of_every_call(times: dict[str, list[float]]) -> dict[str, float]:
    """The sum over calls of each way that took all of them."""
    most = max(map(len, times.values()))
    return {way: sum(each) for way, each in times.items() if len(each) == most}


class Case(NamedTuple):
    """A call of a model's step, and the same on two clips, small enough to check in fp64."""

    name: str
    model: str
    call: Call
    two: Call


def cases(setting: Setting, models: Iterable[str], batch: int) -> list[Case]:
    """The different calls of some models: the decoder's are the same in most."""
    found: dict[tuple[str, str], Case] = {}
    for model in setting.some(models):
        for call, two in zip(calls(setting, model, batch), calls(setting, model, 2), strict=True):
            name = f"{model} {call.op} {call.shape}"
            found.setdefault((call.op, call.shape), Case(name, model, call, two))
    return list(found.values())
