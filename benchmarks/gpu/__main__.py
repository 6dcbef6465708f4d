"""`make gpu`: the stages, tables before the steps that use them, each in a process of its own.

    python -m benchmarks.gpu                       # all that is not recorded yet, in 8 minutes
    python -m benchmarks.gpu --rehearse            # the same lines on a CPU, with tiny shapes
    python -m benchmarks.gpu --stage steps --only vit_large

Records go to benchmarks/results/gpu/<device>/<date>-<commit>.jsonl, or under the folder that the
variable OUT names. A run goes on where the last one on the same sources and device stopped.
"""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu import ROOT, records
from benchmarks.gpu.setting import Setting

SKIPPED = """\
make gpu proves and times mae_fast on a CUDA device: the op tests, training steps against the
official code, each kernel against its limit, masking ratios, a profile. It needs torch with CUDA,
triton and a GPU, installs nothing, and takes 8 minutes. `make gpu-rehearsal` runs the same stages
on a CPU with tiny shapes.
skipped: no CUDA device ({})"""
KILL_AFTER = 5.0  # seconds that a stage may take beyond its time, to end its last item


@dataclass(frozen=True)
class Stage:
    """Items of a module of benchmarks/gpu/stages. `seconds`: their share of the time; what a stage
    leaves, the next ones have. `interpret`: the rehearsal runs its Triton kernels on the CPU.
    `where`: MODULE:FUNCTION, where that is not NAME:items."""

    name: str
    seconds: float
    what: str
    interpret: bool = False
    where: str = ""

    def items(self, setting: Setting) -> Iterator[records.Item]:
        module, function = (self.where or f"{self.name}:items").split(":")
        return getattr(import_module(f"benchmarks.gpu.stages.{module}"), function)(setting)


STAGES = (
    Stage("smoke", 90, "golden figures, equal bits: 20 s, then what goes on beside"),
    Stage("tune", 60, "the sizes of every kernel, and AdamW -> kernels/measured.json", True),
    Stage(
        "attention",
        25,
        "attention by every backend -> kernels/measured_backends.json",
        True,
        "kernels:items_of_attention",
    ),
    Stage("kernels", 35, "each op against its limit, torch, inductor, libraries", True),
    Stage("steps", 70, "training steps of B and L at 64 clips, against the bar"),
    Stage("profile", 20, "one step, kernel by kernel"),
    Stage("accelerate", 60, "other people's models, before and after"),
    Stage("ratios", 50, "masking ratios from 0 to 95%", where="steps:items_by_ratio"),
    Stage("rungs", 25, "training steps of the other rungs and sizes", where="steps:items_of_rungs"),
    Stage("checks", 35, "tests of the ops, CUDA graphs of them, compute-sanitizer", True),
)
# Beside the smoke, where nothing is timed: train.py, the CUDA library, and the bar's torch.compile
# into torch's cache on disk.
BESIDE = (
    Stage("train", 90, "train.py: a CUDA graph, resume, NCCL"),
    Stage("compile", 90, "the CUDA library; torch.compile of the bar, ViT-L"),
    Stage("compile_base", 90, "ViT-B's", where="compile:items_of_base"),
)
REHEARSAL_SECONDS = 900.0  # a CPU has no hurry, and must reach everything


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    names = [stage.name for stage in (*BESIDE, *STAGES)]
    parser.add_argument("--stage", choices=names, help="only this stage, in this process")
    parser.add_argument("--only", default="", help="only items whose name holds this")
    parser.add_argument("--deadline", type=float, default=math.inf, help="in seconds since 1970")
    parser.add_argument("--records", type=Path, help="the file that the stage writes")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    if not (args.rehearse or (torch.version.cuda and torch.cuda.is_available())):
        without = f"torch {torch.__version__} is built without CUDA"
        print(SKIPPED.format("torch sees none" if torch.version.cuda else without))
        return 0
    if not args.stage:
        return run_all(args.rehearse)
    setting = Setting.make(args.rehearse, args.deadline, args.records)
    (stage,) = (stage for stage in (*BESIDE, *STAGES) if stage.name == args.stage)
    items = (item for item in stage.items(setting) if args.only in item.name)
    records.work(args.stage, items, setting.records, setting.deadline)
    return 0


def run_all(rehearse: bool) -> int:
    """Every stage within its time; 1 if an item failed or a stage died."""
    began = time.time()
    found = records.open_records(rehearse)
    print(f"records: {found.path}", flush=True)
    with contextlib.ExitStack() as at_the_end:  # also where this process is interrupted

        def begin(stage: Stage) -> tuple[subprocess.Popen, Stage, float]:
            end = end_of(stage, began, rehearse)
            process = start(stage, rehearse, end, found)
            at_the_end.callback(end_session, process)
            return process, stage, end

        beside = [begin(stage) for stage in BESIDE]
        for stage in STAGES:
            left = end_of(stage, began, rehearse) - time.time()
            print(f"\n== {stage.name}: {stage.what} ({left:.0f} s)", flush=True)
            wait(*begin(stage), found)
            while beside:  # nothing else runs while something is timed
                wait(*beside.pop(0), found)
    return summary(found, time.time() - began)


def end_of(stage: Stage, began: float, rehearse: bool) -> float:
    """When a stage must end: it has the time of all stages up to it."""
    if rehearse:
        return began + REHEARSAL_SECONDS
    until = STAGES[: STAGES.index(stage) + 1] if stage in STAGES else (stage,)
    return began + sum(s.seconds for s in until)


def start(
    stage: Stage, rehearse: bool, deadline: float, found: records.Records
) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage.name]
    command += ["--deadline", str(deadline), "--records", str(found.path)]
    command += ["--rehearse"] if rehearse else []
    env = dict(os.environ)
    if rehearse and stage.interpret:
        env["TRITON_INTERPRET"] = "1"
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)


def wait(process: subprocess.Popen, stage: Stage, deadline: float, found: records.Records) -> None:
    """Until it ends, or is ended; a stage that died is a record too."""
    try:
        code = process.wait(max(0.0, deadline + KILL_AFTER - time.time()))
    except subprocess.TimeoutExpired:
        end_session(process)
        code = "killed: out of time"
    if code:
        print(f"{stage.name}: ended with {code}", flush=True)
        status = records.NOT_REACHED if isinstance(code, str) else records.FAILED
        found.add(stage.name, "the stage", status, reason=f"ended with {code}")


def end_session(process: subprocess.Popen) -> None:
    """Kill a stage and all that it started, whatever their process groups: each stage has a session
    of its own. What has ended is left."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(int(entry.name)) == process.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    process.wait()


def summary(found: records.Records, seconds: float) -> int:
    """What there is now, stage by stage: of each item its last record."""
    last = {(r["stage"], r["item"]): r for r in found.all()}
    print(f"\n{seconds:.0f} s; records in {found.path}")
    for stage in (*BESIDE, *STAGES):
        counts = Counter(r["status"] for (name, _), r in last.items() if name == stage.name)
        print(f"{stage.name:10} " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    failed = [r for r in last.values() if r["status"] == records.FAILED]
    for record in failed:
        print(f"failed: {record['stage']}: {record['item']}: {record['reason'].splitlines()[0]}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
