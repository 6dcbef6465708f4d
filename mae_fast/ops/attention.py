"""attention: softmax(q k^T / sqrt(d)) v for each head, no mask, no dropout.

q [B, Sq, H, d]; k, v [B, Sk, H, d], any strides whose last is 1 (they come as projections leave
them) -> [B, Sq, H, d]. Statistics in fp32 (fp64 for double). `cpp` and `amx`, its way in bf16 where
the CPU multiplies tiles, keep no scores: backward saves q, k, v, out and each row's log-sum-exp,
and computes them again.
"""

import json
import logging
from collections.abc import Iterable
from importlib import resources

import torch
from torch import Tensor

from mae_fast.ops import attention_libraries as libraries
from mae_fast.ops import dispatch
from mae_fast.spans import spanned

log = logging.getLogger("mae_fast")


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The specification, by plain products."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).to(dtype)


dispatch.LIBRARY.define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, bool amx=False) -> (Tensor, Tensor)"
)
dispatch.LIBRARY.define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " bool amx=False) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mae_fast::attention_fwd")
def _(q, k, v, amx=False):
    batch, queries, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=dtype)


@torch.library.register_fake("mae_fast::attention_bwd")
def _(dout, q, k, v, out, lse, amx=False):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.amx = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse)


@dispatch.once_differentiable
def _backward(ctx, dout, _):
    if dout is None:
        return None, None, None, None
    return *torch.ops.mae_fast.attention_bwd(dout, *ctx.saved_tensors, ctx.amx), None


torch.library.register_autograd("mae_fast::attention_fwd", _backward, setup_context=_save)

# The same of q, k and v in one tensor [B, S, 3, H, d], whose gradient is one too: what comes from
# one product goes back into one. Queries are those of the tokens from `first` on.
dispatch.LIBRARY.define(
    "attention_qkv_fwd(Tensor qkv, int first, bool amx=False) -> (Tensor, Tensor)"
)
dispatch.LIBRARY.define(
    "attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, bool amx=False) -> Tensor"
)


def split_qkv(qkv: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S - first, H, d], k and v [B, S, H, d], views of qkv [B, S, 3, H, d]."""
    q, k, v = qkv.unbind(2)
    return q[:, first:], k, v


@torch.library.register_fake("mae_fast::attention_qkv_fwd")
def _(qkv, first, amx=False):
    batch, tokens, _, heads, width = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    out = qkv.new_empty(batch, tokens - first, heads, width)
    return out, qkv.new_empty((batch, heads, tokens - first), dtype=dtype)


@torch.library.register_fake("mae_fast::attention_qkv_bwd")
def _(dout, qkv, out, lse, amx=False):
    return qkv.new_empty(qkv.shape)


def _save_qkv(ctx, inputs, output):
    qkv, _, amx = inputs
    _save(ctx, (qkv, amx), output)


@dispatch.once_differentiable
def _qkv_backward(ctx, dout, _):
    if dout is None:
        return None, None, None
    return torch.ops.mae_fast.attention_qkv_bwd(dout, *ctx.saved_tensors, ctx.amx), None, None


torch.library.register_autograd(
    "mae_fast::attention_qkv_fwd", _qkv_backward, setup_context=_save_qkv
)


def _why_not_cpp(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    return dispatch.why_not_cpp(q, k, v) or dispatch.why_not_dtype(q.dtype)


def _why_not_amx(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    reason = _why_not_cpp(q, k, v) or dispatch.load_amx()
    if reason:
        return reason
    if q.dtype != torch.bfloat16:
        return f"dtype {q.dtype} is not bfloat16"
    if q.shape[-1] % 2 or not 16 <= q.shape[-1] <= 128:
        return f"head dim {q.shape[-1]} is not even, from 16 to 128"
    return None


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
    if q.dtype == torch.float32 and q.shape[-1] > 80:
        return f"head dim {q.shape[-1]} in float32 does not fit the registers, 80 does"
    return None if k.shape[1] else "there are no keys"


def measured_key(width: int, keys: int, dtype: torch.dtype, gradients: bool) -> str:
    """A row of the table: "d32-s2048-bfloat16-both" for 1,025 to 2,048 keys, forward and backward
    (without gradients "forward")."""
    length = 1 << max(keys - 1, 0).bit_length()
    direction = "both" if gradients else "forward"
    return f"d{width}-s{length}-{str(dtype).removeprefix('torch.')}-{direction}"


def read_measured() -> dict[str, dict[str, dict[str, float]]]:
    """The table that `make gpu` writes, kernels/measured_backends.json, or {}.

    {architecture: {measured_key: {backend: milliseconds}}}, architectures as "90" for sm_90, the
    times of a row taken side by side at the same shapes.
    """
    file = resources.files("mae_fast.kernels") / "measured_backends.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def orders(rows: dict[str, dict[str, float]]) -> dict[str, tuple[str, ...]]:
    """{measured_key: backends, the fastest first}: as flat as torch.compile wants it."""
    return {row: tuple(sorted(times, key=times.get)) for row, times in rows.items()}


architecture = dispatch.constant(lambda: "{}{}".format(*torch.cuda.get_device_capability()))
measured = dispatch.constant(lambda: orders(read_measured().get(architecture(), {})))
_guessed: set[str] = set()


class _Attention(dispatch.Op):
    def order(self, q: Tensor, k: Tensor, v: Tensor) -> Iterable[str]:
        if q.device.type != "cuda":
            return self.backends
        gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        return self.by_table(measured_key(q.shape[-1], k.shape[1], q.dtype, gradients))

    def by_table(self, row: str) -> Iterable[str]:
        """The fastest first where the row was measured, then what it does not have."""
        fastest = measured().get(row)
        if fastest:
            found = [name for name in fastest if name in self.backends]
            return [*found, *(name for name in self.backends if name not in found)]
        if not torch.compiler.is_compiling() and row not in _guessed:
            _guessed.add(row)
            where = f"sm_{architecture()}, {row}"
            log.info("attention: the order of backends is a guess, %s was not measured", where)
        return self.backends


# The order without a measured table: ours, then libraries by age, then torch, which takes all.
OP = _Attention(
    "attention",
    "attention that keeps no scores",
    {
        "amx": _why_not_amx,
        "cpp": _why_not_cpp,
        "triton": _why_not_triton,
        **{name: libraries.why_not(name) for name in libraries.LIBRARIES},
        "sdpa": dispatch.anything,
        **{name: libraries.why_not(name) for name in libraries.TORCH_KERNELS},
        "reference": dispatch.anything,
    },
)


OURS = ("amx", "cpp", "triton")


@spanned(op="attention")
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, Sq, H, d], k, v [B, Sk, H, d] -> [B, Sq, H, d]. Raises ValueError on other shapes."""
    heads = (q.shape[0], *q.shape[2:])
    if q.dim() != 4 or k.shape != v.shape or (k.shape[0], *k.shape[2:]) != heads:
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit"
        )
    dispatch.check_device("attention", q=q, k=k, v=v)
    return _by(OP.choose(q, k, v), q, k, v)


def _by(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if backend in OURS:
        return torch.ops.mae_fast.attention_fwd(q, k, v, backend == "amx")[0]
    if backend == "reference":
        return attention_ref(q, k, v)
    return libraries.compute(backend, q, k, v)


@spanned(op="attention")
def attention_qkv(qkv: Tensor, first: int = 0) -> Tensor:
    """`attention` of qkv [B, S, 3, H, d], as one product gives them -> [B, S - first, H, d]."""
    if qkv.dim() != 5 or qkv.shape[2] != 3 or not 0 <= first <= qkv.shape[1]:
        raise ValueError(f"attention_qkv: {list(qkv.shape)} is not [B, S, 3, H, d], S >= {first}")
    q, k, v = split_qkv(qkv, first)
    backend = OP.choose(q, k, v)
    if backend in OURS:
        return torch.ops.mae_fast.attention_qkv_fwd(qkv, first, backend == "amx")[0]
    return _by(backend, q, k, v)
