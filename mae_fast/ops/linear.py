"""linear: x @ weight.T + bias, by whichever of torch's two CPU libraries is the faster one here.

torch multiplies fp32 matrices with MKL, which runs at half speed on CPUs that are not Intel's:
185 against 390 GFLOP/s for oneDNN, also inside torch, on two cores of an AMD EPYC with AVX-512
(shapes of ViT-B at batch 2, forward and both products of backward). Elsewhere, and for every other
device and dtype, this is torch.nn.functional.linear. The same product to rounding.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.spans import spanned

linear_ref = F.linear


@dispatch.constant
def why_not_onednn() -> str | None:
    """Why fp32 products on this CPU are left to torch's default, or None where oneDNN does them."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return "torch is built without oneDNN"
    if not torch.backends.mkl.is_available():
        return "torch does not use MKL"
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "the CPU's maker is unknown"
    return None if amd else "MKL is fast on this CPU"


# x float [M, N] -> x.t(), contiguous. A kernel of csrc/cpu only; it has no gradient.
dispatch.LIBRARY.define("transposed(Tensor x) -> Tensor")


@torch.library.register_fake("mae_fast::transposed")
def _(x):
    return x.new_empty(x.shape[1], x.shape[0])


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [N, K].T + bias [N] -> [M, N]. b may be a transposed view; a is copied if so."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _transposed(x: Tensor) -> Tensor:
    """x [M, N] -> x.t(), a copy where the C++ kernels are there to make one fast."""
    return x.t() if dispatch.load_cpp() else torch.ops.mae_fast.transposed(x)


class _OneDNNLinear(torch.autograd.Function):
    """Saves x and weight. (A setup_context of its own costs 40 us at every call.)"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        g, x2 = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _product(g, weight.t()).view(x.shape) if need_x else None,
            _product(_transposed(g), x2.t()) if need_weight else None,
            g.sum(0) if need_bias else None,
        )


def _why_not_onednn(x: Tensor, weight: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return "the product is not in fp32"
    if x.numel() == 0:
        return "x is empty"
    return why_not_onednn()


dispatch.MACHINE["onednn"] = why_not_onednn
OP = dispatch.Op(
    "linear",
    "fp32 products by the faster CPU library",
    {"onednn": _why_not_onednn, "reference": dispatch.anything},
)


@spanned(op="linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None -> [..., N]."""
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` within another op, which has its own name in a profile."""
    dispatch.check_device("linear", x=x, weight=weight, bias=bias)
    if OP.choose(x, weight) == "reference":
        return linear_ref(x, weight, bias)
    return _OneDNNLinear.apply(x, weight, bias)
