"""Memory over the course of a profiled step, and what held it at its peak.

torch's profiler tells of every allocation and release with its address; each is put under the phase
and op that ran when it was made. What was there before the step (weights, moments, clips) is not
in it, and torch tells of its release on a CUDA device only.
"""

from typing import Any, NamedTuple

from torch.profiler import profile as torch_profile

from mae_fast.profile.trace import Trace, Where

MB = 2**20
MOMENTS = 500  # in a timeline at most


class Timeline(NamedTuple):
    """Seconds since the step began, MB of each holder ("phase op") at each moment, and the peak."""

    seconds: list[float]
    holders: dict[str, list[float]]
    peak_mb: float
    at_peak: dict[str, float]  # MB of each holder, the largest first


def timeline(found: Trace, device: str) -> Timeline:
    """From a trace with its allocations."""
    start = found.profile.profiler.kineto_results.trace_start_ns()
    begin, end = found.root.time_range.start, found.root.time_range.end
    spans = [(e.time_range.start, e.time_range.end, where) for e, where in found.places]
    owners: dict[int, tuple[str, int]] = {}
    held: dict[str, int] = {}
    seconds, states, stack, at = [], [], [], 0
    peak, at_peak = 0, {}
    for ns, address, size in _changes(found.profile, device):
        moment = (ns - start) / 1000
        if not begin <= moment <= end:
            continue
        while at < len(spans) and spans[at][0] <= moment:
            stack.append(spans[at])
            at += 1
        while stack and stack[-1][1] < moment:
            stack.pop()
        if size > 0:
            where = stack[-1][2] if stack else Where("rest", "rest", False)
            owner = f"{where.phase} {where.op}" if where.op != "rest" else where.phase
            owners[address] = owner, size
            held[owner] = held.get(owner, 0) + size
        elif address in owners:
            owner, size = owners.pop(address)
            held[owner] -= size
        seconds.append((moment - begin) / 1e6)
        states.append(dict(held))
        total = sum(held.values())
        if total > peak:
            peak, at_peak = total, dict(held)
    names = dict.fromkeys(name for state in [at_peak, *states[-1:]] for name in state)
    kept = _thinned([sum(state.values()) for state in states])
    holders = {name: [round(states[i].get(name, 0) / MB, 3) for i in kept] for name in names}
    largest = sorted(at_peak.items(), key=lambda item: -item[1])
    return Timeline(
        [round(seconds[i], 6) for i in kept],
        holders,
        peak / MB,
        {name: size / MB for name, size in largest if size},
    )


def _thinned(totals: list[int]) -> list[int]:
    """Of many moments, in order: the fullest of each MOMENTS-th part, so that peaks stay."""
    width = -(-len(totals) // MOMENTS) or 1
    parts = (range(i, min(i + width, len(totals))) for i in range(0, len(totals), width))
    return [max(part, key=totals.__getitem__) for part in parts]


def _changes(found: torch_profile, device: str) -> list[tuple[int, int, int]]:
    """(ns, address, bytes) of each allocation, or release (bytes < 0)."""
    changes: list[tuple[int, int, int]] = []

    def visit(node: Any) -> None:
        if node.name == "[memory]":
            told = node.extra_fields
            if told.device.type == device:
                changes.append((node.start_time_ns, told.ptr, told.alloc_size))
        for child in node.children:
            visit(child)

    for root in found.profiler.kineto_results.experimental_event_tree():
        visit(root)
    return sorted(changes)
