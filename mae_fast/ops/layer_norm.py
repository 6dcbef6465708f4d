"""layer_norm: (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

x [..., D]; weight, bias [D] -> [..., D], of x's dtype, or rounded once to the one asked for, as a
product in bf16 takes it; statistics in fp32 (fp64 for double). Backward saves x, and mean and
1 / deviation of each row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.spans import spanned


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The specification."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return out.to(dtype or x.dtype)


dispatch.LIBRARY.define(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)"
)
dispatch.LIBRARY.define(
    "layer_norm_bwd(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mae_fast::layer_norm_fwd")
def _(x, weight, bias, eps, dtype):
    rows = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=dtype), rows, torch.empty_like(rows)


@torch.library.register_fake("mae_fast::layer_norm_bwd")
def _(dout, x, weight, mean, rstd):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, rstd)


@dispatch.once_differentiable
def _backward(ctx, dout, *_):
    if dout is None:
        return (None,) * 5
    return *torch.ops.mae_fast.layer_norm_bwd(dout, *ctx.saved_tensors), None, None


torch.library.register_autograd("mae_fast::layer_norm_fwd", _backward, setup_context=_save)


def why_not_cpp(dtype: torch.dtype, out: torch.dtype, *tensors: Tensor) -> str | None:
    """Also add_layer_norm's; `dtype` is of what is normalised."""
    reason = dispatch.why_not_cpp(*tensors) or dispatch.why_not_dtype(
        out, *(t.dtype for t in tensors)
    )
    narrows = dtype == torch.float32 and out in (torch.bfloat16, torch.float16)
    if not reason and out != dtype and not narrows:
        return f"of {dtype} it gives no {out}"
    return reason


def why_not_triton(out: torch.dtype, *tensors: Tensor) -> str | None:
    """Also add_layer_norm's: fp32, bf16 and f16, each tensor its own."""
    dtypes = {out, *(t.dtype for t in tensors)}
    if torch.float64 in dtypes:
        return "its statistics are fp32, and a tensor is float64"
    width = tensors[0].shape[-1]
    if not 0 < width <= 8192:
        return f"a row has {width} values, and it takes 1 to 8192"
    return dispatch.why_not_triton(*tensors) or dispatch.why_not_dtype(*dtypes)


OP = dispatch.Op(
    "layer_norm",
    "layer norm over the last dimension, statistics in fp32",
    {
        "cpp": lambda x, weight, bias, dtype: why_not_cpp(x.dtype, dtype, x, weight, bias),
        "triton": lambda x, weight, bias, dtype: why_not_triton(dtype, x, weight, bias),
        "reference": dispatch.anything,
    },
)


@spanned(op="layer_norm")
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """x [..., D], weight and bias [D] -> [..., D] of `dtype` (None: x's). Raises ValueError on
    shapes that do not fit."""
    if x.shape[-1:] != weight.shape or bias.shape != weight.shape:
        raise ValueError(
            f"layer_norm: x {list(x.shape)}, weight {list(weight.shape)} and bias "
            f"{list(bias.shape)} do not fit"
        )
    dispatch.check_device("layer_norm", x=x, weight=weight, bias=bias)
    dtype = dtype or x.dtype
    if OP.choose(x, weight, bias, dtype) == "reference":
        return layer_norm_ref(x, weight, bias, eps, dtype)
    return torch.ops.mae_fast.layer_norm_fwd(x, weight, bias, eps, dtype)[0]
