"""accelerate: the fused forward, in the model that somebody trains already.

    model = mae_fast.accelerate(model)      # the same object, and one line in a training script

Nothing changes but `model.forward`, on that instance: same class, parameters, names, hooks on the
model itself, optimizer, DDP. The family is recognised by the names of its parts, and every part is
compared with what the fused forward computes (mae_fast/adapters); the first call also compares the
outputs of both. Nothing is ever approximated: what does not fit is refused by name.
"""

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from mae_fast import adapters
from mae_fast.adapters.parts import Finding, Pixels, Unfused
from mae_fast.errors import AccelerateError
from mae_fast.ops.dispatch import backends as forced

log = logging.getLogger("mae_fast")

# Greatest relative difference of an output between both forwards, by the parameters' dtype.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 5e-5,  # rounding differs by 1e-6 (ViT-B), GELU by tanh by 2e-4
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def accelerate(
    model: nn.Module,
    *,
    backends: Mapping[str, str] | None = None,
    strict: bool = True,
    verify: bool = True,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> nn.Module:
    """The same model, its forward fused from now on; `restore` undoes it, twice is once.

    `backends` forces backends by op, as mae_fast.backends does, for the forward. `strict=False`
    runs the model's own forward, and says so, for calls while an inner module has hooks. `verify`
    sends one clip of noise through both forwards at the first call, and at the first after modules
    were exchanged, in the parameters' dtype; not under torch.compile. With `mean` and `std`, a
    number or one a channel, uint8 clips are taken too: (x / 255 - mean) / std. Raises
    AccelerateError with the parts that do not fit (`explain` prints them all).
    """
    family, findings = _examine(model, strict)
    refused = [f for f in findings if f.why_not]
    if refused:
        raise AccelerateError(f"{_title(model, family)}\n{_table(refused)}")
    if (mean is None) != (std is None):
        raise AccelerateError("mean and std go together")
    pixels = None if mean is None else Pixels(_numbers(mean), _numbers(std))
    model.forward = Fused(model, family.FAMILY, dict(backends or {}), strict, verify, pixels)
    return model


def restore(model: nn.Module) -> nn.Module:
    """The same model with its own forward. Raises AccelerateError if another has replaced ours."""
    forward = vars(model).get("forward")
    if isinstance(forward, Fused):
        del model.forward
    elif forward is not None:
        raise AccelerateError(f"model.forward is {forward!r}, which accelerate did not set")
    return model


def explain(model: nn.Module) -> None:
    """Print what fits the fused forward, part by part, and what does not."""
    family, findings = _examine(model, strict=True)
    print(f"{_title(model, family)}\n{_table(findings)}")


class Fused:
    """The forward of an accelerated model. It can be pickled and copied with its model."""

    def __init__(
        self,
        model: nn.Module,
        family: str,
        backends: dict[str, str],
        strict: bool,
        verify: bool,
        pixels: Pixels | None,
    ) -> None:
        self.model, self.family, self.backends = model, family, backends
        self.strict, self.verify, self.pixels = strict, verify, pixels
        self.checked: list[nn.Module] = []  # the model's modules when its parts were compared
        self.said: set[str] = set()

    @property
    def __wrapped__(self) -> Callable:
        """The model's own forward: what inspect.signature reads."""
        return type(self.model).forward.__get__(self.model)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"checked": []}  # a copy is compared anew

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            try:
                return self._fused(args, kwargs)
            except Unfused:
                return self._as_before(args, kwargs)
        modules = list(self.model.modules())
        hooked = _hooked(self.model, modules)
        if hooked and self.strict:
            raise AccelerateError(f"hooks that would not be called:\n{_table(hooked)}")
        if hooked:
            return self._own(f"{hooked[0].part} has hooks", args, kwargs)
        # A forward that breaks the graph comes here too: the comparison is not for a compiler.
        if modules != self.checked and torch.compiler.disable(self._check)(args, kwargs):
            self.checked = modules
        try:
            return self._fused(args, kwargs)
        except Unfused as e:
            return self._own(str(e), args, kwargs)

    def _fused(self, args: tuple, kwargs: dict):
        if self.pixels is None and any(map(_is_uint8_clip, _tensors([args, kwargs]))):
            raise AccelerateError("uint8 clips need accelerate(model, mean=..., std=...)")
        forward = adapters.FAMILIES[self.family].forward
        with forced(**self.backends) if self.backends else contextlib.nullcontext():
            return forward(self.model, self.pixels, *args, **kwargs)

    def _own(self, reason: str, args: tuple, kwargs: dict):
        if reason not in self.said:
            self.said.add(reason)
            log.warning("%s: its own forward runs: %s", type(self.model).__name__, reason)
        return self._as_before(args, kwargs)

    def _as_before(self, args: tuple, kwargs: dict):
        args, kwargs = (_map(self._normalised, given) for given in (args, kwargs))
        return type(self.model).forward(self.model, *args, **kwargs)

    def _normalised(self, t: Tensor) -> Tensor:
        if self.pixels is None or not _is_uint8_clip(t):
            return t
        channel_dim = adapters.FAMILIES[self.family].CHANNEL_DIM
        return self.pixels.normalise(t, channel_dim, next(self.model.parameters()).dtype)

    def _check(self, args: tuple, kwargs: dict) -> bool:
        """Compare the model's parts, and both forwards on a clip like this batch's; False where
        this call is left to the model's own."""
        _, findings = _examine(self.model, self.strict)
        refused = [f for f in findings if f.why_not]
        if refused:
            raise AccelerateError(f"the model has changed:\n{_table(refused)}")
        return not self.verify or self._compare(args, kwargs)

    @torch.no_grad()
    def _compare(self, args: tuple, kwargs: dict) -> bool:
        tensors = _tensors([args, kwargs])
        param = next(self.model.parameters())
        batch = next((len(t) for t in tensors if t.dim()), 0)

        def one(t: Tensor) -> Tensor:
            t = t[:1] if t.dim() and len(t) == batch else t
            t = _noise_like(t) if t.dim() == 5 else t
            return t.to(param.dtype) if t.is_floating_point() else t

        args, kwargs = _map(one, args), _map(one, kwargs)
        outputs = []
        try:
            for forward in (self._fused, self._as_before):
                with _same_conditions(param.device):
                    outputs.append(_tensors(forward(args, kwargs)))
        except Unfused:
            return False
        ours, theirs = outputs
        worst = [_difference(a, b) for a, b in zip(ours, theirs, strict=False)]
        limit = TOLERANCE[param.dtype]
        if len(ours) != len(theirs) or not all(w <= limit for w in worst):
            raise AccelerateError(
                f"{type(self.model).__name__} has the parts of {self.family} and computes something"
                f" else: on one clip {len(theirs)} outputs and {len(ours)} of the fused forward"
                f" differ by {', '.join(f'{w:.1e}' for w in worst)} (relative, nan: another shape"
                f" or dtype; at most {limit:.0e} in {param.dtype})"
            )
        log.info("%s: on one clip both forwards agree to %.1e", self.family, max(worst, default=0))
        return True


@contextlib.contextmanager
def _same_conditions(device: torch.device) -> Iterator[None]:
    """The same random numbers inside and afterwards, no autocast, no TF32."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    devices = [] if device.type == "cpu" else [device]
    random = torch.random.fork_rng(devices, device_type=device.type)
    with random, torch.autocast(device.type, enabled=False):
        try:
            matmul.fp32_precision = conv.fp32_precision = "ieee"
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision = before


def _noise_like(clip: Tensor) -> Tensor:
    """A clip without a flat patch, whose values over their own deviation would be all rounding."""
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    noise = (noise * 64 + 128).clamp(0, 255) if clip.dtype == torch.uint8 else noise
    return noise.to(clip.device, clip.dtype)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|; NaN where shapes differ or one alone is not finite."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.nan
    same = torch.equal(ours.isfinite(), theirs.isfinite())
    ours, theirs = (t.double().nan_to_num(0, 0, 0) for t in (ours, theirs))
    difference = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    return float(difference) if same else math.nan


def _examine(model: nn.Module, strict: bool) -> tuple[ModuleType | None, list[Finding]]:
    """(the adapter of the model's family, what was found of every part)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, not a {type(model).__name__}")
    inside = [name for name, _ in model.named_children()]
    if inside in (["module"], ["_orig_mod"]):
        wrapper = type(model).__name__
        why_not = (
            f"is a {wrapper}: accelerate the model inside (.{inside[0]}), before it is wrapped"
        )
        return None, [Finding(wrapper, why_not)]
    family, findings = adapters.find(model)
    own = tuple(f.part for f in findings if f.own)
    replaced = [n for n, m in model.named_modules() if _replaced(m)]
    if not isinstance(vars(model).get("forward"), Fused | None):
        findings.append(Finding("forward", "was replaced on this instance"))
    within = [Finding(n, "has a forward of its own") for n in replaced if n]
    if strict:
        within += _hooked(model, list(model.modules()))
    return family, findings + [f for f in within if not _is_in(f.part, own)]


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    """A module's name is one of the parts, or of a module in one."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _hooked(model: nn.Module, modules: list[nn.Module]) -> list[Finding]:
    """The modules inside whose hooks a fused forward would not call. `modules` are the model's, the
    model first: names are made where there is something to name, for this runs at every call."""
    if any(getattr(nn_module, f"_global{hooks}", None) for hooks in _HOOKS):
        return [Finding("torch.nn.modules.module", "has hooks of every module")]
    hooked = [m for m in modules[1:] if _called(vars(m))]
    names = {m: name for name, m in model.named_modules()} if hooked else {}
    why_not = "has hooks (FSDP, quantisation, feature extraction ...), called by no fused forward"
    return [Finding(names[m], why_not) for m in hooked]


def _called(attributes: dict[str, Any]) -> bool:
    """Some of a module's hooks do something. Those that transformers installs when hidden states
    are first asked for, and leaves there, do nothing at other calls."""
    found = [attributes[hooks] for hooks in _HOOKS if attributes[hooks]]
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


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` of every tensor in lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {k: _map(function, v) for k, v in tree.items()}
    return type(tree)(_map(function, t) for t in tree) if type(tree) in (list, tuple) else tree


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor in lists, tuples and mappings, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [t for x in tree for t in _tensors(x)] if isinstance(tree, list | tuple) else []
