"""Forwards that others wrapped: accelerate's prepare, autocast, convert_outputs_to_fp32 ...

They hold the forward that they call in a closure or in an attribute, and name it in `__wrapped__`,
which a function need not call. Where they came after us, ours is what they hold. Where they came
before, ours takes the place of the class's.
"""

import contextlib
import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn


def find(model: nn.Module) -> Any:
    """Our forward of this model, however it is wrapped; None without one."""
    return next((f for f, _, _ in _held(model) if _is_ours(f, model)), None)


def leads_to_own(model: nn.Module) -> bool:
    """The model's forward is its class's, or calls that."""
    return any(_is_own(f, model) for f, _, _ in _held(model, called=True))


def put_inside(model: nn.Module, ours: Any) -> bool:
    """Ours in place of the class's own forward, wherever a wrapper holds that; False: nowhere."""

    def places(called: bool) -> list[tuple[Any, str]]:
        found = _held(model, called)
        return [(where, key) for f, where, key in found if where is not None and _is_own(f, model)]

    inside = bool(places(called=True))
    for where, key in places(called=False):
        setattr(where, key, ours)
    return inside


def _is_ours(forward: Any, model: nn.Module) -> bool:
    return getattr(type(forward), "accelerates", False) and forward.model is model


def _is_own(forward: Any, model: nn.Module) -> bool:
    own = type(model).forward
    return forward is own or (
        isinstance(forward, MethodType) and forward.__func__ is own and forward.__self__ is model
    )


def _held(model: nn.Module, called: bool = False) -> Iterator[tuple[Any, Any, str]]:
    """(a callable, what holds it, under which attribute) of all that the forward on the instance
    leads to, as far as the class's own and ours. `called`: not what functions only name."""
    left, seen = [(vars(model).get("forward", type(model).forward), None, "")], set()
    while left:
        found, holder, key = left.pop(0)
        if not callable(found) or isinstance(found, nn.Module | type) or len(seen) > 1000:
            continue
        yield found, holder, key
        if id(found) in seen or _is_own(found, model) or getattr(type(found), "accelerates", False):
            continue
        seen.add(id(found))
        if isinstance(found, MethodType):
            left.append((found.__func__, None, ""))
            continue
        if isinstance(found, functools.partial):
            left += [(f, None, "") for f in (found.func, *found.args)]
        for cell in getattr(found, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # it is not filled yet
                left.append((cell.cell_contents, cell, "cell_contents"))
        attributes = dict(getattr(found, "__dict__", {}))
        if called and isinstance(found, FunctionType):
            attributes.pop("__wrapped__", None)
        left += [(f, found, name) for name, f in attributes.items()]
