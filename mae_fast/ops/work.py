"""The one model of what a call of an op does at the least: FLOP (2 a multiply-add, products only)
and bytes, from the shapes and dtypes of its arguments.

Bytes: each tensor read or written once, of a clip only the pixels of the tokens asked for; a
backward reads the outputs' gradients and what was kept, and writes the inputs' gradients. What
attention computes again in backward because it keeps no scores is not counted; pixels want no
gradient. torch's FlopCounterMode counts our operators by the same formulas.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Work(NamedTuple):
    """FLOP and bytes."""

    flop: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":  # type: ignore[override]
        return Work(self.flop * times, self.bytes * times)

    def seconds(self, product_rate: float, copy_rate: float) -> float:
        """What it takes at the machine's limits: the roofline."""
        return max(self.flop / product_rate, self.bytes / copy_rate)


Both = tuple[Work, Work]  # forward, backward
ADAMW_BYTES = 32  # a parameter: gradient for the norm and again; weight, moments in and out


def work(op: str, args: tuple, product: torch.dtype | None = None) -> Both:
    """Of a call op(*args); `product`: what autocast casts the inputs of products to."""
    return WORK[op](product, *args)


def outputs(op: str, args: tuple, product: torch.dtype | None = None) -> list[tuple]:
    """(shape, dtype) of what a call gives."""
    x = args[0]
    if op == "linear":
        return [((*x.shape[:-1], len(args[1])), product or x.dtype)]
    if op == "patch_embed":
        _, ids, weight, _, pos = args[:5]
        wide = torch.promote_types(product or weight.dtype, pos.dtype)
        return [((*ids.shape, len(weight)), wide)]
    if op == "decoder_tokens":
        tokens = (args[1] is not None) + args[4].shape[1] + args[5].shape[1]
        wide = torch.promote_types(x.dtype, args[3].dtype)
        return [((len(x), tokens, x.shape[-1]), wide)]
    if op in ("masked_mse", "masked_hog_mse"):
        return [((), torch.promote_types(x.dtype, torch.float32))]
    if op == "layer_norm":
        return [(x.shape, args[4] or x.dtype)]
    if op == "add_layer_norm":
        wide = torch.promote_types(x.dtype, args[1].dtype)
        going = (*x.shape[:-2], x.shape[-2] - args[6], x.shape[-1]) if args[6:] else x.shape
        return [(going, wide), (x.shape, args[5] or wide)]
    return [(x.shape, x.dtype)]


def _size(*tensors: Tensor, dtype: torch.dtype | None = None) -> int:
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors)


def _pixels(video: Tensor, ids: Tensor, t_patch: int, patch: int, chans: int) -> int:
    return ids.numel() * chans * t_patch * patch**2 * video.dtype.itemsize


def _linear(product, x, weight, bias=None) -> Both:
    flop, p = 2 * x.numel() * len(weight), (product or x.dtype).itemsize
    ins, out = p * (x.numel() + weight.numel()), p * (x.numel() // x.shape[-1]) * len(weight)
    return Work(flop, ins + out), Work(2 * flop, 2 * ins + out)


def _attention(product, q, k, v) -> Both:
    flop = attention_flop(q.shape, k.shape)
    return Work(flop, _size(q, k, v, q)), Work(2 * flop, 2 * _size(q, q, k, v))


def _patch_embed(product, video, ids, weight, bias, pos, t_patch, patch, *_) -> Both:
    flop, tokens = 2 * ids.numel() * weight.numel(), ids.numel() * pos.shape[1]
    clip = _pixels(video, ids, t_patch, patch, video.shape[1])
    weights, table = _size(weight, dtype=product), min(_size(pos), tokens * pos.dtype.itemsize)
    out = tokens * torch.promote_types(product or weight.dtype, pos.dtype).itemsize
    return Work(flop, clip + weights + table + out), Work(flop, clip + weights + out + _size(pos))


def _masked_mse(product, pred, video, *_) -> Both:  # the gradient is made with the loss
    return Work(0, 2 * _size(pred) + pred.numel() * video.dtype.itemsize), Work()


def _masked_hog_mse(product, pred, video, ids, frames, patch, std) -> Both:
    pixels = ids.numel() * video.shape[1] * (patch + 2) ** 2 * video.dtype.itemsize
    return Work(0, 2 * _size(pred) + pixels), Work()


def _patchify_gather(product, video, ids, t_patch, patch, mean, std, dtype) -> Both:
    clip = _pixels(video, ids, t_patch, patch, video.shape[1])
    return Work(0, clip * (1 + dtype.itemsize / video.dtype.itemsize)), Work()


def _crop_resize(product, source, ids, t_patch, patch, mean, std, dtype, *_) -> Both:
    pixels = _pixels(source, ids, t_patch, patch, 3)
    return Work(0, pixels * (1 + dtype.itemsize)), Work()  # about a byte of a frame a value


def _decoder_tokens(product, visible, cls, mask_token, pos, keep, mask) -> Both:
    rows = keep.numel() + mask.numel() + (0 if cls is None else len(cls))
    wide = torch.promote_types(visible.dtype, pos.dtype)
    out = rows * visible.shape[-1] * wide.itemsize
    # The gradient of what is visible is a part of dout.
    return Work(0, _size(visible, pos) + out), Work(0, out + _size(pos))


def _layer_norm(product, x, weight, bias, eps, dtype=None) -> Both:
    out = _size(x, dtype=dtype)
    return Work(0, _size(x) + out), Work(0, out + 2 * _size(x))  # dout, x -> dx


def _add_layer_norm(product, x, y, weight, bias, eps, dtype=None, first=0) -> Both:
    wide = torch.promote_types(x.dtype, y.dtype)
    total, out = _size(x, dtype=wide), _size(x, dtype=dtype or wide)
    going = _size(x[..., first:, :], dtype=wide) if first else total
    # dtotal, dout, total -> dx, which is dy too.
    return Work(0, _size(x, y) + total + out), Work(0, out + going + 2 * total)


def _bias_gelu(product, x, bias) -> Both:
    return Work(0, 2 * _size(x)), Work(0, 3 * _size(x))


WORK: dict[str, Callable[..., Both]] = {
    "linear": _linear,
    "attention": _attention,
    "patch_embed": _patch_embed,
    "masked_hog_mse": _masked_hog_mse,
    "masked_mse": _masked_mse,
    "patchify_gather": _patchify_gather,
    "crop_resize_patchify_gather": _crop_resize,
    "decoder_tokens": _decoder_tokens,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "bias_gelu": _bias_gelu,
}


def attention_flop(q: torch.Size, k: torch.Size, *_, **__) -> int:
    """Scores, and their product with v; q [B, Sq, H, d], k [B, Sk, H, d]."""
    return 4 * math.prod(q) * k[1]


def _attention_qkv_flop(dout: torch.Size, qkv: torch.Size) -> int:
    """dout or out [B, queries, H, d], qkv [B, S, 3, H, d]."""
    return 4 * math.prod(dout) * qkv[1]


def _product_flop(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * math.prod(x) * weight[0]


def register() -> None:
    """Tell torch's FlopCounterMode of our operators, and of oneDNN's product, which it has not."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ops = torch.ops.mae_fast
    formulas = {
        ops.attention_fwd: attention_flop,
        ops.attention_bwd: lambda dout, q, k, *_, **__: 2 * attention_flop(q, k),
        ops.attention_qkv_fwd: lambda qkv, *_, out_shape, **__: _attention_qkv_flop(
            out_shape[0], qkv
        ),
        ops.attention_qkv_bwd: lambda dout, qkv, *_, **__: 2 * _attention_qkv_flop(dout, qkv),
        ops.linear_grads: lambda g, x, *_, **__: 2 * math.prod(g) * x[1],
        ops.patch_embed_fwd: lambda video, ids, weight, *_, **__: (
            2 * math.prod(ids) * math.prod(weight)
        ),
        ops.patch_embed_bwd: lambda dout, video, ids, *_, out_shape, **__: (
            2 * math.prod(ids) * math.prod(out_shape[0])
        ),
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        formulas[torch.ops.mkldnn._linear_pointwise] = _product_flop
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)
