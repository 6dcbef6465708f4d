"""layer_norm: (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

x [..., D]; weight, bias [D] -> [..., D], of x's dtype; statistics in fp32 (fp64 for double).
Backward saves x, and mean and 1 / deviation of each row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The specification."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


dispatch.LIBRARY.define(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)"
)
dispatch.LIBRARY.define(
    "layer_norm_bwd(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mae_fast::layer_norm_fwd")
def _(x, weight, bias, eps):
    rows = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.contiguous_format), rows, torch.empty_like(rows)


@torch.library.register_fake("mae_fast::layer_norm_bwd")
def _(dout, x, weight, mean, rstd):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


@torch.autograd.function.once_differentiable
def _backward(ctx, dout, *_):
    return *torch.ops.mae_fast.layer_norm_bwd(dout, *ctx.saved_tensors), None


torch.library.register_autograd("mae_fast::layer_norm_fwd", _backward, setup_context=_save)


def _why_not_cpp(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    return dispatch.why_not_cpp(x, weight, bias) or dispatch.why_not_dtype(x.dtype, weight.dtype)


def why_not_triton(x: Tensor, *rest: Tensor) -> str | None:
    """Also add_layer_norm's: fp32, bf16 and f16, each tensor its own."""
    dtypes = {t.dtype for t in (x, *rest)}
    if torch.float64 in dtypes:
        return "its statistics are fp32, and a tensor is float64"
    if not 0 < x.shape[-1] <= 8192:
        return f"a row has {x.shape[-1]} values, and it takes 1 to 8192"
    return dispatch.why_not_triton(x, *rest) or dispatch.why_not_dtype(*dtypes)


OP = dispatch.Op(
    "layer_norm",
    "layer norm over the last dimension, statistics in fp32",
    {"cpp": _why_not_cpp, "triton": why_not_triton, "reference": dispatch.anything},
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D], weight and bias [D] -> [..., D]. Raises ValueError on shapes that do not fit."""
    if x.shape[-1:] != weight.shape or bias.shape != weight.shape:
        raise ValueError(
            f"layer_norm: x {list(x.shape)}, weight {list(weight.shape)} and bias "
            f"{list(bias.shape)} do not fit"
        )
    if OP.choose(x, weight, bias) == "reference":
        return layer_norm_ref(x, weight, bias, eps)
    return torch.ops.mae_fast.layer_norm_fwd(x, weight, bias, eps)[0]
