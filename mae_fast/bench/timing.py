"""Times taken in turn: every round runs each function once, in an order drawn anew, so that a
machine whose speed drifts is the same for all of them; ratios are then taken round by round."""

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

FLUSH_BYTES = 256 << 20  # more than a last-level cache holds


def interleave(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    cold: bool = False,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """{name: seconds of its one call in each round}. Call each once before: this does not warm up.

    cold: other memory is read before each call, so that none finds its inputs in a cache and all
    can be held against the bandwidth of memory. timer(function) -> seconds: another clock than the
    host's, that of benchmarks/gpu/device.py.
    """
    timer = timer or host_clock(cold)
    times = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(timer(functions[name]))
    return times


def host_clock(cold: bool = False) -> Callable[[Callable[[], object]], float]:
    """A timer of one call on the host, from cold caches if asked."""
    flush = torch.ones(FLUSH_BYTES // 4, device="cpu") if cold else None

    def timer(function: Callable[[], object]) -> float:
        if cold:
            flush.sum()
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return timer


def event_clock() -> Callable[[Callable[[], object]], float]:
    """A timer of one call on the CUDA device, by events."""

    def timer(function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    return timer


def clock(device: str) -> Callable[[Callable[[], object]], float]:
    """The timer of a device."""
    return event_clock() if device == "cuda" else host_clock()


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of a's time over b's in the same round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def spread(samples: Sequence[float]) -> float:
    """(slowest - fastest) / median."""
    return (max(samples) - min(samples)) / statistics.median(samples)


def share(limits: dict, work: dict, seconds: Sequence[float], product: str = "") -> float:
    """What `work` needs at the least of what it took: of its "flop" at the rate of `product` (by
    default the fastest), or of its "bytes" at that of a copy, whichever is more; the median over
    rounds. `limits` were timed in the same ones, as mae_fast.bench.machine.as_record has them."""
    products = [product] if product else [name for name in limits if "flop" in limits[name]]

    def of(unit: str, name: str) -> float:
        return work[unit] / limits[name][unit] * ratio(limits[name]["seconds"], seconds)

    flop = min((of("flop", name) for name in products), default=0.0) if work.get("flop") else 0.0
    return max(flop, of("bytes", "copy") if work.get("bytes") else 0.0)
