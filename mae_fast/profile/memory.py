"""Memory over the course of a profiled step, and what held it at its peak.

torch's profiler tells of every allocation and release with its address; each is put under the phase
and op that ran when it was made. What was there before the step (weights, moments, clips) is not
in it, and torch tells of its release on a CUDA device only.
"""

from typing import NamedTuple

from torch.profiler import profile as torch_profile

from mae_fast.profile.trace import REST, Trace

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
    step = found.root.time_range
    coming = list(reversed(found.places))
    owners: dict[int, tuple[str, int]] = {}
    held: dict[str, int] = {}
    seconds, states, open_places = [], [], []
    for ns, address, size in _changes(found.profile, device):
        moment = (ns - start) / 1000
        if not step.start <= moment <= step.end:
            continue
        while coming and coming[-1][0].time_range.start <= moment:
            open_places.append(coming.pop())
        while open_places and open_places[-1][0].time_range.end < moment:
            open_places.pop()
        if size > 0:
            where = open_places[-1][1] if open_places else REST
            owner = f"{where.phase} {where.op}" if where.op != "rest" else where.phase
            owners[address] = owner, size
            held[owner] = held.get(owner, 0) + size
        elif address in owners:
            owner, size = owners.pop(address)
            held[owner] -= size
        seconds.append((moment - step.start) / 1e6)
        states.append(dict(held))
    totals = [sum(state.values()) for state in states]
    kept, peak = _thinned(totals), max(totals, default=0)
    at_peak = states[totals.index(peak)] if states else {}
    names = dict.fromkeys(name for state in [at_peak, *states[-1:]] for name in state)
    return Timeline(
        [round(seconds[i], 6) for i in kept],
        {name: [round(states[i].get(name, 0) / MB, 3) for i in kept] for name in names},
        peak / MB,
        {n: x / MB for n, x in sorted(at_peak.items(), key=lambda item: -item[1]) if x},
    )


def _thinned(totals: list[int]) -> list[int]:
    """Of many moments, in order: the fullest of each MOMENTS-th part, so that peaks stay."""
    width = -(-len(totals) // MOMENTS) or 1
    parts = (range(i, min(i + width, len(totals))) for i in range(0, len(totals), width))
    return [max(part, key=totals.__getitem__) for part in parts]


def _changes(found: torch_profile, device: str) -> list[tuple[int, int, int]]:
    """(ns, address, bytes) of each allocation, or release (bytes < 0)."""
    changes, nodes = [], list(found.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == "[memory]" and node.extra_fields.device.type == device:
            told = node.extra_fields
            changes.append((node.start_time_ns, told.ptr, told.alloc_size))
    return sorted(changes)
