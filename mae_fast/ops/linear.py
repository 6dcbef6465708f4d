"""linear: x @ weight.T + bias. The same product to rounding, by one of three ways:

onednn: torch multiplies fp32 matrices on a CPU with MKL, which runs at half speed on CPUs that are
not Intel's: 185 against 390 GFLOP/s for oneDNN, also inside torch, on two cores of an AMD EPYC with
AVX-512 (shapes of ViT-B at batch 2, forward and both products of backward).

half: under autocast, with weights in fp32, on a GPU and in bf16 on a CPU that multiplies tiles.
Several layers of one input are one product; gradients of weights and biases are summed in fp32 and
stay so.

reference: torch.nn.functional.linear, for everything else.
"""

from collections.abc import Sequence
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


# g [M, N], x [M, K] of 16 bits -> in fp32 g^T x [N, K], as it is summed, and g's columns' sums [N].
dispatch.LIBRARY.define("linear_grads(Tensor g, Tensor x) -> (Tensor, Tensor)")


@torch.library.register_fake("mae_fast::linear_grads")
def _(g, x):
    wide = dict(dtype=torch.float32)
    return g.new_empty(g.shape[1], x.shape[1], **wide), g.new_empty(g.shape[1], **wide)


# x float [M, N] -> its columns' sums in fp32, [N].
dispatch.LIBRARY.define("linear_sums(Tensor x) -> Tensor")


@torch.library.register_fake("mae_fast::linear_sums")
def _(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


@torch.library.impl("mae_fast::linear_sums", "CPU", lib=dispatch.LIBRARY)
def _(x):
    return x.sum(0, dtype=torch.float32)


def leave_sums(grad: Tensor, sums: Tensor) -> None:
    """Leaves on a gradient [..., N] the sums of its columns in fp32, [N], for `bias_grad`: who
    makes the gradient has it in registers."""
    grad._mae_fast_sums = sums, grad._version


def bias_grad(grad: Tensor, rows: Tensor) -> Tensor:
    """The sums of a gradient's columns [..., N] -> [N], in fp32: those that were left on it, if
    nothing has written into it since; else of the same as `rows` [M, N]."""
    sums, version = grad.__dict__.pop("_mae_fast_sums", (None, None))
    if sums is not None and version == grad._version:
        return sums
    return torch.ops.mae_fast.linear_sums(rows)


class _HalfLinear(torch.autograd.Function):
    """Layers of one input in 16 bits, as one product; saves x and the weights in 16 bits."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, count: int, *parameters: Tensor | None):
        """parameters: `count` weights, then as many biases. -> [..., N of all]"""
        weights, biases = parameters[:count], parameters[count:]
        rows = [len(w) for w in weights]
        x16 = x.to(dtype)
        weight = _in_one(weights, rows, x16, x.shape[-1])
        bias = None
        if any(b is not None for b in biases):
            bias = _in_one(biases, rows, x16)
        ctx.save_for_backward(x16, weight)
        ctx.rows, ctx.dtype = rows, x.dtype
        return F.linear(x16, weight, bias)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        g, x2 = grad.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        need_x, _, _, *needs = ctx.needs_input_grad
        count = len(ctx.rows)
        dx = (g @ weight).view(x.shape).to(ctx.dtype) if need_x else None
        dweights = dbiases = (None,) * count
        if dispatch.why_not_triton(g):  # of a CPU's tiles
            if any(needs):
                dweight, dbias = torch.ops.mae_fast.linear_grads(g, x2)
                dweights, dbiases = dweight.split(ctx.rows), dbias.split(ctx.rows)
        else:
            if any(needs[:count]):
                dweights = wide_product(g.t(), x2).split(ctx.rows)
            if any(needs[count:]):
                dbiases = bias_grad(grad, g).split(ctx.rows)
        grads = (t if need else None for t, need in zip((*dweights, *dbiases), needs, strict=True))
        return dx, None, None, *grads


class Copies:
    """16-bit copies of weights for a training step, which makes all of them with one launch when it
    begins, where autocast would launch one for each: `with copies: loss = ...`. They are as old as
    that beginning, as those of autocast are. Not for parameters that come and go (FSDP)."""

    def __init__(self) -> None:
        self.known: dict[tuple, Tensor] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (where it goes, the parameter)

    def __enter__(self) -> None:
        global _copies
        if self.pairs:
            with torch.no_grad():
                torch._foreach_copy_(*map(list, zip(*self.pairs, strict=True)))
        _copies = self

    def __exit__(self, *args) -> None:
        global _copies
        _copies = None


_copies: Copies | None = None


def _in_one(parts: Sequence[Tensor | None], rows: list[int], like: Tensor, *width: int) -> Tensor:
    """A tensor as `like` whose rows are those of the parts, rounded; zeros where there is none."""
    key = *map(id, parts), *rows, like.dtype
    if _copies is not None and key in _copies.known:
        return _copies.known[key]
    whole = like.new_empty(sum(rows), *width)
    places = whole.split(rows)
    for part, place in zip(parts, places, strict=True):
        place.zero_() if part is None else place.copy_(part)
    leaves = [(at, p) for at, p in zip(places, parts, strict=True) if p is not None]
    # A view of a frozen one is a leaf too, and another one in every step.
    if _copies is not None and all(p.is_leaf and p._base is None for _, p in leaves):
        _copies.known[key] = whole
        _copies.pairs += leaves
    return whole


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit tensors, in fp32 as it is summed."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _why_not_half(x: Tensor, weight: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "a compiler makes its own"
    if dispatch.autocast_dtype(x.device.type) not in (torch.bfloat16, torch.float16):
        return "there is no autocast"
    if weight.dtype != torch.float32 or x.dtype == torch.float64:
        return f"x is {x.dtype} and the weight {weight.dtype}"
    reason = dispatch.why_not_triton(x, weight)
    if reason and x.device.type == "cpu":
        if dispatch.autocast_dtype("cpu") != torch.bfloat16:
            return "tiles are of bfloat16, autocast is not"
        return dispatch.why_not_cpp(x, weight) or dispatch.load_amx()
    return reason


@dispatch.constant
def why_no_half() -> str | None:
    """Why nothing here multiplies 16-bit numbers fast, or None."""
    gpu, cpu = dispatch.load_triton(), dispatch.load_amx()
    return f"{gpu}; {cpu}" if gpu and cpu else None


def _why_not_onednn(x: Tensor, weight: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return "the product is not in fp32"
    if x.numel() == 0:
        return "x is empty"
    return why_not_onednn()


dispatch.MACHINE["onednn"] = why_not_onednn
dispatch.MACHINE["half"] = why_no_half
OP = dispatch.Op(
    "linear",
    "products: fp32 by the faster CPU library, under autocast several in one",
    {"onednn": _why_not_onednn, "half": _why_not_half, "reference": dispatch.anything},
)


@spanned(op="linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None -> [..., N]."""
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` within another op, which has its own name in a profile."""
    dispatch.check_device("linear", x=x, weight=weight, bias=bias)
    backend = OP.choose(x, weight)
    if backend == "reference":
        return linear_ref(x, weight, bias)
    if backend == "half":
        return _HalfLinear.apply(x, dispatch.autocast_dtype(x.device.type), 1, weight, bias)
    return _OneDNNLinear.apply(x, weight, bias)


def linears(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """x [..., K], layers (weight [N, K], bias [N] or None) of one size -> [..., len(layers), N] by
    one product, or None where one product is not faster."""
    weights, biases = zip(*layers, strict=True)
    shapes = {w.shape for w in weights}
    if len(shapes) > 1 or any(OP.choose(x, w) != "half" for w in weights):
        return None
    return _in_one_product(x, weights, biases).unflatten(-1, (len(layers), -1))


@spanned(op="linear")
def _in_one_product(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    dtype = dispatch.autocast_dtype(x.device.type)
    return _HalfLinear.apply(x, dtype, len(weights), *weights, *biases)
