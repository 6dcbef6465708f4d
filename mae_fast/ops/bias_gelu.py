"""bias_gelu: gelu(x + bias) with the exact erf, what follows the product of an MLP's first layer.

x [..., F]; bias [F] -> [..., F], of x's dtype, computed in fp32 (fp64 for double). Backward saves
x and bias and gives the bias's gradient in the same pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.spans import spanned


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    """The specification."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(wide) + bias.to(wide)).to(x.dtype)


dispatch.LIBRARY.define("bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor")
dispatch.LIBRARY.define("bias_gelu_bwd(Tensor dout, Tensor x, Tensor bias) -> (Tensor, Tensor)")


@torch.library.register_fake("mae_fast::bias_gelu_fwd")
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("mae_fast::bias_gelu_bwd")
def _(dout, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


@dispatch.once_differentiable
def _backward(ctx, dout):
    return torch.ops.mae_fast.bias_gelu_bwd(dout, *ctx.saved_tensors)


torch.library.register_autograd("mae_fast::bias_gelu_fwd", _backward, setup_context=_save)


def _why_not_cpp(x: Tensor, bias: Tensor) -> str | None:
    return dispatch.why_not_cpp(x, bias) or dispatch.why_not_dtype(x.dtype, bias.dtype)


def _why_not_triton(x: Tensor, bias: Tensor) -> str | None:
    if torch.float64 in (x.dtype, bias.dtype):
        return "it computes in fp32, and a tensor is float64"
    if not x.shape[-1]:
        return "a row has no values"
    return dispatch.why_not_triton(x, bias) or dispatch.why_not_dtype(x.dtype, bias.dtype)


OP = dispatch.Op(
    "bias_gelu",
    "bias and exact GELU, and the bias's gradient",
    {"cpp": _why_not_cpp, "triton": _why_not_triton, "reference": dispatch.anything},
)


@spanned(op="bias_gelu")
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """x [..., F], bias [F] -> [..., F]. Raises ValueError on shapes that do not fit."""
    if x.shape[-1:] != bias.shape:
        raise ValueError(f"bias_gelu: x {list(x.shape)} and bias {list(bias.shape)} do not fit")
    dispatch.check_device("bias_gelu", x=x, bias=bias)
    if OP.choose(x, bias) == "reference":
        return bias_gelu_ref(x, bias)
    return torch.ops.mae_fast.bias_gelu_fwd(x, bias)
