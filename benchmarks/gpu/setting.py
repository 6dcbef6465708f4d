"""What every stage is given: the device and its state, and the sizes to run at."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu import ROOT
from benchmarks.gpu.records import Records, open_records
from mae_fast.bench import machine
from mae_fast.bench.engines import config_of
from mae_fast.bench.machine import Limit
from mae_fast.bench.timing import Timer, clock
from mae_fast.config import ModelConfig, preset
from mae_fast.kernels import configs

T = TypeVar("T")
# 25 patches, of which 95% masking leaves one; one head of 32.
TINY = preset(
    "vit_tiny",
    img_size=40,
    patch_size=8,
    num_frames=2,
    depth=1,
    decoder_depth=2,
    embed_dim=32,
    num_heads=1,
    decoder_embed_dim=32,
)
SMI_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw")
SMI_FIELDS += ("power.limit", "temperature.gpu", "clocks_throttle_reasons.active")


def model_of(name: str) -> ModelConfig:
    """As `bench` knows it; vit_huge16 has patches of 16: 1,568 tokens as the others, not 2,048."""
    return preset("vit_huge", patch_size=16) if name == "vit_huge16" else config_of(name)


def smi() -> dict[str, str]:
    """Clocks, power and temperature as nvidia-smi tells them; {} where it is not."""
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        return {}
    except (OSError, subprocess.TimeoutExpired) as e:
        return {"nvidia-smi": str(e)}
    if run.returncode:
        return {"nvidia-smi": (run.stdout + run.stderr).strip()[:200]}
    return dict(zip(SMI_FIELDS, (x.strip() for x in run.stdout.split(",")), strict=False))


@dataclass(frozen=True)
class Setting:
    """The device of a run, "cuda", and its records; `tiny`: the rehearsal, on the "cpu", where
    every model is TINY and has few clips; the stage must end at `deadline` (of time.time)."""

    device: str
    records: Records
    tiny: bool
    deadline: float

    @classmethod
    def make(cls, rehearse: bool, deadline: float, path: Path | None = None) -> "Setting":
        if rehearse:  # Triton's interpreter does not round or multiply bf16 by itself
            sys.path.append(str(ROOT / "tests/ops"))
            import_module("interpreter")
        found = open_records(rehearse, path)
        return cls("cpu" if rehearse else "cuda", found, rehearse, deadline)

    def cfg(self, model: str) -> ModelConfig:
        return TINY if self.tiny else model_of(model)

    def batch(self, clips: int) -> int:
        return min(clips, 2) if self.tiny else clips

    def some(self, plan: Sequence[T], count: int = 1) -> Sequence[T]:
        """All of a plan; the rehearsal takes its first few, whose lines are those of the rest."""
        return plan[:count] if self.tiny else plan

    def rounds(self, count: int) -> int:
        return 2 if self.tiny else count

    @property
    def compiler(self) -> str:
        """torch.compile's backend. Inductor's C++ would take the rehearsal minutes."""
        return "aot_eager" if self.tiny else "inductor"

    def limits(self) -> dict[str, Limit]:
        """`copy`: bytes read and written; `product`: torch's bf16 matrix product."""
        found = machine.limits(self.tiny, self.device, torch.bfloat16)
        return {"copy": found["copy"], "product": found["torch_mm"]}

    def clock(self, cold: bool = False) -> Timer:
        """Of one call; cold: with the L2 cache flushed. The rehearsal's times say nothing."""
        return clock(self.device, cold and not self.tiny)

    def peak_mb(self, call: Callable[[], object]) -> float:
        """What is allocated on the device at most during a call, in MB."""
        if self.tiny:
            call()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20

    def write_table(self, name: str, found: dict[tuple[str, ...], dict]) -> None:
        """Put what was found, by its keys, into a table of kernels/, and a copy of that beside the
        records; a rehearsal's is only there, and new."""
        paths = [self.records.path.with_name(name), configs.MEASURED.with_name(name)]
        before = paths[-1].exists() and not self.tiny
        table = json.loads(paths[-1].read_text()) if before else {}
        for (*keys, last), value in found.items():
            at = table
            for key in keys:
                at = at.setdefault(key, {})
            at[last] = value
        for path in self.some(paths) if found else ():
            path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            print(f"wrote {path}", flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16)

    def inputs(self, cfg: ModelConfig, batch: int) -> tuple[Tensor, Tensor]:
        """(random uint8 clips [B, C, T, H, W], the mask's noise) on the device."""
        shape = (batch, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
        clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        return clips, torch.rand(batch, cfg.num_patches, device=self.device)
