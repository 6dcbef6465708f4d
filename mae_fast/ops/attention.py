"""attention: softmax(q k^T / sqrt(d)) v for each head, no mask, no dropout.

q [B, Sq, H, d]; k, v [B, Sk, H, d], any strides whose last is 1 (they come as projections leave
them) -> [B, Sq, H, d]. Statistics in fp32 (fp64 for double). `cpp` keeps no scores: backward saves
q, k, v, out and each row's log-sum-exp, and computes them again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The specification, by plain products."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).to(dtype)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, by whichever of its kernels torch takes."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


dispatch.LIBRARY.define("attention_fwd(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
dispatch.LIBRARY.define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mae_fast::attention_fwd")
def _(q, k, v):
    batch, queries, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=dtype)


@torch.library.register_fake("mae_fast::attention_bwd")
def _(dout, q, k, v, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs, out, lse)


@torch.autograd.function.once_differentiable
def _backward(ctx, dout, _):
    return torch.ops.mae_fast.attention_bwd(dout, *ctx.saved_tensors)


torch.library.register_autograd("mae_fast::attention_fwd", _backward, setup_context=_save)


def _why_not_cpp(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    return dispatch.why_not_cpp(q, k, v) or dispatch.why_not_dtype(q.dtype)


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    reason = dispatch.why_not_triton(q, k, v)
    if reason:
        return reason
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {q.dtype} is none of float32, bfloat16, float16"
    if q.shape[-1] % 16 or not 16 <= q.shape[-1] <= 128:
        return f"head dim {q.shape[-1]} is not a multiple of 16 up to 128"
    return None if k.shape[1] else "there are no keys"


OP = dispatch.Op(
    "attention",
    "attention that keeps no scores",
    {
        "cpp": _why_not_cpp,
        "triton": _why_not_triton,
        "sdpa": dispatch.anything,
        "reference": dispatch.anything,
    },
)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, Sq, H, d], k, v [B, Sk, H, d] -> [B, Sq, H, d]. Raises ValueError on other shapes."""
    heads = (q.shape[0], *q.shape[2:])
    if q.dim() != 4 or k.shape != v.shape or (k.shape[0], *k.shape[2:]) != heads:
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit"
        )
    backend = OP.choose(q, k, v)
    if backend in ("cpp", "triton"):
        return torch.ops.mae_fast.attention_fwd(q, k, v)[0]
    return (attention_sdpa if backend == "sdpa" else attention_ref)(q, k, v)
