"""The device under the stages: how a call is timed on it, what it can do at most, its memory.

`Cuda` times by events, with the L2 cache flushed; `Cpu` stands in its place in the rehearsal, by
the clock. Every stage is written against this one interface.
"""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mae_fast.bench.timing import FLUSH_BYTES, event_clock, host_clock

SMI_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)


class Cpu:
    """Stands for the GPU in the rehearsal. Its times say nothing."""

    type, NAME = "cpu", "rehearsal-cpu"

    def name(self) -> str:
        return self.NAME

    def time(self, call: Callable[[], object], cold: bool = False) -> float:
        """Seconds of one call."""
        return host_clock()(call)

    def graphed(self, call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        """`call`, as one launch of a captured CUDA graph; here as it is."""
        return call

    def synchronize(self) -> None:
        pass

    def allocated_mb(self) -> float:
        return 0.0

    def peak_mb(self, call: Callable[[], object]) -> float:
        """What is allocated at most during a call, in MB."""
        call()
        return 0.0


class Cuda:
    """The first CUDA device."""

    type = "cuda"

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def time(self, call: Callable[[], object], cold: bool = False) -> float:
        """Seconds of one call on the device; cold: with its L2 cache flushed."""
        return event_clock(self.flush if cold else None)(call)

    def graphed(self, call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
        """`call`, as one launch of a captured CUDA graph, into the same outputs every time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()

        def replay() -> Sequence[Tensor]:
            graph.replay()
            return outputs

        return replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def allocated_mb(self) -> float:
        return torch.cuda.memory_allocated() / 2**20

    def peak_mb(self, call: Callable[[], object]) -> float:
        """What is allocated at most during a call, in MB."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20


def smi() -> dict[str, Any]:
    """Clocks, power and temperature as nvidia-smi tells them; {} where it is not."""
    command = shutil.which("nvidia-smi")
    if not command:
        return {}
    query = [command, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as e:
        return {"nvidia-smi": str(e)}
    if run.returncode:
        return {"nvidia-smi": (run.stdout + run.stderr).strip()[:200]}
    return dict(zip(SMI_FIELDS, (x.strip() for x in run.stdout.split(",")), strict=False))
