"""`mae-fast profile`: one warmed training step by phase and op, against the machine's limits."""

import contextlib
import json as jsonlib
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from mae_fast import memory
from mae_fast.bench import machine
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.cell import Cell, LoadedClips, Setting, build, make_clips, stepper
from mae_fast.bench.engines import OURS, QUICK, name_of, why_not, work
from mae_fast.bench.records import title
from mae_fast.bench.table import number, text_table
from mae_fast.bench.timing import clock, interleave, spread
from mae_fast.environment import environment
from mae_fast.errors import ConfigError
from mae_fast.fields import positive
from mae_fast.files import write as write_file
from mae_fast.files import writing
from mae_fast.ops.work import ADAMW_BYTES, Work
from mae_fast.profile.memory import Timeline, timeline
from mae_fast.profile.trace import Trace, Where, trace

# Of the step without a profiler, the machine's limits, and a profiled step; told of are medians.
ROUNDS = 5
PHASES = ("data", "host to device", "mask", "target encoder", "patch embedding", "encoder")
PHASES += ("decoder", "loss", "compiled", "optimizer", "rest", "idle", "unaccounted")


def profile(
    model: str = "vit_base",
    batch: int = 2,
    ratio: float = 0.9,
    strategy: str = "random",
    engine: str = "ours",
    against: str = "",
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
    with_data: str = "",
    workers: int = 2,
    out: str = "runs/profile",
    nvtx: bool = False,
    json: bool = False,
) -> Path | None:
    """Show where one training step, on random clips or with loading, spends its time and memory, by
    phase and op, forward and backward apart, and how far each is from this machine's limits. Writes
    profile.json, Chrome traces, roofline.png and memory.png. Gives the first, of which the command
    makes a page.

    Args:
        model: vit_tiny ... vit_huge, or a run's CONFIG.toml, whose [model] is taken.
        batch: clips a step.
        ratio: masked share in [0, 1); 0: the encoder sees every token.
        strategy: one of docs/masks.md: random, tube, cube ...
        engine: what is profiled, by its name in `mae-fast bench ratio`.
        against: another engine, side by side: official_eager.
        precision: fp32, or bf16 by autocast with fp32 weights.
        device: where the model runs.
        with_data: a folder of videos, an index or a pack; the step loads its clips, as in training.
        workers: processes that decode, with with_data.
        out: the folder of what is written.
        nvtx: only run five steps, their parts named for Nsight Systems and Compute (CUDA).
        json: print one JSON document, and nothing else on stdout.
    """
    positive(batch=batch)
    setting = Setting(device, precision, seed=0)
    cells = [Cell(model, strategy, ratio, name_of(e)) for e in (engine, against) if e]
    for cell in cells:
        reason = why_not(cell.engine, cell.cfg, cell.masking)
        if reason:
            raise ConfigError(f"{cell.engine}: {reason}")
    if nvtx:
        run_with_nvtx(cells[0], setting, batch)
        return None
    folder = Path(out)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    told = measure(cells, setting, batch, folder, with_data, workers)
    told["files"] = write(told, folder, device)
    if json:
        print(jsonlib.dumps(told, indent=1))
        return None
    print_tables(told)
    return folder / "profile.json"


def measure(
    cells: list[Cell], setting: Setting, clips: int, folder: Path, videos: str, workers: int
) -> dict[str, Any]:
    """The record: steps without a profiler, and with it, beside the machine's limits. On random
    clips engines and limits take turns. With loading it is one engine after the other, since two
    loaders would share the cores. Traces and snapshots go into `folder`."""
    device, timer = setting.device, clock(setting.device)
    limits = machine.limits(cells[0].model == QUICK, device, setting.dtype)
    runs = {name: limit.run for name, limit in limits.items()}
    seconds = defaultdict(list, interleave(runs, ROUNDS, timer) if videos else {})
    found: dict[str, tuple[list[Trace], Timeline]] = {}
    built = {cell.engine: build(cell, setting) for cell in cells}
    for group in [[cell] for cell in cells] if videos else [cells]:
        with contextlib.ExitStack() as stack:
            steps, ahead = {}, 0
            for cell in group:
                source = make_clips(cell.cfg, clips, setting)
                if videos:  # no batch is to be left, in a time, of those made in a pause
                    source = stack.enter_context(LoadedClips(cell, setting, clips, videos, workers))
                    ahead = source.ahead
                step = steps[cell.engine] = stepper(cell, built[cell.engine], source, setting)
                step(), step()
            traces = defaultdict(list)
            for _ in range(ROUNDS):
                for step in [*steps.values()] * ahead:
                    step()
                in_turn = steps if videos else runs | steps
                for name, samples in interleave(in_turn, 1, timer).items():
                    seconds[name] += samples
                for name, step in steps.items():
                    traces[name].append(trace(built[name], step, device))
            for name, step in steps.items():
                with snapshot(folder / f"{name}.memory.pickle", device):
                    last = trace(built[name], step, device, memory=True)
                found[name] = traces[name], timeline(last, device)
    rates = {name: x.amount / statistics.median(seconds[name]) for name, x in limits.items()}
    product = max(rates[name] for name, limit in limits.items() if limit.unit == "flop")
    engines: dict[str, dict[str, Any]] = {}
    for cell in cells:
        name, (traces, held) = cell.engine, found[cell.engine]
        traces[0].profile.export_chrome_trace(str(folder / f"{name}.trace.json"))
        todo, step = least(cell, clips, setting.dtype), statistics.median(seconds[name])
        engines[name] = {
            "profiled_seconds": statistics.median(t.seconds for t in traces),
            "parts": parts(traces, step, todo, product, rates["copy"]),
            "launches": sum(row.launches for row in traces[0].rows.values()),
            "state_mb": state_mb(built[name]),
            "memory": held._asdict(),
        }
    return {
        "kind": "profile",
        "what": "one training step by phase and op" + (", with loading" if videos else ""),
        "model": cells[0].model,
        "batch_clips": clips,
        "ratio": cells[0].ratio,
        "strategy": cells[0].strategy,
        **asdict(setting),
        "workers": workers if videos else None,
        "limits": machine.as_record(limits, seconds),
        "product_rate": product,
        "copy_rate": rates["copy"],
        "engines": engines,
        "seconds": {name: seconds[name] for name in engines},
        "environment": environment(),
    }


def least(cell: Cell, clips: int, dtype: torch.dtype) -> dict[Where, Work]:
    """What each part of a cell's step must compute and move at the least, where there are formulas
    for it: its recorded calls, put where the profile puts the time."""
    found: dict[Where, Work] = {}
    calls = work(cell.engine, cell.cfg, clips, cell.masking, dtype) or {}
    for (phase, op), (forward, backward) in calls.items():
        if not cell.engine.startswith(OURS) and op == "add_layer_norm":
            # A baseline adds elsewhere. Its norm: sum -> out; dout, sum -> dx.
            op, forward, backward = "layer_norm", forward * 0.5, backward * 0.75
        for way, done in ((False, forward), (True, backward)):
            where = Where("decoder" if phase == "head" else phase, op, way)
            found[where] = found.get(where, Work()) + done
    if found:
        parameters = memory.parameters(cell.cfg)
        found[Where("optimizer", "adamw", False)] = Work(0, ADAMW_BYTES * parameters)
    return found


def parts(
    traces: list[Trace], step: float, work: dict[Where, Work], product: float, copy: float
) -> list[dict[str, Any]]:
    """Each row of some traces, its median, beside its work. The parts add up to `step`, seconds of
    the step without a profiler: the rest is "unaccounted", the profiler's own time and noise."""
    told = []
    for where, row in traces[0].rows.items():
        seconds = statistics.median(t.rows[where].seconds for t in traces if where in t.rows)
        todo = work.get(where)
        limit = todo and todo.seconds(product, copy)
        told.append(
            {
                "phase": where.phase,
                "op": where.op,
                "direction": "backward" if where.backward else "forward",
                "calls": row.calls,
                "launches": row.launches,
                "seconds": seconds,
                "share": seconds / step,
                "flop": todo and todo.flop,
                "bytes": todo and todo.bytes,
                "limit_seconds": limit,
                "share_of_limit": limit / seconds if limit and seconds else None,
            }
        )
    idle = statistics.median(t.phases()["idle"] for t in traces)
    rest = step - idle - sum(part["seconds"] for part in told)
    for name, seconds in (("idle", idle), ("unaccounted", rest)):
        told.append(
            {"phase": name, "op": "", "direction": "", "seconds": seconds, "share": seconds / step}
        )
    return sorted(told, key=lambda part: (PHASES.index(part["phase"]), -part["seconds"]))


def state_mb(built: Built) -> float:
    """Weights and the optimizer's state, which no step gives back."""
    tensors = list(built.model.parameters())
    tensors += [t for s in built.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


@contextlib.contextmanager
def snapshot(path: Path, device: str) -> Iterator[None]:
    """A snapshot of CUDA's allocator over a step, for pytorch.org/memory_viz. Not run yet: there
    was no GPU."""
    if device != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history()
    yield
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def run_with_nvtx(cell: Cell, setting: Setting, clips: int) -> None:
    """Steps for an outer profiler, which finds the labels as NVTX ranges."""
    from mae_fast.profile.labels import labelled

    if setting.device != "cuda":
        raise ConfigError("nvtx needs --device cuda")
    built = build(cell, setting)
    step = stepper(cell, built, make_clips(cell.cfg, clips, setting), setting)
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    with labelled(built.model), torch.autograd.profiler.emit_nvtx():
        torch.cuda.cudart().cudaProfilerStart()
        step()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def write(told: dict[str, Any], folder: Path, device: str) -> list[str]:
    """profile.json and the pictures; the files' names, the traces among them."""
    from mae_fast.profile.pictures import draw

    engines = list(told["engines"])
    write_file(folder / "profile.json", jsonlib.dumps(told) + "\n")
    files = [folder / "profile.json", *(folder / f"{name}.trace.json" for name in engines)]
    files += draw(told, folder)
    if device == "cuda":
        deeper = folder / "deeper.sh"
        write_file(deeper, DEEPER.format(**told, name=engines[0]))
        files += [*(folder / f"{name}.memory.pickle" for name in engines), deeper]
    return [str(f) for f in files]


# Not run yet: there was no GPU.
DEEPER = """\
#!/bin/sh
# A timeline by phase and op, and every kernel of one op, counted.
step="mae-fast profile --model {model} --batch {batch_clips} --ratio {ratio} --engine {name} \\
  --precision {precision} --device cuda --nvtx"
nsys profile -c cudaProfilerApi -t cuda,nvtx -o step $step
ncu --profile-from-start off --set full --nvtx --nvtx-include "regex:mae_fast label.*attention/" \\
  -o attention $step
ncu --profile-from-start off --set full -k "regex:masked_mse" -o masked_mse $step
"""


def print_tables(told: dict[str, Any]) -> None:
    """The phases and ops of each engine; two engines side by side; memory."""
    first, *others = told["engines"]
    print(
        f"{title(told)}, {told['device']}; limits here: {told['product_rate'] / 1e9:.0f} GFLOP/s, "
        f"{told['copy_rate'] / 1e9:.1f} GB/s"
    )
    for name, engine in told["engines"].items():
        samples = told["seconds"][name]
        step = statistics.median(samples)
        left = engine["parts"][-1]["seconds"]
        print(
            f"\n{name}: {step:.3f} s a step without profiler (spread "
            f"{spread(samples):.0%}), {engine['profiled_seconds']:.3f} s with it; "
            f"unaccounted {left / step:+.1%}"
            + (f"; {engine['launches']} launches" if told["device"] == "cuda" else "")
        )
        print(text_table(PART_HEAD, part_rows(engine)))
        held = engine["memory"]
        top = ", ".join(f"{n} {mb:.1f}" for n, mb in list(held["at_peak"].items())[:5])
        print(
            f"memory: weights and moments {engine['state_mb']:.0f} MB, on top at the peak "
            f"{held['peak_mb']:.0f} MB: {top}"
        )
    for other in others:
        print(f"\n{first} beside {other}, milliseconds")
        print(text_table(BESIDE, _beside(told, first, other)))
    print("wrote " + ", ".join(told["files"]))


PART_HEAD = ["phase", "op", "calls", "fwd ms", "bwd ms", "share", "GFLOP", "MB", "GFLOP/s", "GB/s"]
PART_HEAD += ["of limit", "could save"]
BESIDE = ["phase", "op", "ours", "theirs", "speed-up"]


def _grouped(engine: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict]]:
    """{(phase, op): {direction: part}} in the order of the parts."""
    found: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
    for part in engine["parts"]:
        found[part["phase"], part["op"]][part["direction"]] = part
    return found


def part_rows(engine: dict[str, Any]) -> Iterator[list[str]]:
    """Of an engine of a profile, a row for each phase and op, under PART_HEAD."""
    for (phase, op), both in _grouped(engine).items():
        seconds, share, calls, flop, moved, limit = (
            sum(part.get(key) or 0 for part in both.values())
            for key in ("seconds", "share", "calls", "flop", "bytes", "limit_seconds")
        )
        forward, backward = (both.get(d, {}).get("seconds") for d in ("forward", "backward"))
        saved = max(0.0, seconds - limit) if limit and seconds else None
        yield [
            phase,
            op,
            str(calls or "-"),
            _ms(forward if op else seconds),
            _ms(backward),
            f"{share:.1%}",
            number(_over(flop, 1e9), ".1f"),
            number(_over(moved, 1e6), ".0f"),
            number(_over(flop, 1e9 * seconds), ".0f"),
            number(_over(moved, 1e9 * seconds), ".1f"),
            number(_over(limit, seconds), ".0%"),
            _ms(saved, " ms"),
        ]


def _over(amount: float, unit: float) -> float | None:
    return amount / unit if amount and unit else None


def _ms(seconds: float | None, unit: str = "") -> str:
    return number(None if seconds is None else 1e3 * seconds, ".1f", unit)


def _beside(told: dict[str, Any], first: str, other: str) -> Iterator[list[str]]:
    """Rows of the same phase and op; an empty cell where only one engine has it."""
    ours, theirs = (
        {key: sum(p["seconds"] for p in both.values()) for key, both in _grouped(e).items()}
        for e in (told["engines"][first], told["engines"][other])
    )
    total = [statistics.median(told["seconds"][name]) for name in (first, other)]
    rows = [(key, ours.get(key), theirs.get(key)) for key in dict.fromkeys([*ours, *theirs])]
    for (phase, op), a, b in [*rows, (("step", ""), *total)]:
        times = f"{b / a:.2f}x" if a and b and phase not in ("idle", "unaccounted") else "-"
        yield [phase, op, _ms(a), _ms(b), times]
