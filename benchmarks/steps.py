"""What benchmarks of whole training steps share: steps in turn, and peak memory of processes of
their own, whose malloc gives back what is freed: glibc's own way leaves the heap in pieces, and the
peak is then up to half as much again, by chance."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mae_fast.bench.baselines.training import Built
from mae_fast.bench.cell import MALLOC
from mae_fast.bench.timing import interleave
from mae_fast.metrics import memory_mb

ROOT = Path(__file__).resolve().parent.parent


def time_rounds(
    built: dict[str, Built],
    inputs: Callable[[], tuple],
    rounds: int,
    others: dict[str, Callable[[], object]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """({engine or other: seconds of each round}, {engine: seconds until its optimizer began}).
    `inputs()` gives the arguments of each step; `others` run among the engines."""
    until_update: dict[str, list[float]] = {name: [] for name in built}
    began_update = [0.0]

    def timed(name: str, engine: Built) -> Callable[[], None]:
        def step() -> None:
            given = inputs()
            begin = time.perf_counter()
            engine.step(*given)
            until_update[name].append(began_update[0] - begin)

        return step

    for engine in built.values():
        engine.optimizer.register_step_pre_hook(
            lambda *_: began_update.__setitem__(0, time.perf_counter())
        )
    functions = dict(others or {}) | {name: timed(name, e) for name, e in built.items()}
    return interleave(functions, rounds), until_update


def peak_memory(built: Built, *inputs: Any) -> float:
    """Peak resident memory in MB of this process after two steps."""
    for _ in range(2):
        built.step(*inputs)
    return memory_mb(torch.device("cpu"))


def measure_memory(module: str, arguments: list[str]) -> float:
    """What `python -m module arguments` prints last: the peak of that process."""
    command, env = [sys.executable, "-m", module, *arguments], os.environ | MALLOC
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    return float(run.stdout.splitlines()[-1])
