"""Names of what a step does: its phases, and in each the ops. A profiler finds them as ranges of
torch.profiler.record_function, `recording` gets every call of an op; nobody else pays for them.

A span without a phase is in the one around it; one without an op is the rest of its phase.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import profiler

P, R = ParamSpec("P"), TypeVar("R")
PREFIX = "mae_fast label:"  # of a range's name: PREFIX phase|op
# recorder(phase, op, args) -> what the op's function would give.
Recorder = Callable[[str, str, tuple], object]
_recorders: list[Recorder] = []
_phases = ["rest"]  # that are open, while something records


def _watched() -> bool:
    return bool(_recorders) or profiler._is_profiler_enabled


_watched._dynamo_marked_constant = True  # torch.compile is not to guard on it


def spanned(phase: str = "", op: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose calls are named."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _watched() or torch.compiler.is_compiling():
                return function(*args, **kwargs)
            if _recorders and op:
                return _recorders[-1](phase or _phases[-1], op, args)
            with span(phase, op):
                return function(*args, **kwargs)

        return run

    return decorate


@contextlib.contextmanager
def span(phase: str = "", op: str = "") -> Iterator[None]:
    """What is called inside is named."""
    if not _watched():
        yield
        return
    if _recorders:
        _phases.append(phase or _phases[-1])
    try:
        with profiler.record_function(f"{PREFIX}{phase}|{op or 'rest'}"):
            yield
    finally:
        if _recorders:
            _phases.pop()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, `recorder` gets every call of an op, and stands in its place."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()
