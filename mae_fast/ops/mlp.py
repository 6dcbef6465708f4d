"""mlp: a block's two layers with the exact GELU between them: gelu(x W1^T + b1) W2^T + b2.

apart: as the ops `linear`, `bias_gelu` and `linear`; a block then calls these itself.

triton: under autocast, one product adds the bias and takes the GELU before it is stored, and in
backward one takes the GELU's derivative: three of the five passes over the hidden layer are not
made. The hidden layer is rounded where `bias_gelu` rounds it. It stands after `apart` until a GPU
has measured that it is faster there (ops/measured.py).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.ops.bias_gelu import bias_gelu, bias_gelu_ref
from mae_fast.ops.linear import bias_grad, in_one, product, why_not_half, wide_product
from mae_fast.ops.measured import Measured, row
from mae_fast.spans import spanned


def mlp_ref(x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> Tensor:
    """The specification."""
    return F.linear(F.gelu(F.linear(x, fc1, bias1)), fc2, bias2)


# x [M, K], weight [N, K] of 16 bits, bias [N] -> x weight^T and gelu(that + bias), both [M, N].
dispatch.LIBRARY.define("mlp_fwd(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)")
# dout [M, K], weight [K, N], hidden [M, N] as mlp_fwd's first, bias [N] -> the gradient of
# `hidden` through gelu(hidden + bias) @ weight^T, [M, N], and of bias, [N].
dispatch.LIBRARY.define(
    "mlp_bwd(Tensor dout, Tensor weight, Tensor hidden, Tensor bias) -> (Tensor, Tensor)"
)


@torch.library.register_fake("mae_fast::mlp_fwd")
def _(x, weight, bias):
    hidden = x.new_empty(x.shape[0], weight.shape[0])
    return hidden, torch.empty_like(hidden)


@torch.library.register_fake("mae_fast::mlp_bwd")
def _(dout, weight, hidden, bias):
    return torch.empty_like(hidden), torch.empty_like(bias)


@torch.library.impl("mae_fast::mlp_fwd", "CPU", lib=dispatch.LIBRARY)
def _(x, weight, bias):
    hidden = x @ weight.t()
    return hidden, bias_gelu_ref(hidden, bias)


@torch.library.impl("mae_fast::mlp_bwd", "CPU", lib=dispatch.LIBRARY)
def _(dout, weight, hidden, bias):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    h = hidden.to(wide) + bias.to(wide)
    dh = torch.ops.aten.gelu_backward((dout @ weight).to(wide), h)
    return dh.to(hidden.dtype), dh.sum(0).to(bias.dtype)


class _Fused(torch.autograd.Function):
    """Saves x, the weights in 16 bits, the hidden layer, and its activation if `keep`."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, keep: bool, fc1, bias1, fc2, bias2) -> Tensor:
        x16 = x.to(dtype).reshape(-1, x.shape[-1])
        first, second = (in_one([w], [len(w)], x16, w.shape[1]) for w in (fc1, fc2))
        hidden, activation = torch.ops.mae_fast.mlp_fwd(x16, first, bias1)
        saved = activation if keep else None
        ctx.save_for_backward(x16, first, second, bias1, hidden, saved)
        out = F.linear(activation, second, in_one([bias2], [len(bias2)], x16))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, dout: Tensor):
        x, first, second, bias1, hidden, activation = ctx.saved_tensors
        need_x, _, _, need_fc1, need_bias1, need_fc2, need_bias2 = ctx.needs_input_grad
        grad, shape = dout, (*dout.shape[:-1], x.shape[-1])
        dout = grad.reshape(-1, len(second))
        dx = dfc1 = dbias1 = dfc2 = dbias2 = None
        if need_x or need_fc1 or need_bias1:
            dhidden, dbias1 = torch.ops.mae_fast.mlp_bwd(dout, second, hidden, bias1)
            dx = (dhidden @ first).view(shape) if need_x else None
            dfc1 = wide_product(dhidden.t(), x) if need_fc1 else None
        if need_fc2:
            if activation is None:
                activation = torch.ops.mae_fast.bias_gelu_fwd(hidden, bias1)
            dfc2 = wide_product(dout.t(), activation)
        if need_bias2:
            dbias2 = bias_grad(grad, dout)
        return dx, None, None, dfc1, dbias1, dfc2, dbias2


def _why_not_triton(x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, *_) -> str | None:
    if not x.numel() or not len(fc1):
        return "there are no values"
    return dispatch.why_not_triton(x, fc1, bias1, fc2) or why_not_half(x, fc1)


class _Mlp(Measured):
    def order(self, x: Tensor, fc1: Tensor, *others: Tensor) -> Iterable[str]:
        dtype = dispatch.autocast_dtype(x.device.type)
        if x.device.type != "cuda" or dtype is None:
            return self.backends
        gradients = torch.is_grad_enabled() and (x.requires_grad or fc1.requires_grad)
        return self.by_table(measured_key(fc1, dtype, gradients))


def measured_key(fc1: Tensor, dtype: torch.dtype, gradients: bool) -> str:
    """A row of the table: "mlp512x2048-bfloat16-both"."""
    hidden, width = fc1.shape
    return row(f"mlp{width}x{hidden}", dtype, gradients)


OP = _Mlp(
    "mlp",
    "a block's MLP, the exact GELU within its products",
    {"apart": dispatch.anything, "triton": _why_not_triton, "reference": dispatch.anything},
)


def mlp(
    x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor, keep: bool = True
) -> Tensor:
    """x [..., D], fc1 [F, D], bias1 [F], fc2 [D, F], bias2 [D] -> [..., D]. Not `keep`: the
    activation is made again in backward. Raises ValueError on shapes that do not fit."""
    width, hidden = x.shape[-1], len(bias1)
    if fc1.shape != (hidden, width) or fc2.shape != (len(bias2), hidden):
        shapes = [list(t.shape) for t in (x, fc1, bias1, fc2, bias2)]
        raise ValueError("mlp: x {}, fc1 {} + {} and fc2 {} + {} do not fit".format(*shapes))
    dispatch.check_device("mlp", x=x, fc1=fc1, bias1=bias1, fc2=fc2, bias2=bias2)
    backend = OP.choose(x, fc1, bias1, fc2, bias2)
    if backend == "triton":
        return _fused(x, fc1, bias1, fc2, bias2, keep)
    if backend == "reference":
        return mlp_ref(x, fc1, bias1, fc2, bias2)
    return product(bias_gelu(product(x, fc1), bias1), fc2, bias2)


@spanned(op="mlp")
def _fused(x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor, keep: bool) -> Tensor:
    dtype = dispatch.autocast_dtype(x.device.type)
    return _Fused.apply(x, dtype, keep, fc1, bias1, fc2, bias2)
