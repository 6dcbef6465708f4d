"""Whether two forwards of one model agree: on one clip, their outputs, the gradients of these, and
what they write. accelerate compares a model's own with the fused one before it stands for it."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mae_fast import adapters
from mae_fast.adapters.parts import Unfused, noise_like
from mae_fast.errors import AccelerateError
from mae_fast.guard import state, written
from mae_fast.ops.dispatch import autocast_dtype

log = logging.getLogger("mae_fast")
Forward = Callable[[tuple, dict], Any]  # of the arguments and keywords of a model's

# Greatest relative difference of an output between both forwards, by the parameters' dtype.
TOLERANCE = {
    # Some round to fp32 on their way: transformers 4's softmax (1e-7), constants of pixels (1e-7).
    torch.float64: 2e-6,
    torch.float32: 5e-5,  # rounding differs by 1e-6 (ViT-B), GELU by tanh by 2e-4
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def agree(
    model: nn.Module,
    family: str,
    forwards: tuple[Forward, Forward],
    args: tuple,
    kwargs: dict,
    gradients: bool,
) -> bool:
    """True where the fused forward and the model's own do, on a clip like this batch's, as the
    model is run now; False where this call is left to the model's own. AccelerateError where they
    do not. `gradients`: whether these are compared, too."""
    batch = next((len(t) for t in tensors_of([args, kwargs]) if t.dim()), 0)

    def one(t: Tensor) -> Tensor:
        t = t[:1] if t.dim() and len(t) == batch else t
        return noise_like(t) if t.dim() == 5 else t

    args, kwargs = map_tensors(one, args), map_tensors(one, kwargs)
    try:
        with torch.set_grad_enabled(gradients), _disable_current_modes():
            ours, theirs = (_results(model, family, f, args, kwargs) for f in forwards)
    except Unfused:
        return False
    if not all(t.isfinite().all() for t in theirs[0]):
        return False  # nothing can be compared; at the next call, perhaps
    dtype = _coarsest(next(model.parameters()))
    limit = TOLERANCE[dtype]
    worst = [_difference(a, b) for a, b in zip(ours[0], theirs[0], strict=False)]
    title = f"{type(model).__name__} has the parts of {family} and computes something"
    if len(ours[0]) != len(theirs[0]) or not all(w <= limit for w in worst):
        raise AccelerateError(
            f"{title} else: on one clip {len(theirs[0])} outputs and {len(ours[0])} of the"
            f" fused forward differ by {', '.join(f'{w:.1e}' for w in worst)} (relative, nan:"
            f" another shape or dtype; at most {limit:.0e} in {dtype})"
        )
    wrong = _gradients_differ(ours[1], theirs[1], 10 * limit)
    if wrong and not _agree_in_double(model, family, forwards, args, kwargs):
        raise AccelerateError(f"{title} else: on one clip the gradient of {wrong}")
    if missed := sorted(theirs[2] - ours[2]):
        raise AccelerateError(f"{title} else: its own forward writes {', '.join(missed)}")
    log.info("%s: on one clip both forwards agree to %.1e", family, max(worst, default=0))
    return True


def _agree_in_double(
    model: nn.Module, family: str, forwards: tuple[Forward, Forward], args: tuple, kwargs: dict
) -> bool:
    """Whether rounding alone has kept gradients of fp32 apart: the sum of a token's over all of
    its places may lose three digits in either forward. False where a forward has no fp64."""
    device = next(model.parameters()).device
    args, kwargs = map_tensors(_wide, args), map_tensors(_wide, kwargs)
    try:
        with torch.autocast(device.type, enabled=False), _disable_current_modes():
            ours, theirs = (_results(model, family, f, args, kwargs, _wide)[1] for f in forwards)
    except Exception:  # whatever another's code does not take
        return False
    return _gradients_differ(ours, theirs, 10 * TOLERANCE[torch.float64]) is None


def _results(
    model: nn.Module,
    family: str,
    forward: Forward,
    args: tuple,
    kwargs: dict,
    of: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> tuple[list[Tensor], dict[str, Tensor | None], set[str]]:
    """Outputs; the gradients of a sum of them by name, of parameters that stand for the model's:
    its own see no gradient and call no hook; and the names of what else the forward has written.
    Buffers (spectral_norm's, an observer's) and attributes have their values again."""
    held = [(vars(m), vars(m).copy()) for m in model.modules()]
    known = getattr(adapters.FAMILIES[family], "WRITTEN", ())
    others = {b: of(b).clone() for b in model.buffers()}
    asked = {}
    if torch.is_grad_enabled():
        for name, p in model.named_parameters():
            others[p] = of(p.detach()).requires_grad_(p.requires_grad)
            asked |= {name: others[p]} if p.requires_grad else {}
    device = next(model.parameters()).device
    try:
        with _same_conditions(device), _stand_ins(model, others):
            before = state(model)
            outputs = tensors_of(forward(args, kwargs))
            found = written(model, before) - {*known}
            roots = [t for t in outputs if t.requires_grad]
            if roots and asked:  # in here: a reentrant checkpoint reads the parameters again
                cotangents = [noise_like(t) / t.numel() ** 0.5 for t in roots]
                torch.autograd.backward(roots, cotangents)
    finally:
        for attributes, as_they_were in held:
            attributes.update(as_they_were)
    grads = {n: p.grad for n, p in asked.items()}
    return [t.detach() for t in outputs], grads, found


def _wide(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t.detach()


def _coarsest(param: Tensor) -> torch.dtype:
    """The dtype whose rounding both forwards have."""
    cast = autocast_dtype(param.device.type)
    return cast if cast is not None and param.dtype != torch.float64 else param.dtype


@contextlib.contextmanager
def _stand_ins(model: nn.Module, others: dict[Tensor, Tensor]) -> Iterator[None]:
    """Every parameter and buffer of `others` replaced, also where several modules have it."""
    held = [vars(m)[kind] for m in model.modules() for kind in ("_parameters", "_buffers")]
    before = [d.copy() for d in held]
    for d in held:
        d.update({name: others.get(t, t) for name, t in d.items()})
    try:
        yield
    finally:
        for d, was in zip(held, before, strict=True):
            d.clear()
            d.update(was)


@contextlib.contextmanager
def _same_conditions(device: torch.device) -> Iterator[None]:
    """The same random numbers inside and afterwards, no TF32, no cast that autocast keeps, and
    nothing that a checkpoint or save_on_cpu around the call would see saved."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    devices = [] if device.type == "cpu" else [device]
    random = torch.random.fork_rng(devices, device_type=device.type)
    cast = autocast_dtype(device.type)
    how = dict(dtype=cast, enabled=cast is not None, cache_enabled=False)
    saved = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with random, saved, torch.autocast(device.type, **how):
        try:
            matmul.fp32_precision = conv.fp32_precision = "ieee"
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision = before


def _gradients_differ(
    ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], limit: float
) -> str | None:
    """The name of the first whose gradients differ, and by how much; None: there is none. One a
    hundred times smaller than the greatest is mostly rounding, and held to that size."""
    sizes = {n: float(g.double().norm()) for n, g in theirs.items() if g is not None}
    least = max(sizes.values(), default=0) / 100
    for name, want in theirs.items():
        got = ours[name]
        if got is None or want is None:
            size = max(sizes.get(name, 0), 0 if got is None else float(got.double().norm()))
            if size > limit * least:
                return f"{name} is {'none' if got is None else 'there'}, which is not so in its own"
        elif not (d := float((got.double() - want.double()).norm())) <= limit * max(
            sizes[name], least
        ):
            return f"{name} differs by {d / max(sizes[name], 1e-30):.1e} (at most {limit:.0e})"
    return None


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|; NaN where shapes differ or one alone is not finite."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.nan
    same = torch.equal(ours.isfinite(), theirs.isfinite())
    ours, theirs = (t.double().nan_to_num(0, 0, 0) for t in (ours, theirs))
    difference = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    return float(difference) if same else math.nan


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` of every tensor in lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {k: map_tensors(function, v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_tensors(function, t) for t in tree)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in lists, tuples and mappings, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [t for x in tree for t in tensors_of(x)] if isinstance(tree, list | tuple) else []
