"""What an accelerated model was when its parts were examined, and whether it still is that.

A fused forward rests on what the modules are, not only on what it reads of them: an attention's
scale, a dropout's p, a forward that nobody has replaced. So every call compares all of it, and
torch.compile guards on the same comparison.
"""

import argparse
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection
from itertools import chain
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
import torch._library.opaque_object as opaque
from torch import nn
from torch.nn.modules import module as nn_module

_Opaque = getattr(opaque, "CustomClassBase", None) or opaque.OpaqueBase  # until torch 2.13
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(nn_module, f"_global{hooks}") for hooks in HOOKS)
_ROOT = {"forward", "_original_forward", "_compiled_call_impl", "_replicate_for_data_parallel"}
_ROOT |= {"_is_hf_initialized", *HOOKS}
_TRACKERS = ("torch.utils.module_tracker", "torch.distributed._tools.mod_tracker")
_MODULE = set(vars(nn.Module()))  # what every module has
MODES = 8  # train, eval, with a hook, checkpointed ...


class Snapshot:
    """Every module of a model with its class, attributes, children, hooks and shapes.

    Not the parameters, which are read at every call. A comparison is some thirty operations on
    whole lists, in C: hundreds of modules take less time than a kernel's launch or two.
    `written`: attributes of the model itself that its forward writes.
    """

    def __init__(self, model: nn.Module, written: Collection[str] = ()) -> None:
        self.modules = list(model.modules())
        self.number, self.verified = 0, set()  # of Guard, and under which conditions by verify
        self.own: str | None = None  # why the model's own forward runs
        self.types = [type(m) for m in self.modules]
        self.skipped = _ROOT | set(written)
        inside = [vars(m) for m in self.modules[1:]]
        self.reads = [(itemgetter("training", *(d.keys() - _MODULE)), d) for d in inside]
        children = [vars(m)["_modules"] for m in self.modules]
        hooks = [d[kind] for d in inside for kind in HOOKS]
        self.hooked = any(hooks)
        self.tensors = [vars(m)[kind] for m in self.modules for kind in ("_parameters", "_buffers")]
        self.tables = [m for m in self.modules if vars(m)["_parameters"] and vars(m)["_modules"]]
        own = [v for m in self.modules for k, v in vars(m).items() if k not in _MODULE]
        live = [*children, *hooks]
        self.filled = [d for d in live if d] + _containers(own)
        self.empty = [d for d in live if not d]
        self.classes = list({c: vars(c) for t in self.types for c in _own_classes(t)}.values())
        self.copies = [d.copy() for d in self.filled]
        self.members = [dict(c) for c in self.classes]
        self.lengths, self.names = self._lengths(), list(chain.from_iterable(self.tensors))
        self.hooks_of_all = hooks_of_all()
        self.values, self.shapes, self.root = self._values(), self._shapes(), self._of_root()

    def same(self) -> bool:
        """Nothing that was copied has another value."""
        try:
            return (
                list(map(type, self.modules)) == self.types
                and self._values() == self.values
                and self._lengths() == self.lengths
                and self.filled == self.copies
                and not any(self.empty)
                and hooks_of_all() == self.hooks_of_all
                and self.classes == self.members
                and list(chain.from_iterable(self.tensors)) == self.names
                and self._shapes() == self.shapes
                and self._of_root() == self.root
            )
        except Exception:  # an attribute is gone, or became a tensor, whose == is no bool
            return False

    def _values(self) -> list[tuple]:
        return [read(attributes) for read, attributes in self.reads]

    def _lengths(self) -> list[int]:
        return [len(attributes) for _, attributes in self.reads]

    def _shapes(self) -> list[torch.Size | None]:
        """Those of tokens and tables of positions; a layer's weights are compared by its op."""
        tensors = (t for m in self.tables for t in vars(m)["_parameters"].values())
        return [None if t is None else t.shape for t in tensors]

    def _of_root(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self.modules[0]).items() if k not in self.skipped}

    def changed(self) -> str:
        """Names of attributes that have another value, as far as it lies in these."""
        names = {m: f"{name}." if name else "" for name, m in self.modules[0].named_modules()}
        found = [k for k, v in self._of_root().items() if not _equal(v, self.root.get(k, ...))]
        before = zip(self.modules[1:], self.values, self.reads, strict=True)
        for module, values, (read, attributes) in before:
            try:
                same = read(attributes) == values
            except Exception:
                same = False
            if not same and module in names:
                found.append(f"{names[module]}*")
        return ", ".join(found[:4]) or "modules"


def hooks_of_all() -> list[Callable]:
    """The hooks of every module. Not those that follow which module runs and change nothing:
    FlopCounterMode's, MemTracker's."""
    if not any(GLOBAL_HOOKS):
        return []
    return [h for hooks in GLOBAL_HOOKS for h in hooks.values() if not _only_counts(h)]


def _only_counts(hook: Callable) -> bool:
    owner = inspect.getmodule(hook)
    return owner is not None and owner.__name__ in _TRACKERS


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:
        return False


def _own_classes(kind: type) -> list[type]:
    return [c for c in kind.__mro__ if c not in (nn.Module, object)]


def _containers(values: list[Any], found: dict[int, Any] | None = None) -> list[Any]:
    """Lists, dicts and sets among the values, and the attributes of settings; and theirs."""
    found = {} if found is None else found
    for value in values:
        value = vars(value) if _is_settings(value) else value
        if type(value) is OrderedDict or not isinstance(value, dict | list | set):
            continue  # a module's own; of no matter
        if id(value) not in found and len(value) < 1000:
            found[id(value)] = value
            _containers(list(value.values() if isinstance(value, dict) else value), found)
    return list(found.values())


def _is_settings(value: Any) -> bool:
    """An object that holds values for others to read: transformers' config, a namespace."""
    kind = type(value)
    plain = isinstance(value, SimpleNamespace | argparse.Namespace) or dataclasses.is_dataclass(
        kind
    )
    return (plain or kind.__name__.lower().endswith(("config", "cfg", "args"))) and hasattr(
        value, "__dict__"
    )


class Guard(_Opaque):
    """The snapshots under which a model was examined. torch.compile guards on which of them it is,
    and where it is none examines the model as it traces it again.

    `examine` makes a snapshot, given the last; `prepare` does before a traced call what is done
    before any other, and gives the reason why the call is the model's own.
    """

    def __init__(
        self,
        examine: Callable[[Snapshot | None], Snapshot],
        prepare: Callable[[torch.dtype | None], str | None],
    ) -> None:
        self.examine, self.prepare = examine, prepare
        self.known: list[Snapshot] = []  # the latest first
        self.made = 0

    def current(self) -> Snapshot | None:
        """The snapshot that the model is like now."""
        for i, snapshot in enumerate(self.known):
            if snapshot.same():
                if i:
                    self.known.insert(0, self.known.pop(i))
                return snapshot
        return None

    def examined(self) -> Snapshot:
        """The same, made by `examine` where there is none."""
        found = self.current()
        if found is None:
            found = self.examine(self.known[0] if self.known else None)
            self.made += 1
            found.number = self.made
            self.known = [found, *self.known[: MODES - 1]]
        return found

    def traced(self, dtype: torch.dtype | None) -> str | None:
        """Called once by torch.compile, for real."""
        return self.prepare(dtype)


def _guards_on(guard: Guard) -> list[int]:
    found = guard.current()
    return [-1 if found is None else found.number]


_how = dict(guard_fn=_guards_on, members={"traced": opaque.MemberType.USE_REAL})
if hasattr(opaque, "register_custom_class"):
    opaque.register_custom_class(Guard, typ="symbolic", **_how)
else:
    opaque.register_opaque_type(Guard, typ="reference", **_how)
