"""One cell of `mae-fast bench ratio`: a training step of one engine at one masking ratio.

What is measured in a process of its own stands here: peak memory and the batch that fits, the first
loss, the step's parts, and steps that load their clips. `in_own_process` starts that process, which
is `python -m mae_fast.bench.cell`.
"""

import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_fast.bench import engines
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.engines import Masking
from mae_fast.config import DataConfig, ModelConfig, load_config, preset
from mae_fast.errors import ConfigError, MaeFastError
from mae_fast.metrics import memory_mb

QUICK = "quick"
# Blocks of 128 KiB and more go back when freed; setting it stops glibc from raising the number.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
USABLE = 0.9  # of the memory that is free
WARM, TIMED = 2, 5  # steps with data


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


@functools.cache
def config_of(model: str) -> ModelConfig:
    """A model by name. ConfigError where there is none."""
    if model == QUICK:
        return preset("vit_tiny", img_size=64, depth=2, decoder_depth=2)
    return load_config(model).model if model.endswith(".toml") else preset(model)


def make_clips(cfg: ModelConfig, clips: int, setting: Setting) -> Tensor:
    """Random uint8 clips [B, C, T, H, W], the same for every engine."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (clips, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    found = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return found.to(setting.device)


def stepper(cell: Cell, built: Built, clips: Tensor, setting: Setting) -> Callable[[], Any]:
    """step() of `built` in this cell, on these clips; a mask of its own every time."""
    cfg, masking, taken = cell.cfg, cell.masking, 0
    ratio = masking.step_ratio(cfg)

    def step() -> Any:
        nonlocal taken
        noise = masking.noise(cfg, len(clips), setting.seed, taken, setting.device)
        taken += 1
        return built.step(clips, noise, ratio, masking.encode_all)

    return step


def build(cell: Cell, setting: Setting) -> Built:
    torch.manual_seed(setting.seed)
    cfg = config_of(cell.model)
    return engines.build(cell.engine, cfg, setting.device, setting.precision)


def probe(cell: Cell, setting: Setting, clips: int) -> dict[str, Any]:
    """Peak memory of two steps, the first one's loss, and the parts of the third."""
    from mae_fast.profile.trace import trace

    built = build(cell, setting)
    engines.same_weights(built)
    step = stepper(cell, built, make_clips(cell.cfg, clips, setting), setting)
    loss = float(step())
    step()
    memory = memory_mb(torch.device(setting.device))
    found = trace(built, step, setting.device, warm=1)
    return {
        "clips": clips,
        "loss": loss,
        "peak_memory_mb": memory,
        "state_mb": 16 * sum(p.numel() for p in built.model.parameters()) / 2**20,
        "step_seconds": found.unprofiled,
        "parts": found.phases(),
    }


def with_data(
    cell: Cell, setting: Setting, clips: int, folder: str, workers: int
) -> dict[str, Any]:
    """Seconds of steps whose clips are decoded, augmented and copied, and of these the wait."""
    from mae_fast.data import build_index, make_loader, read_index

    cfg, masking = cell.cfg, cell.masking
    built = build(cell, setting)
    ratio, device = masking.step_ratio(cfg), torch.device(setting.device)
    repeat = next(n for n in (4, 2, 1) if clips % n == 0)
    seconds, waits = [], []
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index.jsonl"
        build_index([folder], index, progress=False)
        rows = [row for row in read_index(index) if not row.error]
        data = DataConfig(index=str(index), repeat_aug=repeat, workers=workers)
        # Near its end the loader's workers are done, and steps would have their cores.
        steps = WARM + TIMED + 2 * (1 + workers)
        loader = make_loader(
            rows,
            data,
            num_frames=cfg.num_frames,
            batch_size=clips // repeat,
            seed=setting.seed,
            start=0,
            steps=steps,
        )
        batches = iter(loader)
        for taken in range(WARM + TIMED):
            begin = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - begin
            video = batch.to(device, non_blocking=True).video(cfg.img_size)
            noise = masking.noise(cfg, clips, setting.seed, taken, setting.device)
            built.step(video, noise, ratio, masking.encode_all)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            waits.append(waited)
        batches.close()
    return {"clips": clips, "seconds": seconds[WARM:], "waits": waits[WARM:], "repeat": repeat}


def in_own_process(what: str, cell: Cell, setting: Setting, **arguments: Any) -> dict[str, Any]:
    """The result of `probe` or `with_data`. {"memory": why} where it does not fit; ConfigError,
    with its last words, where the process fails otherwise."""
    order = {
        "what": what,
        "cell": dataclasses.asdict(cell),
        "setting": dataclasses.asdict(setting),
        "arguments": arguments,
    }
    command = [sys.executable, "-m", "mae_fast.bench.cell", json.dumps(order)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | MALLOC)
    lines = run.stdout.splitlines()
    if run.returncode == 0 and lines:
        return json.loads(lines[-1])
    if run.returncode == -9:
        return {"memory": "the system ended the process"}
    words = run.stderr.strip().splitlines()
    raise ConfigError(f"{cell.key}: {words[-1] if words else f'exit code {run.returncode}'}")


def main(order: str) -> None:
    told = json.loads(order)
    cell, setting = Cell(**told["cell"]), Setting(**told["setting"])
    if setting.device == "cpu":
        limit_memory()
    try:
        found = globals()[told["what"]](cell, setting, **told["arguments"])
    except (torch.OutOfMemoryError, MemoryError) as e:
        found = {"memory": str(e)}
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):
            raise
        found = {"memory": str(e)}
    except MaeFastError as e:
        sys.exit(str(e))
    print(json.dumps(found))


def free_mb(device: str) -> float:
    """Memory that a process may still take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def limit_memory() -> None:
    """Have an allocation fail before the system has to end processes for want of memory."""
    limit = int(USABLE * free_mb("cpu") * 2**20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1])
