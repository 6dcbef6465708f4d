"""accelerate: the fused forward, in the model that somebody trains already.

    model = mae_fast.accelerate(model)      # the same object, and one line in a training script

Nothing changes but `model.forward`, on that instance: same class, parameters, names, hooks on the
model itself, optimizer, DDP. The family is recognised by the names of its parts, and every part is
compared with what the fused forward computes (mae_fast/adapters); the first call also compares the
outputs of both. Nothing is ever approximated: what does not fit is refused by name.
"""

import contextlib
import copy
import inspect
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from mae_fast import adapters, wrapped
from mae_fast.adapters.own import WRAPPED, is_bare, known_bare
from mae_fast.adapters.parts import Finding, Pixels, Unfused
from mae_fast.comparison import agree, map_tensors, tensors_of
from mae_fast.errors import AccelerateError
from mae_fast.guard import HOOKS, MODES, Guard, Snapshot, hooks_of_all
from mae_fast.ops.dispatch import autocast_dtype
from mae_fast.ops.dispatch import backends as forced
from mae_fast.remade import keeping
from mae_fast.replays import Replays, replaying

log = logging.getLogger("mae_fast")
_ONE_THREAD = threading.RLock()


def accelerate(
    model: nn.Module,
    *,
    backends: Mapping[str, str] | None = None,
    strict: bool = True,
    verify: bool = True,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    keep: bool = False,
    cuda_graph: bool = True,
) -> nn.Module:
    """The same model, its forward fused from now on; `restore` undoes it, twice is once.

    `backends` forces backends by op, as mae_fast.backends does, for the forward. `strict=False`
    runs the model's own forward, and says so, for calls while an inner module has hooks. `verify`
    sends one clip of noise through both forwards at the first call, and at the first after modules
    were exchanged, in the parameters' dtype; not under torch.compile. With `mean` and `std`, a
    number or one a channel, uint8 clips are taken too: (x / 255 - mean) / std. `keep` keeps
    for backward the norms and activations that are else made again there: faster on a GPU, of more
    memory (what the rest of a program needs of it, only its author knows). On a GPU, from the
    fourth call of one shape on, forward and backward are each a CUDA graph (mae_fast/replays.py),
    but with `cuda_graph=False`. Raises AccelerateError with the parts that do not fit (`explain`
    prints them all).
    """
    family, findings = _examine(model, strict)
    refused = [f for f in findings if f.why_not]
    if refused:
        raise AccelerateError(f"{_title(model, family)}\n{_table(refused)}")
    if (mean is None) != (std is None):
        raise AccelerateError("mean and std go together")
    pixels = None if mean is None else Pixels(_numbers(mean), _numbers(std))
    how = strict, verify, pixels, keep, cuda_graph
    fused = Fused(model, family.FAMILY, dict(backends or {}), *how)
    fused.guard.examined()
    known = wrapped.find(model)
    if known is not None:  # twice is once, inside of whatever was wrapped around it since
        known.__setstate__(vars(fused))
        fused = known
    elif not wrapped.put_inside(model, fused):
        model.forward = fused
    model._replicate_for_data_parallel = fused.replicate
    return model


def restore(model: nn.Module) -> nn.Module:
    """The same model with its own forward, inside of whatever was wrapped around it.

    Raises AccelerateError if another has replaced ours.
    """
    forward, fused = vars(model).get("forward"), wrapped.find(model)
    if fused is None:
        if forward is not None:
            raise AccelerateError(f"model.forward is {forward!r}, which accelerate did not set")
        return model
    fused.on, fused.replays = False, None
    if fused in (forward, getattr(forward, "__func__", None)):
        del model.forward
    vars(model).pop("_replicate_for_data_parallel", None)
    return model


def explain(model: nn.Module) -> None:
    """Print what fits the fused forward, part by part, and what does not."""
    family, findings = _examine(model, strict=True)
    print(f"{_title(model, family)}\n{_table(findings)}")


class Fused:
    """The forward of an accelerated model. It can be pickled and copied with its model."""

    accelerates = True  # what mae_fast.wrapped looks for

    def __init__(
        self,
        model: nn.Module,
        family: str,
        backends: dict[str, str],
        strict: bool,
        verify: bool,
        pixels: Pixels | None,
        keep: bool,
        cuda_graph: bool,
    ) -> None:
        self.model, self.family, self.backends = model, family, backends
        self.strict, self.verify, self.pixels, self.keep = strict, verify, pixels, keep
        self.cuda_graph = cuda_graph
        self.on = True
        self.said: set[str] = set()
        self.replica_of: nn.Module | None = None
        self._begin()

    def _begin(self) -> None:
        """What a copy has of its own."""
        self.guard = Guard(self._examine, self._prepare)  # compared anew
        self.replays = Replays(self.model) if self.cuda_graph else None

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).forward.__get__(self.model))

    @property
    def __code__(self) -> CodeType:
        """Where it stands in the source, which torch.export reads."""
        return type(self).__call__.__code__

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("guard", "replays")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"keep": False, "cuda_graph": True} | state)  # which older pickles lack
        self._begin()

    def __call__(self, *args, **kwargs):
        if args and isinstance(args[0], nn.Module):  # others hold it as a function of the model
            model, args = args[0], args[1:]
            if model is not self.model:
                return self._of_a_copy(model, args, kwargs)
        if not self.on:
            return type(self.model).forward(self.model, *args, **kwargs)
        if not torch.compiler.is_compiling() and (why := _transformed()):
            return self._own(why, args, kwargs)
        if torch.compiler.is_compiling():
            clip = next((t for t in tensors_of([args, kwargs]) if t.dim() == 5), None)
            own = self.guard.traced(None if clip is None else clip.dtype)
        else:
            own = self._prepared(args, kwargs)
        if own is None:
            try:
                return self._fused(args, kwargs, graphs=True)
            except Unfused as e:
                own = e  # not its words: torch.compile cannot ask for them before torch 2.13
        if torch.compiler.is_compiling():
            return self._as_before(args, kwargs)
        return self._own(str(own), args, kwargs)

    def replicate(self) -> nn.Module:
        """In place of the model's _replicate_for_data_parallel: nn.DataParallel's copy for one
        device, whose forward reads the copy's parameters."""
        model = self.model
        if vars(model).get("forward") is not self:
            raise AccelerateError("nn.DataParallel after another has wrapped the model's forward")
        self._prepare(None)
        replica = type(model)._replicate_for_data_parallel(model)
        del replica._replicate_for_data_parallel
        replica.forward = copy.copy(self)
        replica.forward.model, replica.forward.replica_of = replica, model
        return replica

    def _of_a_copy(self, model: nn.Module, args: tuple, kwargs: dict):
        if "copy" not in self.said:
            self.said.add("copy")
            log.warning("%s: a copy of it runs its own forward", type(model).__name__)
        return type(model).forward(model, *args, **kwargs)

    @torch.compiler.disable  # a forward that breaks the graph comes here while it is compiled
    def _prepared(self, args: tuple, kwargs: dict) -> str | None:
        """Why the model's own forward runs (None: the fused one). Raises AccelerateError where the
        model is not what it was, and no fused forward stands for what it is."""
        if self.replica_of is not None:
            return None
        with _ONE_THREAD:  # a comparison has others in the parameters' places
            snapshot = self.guard.examined()
            conditions = self._conditions(_dtype_of_clip(args, kwargs))
            if snapshot.own is None and self.verify and conditions not in snapshot.verified:
                if self._compare(args, kwargs, snapshot):
                    snapshot.verified |= {conditions, (*conditions[:-1], False)}
            return snapshot.own

    def _prepare(self, dtype: torch.dtype | None) -> str | None:
        """The same with a clip of noise, where there is no other."""
        adapter, param = adapters.FAMILIES[self.family], next(self.model.parameters())
        if isinstance(param, FakeTensor):  # torch.export's, without numbers
            with _disable_current_modes():
                return self.guard.examined().own
        if not hasattr(adapter, "sample"):
            raise AccelerateError(f"the adapter of {self.family} has no sample() to compare")
        clip = adapter.sample(self.model, dtype or param.dtype)
        return self._prepared(clip, {})

    def _conditions(self, clip: torch.dtype | None) -> tuple:
        """What else a comparison rests on; at the end whether gradients were compared."""
        param = next(self.model.parameters())
        grad = torch.is_grad_enabled()
        return param.dtype, clip, autocast_dtype(param.device.type), torch.get_default_dtype(), grad

    def _examine(self, last: Snapshot | None) -> Snapshot:
        """The model's parts, compared."""
        if last is not None and self.guard.made % MODES == 0:
            log.warning(
                "%s is examined anew at every call, for it changes: %s",
                type(self.model).__name__,
                last.changed(),
            )
        _, findings = _examine(self.model, self.strict)
        refused = [f for f in findings if f.why_not]
        if refused:
            raise AccelerateError(f"the model has changed:\n{_table(refused)}")
        written = getattr(adapters.FAMILIES[self.family], "WRITTEN", ())
        snapshot = Snapshot(self.model, written)
        snapshot.bare = frozenset(filter(is_bare, snapshot.modules))
        snapshot.sharded = snapshot.hooked or _has_views(self.model)
        own = tuple(f.part for f in findings if f.own)
        hooked = [f for f in _hooked(self.model) if not _is_in(f.part, own)]
        if hooked:  # strict=False
            snapshot.own = f"{hooked[0].part} has hooks"
        return snapshot

    def _fused(self, args: tuple, kwargs: dict, graphs: bool = False):
        if self.pixels is None and any(map(_is_uint8_clip, tensors_of([args, kwargs]))):
            raise AccelerateError("uint8 clips need accelerate(model, mean=..., std=...)")
        forward = adapters.FAMILIES[self.family].forward
        backends = forced(**self.backends) if self.backends else contextlib.nullcontext()
        with backends, keeping(self.keep):
            if torch.compiler.is_compiling() or not self.guard.known:  # traced; a replica
                return forward(self.model, self.pixels, *args, **kwargs)
            replays = self.replays if graphs and self._is_whole() else None
            with known_bare(self.guard.known[0].bare), replaying(replays):
                return forward(self.model, self.pixels, *args, **kwargs)

    def _is_whole(self) -> bool:
        """Its parameters stay where they are from forward to backward: no hook gathers them."""
        snapshot = self.guard.known[0]
        return not snapshot.sharded and not any(vars(self.model)[kind] for kind in HOOKS)

    def _own(self, reason: str, args: tuple, kwargs: dict):
        if reason not in self.said:
            self.said.add(reason)
            log.warning("%s: its own forward runs: %s", type(self.model).__name__, reason)
        return self._as_before(args, kwargs)

    def _as_before(self, args: tuple, kwargs: dict):
        args, kwargs = (map_tensors(self._normalised, given) for given in (args, kwargs))
        return type(self.model).forward(self.model, *args, **kwargs)

    def _normalised(self, t: Tensor) -> Tensor:
        if self.pixels is None or not _is_uint8_clip(t):
            return t
        channel_dim = adapters.FAMILIES[self.family].CHANNEL_DIM
        return self.pixels.normalise(t, channel_dim, next(self.model.parameters()).dtype)

    def _compare(self, args: tuple, kwargs: dict, snapshot: Snapshot) -> bool:
        # Hooks inside may be of sharding, and gather and reduce the gradients of a backward.
        gradients = torch.is_grad_enabled() and not (snapshot.hooked or _has_views(self.model))
        forwards = self._fused, self._as_before
        return agree(self.model, self.family, forwards, args, kwargs, gradients)


def _transformed() -> str | None:
    """What the operators of the fused forward have no rule for (None: nothing)."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func (grad, jvp, vmap ...) calls it"
    if torch.jit.is_tracing():
        return "torch.jit.trace records it"
    return "forward-mode AD is on" if forward_ad._current_level >= 0 else None


def _dtype_of_clip(args: tuple, kwargs: dict) -> torch.dtype | None:
    return next((t.dtype for t in tensors_of([args, kwargs]) if t.dim() == 5), None)


def _has_views(model: nn.Module) -> bool:
    """Some weights are no parameters: views, as of FSDP 1's, whose gradients go elsewhere."""
    values = (v for m in model.modules() for v in vars(m).values())
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _examine(model: nn.Module, strict: bool) -> tuple[ModuleType | None, list[Finding]]:
    """(the adapter of the model's family, what was found of every part)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, not a {type(model).__name__}")
    inside = [name for name, _ in model.named_children()]
    if len(inside) == 1 and inside[0] in ("module", *WRAPPED):
        wrapper = type(model).__name__
        why_not = (
            f"is a {wrapper}: accelerate the model inside (.{inside[0]}), before it is wrapped"
        )
        return None, [Finding(wrapper, why_not)]
    family, findings = adapters.find(model)
    own = tuple(f.part for f in findings if f.own)
    replaced = [n for n, m in model.named_modules() if _replaced(m)]
    if wrapped.find(model) is None and not wrapped.leads_to_own(model):
        findings.append(Finding("forward", "was replaced on this instance"))
    within = [Finding(n, "has a forward of its own") for n in replaced if n]
    if strict:
        within += _hooked(model)
    return family, findings + [f for f in within if not _is_in(f.part, own)]


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    """A module's name is one of the parts, or of a module in one."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _hooked(model: nn.Module) -> list[Finding]:
    """The modules inside whose hooks a fused forward would not call."""
    if hooks_of_all():
        return [Finding("torch.nn.modules.module", "has hooks of every module: see strict=False")]
    why_not = "has hooks (FSDP, a summary ...), called by no fused forward: see strict=False"
    return [Finding(n, why_not) for n, m in model.named_modules() if n and _called(vars(m))]


def _called(attributes: dict[str, Any]) -> bool:
    """Some of a module's hooks do something. Those that transformers installs when hidden states
    are first asked for, and leaves there, do nothing at other calls."""
    found = [attributes[hooks] for hooks in HOOKS if attributes[hooks]]
    names = (getattr(h, "__name__", "") for hooks in found for h in hooks.values())
    return bool(found) and any(name != "output_capturing_hook" for name in names)


def _replaced(module: nn.Module) -> bool:
    """The instance has a forward that is not its class's (which transformers 4 puts back there)."""
    forward = vars(module).get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not own


def _title(model: nn.Module, family: ModuleType | None) -> str:
    kind = type(model).__name__
    return f"{kind}: {family.FAMILY} ({family.SOURCE})" if family else f"{kind}: of no known family"


def _table(findings: list[Finding]) -> str:
    """A line a part; blocks that fit are one line."""
    rows: list[list[str]] = []
    for part, why_not, own in findings:
        stem = re.sub(r"\.\d+$", "", part)
        if rows and not why_not and not own and stem != part and rows[-1][2] == stem:
            rows[-1][1] = f" to {part.removeprefix(stem + '.')}"
        else:
            how = "does not fit" if why_not else "runs itself" if own else "fits"
            rows.append([f"  {how:14}{part}", "", stem])
            rows[-1][1] = f": {why_not or own}" if why_not or own else ""
            rows[-1][2] = stem if not why_not and not own else ""
    return "\n".join(text + more for text, more, _ in rows)


def _is_uint8_clip(t: Tensor) -> bool:
    return t.dtype == torch.uint8 and t.dim() == 5


def _numbers(value: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)
