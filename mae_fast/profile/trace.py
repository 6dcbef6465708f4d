"""What torch's profiler saw of one labelled step, as rows: phase, op, forward or backward, time.

Every moment of the step belongs to one row: on a CPU the own time of each event, on a CUDA device
the kernels that it launched. A backward node is put under the phase and op of the forward event
that made it, which autograd numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from mae_fast.bench.baselines.training import Built
from mae_fast.profile.labels import labelled
from mae_fast.spans import PREFIX, span

STEP = f"{PREFIX}rest|rest"
NODE = "autograd::engine::evaluate_function: "
OPTIMIZER = "Optimizer.step#"


class Where(NamedTuple):
    """Where a moment of the step belongs."""

    phase: str
    op: str
    backward: bool


REST = Where("rest", "rest", False)


@dataclass
class Row:
    """Calls (ranges forward, autograd nodes backward), seconds, and kernels launched."""

    calls: int = 0
    seconds: float = 0.0
    launches: int = 0


class Trace(NamedTuple):
    """One profiled step: its rows, seconds of its wall clock; its events with their places, the
    outermost, and torch's own profile."""

    rows: dict[Where, Row]
    seconds: float
    places: list[tuple[FunctionEvent, Where]]
    root: FunctionEvent
    profile: torch_profile

    def phases(self) -> dict[str, float]:
        """Seconds by phase; "idle" is what no row has: of a device that waits."""
        found: dict[str, float] = {}
        for where, row in self.rows.items():
            found[where.phase] = found.get(where.phase, 0.0) + row.seconds
        found["idle"] = self.seconds - sum(found.values())
        return found


def trace(
    built: Built, step: Callable[[], object], device: str = "cpu", memory: bool = False
) -> Trace:
    """Profile one call of `step`, which is a step of `built` and has run before; `memory`: its
    allocations too, which takes time of its own."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * (device == "cuda"))]
    profiler = torch_profile(activities=activities, profile_memory=memory)
    with labelled(built.model), profiler as found, span("rest", "rest"):
        step()
        synchronize()
    events = [e for e in found.events() if e.device_type.name == "CPU"]
    root = next(e for e in events if e.name == STEP)
    places = places_of(events)
    rows = rows_of(places, root, device)
    return Trace(rows, root.cpu_time_total / 1e6, places, root, found)


def places_of(events: list[FunctionEvent]) -> list[tuple[FunctionEvent, Where]]:
    """Each event and where it belongs, by the time of its start."""
    events = sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end))
    places: dict[int, Where] = {}  # of each event, by identity
    makers: dict[int, Where] = {}  # of each autograd node, by its number
    last = REST._replace(backward=True)  # of the backward node before
    for event in events:
        where = places.get(id(event.cpu_parent), REST)
        if event.name.startswith(PREFIX):
            phase, op = event.name[len(PREFIX) :].split("|")
            where = Where(phase or where.phase, op, where.backward)
        elif event.name.startswith(OPTIMIZER):
            where = Where("optimizer", "adamw", False)
        elif event.name.startswith(NODE):
            # What adds up a parameter's gradient has no number: it belongs to the node before.
            last = where = makers.get(event.sequence_nr, last)._replace(backward=True)
        elif event.sequence_nr >= 0 and not where.backward:
            makers[event.sequence_nr] = where  # the last one before the next number is its maker
        places[id(event)] = where
    return [(event, places[id(event)]) for event in events]


def rows_of(
    places: list[tuple[FunctionEvent, Where]], root: FunctionEvent, device: str
) -> dict[Where, Row]:
    """The rows of a step whose outermost event is `root`."""
    rows: dict[Where, Row] = {}
    step = root.time_range
    for event, where in places:
        if event.time_range.start < step.start or event.time_range.end > step.end:
            continue
        row = rows.setdefault(where, Row())
        # A call of its row is a range, or a node that is more than a sum of gradients.
        node = event.name.startswith(NODE) and event.sequence_nr >= 0
        ours = event is not root and event.name.startswith((PREFIX, OPTIMIZER))
        row.calls += node or ours
        row.launches += len(event.kernels)
        if device == "cuda":
            row.seconds += sum(k.duration for k in event.kernels) / 1e6
        elif event.thread == root.thread:
            row.seconds += event.self_cpu_time_total / 1e6
    return rows
