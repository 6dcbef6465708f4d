"""add_layer_norm: total = x + y, and the layer norm of total over its last dimension.

x, y [..., D]; weight, bias [D] -> total, out [..., D], of the dtype that x + y has, and out of the
one asked for; statistics in fp32 (fp64 for double). Backward saves total, and mean and
1 / deviation of each row; it gives the gradient of y, which is that of x, in y's dtype too. Where
that is another one, in Triton, it leaves its columns' sums on it (ops/linear.py): the gradient of
the bias of the layer that y comes from, of which no pass of its own is made then.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.ops.layer_norm import layer_norm_ref, why_not_cpp, why_not_triton
from mae_fast.ops.linear import leave_sums
from mae_fast.spans import spanned


def add_layer_norm_ref(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """The specification."""
    total = x + y
    out = layer_norm_ref(total, weight, bias, eps, dtype)
    return total[:, first:] if first else total, out


dispatch.LIBRARY.define(
    "add_layer_norm_fwd(Tensor x, Tensor y, Tensor weight, Tensor bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
dispatch.LIBRARY.define(
    "add_layer_norm_bwd(Tensor? dtotal, Tensor dout, Tensor total, Tensor weight, Tensor mean,"
    " Tensor rstd, ScalarType y_dtype, int first, bool sums)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mae_fast::add_layer_norm_fwd")
def _(x, y, weight, bias, eps, dtype):
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return total, torch.empty_like(total, dtype=dtype), rows, torch.empty_like(rows)


@torch.library.register_fake("mae_fast::add_layer_norm_bwd")
def _(dtotal, dout, total, weight, mean, rstd, y_dtype, first, sums):
    dy = total.new_empty(total.shape if y_dtype != total.dtype else (0,), dtype=y_dtype)
    of_dy = total.new_empty(len(weight) if sums else 0, dtype=torch.float32)
    return torch.empty_like(total), dy, torch.empty_like(weight), torch.empty_like(weight), of_dy


def _save(ctx, inputs, output):
    _, y, weight, *_ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.y_dtype, ctx.first = y.dtype, 0


@dispatch.once_differentiable
def _backward(ctx, dtotal, dout, *_):
    if dout is None:  # only the sum was used
        if ctx.first and dtotal is not None:
            dtotal = F.pad(dtotal, (0, 0, ctx.first, 0))
        return dtotal, None if dtotal is None else dtotal.to(ctx.y_dtype), *[None] * 4
    saved = ctx.saved_tensors
    narrow = ctx.y_dtype != saved[0].dtype
    sums = narrow and dispatch.why_not_triton(dout) is None
    dx, dy, dweight, dbias, of_dy = torch.ops.mae_fast.add_layer_norm_bwd(
        dtotal, dout, *saved, ctx.y_dtype, ctx.first, sums
    )
    if sums:
        leave_sums(dy, of_dy)
    return dx, dy if narrow else dx, dweight, dbias, None, None


torch.library.register_autograd("mae_fast::add_layer_norm_fwd", _backward, setup_context=_save)


class _FromToken(torch.autograd.Function):
    """The sum goes on from token `first` alone: its gradient is not made as large as the sum."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, eps: float, dtype: torch.dtype, first: int):
        total, out, *rows = torch.ops.mae_fast.add_layer_norm_fwd(x, y, weight, bias, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, *rows)
        ctx.y_dtype, ctx.first = y.dtype, first
        return total[:, first:], out

    @staticmethod
    def backward(ctx, *grads):
        return *_backward(ctx, *grads), None


def _why_not_cpp(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, dtype) -> str | None:
    return why_not_cpp(torch.promote_types(x.dtype, y.dtype), dtype, x, y, weight, bias)


OP = dispatch.Op(
    "add_layer_norm",
    "residual addition and layer norm",
    {
        "cpp": _why_not_cpp,
        "triton": lambda *args: why_not_triton(args[-1], *args[:-1]),
        "reference": dispatch.anything,
    },
)


@spanned(op="add_layer_norm")
def add_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """x, y [..., D], weight, bias [D] -> (x + y, its norm of `dtype`; None: that of x + y). Of
    [B, S, D] with `first`, of the sum the tokens from there on, [B, S - first, D]. Raises
    ValueError on other shapes."""
    if x.shape != y.shape or x.shape[-1:] != weight.shape or bias.shape != weight.shape:
        raise ValueError(
            f"add_layer_norm: x {list(x.shape)}, y {list(y.shape)}, weight {list(weight.shape)} "
            f"and bias {list(bias.shape)} do not fit"
        )
    dispatch.check_device("add_layer_norm", x=x, y=y, weight=weight, bias=bias)
    wide = torch.promote_types(x.dtype, y.dtype)
    dtype = dtype or wide
    if OP.choose(x, y, weight, bias, dtype) == "reference":
        return add_layer_norm_ref(x, y, weight, bias, eps, dtype, first)
    args = (x.to(wide), y, weight, bias, eps, dtype)
    if first and not torch.compiler.is_compiling():
        return _FromToken.apply(*args, first)
    total, out, *_ = torch.ops.mae_fast.add_layer_norm_fwd(*args)
    return total[:, first:] if first else total, out
