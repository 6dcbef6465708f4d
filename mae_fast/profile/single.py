"""`mae-fast profile --op`: one op on the arguments of a step, every backend against its limit."""

import statistics
from typing import Any

import torch

from mae_fast.bench import machine
from mae_fast.bench.calls import Call, Run, calls, check
from mae_fast.bench.cell import Setting, config_of
from mae_fast.bench.ratio_table import text_table
from mae_fast.bench.timing import clock, interleave, share, spread
from mae_fast.environment import environment
from mae_fast.errors import BackendError, ConfigError
from mae_fast.ops import OPS

ROUNDS = 9
DIRECTIONS = ("forward", "forward_backward")
SMALL = 2  # clips on which a backend is checked in fp64 before it is timed


def profile_op(
    op: str, model: str, clips: int, mask_ratio: float, setting: Setting
) -> dict[str, Any]:
    """The document: each different call of `op` in a step of `model`, forward and backward."""
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    cfg, device = config_of(model), setting.device

    def of_step(count: int) -> list[Call]:
        return [c for c in calls(cfg, count, mask_ratio, dtype) if c.op == op]

    found = of_step(clips)
    if not found:
        known = ", ".join(dict.fromkeys(c.op for c in calls(cfg, 1, mask_ratio, dtype)))
        raise ConfigError(f"unknown op {op!r} (known: {known})")
    limits = machine.limits(model == "quick", device, dtype)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        told = [
            time_call(big.real(device), small.real(device), limits, device)
            for big, small in zip(found, of_step(min(SMALL, clips)), strict=True)
        ]
    return {
        "what": "one op by backend",
        "op": op,
        "model": model,
        "batch_clips": clips,
        "ratio": mask_ratio,
        "precision": setting.precision,
        "device": device,
        "calls": told,
        "environment": environment(),
    }


def time_call(
    call: Call, small: Call, limits: dict[str, machine.Limit], device: str
) -> dict[str, Any]:
    """Seconds of forward, and of forward with backward, by backend; a backend that declines, or
    gives something else than the reference does in fp64, has its reason instead."""
    usable, declined = {}, {}
    for name in OPS[call.op].backends:
        try:
            check(small, small.function(name))
            usable[name] = call.function(name)
            call.forward(usable[name])()
        except (BackendError, AssertionError) as e:
            usable.pop(name, None)
            declined[name] = str(e)
    forward, backward = call.work()
    work = {"forward": forward._asdict(), "forward_backward": (forward + backward)._asdict()}
    told: dict[str, Any] = {}
    for direction, run_of in zip(DIRECTIONS, (call.forward, call.both), strict=True):
        if direction != "forward" and not call.differentiable:
            continue
        runs: dict[str, Run] = {name: run_of(function) for name, function in usable.items()}
        for run in runs.values():
            run()
        timed = runs | {name: limit.run for name, limit in limits.items()}
        seconds = interleave(timed, ROUNDS, cold=device == "cpu", timer=_timer(device))
        recorded = machine.as_record(limits, seconds)
        told[direction] = {
            "seconds": {name: seconds[name] for name in usable},
            "share_of_limit": {
                name: share(recorded, work[direction], seconds[name]) for name in usable
            },
            "limits": recorded,
        }
    return {
        "shape": call.shape,
        "calls_a_step": call.count,
        "work": work,
        "declined": declined,
    } | told


def _timer(device: str):
    return clock(device) if device == "cuda" else None


def single_table(told: dict[str, Any]) -> str:
    """A table for each call, a line for each backend, and why others do not run."""
    lines = [
        f"{told['op']} in a step of {told['model']}, {told['batch_clips']} clips, "
        f"{told['ratio']:.0%} masked, {told['precision']}, {told['device']}; (spread)"
        + ("; from cold caches" if told["device"] == "cpu" else "")
    ]
    for call in told["calls"]:
        bound = "the limit"
        head, rows = ["backend"], []
        for direction in DIRECTIONS:
            head += [direction.replace("_", " + "), f"of {bound}"] if direction in call else []
        for name in call["forward"]["seconds"]:
            rows.append([name])
            for found in (call[d] for d in DIRECTIONS if d in call):
                samples, reached = found["seconds"][name], found["share_of_limit"][name]
                rows[-1].append(
                    f"{1e3 * statistics.median(samples):.2f} ms ({spread(samples):.0%})"
                )
                rows[-1].append(f"{reached:.0%}")
        lines.append(f"\n{call['shape']}, {call['calls_a_step']} a step\n{text_table(head, rows)}")
    lines += [f"{name}: {reason}" for name, reason in told["calls"][0]["declined"].items()]
    return "\n".join(lines)
