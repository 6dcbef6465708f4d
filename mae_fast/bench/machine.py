"""What this machine can do at most: the bandwidth of a copy and the rate of fp32 products.

Whatever is held against these is measured in the same process, and round by round with them.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from mae_fast.ops.linear import linear

COPY_BYTES = 128 << 20  # of each of the two tensors: beyond any cache
SIDE = 2048  # of the matrices: large enough for the best rate, 0.1 s at 170 GFLOP/s


class Limit(NamedTuple):
    """One function to time, and the bytes it moves or the FLOP it does."""

    run: Callable[[], object]
    unit: str  # "bytes" or "flop"
    amount: int


def limits(
    quick: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Limit]:
    """`copy`: bytes read + written. `torch_mm`: torch's own sgemm, which is MKL's on most builds.
    `engine_product`: the product that mae_fast's linear layers use here, oneDNN's on AMD."""
    side, length = (256, 1 << 18) if quick else (SIDE, COPY_BYTES // 4)
    if device == "cuda" and not quick:  # milliseconds, as there
        side, length = 4 * SIDE, COPY_BYTES
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.ones(length, device=device)
    target = torch.zeros_like(source)
    found = {
        "copy": Limit(lambda: target.copy_(source), "bytes", 8 * length),
        "torch_mm": Limit(lambda: torch.mm(a, b, out=out), "flop", 2 * side**3),
        "engine_product": Limit(lambda: linear(a, b), "flop", 2 * side**3),
    }
    for limit in found.values():
        limit.run()
    return found


def as_record(found: dict[str, Limit], seconds: dict[str, list[float]]) -> dict[str, dict]:
    """{limit: {"bytes" or "flop": a call's, "seconds": samples}}, for a record."""
    return {n: {unit: amount, "seconds": seconds[n]} for n, (_, unit, amount) in found.items()}


def free_mb(device: str) -> float:
    """Memory that a process may still take; all of it, where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
