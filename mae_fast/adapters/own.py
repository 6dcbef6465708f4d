"""What of a block runs as the model's own modules, inside of the fused forward.

A block with hooks, or wrapped by torch.compile or a checkpoint, runs whole as its own
module; one sharded by fully_shard is fused, between its own hooks; a linear layer that is more than
that (LoRA, quantised, parametrised ...) and dropout are called where they stand. Everything is read
at each call: what changes is computed as it then is.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.dropout import _DropoutNd

from mae_fast.forward import Affine, Block, Layer, OwnBlock, apply_layer

_PLAIN = (nn.Parameter, Tensor)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Children by which a module is known to stand in place of another: torch.compile's, and torch's
# checkpoint_wrapper's and FSDP 1's.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_BARE: ContextVar[Collection[nn.Module]] = ContextVar("bare", default=())


@contextlib.contextmanager
def known_bare(modules: Collection[nn.Module]) -> Iterator[None]:
    """Modules without a hook or forward of their own inside, until the end: a call does not walk
    through blocks whose guard has just found them as they were."""
    token = _BARE.set(modules)
    try:
        yield
    finally:
        _BARE.reset(token)


def is_hooked(module: nn.Module) -> bool:
    """Some of a module's own hooks do something. Those that transformers installs when hidden
    states are first asked for, and leaves there, do nothing at other calls."""
    hooks = [h for kind in HOOKS for h in vars(module)[kind].values()]
    return any(getattr(h, "__name__", "") != "output_capturing_hook" for h in hooks)


def block(
    module: nn.Module, read: Callable[[nn.Module], Block], call: Callable | None = None
) -> Block | OwnBlock:
    """read(module), the block's parameters; or what runs it, by `call` in place of module()."""
    if not torch.compiler.is_compiling() and module in _BARE.get():
        return read(module)
    if why_itself(module):
        return functools.partial(_itself, call or module)
    return functools.partial(_between_hooks, module, read) if is_hooked(module) else read(module)


def why_itself(module: nn.Module) -> str | None:
    """Why a block runs as its own module. What only gathers its parameters is no reason."""
    if is_bare(module):
        return None
    inside = list(module.modules())
    if wrappers := [m for m in inside if is_wrapper(m)]:
        return f"is a {type(wrappers[0]).__name__}, or has one inside"
    if any(map(_has_forward, inside)):
        return "has a forward of its own"
    hooked = [m for m in inside if is_hooked(m)]
    return "has hooks" if hooked and not (hooked == [module] and _is_sharded(module)) else None


def is_bare(module: nn.Module) -> bool:
    """There is no hook, no wrapper and no forward on any instance inside."""
    have = vars(module)
    if (
        have["_forward_hooks"]
        or have["_forward_pre_hooks"]
        or have["_backward_hooks"]
        or have["_backward_pre_hooks"]
        or "forward" in have
        or is_wrapper(module)
    ):
        return False
    for child in have["_modules"].values():
        if child is not None and not is_bare(child):
            return False
    return True


def is_wrapper(module: nn.Module) -> bool:
    """It calls the one module that it wraps."""
    return any(name in vars(module)["_modules"] for name in WRAPPED)


def _has_forward(module: nn.Module) -> bool:
    """On the instance, and not its class's (as transformers 4 puts back there)."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _is_sharded(module: nn.Module) -> bool:
    """fully_shard was called on the module, and its hooks are all that it has."""
    hooks = [h for kind in HOOKS for h in vars(module)[kind].values()]
    return isinstance(module, FSDPModule) and all(
        type(getattr(h, "__self__", None)).__name__ == "FSDPState" for h in hooks
    )


def _itself(call: Callable, x: Tensor, y: Tensor | None, _, fused: Callable):
    return call(x if y is None else x + y), None  # of all tokens: needs_order has seen to it


def _between_hooks(module: nn.Module, read: Callable, x: Tensor, y: Tensor | None, _, fused):
    """The module's __call__ with the fused block for its forward: the hooks gather the parameters
    before they are read, and register what backward needs on inputs and outputs."""
    before = vars(module).get("forward")
    module.forward = lambda x, y: fused(x, y, read(module))
    try:
        return nn.Module.__call__(module, x, y)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def linear(layer: nn.Module) -> Layer:
    """The layer's weight and bias, or the layer itself where it is more than they say."""
    if type(layer) is not nn.Linear:
        return layer
    weight = layer.weight
    return Affine(weight, layer.bias) if type(weight) in _PLAIN else layer


def products(
    q: nn.Module, k: nn.Module, v: nn.Module, order: tuple[int, ...] = (0, 1, 2)
) -> tuple[Layer, Layer | None, Layer | None]:
    """(q, k, v) of a Block; the model calls its layers in this order."""
    layers = linear(q), linear(k), linear(v)
    if all(type(layer) is Affine for layer in layers):
        return layers
    return functools.partial(_three, layers, order), None, None


def _three(layers: tuple[Layer, ...], order: tuple[int, ...], h: Tensor) -> list[Tensor]:
    found = {i: apply_layer(h, layers[i]) for i in order}
    return [found[i] for i in range(3)]


def product(qkv: nn.Module) -> tuple[Layer, Layer | None, Layer | None]:
    """(q, k, v) of a Block, whose weight one layer has. It is split into views: its gradient is one
    copy of theirs in backward, and no activation is copied."""
    layer = linear(qkv)
    if type(layer) is not Affine:
        return lambda h: layer(h).chunk(3, dim=-1), None, None
    biases = (None,) * 3 if layer.bias is None else layer.bias.chunk(3)
    return tuple(map(Affine, layer.weight.chunk(3), biases))


def probability(module: nn.Module) -> float:
    """Of dropout or stochastic depth; 0 of other modules."""
    have = vars(module)  # a missing attribute costs an exception
    return have.get("p" if isinstance(module, _DropoutNd) else "drop_prob") or 0.0


def drops(module: nn.Module, *names: str) -> list[nn.Module | None]:
    """Children that a module may have, by name."""
    return [vars(module)["_modules"].get(name) for name in names]


def dropped(layer: Layer, *after: nn.Module | None, before: nn.Module | None = None) -> Layer:
    """The layer with the model's own dropout and stochastic depth around it, where they act."""
    acts = [m for m in after if m is not None and m.training and probability(m)]
    if before is not None and before.training and probability(before):
        return [before, layer, *acts]
    return [layer, *acts] if acts else layer


def attention_dropout(drop: nn.Module | float | None, scores: bool) -> Callable | None:
    """A Block's `attend` with dropout of probabilities, by a module or of a number, where it acts.

    `scores`: drawn as code that has the scores draws it; otherwise as torch's own attention does.
    """
    if isinstance(drop, nn.Module):
        drop = probability(drop) if drop.training else 0.0
    return functools.partial(_attend_scores if scores else _attend, drop) if drop else None


def _attend(p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)


def _attend_scores(p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (F.dropout(weights, p) @ v).transpose(1, 2)


def needs_order(modules: Iterable[nn.Module], blocks: Iterable[Block | OwnBlock]) -> bool:
    """Some block must have all tokens, and in the model's order: its hooks see them, its random
    numbers are drawn for them, or a layer of another's rounds by the greatest of them."""
    return any(
        not found.is_plain() if isinstance(found, Block) else found.func is _itself or draws(module)
        for module, found in zip(modules, blocks, strict=True)
    )


def draws(module: nn.Module) -> bool:
    """Dropout acts somewhere inside."""
    return any(m.training and probability(m) for m in module.modules())
