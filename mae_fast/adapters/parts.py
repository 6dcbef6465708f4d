"""What adapters are made of: findings about a model's parts, and clips of uint8."""

import contextlib
import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mae_fast.adapters import own
from mae_fast.forward import Affine


class Finding(NamedTuple):
    """A part of a model, and why the fused forward cannot stand for it (None: it can).

    own: why the module of this name runs as itself inside the fused forward. Then nothing in it is
    refused: its hooks are called, its forward is its own.
    """

    part: str
    why_not: str | None = None
    own: str | None = None


class Unfused(Exception):
    """An adapter's forward leaves this call to the model's own; the message says why."""


class Pixels(NamedTuple):
    """How a uint8 clip is read: (x / 255 - mean) / std, one number or one a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, clip: Tensor, channel_dim: int, dtype: torch.dtype) -> Tensor:
        """The float clip that the model's own forward takes."""
        shape = [-1 if dim == channel_dim else 1 for dim in range(clip.dim())]
        mean, std = (torch.tensor(t, dtype=dtype, device=clip.device).view(shape) for t in self)
        return (clip.to(dtype) / 255 - mean) / std

    def fold(self, patch_embed: Affine, channels: int) -> Affine:
        """The embedding of x / 255 that gives what `patch_embed` gives of the normalised clip.

        W [D, C*u*p*p] -> W / std, b - W.(mean / std); differentiable, small, no copy of a clip.
        """
        mean, std = (t * channels if len(t) == 1 else t for t in self)
        parts = patch_embed.weight.unflatten(1, (channels, -1)).unbind(1)
        parts = [w / s for w, s in zip(parts, std, strict=True)]
        shift = sum(w.sum(1) * m for w, m in zip(parts, mean, strict=True))
        bias = -shift if patch_embed.bias is None else patch_embed.bias - shift
        return Affine(torch.cat(parts, dim=1), bias)


def noise(shape: tuple[int, ...], dtype: torch.dtype, beside: nn.Module) -> Tensor:
    """A clip of noise, on the device of a module's parameters."""
    clip = torch.zeros(shape, dtype=dtype, device=next(beside.parameters()).device)
    return noise_like(clip)


def noise_like(clip: Tensor) -> Tensor:
    """A clip without a flat patch, whose values over their own deviation would be all rounding."""
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    noise = (noise * 64 + 128).clamp(0, 255) if clip.dtype == torch.uint8 else noise
    return noise.to(clip.device, clip.dtype)


class Parts:
    """Collects findings. Each method names a part and says what the fused forward needs of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.findings: list[Finding] = []

    def need(self, part: str, fits: bool, why_not: str) -> bool:
        """The part fits, or why not."""
        finding = Finding(part, None if fits else why_not)
        if finding not in self.findings:
            self.findings.append(finding)
        return fits

    @contextlib.contextmanager
    def group(self, part: str) -> Iterator[None]:
        """One finding in place of many: the part fits, or what of it does not."""
        first = len(self.findings)
        yield
        found = self.findings[first:]
        refused, itself = [f for f in found if f.why_not], [f for f in found if f.own]
        whole = [] if any(f.part == part for f in itself) else [Finding(part)]
        self.findings[first:] = refused or [*whole, *itself]

    def runs_itself(self, part: str) -> bool:
        """The block runs as its own module, whatever it is, for it has hooks or a forward of its
        own. One that is sharded is as the others, between its hooks."""
        module = self.model.get_submodule(part)
        why = own.why_itself(module)
        if why or own.is_hooked(module):
            why_fused = "is sharded, and fused between its hooks"
            self.findings.append(Finding(part, None, why or why_fused))
        return bool(why)

    def has(self, part: str, *names: str) -> bool:
        """The module has attributes under these names, dots and all."""
        missing = []
        for name in names:
            try:
                operator.attrgetter(name)(self.model.get_submodule(part))
            except AttributeError:
                missing.append(name)
        return self.need(part or "model", not missing, f"has no {', no '.join(missing)}")

    def value(self, part: str, value: Any, expected: Any) -> bool:
        """An attribute's value is the expected one."""
        return self.need(part, value == expected, f"is {value}, not {expected}")

    def layer(self, part: str, kind: type[nn.Module], **attributes: Any) -> bool:
        """The layer is a `kind` itself, no subclass (which may compute otherwise), and its
        attributes are these."""
        layer = self.model.get_submodule(part)
        if type(layer) is not kind:
            found = type(layer).__name__
            if found == kind.__name__:  # peft has a Conv3d too
                found = f"{type(layer).__module__}.{found}"
            return self.need(part, False, f"is a {found}, not a {kind.__name__}")
        found = {name: getattr(layer, name) for name in attributes}
        wrong = [f"{n} is {found[n]}, not {v}" for n, v in attributes.items() if found[n] != v]
        return self.need(part, not wrong, ", ".join(wrong))

    def linear(self, part: str, rows: int, columns: int, bias: bool | None = True) -> bool:
        """A linear layer from `rows` to `columns` values, or one that stands in its place (LoRA,
        quantised ...) and is called as it is; bias None: with or without."""
        layer = self.model.get_submodule(part)
        kind, sizes = type(layer), ("in_features", "out_features")
        if not all(hasattr(layer, size) for size in sizes):
            why_not = f"is a {kind.__name__}, no linear layer with in_features and out_features"
            return self.need(part, False, why_not)
        fits = self.layer(part, kind, in_features=rows, out_features=columns)
        if fits and type(own.linear(layer)) is not Affine:
            self.findings.append(Finding(part, None, f"is a {kind.__name__}, called as it is"))
        if not fits or bias is None or kind is not nn.Linear:
            return fits
        has = layer.bias is not None
        return has == bias or self.need(part, False, "has a bias" if has else "has no bias")

    def weight(self, part: str, rows: int, columns: int) -> bool:
        """A layer of which the model reads the weight and calls nothing, of whatever kind."""
        layer = self.model.get_submodule(part)
        if parametrize.is_parametrized(layer):  # to read it may write: spectral_norm does
            layer = copy.deepcopy(layer)
        shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
        return self.need(part, shape == (columns, rows), f"has a weight {list(shape)}")

    def drops(self, part: str, *names: str) -> bool:
        """Those of these children that the module has are dropout, stochastic depth by the sample,
        or identities."""
        children = dict(self.model.get_submodule(part).named_children())
        fits = True
        for child, name in ((children[n], f"{part}.{n}") for n in names if n in children):
            if hasattr(child, "drop_prob") and not isinstance(child, nn.Dropout):
                why_not = f"is a {type(child).__name__} that does not drop whole samples"
                fits &= _drops_samples(child) or self.need(name, False, why_not)
            elif type(child) not in (nn.Identity, nn.Dropout):
                fits &= self.need(name, False, why_not_off(child) or f"is a {type(child).__name__}")
        return fits

    def norm(self, part: str, width: int) -> bool:
        """A layer norm with weight and bias, of any eps."""
        fits = self.layer(part, nn.LayerNorm, normalized_shape=(width,))
        bare = fits and self.model.get_submodule(part).bias is None
        return self.need(part, False, "has no weight or no bias") if bare else fits

    def shape(self, part: str, *shape: int) -> bool:
        """A parameter or buffer of this shape."""
        module, _, name = part.rpartition(".")
        tensor = getattr(self.model.get_submodule(module), name, None)
        found = () if tensor is None else tuple(tensor.shape)
        return self.need(part, found == shape, f"is {list(found)}, not {list(shape)}")

    def rest_is_off(self, part: str, *known: str) -> None:
        """Beside the `known` ones, the module has no parameter, and children that do nothing."""
        module = self.model.get_submodule(part)
        before = f"{part}." if part else ""
        for name, child in module.named_children():
            if name not in known and (why_not := why_not_off(child)):
                self.need(before + name, False, why_not)
        for name, _ in module.named_parameters(recurse=False):
            if name not in known:
                self.need(before + name, False, "is no parameter of the fused forward")

    def signature(self, forward: Callable) -> None:
        """The model's forward takes what `forward(model, pixels, ...)` takes, under the same
        names and with the same defaults."""
        theirs = inspect.signature(type(self.model).forward).parameters.values()
        ours = list(inspect.signature(forward).parameters.values())[2:]
        theirs = [(p.name, p.default) for p in list(theirs)[1:]]
        wanted = [(p.name, p.default) for p in ours]
        self.need("forward", theirs == wanted, f"takes {_names(theirs)}, not {_names(wanted)}")


def _drops_samples(module: nn.Module) -> bool:
    """It multiplies a sample as a whole, in training; by trying, on a copy."""
    tried, x = copy.deepcopy(module).train(), torch.ones(64, 3, 5, device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        out = tried(x)
    whole = out.shape == x.shape and bool((out == out[:, :1, :1]).all())
    kept = out[:, 0, 0] != 0
    return whole and len(out[:, 0, 0][kept].unique()) <= 1


def why_not_off(module: nn.Module) -> str | None:
    """Why a module may do something: it is no identity, dropout of 0 or stochastic depth of 0."""
    if type(module) is nn.Identity:
        return None
    probability = module.p if isinstance(module, nn.Dropout) else None
    probability = getattr(module, "drop_prob", probability)
    kind = type(module).__name__
    if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob"):
        return (
            f"is a {kind} of {probability}, and the fused forward has none" if probability else None
        )
    return f"is a {kind} that the fused forward does not have"


def _names(parameters: list[tuple[str, Any]]) -> str:
    empty = inspect.Parameter.empty
    given = (n if default is empty else f"{n}={default}" for n, default in parameters)
    return f"({', '.join(given)})"
