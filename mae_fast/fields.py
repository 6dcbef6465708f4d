"""Fields of dataclasses held to their annotations: those of a configuration and of an index row.

An annotation is int, float, str, bool, a Literal, a tuple or a dict of these, one of these or None,
or another dataclass.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import os
import types
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from mae_fast.errors import ConfigError


def check_fields(it: Any, section: str = "") -> None:
    """Hold every field of a dataclass to its annotation, whoever made it, and however.

    Lists become the tuples they stand for, whole numbers floats, paths strings. Raises ConfigError
    with the key (`section`.field) and the value; a number that is not finite is refused.
    """
    for name, kind in _kinds(type(it)):
        value = getattr(it, name)
        # Most fields of most rows of a long index: nothing to be done.
        if type(value) is kind and (kind is int or kind is bool):
            continue
        key = f"{section}.{name}" if section else name
        object.__setattr__(it, name, typed(key, value, kind))


@functools.cache
def _kinds(cls: type) -> list[tuple[str, Any]]:
    return [(f.name, f.type) for f in dataclasses.fields(cls)]


def typed(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind` has it. Raises ConfigError that names `key`."""
    if kind is str and type(value) is str and "\0" not in value:
        return value
    if kind is float and type(value) is float and math.isfinite(value):
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin is types.UnionType:  # kind | None
        return None if value is None else typed(key, value, args[0])
    if origin is Literal:
        require(isinstance(value, str) and value in args, f"{key} must be {either(args)}", value)
        return value
    if origin is tuple:
        ok = isinstance(value, list | tuple) and len(value) == len(args)
        require(ok, f"{key} must hold {len(args)} numbers", value)
        return tuple(typed(f"{key}[{i}]", v, args[i]) for i, v in enumerate(value))
    if origin is dict:
        ok = isinstance(value, dict) and all(isinstance(x, str) for p in value.items() for x in p)
        require(ok, f"{key} must be a table of strings", value)
        return dict(value)
    if kind is float:
        return _number(key, value)
    if kind is int:
        ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        require(ok, f"{key} must be int", value)
        return int(value)
    if kind is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        require(isinstance(value, str), f"{key} must be str", value)
        require("\0" not in value, f"{key} must not hold a null character", value)
        return value
    require(type(value) is kind, f"{key} must be {kind.__name__}", value)
    return value


def _number(key: str, value: Any) -> float:
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(ok, f"{key} must be float", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    require(math.isfinite(number), f"{key} must be finite", value)
    return number


def require(ok: bool, message: str, value: Any) -> None:
    """Raise ConfigError with the message and the value, in one line, unless `ok`."""
    if not ok:
        raise ConfigError(f"{message}, got {shown(value)}")


def positive(**options: float | None) -> None:
    """Raise ConfigError for an option of a command that is given, and not a number above 0."""
    for name, value in options.items():
        good = value is None or 0 < value < math.inf
        require(good, f"--{name.replace('_', '-')} must be positive", value)


def check_seed(seed: int) -> None:
    require(0 <= seed < 2**63, "seed must be in [0, 2^63)", seed)


def shown(value: Any) -> str:
    """A value in one line of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its own __repr__ fails; an int of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def either(names: Any) -> str:
    """`a, b or c`."""
    *rest, last = map(str, names)
    return f"{', '.join(rest)} or {last}" if rest else last


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """The words that refuse `name`, with the nearest known one."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {shown(name)}{hint} (known: {', '.join(known)})"


def defaults(it: Any) -> dict[str, Any]:
    """The default of each field of a dataclass that has one, nested as the dataclass is."""
    found = {}
    for f in dataclasses.fields(it):
        value = getattr(it, f.name)
        if dataclasses.is_dataclass(value):
            found[f.name] = defaults(value)
        elif f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return found
