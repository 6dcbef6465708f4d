"""What an accelerated model was when its parts were examined, and whether it still is that.

A fused forward rests on what the modules are, not only on what it reads of them: an attention's
scale, a dropout's p, a forward that nobody has replaced. So every call compares all of it, and
torch.compile guards on the same comparison.
"""

import argparse
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from operator import getitem, itemgetter
from types import FunctionType, ModuleType, SimpleNamespace
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
# What a layer's own forward reads of its instance, beside parameters. Others may read anything.
_LAYERS = {
    nn.Linear: (),
    nn.Identity: (),
    nn.ModuleList: (),
    nn.Sequential: (),
    nn.GELU: ("approximate",),
    nn.LayerNorm: ("normalized_shape", "eps"),
    nn.Dropout: ("training", "p", "inplace"),
}


class Snapshot:
    """Every module of a model with its class, attributes, children, hooks and shapes.

    Not the parameters' values, which are read at every call. A comparison is some twenty operations
    on whole lists, in C: a ViT's hundreds of modules take 40 to 60 us.
    `written`: attributes of the model itself that its forward writes.
    """

    def __init__(self, model: nn.Module, written: Collection[str] = ()) -> None:
        self.modules = list(model.modules())
        self.number, self.verified = 0, set()  # of Guard, and under which conditions by verify
        self.own: str | None = None  # why the model's own forward runs
        self.sharded = False  # parameters may be elsewhere between forward and backward
        self.bare: frozenset[nn.Module] = frozenset()  # without hooks inside, of adapters.own
        self.types = [type(m) for m in self.modules]
        self.skipped = _ROOT | set(written)
        self.inside = [vars(m) for m in self.modules[1:]]
        read = [(m, names) for m in self.modules[1:] if (names := _read(m))]
        self.reads = [(itemgetter(*names), vars(m), m) for m, names in read]
        children = [vars(m)["_modules"] for m in self.modules]
        hooks = [d[kind] for d in self.inside for kind in HOOKS]
        self.hooked = any(hooks)
        tensors = [vars(m)[kind] for m in self.modules for kind in ("_parameters", "_buffers")]
        self.tensors = [d for d in tensors if d]
        self.tables = [m for m in self.modules if vars(m)["_parameters"] and vars(m)["_modules"]]
        own = [v for m in self.modules for k, v in vars(m).items() if k not in _MODULE]
        self.classes = list({c: vars(c) for t in self.types for c in _own_classes(t)}.values())
        self.spaces, self.words, tables = _globals(self.classes)
        live = [*children, *hooks]
        self.filled = [d for d in live if d] + _containers([*own, *tables])
        self.empty = [d for d in [*live, *tensors] if not d]
        self.copies = [d.copy() for d in self.filled]
        self.members = [dict(c) for c in self.classes]
        self.lengths, self.names = self._lengths(), list(chain.from_iterable(self.tensors))
        self.kinds, self.functions = self._kinds(), self._functions()
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
                and self._functions() == self.functions
                and list(chain.from_iterable(self.tensors)) == self.names
                and self._kinds() == self.kinds
                and self._shapes() == self.shapes
                and self._of_root() == self.root
            )
        except Exception:  # an attribute is gone, or became a tensor, whose == is no bool
            return False

    def _values(self) -> list[tuple]:
        return [read(attributes) for read, attributes, _ in self.reads]

    def _lengths(self) -> list[int]:
        return list(map(len, self.inside))

    def _kinds(self) -> list[type]:
        """Of every parameter and buffer: a Parameter, quantised, sharded, None."""
        return list(map(type, chain.from_iterable(map(dict.values, self.tensors))))

    def _shapes(self) -> list[torch.Size | None]:
        """Those of tokens and tables of positions; a layer's weights are compared by its op."""
        tensors = (t for m in self.tables for t in vars(m)["_parameters"].values())
        return [None if t is None else t.shape for t in tensors]

    def _functions(self) -> list[Any]:
        return list(map(getitem, self.spaces, self.words))

    def _of_root(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self.modules[0]).items() if k not in self.skipped}

    def changed(self) -> str:
        """Names of attributes that have another value, as far as it lies in these."""
        names = {m: f"{name}." if name else "" for name, m in self.modules[0].named_modules()}
        found = [k for k, v in self._of_root().items() if not _equal(v, self.root.get(k, ...))]
        for values, (read, attributes, module) in zip(self.values, self.reads, strict=True):
            try:
                same = read(attributes) == values
            except Exception:
                same = False
            if not same and module in names:
                found.append(f"{names[module]}*")
        return ", ".join(found[:4]) or "modules"


def state(model: nn.Module) -> dict[str, tuple[Any, int]]:
    """What a forward may write: attributes and buffers by name, each with its length or version."""
    found = {}
    for name, module in model.named_modules():
        have = {k: v for k, v in vars(module).items() if k not in _MODULE} | module._buffers
        for k, v in have.items():
            if isinstance(v, torch.Tensor):
                count = 0 if v.is_inference() else v._version
            else:
                count = len(v) if isinstance(v, Collection) else 0
            found[f"{name}.{k}" if name else k] = v, count
    return found


def written(model: nn.Module, before: dict[str, tuple[Any, int]]) -> set[str]:
    """The names of what is not as in `before`."""
    return {
        name
        for name, (value, count) in state(model).items()
        if name not in before or count != before[name][1] or not _equal(value, before[name][0])
    }


def _read(module: nn.Module) -> tuple[str, ...]:
    """The attributes that the module's own forward may read of it."""
    if type(module) in _LAYERS:
        return _LAYERS[type(module)]
    return tuple(vars(module).keys() - _MODULE | vars(module).keys() & {"training"})


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


def _globals(classes: list[Mapping]) -> tuple[list[dict], list[str], list[dict]]:
    """Where the functions and classes stand that the classes' code names, in its own module or in
    one that it names (F.gelu): (names' spaces, the names); and tables of such functions."""
    found, tables = {}, {}
    functions = [f for c in classes for f in c.values() if isinstance(f, FunctionType)]
    for function in functions:
        space, words = function.__globals__, function.__code__.co_names
        for name in words:
            value = space.get(name)
            if isinstance(value, ModuleType):
                inside = vars(value)
                more = [w for w in words if callable(inside.get(w))]
                found |= {(id(inside), w): (inside, w) for w in more}
            elif callable(value):
                found[id(space), name] = space, name
            elif isinstance(value, Mapping) and hasattr(value, "__dict__"):
                # transformers' ALL_ATTENTION_FUNCTIONS
                tables |= {id(d): d for d in [*vars(value).values(), *vars(type(value)).values()]}
    spaces, names = zip(*found.values(), strict=True) if found else ((), ())
    return list(spaces), list(names), [d for d in tables.values() if isinstance(d, dict)]


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
