"""Each op on the calls of a training step: every backend beside plain torch and inductor, against
what the device can do in the same rounds. Attention has a stage of its own.

A variant whose error against fp64 is more than twice plain torch's (on two clips), or whose results
on all clips differ from plain torch's, is not timed.
"""

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.gpu.calls import Case, cases
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from mae_fast.bench.baselines.training import CLIP_GRAD, LR
from mae_fast.bench.calls import Call, Run, check
from mae_fast.bench.machine import as_record
from mae_fast.bench.timing import interleave, share
from mae_fast.config import TrainConfig
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS, dispatch
from mae_fast.ops.work import ADAMW_BYTES
from mae_fast.optim import clipped_step, make_optimizer

MODELS, BATCH = ("vit_base", "vit_large"), 64
ROUNDS = 10
PLAIN, INDUCTOR = "torch", "inductor"
DIFFER = 2e-2  # of the norm, between two results in bf16


def items(setting: Setting) -> Iterator[Item]:
    limits = setting.device.limits()
    found = [case for case in cases(setting, MODELS, BATCH) if case.call.op != "attention"]
    for case in found:
        yield Item(case.name, lambda case=case: measure(setting, case, limits, own(case.call)))
    for case in setting.some(found, 2):

        def beside_inductor(case=case) -> dict:
            variants = {**own(case.call), INDUCTOR: inductor(setting, case.call)}
            return measure(setting, case, limits, variants)

        yield Item(f"{case.name} {INDUCTOR}", beside_inductor)


def own(call: Call) -> dict[str, Callable]:
    """{variant: function}: the op's backends and plain torch."""
    found = {name: call.function(name) for name in OPS[call.op].backends if name != "reference"}
    return {**found, PLAIN: call.reference()}


def inductor(setting: Setting, call: Call) -> Callable:
    torch._dynamo.reset()  # dynamo gives up after eight shapes
    return torch.compile(call.reference(), dynamic=False, backend=setting.compiler)


def measure(setting: Setting, case: Case, limits: dict, variants: dict[str, Callable]) -> dict:
    """The record of one call: forward, and forward with backward, by variant."""
    call, two = case.call.real(setting.device.type), case.two.real(setting.device.type)
    kept, declined, wrong = usable(setting, call, two, variants)
    forward, backward = call.work()
    work = {"forward": forward._asdict(), "forward_backward": (forward + backward)._asdict()}
    seconds, measured_limits = {}, {}
    directions = {"forward": call.forward}
    if call.differentiable:
        directions["forward_backward"] = call.both
    for direction, make in directions.items():
        timed = {name: cast(setting, make(function)) for name, function in kept.items()}
        timed |= {name: limit.run for name, limit in limits.items()}
        for run in timed.values():
            run()
        rounds = setting.rounds(ROUNDS)
        found = interleave(timed, rounds, timer=lambda run: setting.device.time(run, cold=True))
        measured_limits[direction] = as_record(limits, found)
        seconds[direction] = {name: found[name] for name in kept}
    last = list(directions)[-1]
    return {
        "op": call.op,
        "shape": call.shape,
        "model": case.model,
        "batch": setting.batch(BATCH),
        "calls_a_step": call.count,
        "seconds_a_call": seconds,
        "work": work,
        "limits": measured_limits,
        "declined": declined,
        "wrong": wrong,
        "conditions": setting.device.conditions(),
        "told": "; ".join(
            f"{name} {1e6 * statistics.median(s):.0f} us"
            f" {share(measured_limits[last], work[last], s):.0%}"
            for name, s in seconds[last].items()
        ),
    }


def usable(
    setting: Setting, call: Call, two: Call, variants: dict[str, Callable]
) -> tuple[dict[str, Callable], dict[str, str], dict[str, str]]:
    """(the variants that run here and are right, why others decline, what others get wrong)."""
    kept, declined, wrong, anchor = {}, {}, {}, None
    for name, function in variants.items():
        try:
            with setting.autocast():
                check(two, function)
                results = [t.float() for t in call.both(function)()]
            anchor = anchor or results
            error = max(
                float((r - a).norm() / a.norm().clamp(min=1e-20))
                for r, a in zip(results, anchor, strict=True)
            )
            assert error <= DIFFER, f"differs from {next(iter(kept), name)} by {error:.1e}"
            kept[name] = function
        except AssertionError as e:
            wrong[name] = str(e)
        except (dispatch.BackendError, RuntimeError) as e:  # also out of memory
            text = str(e).strip().splitlines() or [""]
            declined[name] = f"{type(e).__name__}: {text[0]}"
    if not kept:
        raise AssertionError(f"nothing can be timed: {wrong} {declined}")
    return kept, declined, wrong


def cast(setting: Setting, run: Run) -> Run:
    def under_autocast():
        with setting.autocast():
            return run()

    return under_autocast


def adamw(setting: Setting, model: str, limits: dict) -> dict:
    """Clip and AdamW on all parameters of a model, by each backend and by the official loop."""
    with torch.device("meta"):
        shapes = [p.shape for p in MaskedAutoencoder(setting.cfg(model)).parameters()]
    device = setting.device.type
    grads = [torch.randn(s, device=device) for s in shapes]

    def start() -> nn.ParameterList:
        torch.manual_seed(0)
        return nn.ParameterList(nn.Parameter(torch.randn(s, device=device)) for s in shapes)

    def ours(backend: str) -> tuple[nn.ParameterList, Callable[[], None]]:
        params = start()
        optimizer = make_optimizer(params, TrainConfig())

        def run() -> None:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            with dispatch.backends(adamw=backend):
                clipped_step(optimizer, LR, CLIP_GRAD)

        return params, run

    expected, plain = ours("reference")
    plain()
    timed, declined, wrong = {}, {}, {}
    for backend in OPS["adamw"].backends:
        if backend == "reference":
            continue
        params, run = ours(backend)
        try:
            run()
        except dispatch.BackendError as e:
            declined[backend] = str(e)
            continue
        error = max(
            float((p - e).detach().abs().max()) for p, e in zip(params, expected, strict=True)
        )
        if error <= 1e-6:  # of numbers of about 1: some roundings
            timed[backend] = run
        else:
            wrong[backend] = f"differs from the reference by {error:.1e}"
    if not timed:
        raise AssertionError(f"nothing can be timed: {wrong} {declined}")
    count = sum(g.numel() for g in grads)
    found = interleave(
        timed | {name: limit.run for name, limit in limits.items()},
        setting.rounds(ROUNDS),
        timer=lambda run: setting.device.time(run, cold=True),
    )
    work = {"bytes": ADAMW_BYTES * count}
    recorded = as_record(limits, found)
    return {
        "op": "adamw",
        "shape": f"{count / 1e6:.1f} M parameters",
        "model": model,
        "seconds_a_call": {"step": {name: found[name] for name in timed}},
        "work": {"step": work},
        "limits": {"step": recorded},
        "declined": declined,
        "wrong": wrong,
        "told": "; ".join(
            f"{name} {1e6 * statistics.median(found[name]):.0f} us"
            f" {share(recorded, work, found[name]):.0%}"
            for name in timed
        ),
    }
