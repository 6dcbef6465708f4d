"""One cell of `mae-fast bench ratio`: a training step of one engine at one masking ratio.

What is measured in a process of its own stands here: peak memory and the batch that fits, the first
loss, and steps that load their clips. `in_own_process` starts that process, which is `python -m
mae_fast.bench.cell`.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mae_fast.bench import engines
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.engines import Masking, config_of
from mae_fast.bench.machine import free_mb
from mae_fast.bench.timing import clock
from mae_fast.config import DataConfig, ModelConfig
from mae_fast.data import Batch, make_loader
from mae_fast.data.index import read_source
from mae_fast.distributed import check_device
from mae_fast.errors import ConfigError, MaeFastError
from mae_fast.fields import check_seed
from mae_fast.metrics import memory_mb
from mae_fast.ops.source import Source
from mae_fast.spans import span, spanned

# For peak memory: blocks of 128 KiB and more go back when freed; setting it stops glibc from
# raising the number. It makes steps a third slower.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
USABLE = 0.9  # of the memory that is free
WARM, TIMED = 2, 5  # steps with data
# Steps of a loader: near its end its workers would be done, and others have their cores.
ENDLESS = 1 << 30


@dataclass(frozen=True)
class Cell:
    """What is timed: `model` is a preset's name, a TOML file, or "quick"."""

    model: str
    strategy: str
    ratio: float
    engine: str

    @property
    def key(self) -> str:
        return f"{self.model}|{self.strategy}|{self.ratio:g}|{self.engine}"

    @property
    def cfg(self) -> ModelConfig:
        return engines.model_of(self.engine, config_of(self.model))

    @property
    def masking(self) -> Masking:
        return Masking.of(self.cfg, self.ratio, self.strategy)


@dataclass(frozen=True)
class Setting:
    """What all cells of a run share."""

    device: str
    precision: str
    seed: int

    def __post_init__(self) -> None:
        check_device(self.device)
        check_seed(self.seed)

    @property
    def dtype(self) -> torch.dtype:
        """That of products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def make_clips(cfg: ModelConfig, clips: int, setting: Setting) -> Tensor:
    """Random uint8 clips [B, C, T, H, W], the same for every engine."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (clips, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    found = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cpu")
    return found.to(setting.device)


class LoadedClips(AbstractContextManager):
    """Clips [B, C, T, H, W] of videos, as training gets them: each call waits for a batch that
    `workers` processes decode, and copies it to the device; ours takes it as it is, for others the
    clips are augmented there. A context."""

    def __init__(self, cell: Cell, setting: Setting, clips: int, folder: str, workers: int) -> None:
        self.size, self.device = cell.cfg.img_size, torch.device(setting.device)
        self.whole = not cell.engine.startswith(engines.OURS)
        self.repeat = next(n for n in (4, 2, 1) if clips % n == 0)  # of one video, as in training
        self.ahead = 2 * workers  # batches that torch's loader has ready at most
        self.waited = 0.0  # seconds of the last call
        data = DataConfig(index=folder, repeat_aug=self.repeat, workers=workers)
        how = dict(num_frames=cell.cfg.num_frames, batch_size=clips // self.repeat)
        loader = make_loader(read_source(folder), data, **how, seed=setting.seed, steps=ENDLESS)
        self.batches = iter(loader)

    def __exit__(self, *exc: object) -> None:
        self.batches.close()

    @spanned("data", "wait")
    def next_batch(self) -> Batch:
        return next(self.batches)

    def __call__(self) -> Tensor | Source:
        begin = time.perf_counter()
        batch = self.next_batch()
        self.waited = time.perf_counter() - begin
        with span("host to device", "copy"):
            batch = batch.to(self.device, non_blocking=True)
        if not self.whole:
            return batch.source(self.size)
        with span("data", "crop_resize"):
            return batch.video(self.size)


def stepper(
    cell: Cell, built: Built, clips: Tensor | Callable[[], Tensor | Source], setting: Setting
) -> Callable[[], Any]:
    """step() of `built` in this cell, on these clips, or on what `clips()` gives each time; a mask
    of its own every time."""
    cfg, masking, taken = cell.cfg, cell.masking, 0
    ratio = masking.step_ratio(cfg)

    def step() -> Any:
        nonlocal taken
        video = clips() if callable(clips) else clips
        noise = masking.noise(cfg, len(video), setting.seed, taken, setting.device)
        taken += 1
        return built.step(video, noise, ratio, masking.encode_all)

    return step


def build(cell: Cell, setting: Setting) -> Built:
    torch.manual_seed(setting.seed)
    cfg = config_of(cell.model)
    return engines.build(cell.engine, cfg, setting.device, setting.precision)


def probe(cell: Cell, setting: Setting, clips: int) -> dict[str, Any]:
    """Peak memory of two steps, the first one's loss, and the second one's seconds."""
    built = build(cell, setting)
    engines.same_weights(built)
    step = stepper(cell, built, make_clips(cell.cfg, clips, setting), setting)
    loss = float(step())
    seconds = clock(setting.device)(step)
    return {
        "clips": clips,
        "loss": loss,
        "peak_memory_mb": memory_mb(torch.device(setting.device)),
        "state_mb": 16 * sum(p.numel() for p in built.model.parameters()) / 2**20,
        "step_seconds": seconds,
    }


def with_data(
    cell: Cell, setting: Setting, clips: int, folder: str, workers: int
) -> dict[str, Any]:
    """Seconds of steps whose clips are decoded, augmented and copied, and of these the wait."""
    built, timer, found = build(cell, setting), clock(setting.device), []
    with LoadedClips(cell, setting, clips, folder, workers) as source:
        step = stepper(cell, built, source, setting)
        for _ in range(WARM + TIMED):
            found.append((timer(step), source.waited))
    seconds, waits = zip(*found[WARM:], strict=True)
    return {"clips": clips, "seconds": seconds, "waits": waits, "repeat": source.repeat}


def in_own_process(what: str, cell: Cell, setting: Setting, **arguments: Any) -> dict[str, Any]:
    """The result of `probe` or `with_data`. {"memory": why} where it does not fit; ConfigError,
    with its last words, where the process fails otherwise."""
    order = json.dumps([what, asdict(cell), asdict(setting), arguments])
    command = [sys.executable, "-m", "mae_fast.bench.cell", order]
    env = os.environ | (MALLOC if what == "probe" else {})
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = run.stdout.splitlines()
    if run.returncode == 0 and lines:
        return json.loads(lines[-1])
    if run.returncode == -9:
        return {"memory": "the system ended the process"}
    words = run.stderr.strip().splitlines()
    raise ConfigError(f"{cell.key}: {words[-1] if words else f'exit code {run.returncode}'}")


def main(order: str) -> None:
    what, cell, setting, arguments = json.loads(order)
    if setting["device"] == "cpu":
        limit_memory()
    try:
        measure = {"probe": probe, "with_data": with_data}[what]
        found = measure(Cell(**cell), Setting(**setting), **arguments)
    except (torch.OutOfMemoryError, MemoryError) as e:
        found = {"memory": str(e)}
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):
            raise
        found = {"memory": str(e)}
    except MaeFastError as e:
        sys.exit(str(e))
    print(json.dumps(found))


def limit_memory() -> None:
    """Have an allocation fail before the system has to end processes for want of memory."""
    limit = int(USABLE * free_mb("cpu") * 2**20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1])
