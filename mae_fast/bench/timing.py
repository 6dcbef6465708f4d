"""Times taken in turn: every round runs each function once, in an order drawn anew, so that a
machine whose speed drifts is the same for all of them; ratios are then taken round by round."""

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # more than a last-level cache holds: an H100's L2 50 MB, a B200's 126
# Busy work before a timed call, so that the host has launched all of it when the clock starts: 8 M
# cycles are about 4 ms. With 1 ms, forward and backward of small ops told what the host took.
HEAD_START_CYCLES = 8_000_000

Timer = Callable[[Callable[[], object]], float]


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, timer: Timer | None = None
) -> dict[str, list[float]]:
    """{name: seconds of its one call in each round}, by the host's clock or another. Call each once
    before: this does not warm up."""
    timer = timer or host_clock()
    times = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(timer(functions[name]))
    return times


def clock(device: str, cold: bool = False) -> Timer:
    """The timer of one call on a device. cold: other memory is touched before each call, so that
    none finds its inputs in a cache and all can be held against the bandwidth of memory."""
    flush = torch.ones(FLUSH_BYTES // 4, device=device) if cold else None
    return host_clock(flush) if device == "cpu" else event_clock(flush)


def host_clock(flush: Tensor | None = None) -> Timer:
    """By the host's clock; `flush` is read before each call."""

    def timer(function: Callable[[], object]) -> float:
        if flush is not None:
            flush.sum()
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return timer


def event_clock(flush: Tensor | None = None) -> Timer:
    """By events of the CUDA device; `flush` is written before each call, which is launched ahead of
    time, so that what the host does is not in it."""

    def timer(function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush is not None:
            flush.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    return timer


def cpu_time(function: Callable[[], object]) -> float:
    """Of this process, whose one thread does all: others on the machine do not count."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


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
