"""attention: softmax(q k^T / sqrt(d)) v of each head and its gradients, without the scores.

q [B, Sq, H, d], k and v [B, Sk, H, d], any strides whose last is 1; d a multiple of 16 up to 128.

    forward    a program is a block of queries of one head and runs over the keys (online softmax)
    backward   dq: a block of queries runs over the keys; its delta = rowsum(dout * out) is kept for
               dk and dv: a block of keys runs over the queries, with s^T = k q^T, so that p^T and
               ds^T are left operands as they come out of the tensor cores

s and p are computed twice in backward: nothing is summed across programs, the bits are always the
same. Exponentials are to base 2, with the scale and log2(e) in one multiply-add; sizes with BY_FMA
take as many of every eight by a polynomial, off the unit that limits the rest.

A tail of the keys (or queries) is a block of its own, the least power of two that holds it, and
the only one with a mask: 157 keys cost 160, and 1569 cost 1600. Heads are not joined in a program
where S is small: 3 programs a head fill a GPU from 8 clips, and share the keys in the L2 cache.

A d that is no power of two is two parts, 80 = 64 + 16: each product runs over both, at the cost of
d and not of 128. (112 = 64 + 48 is masked to 64 + 64.) fp32 keeps all its digits, so it has no
tensor cores: it is for checks, and for heads of up to 80.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mae_fast.kernels import configs

LOG2E = tl.constexpr(1.4426950408889634)


def _tiles(*candidates):
    names = "BLOCK_Q", "BLOCK_K", "num_warps", "num_stages", "BY_FMA"
    return [dict(zip(names, sizes, strict=False)) for sizes in candidates]


# Shape classes: head dims up to that number, "short" up to 512 keys; fp32 has no tensor cores. By
# warps an SM from registers and shared memory, then instructions a score. A polynomial pays where
# instructions are not the limit: not at 64 x 64.
SIZES = {
    "attention_fwd": {
        "d32": _tiles(
            (64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 4, 3), (64, 128, 4, 3, 1), (64, 256, 4, 2, 1)
        ),
        "d64_short": _tiles((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 2)),
        "d64_long": _tiles((64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2), (128, 64, 8, 3)),
        "d80": _tiles((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
        "d128": _tiles((64, 32, 8, 2), (64, 64, 8, 2)),
        "f32_d32": _tiles((32, 32, 8, 1)),
        "f32_d64": _tiles((16, 16, 8, 1)),
        "f32": _tiles((16, 16, 8, 1)),
    },
    "attention_bwd_dq": {
        "d32": _tiles(
            (64, 64, 4, 3),
            (64, 64, 4, 2),
            (128, 64, 8, 3),
            (64, 128, 4, 2),
            (64, 128, 4, 2, 1),
            (128, 128, 8, 2, 1),
        ),
        "d64_short": _tiles((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
        "d64_long": _tiles((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
        "d80": _tiles((64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
        "d128": _tiles((64, 32, 8, 2)),
        "f32_d32": _tiles((16, 32, 8, 1)),
        "f32_d64": _tiles((16, 16, 8, 2)),
        "f32": _tiles((16, 32, 8, 1)),
    },
    "attention_bwd_dkv": {
        "d32": _tiles((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 3)),
        "d64_short": _tiles((32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 8, 2)),
        "d64_long": _tiles((32, 64, 4, 3), (64, 128, 8, 2), (64, 64, 8, 2)),
        "d80": _tiles((32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2)),
        "d128": _tiles((16, 64, 8, 2), (16, 128, 8, 2)),
        "f32_d32": _tiles((32, 16, 8, 2)),
        "f32_d64": _tiles((16, 16, 8, 2)),
        "f32": _tiles((32, 16, 8, 2)),
    },
}


@triton.jit
def _part(rows, keep, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED):
    cols = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH > D:
        part = tl.load(rows + cols, mask=keep & (cols < D), other=0.0)
    elif MASKED:
        part = tl.load(rows + cols, mask=keep, other=0.0)
    else:
        part = tl.load(rows + cols)
    return part


@triton.jit
def _load(
    ptr, first, stride, n, BLOCK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    REST: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows [first, first + BLOCK) of a head as two parts of its columns; zeros from row n on."""
    i = tl.arange(0, BLOCK)[:, None]
    rows = ptr + tl.cast(first, tl.int64) * stride + i.to(tl.int64) * stride
    keep = i < n - first
    part = _part(rows, keep, 0, WIDE, D, MASKED)
    part2 = part
    if REST:
        part2 = _part(rows, keep, WIDE, REST, D, MASKED)
    return part, part2


@triton.jit
def _store(
    ptr, first, stride, n, x, x2, BLOCK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    REST: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, BLOCK)[:, None]
    rows = ptr + tl.cast(first, tl.int64) * stride + i.to(tl.int64) * stride
    keep = i < n - first
    tl.store(rows + tl.arange(0, WIDE)[None, :], x.to(ptr.dtype.element_ty), mask=keep)
    if REST:
        cols = WIDE + tl.arange(0, REST)[None, :]
        tl.store(rows + cols, x2.to(ptr.dtype.element_ty), mask=keep & (cols < D))


@triton.jit
def _zeros(BLOCK: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    acc = tl.zeros([BLOCK, WIDE], tl.float32)
    acc2 = acc
    if REST:
        acc2 = tl.zeros([BLOCK, REST], tl.float32)
    return acc, acc2


@triton.jit
def _dot_t(a, a2, b, b2, REST: tl.constexpr):
    """a b^T over both parts of the columns."""
    product = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST:
        product = tl.dot(a2, tl.trans(b2), product, input_precision="ieee")
    return product


@triton.jit
def _add_dot(acc, acc2, a, b, b2, REST: tl.constexpr):
    """acc + a b, for each part of b's columns."""
    acc = tl.dot(a, b, acc, input_precision="ieee")
    if REST:
        acc2 = tl.dot(a, b2, acc2, input_precision="ieee")
    return acc, acc2


@triton.jit
def _head(ptr, head, H, batch_stride, head_stride):
    """Where head number `head` of all B * H begins in a [B, S, H, d] tensor."""
    head = tl.cast(head, tl.int64)
    return ptr + head // H * batch_stride + head % H * head_stride


@triton.jit
def _exp2(x, COLUMNS: tl.constexpr, BY_FMA: tl.constexpr):
    """2^x of x [rows, COLUMNS] up to 127, not less than 2^-125 by polynomial: of degree 3, within
    7.5e-5 of the value. Eight columns side by side take the same way: in the layouts that products
    give, which values of a thread do is known when it is compiled, and only one way is."""
    y = tl.exp2(x)
    if BY_FMA:
        z = tl.maximum(x, -125.0, propagate_nan=tl.PropagateNan.ALL)
        shifted = z + 12582912.0  # 1.5 * 2^23: its last bits are those of the nearest integer
        f = z - (shifted - 12582912.0)
        p = ((0.05517132 * f + 0.24261054) * f + 0.69326099) * f + 0.99992811
        exponent = shifted.to(tl.int32, bitcast=True) << 23
        p = (p.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
        y = tl.where((tl.arange(0, COLUMNS) // 8 % 8 < BY_FMA)[None, :], p, y)
    return y


@triton.jit
def _fwd_block(
    acc, acc2, m, total, q, q2, k_ptr, v_ptr, first, Sk, k_row, v_row, D: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, BY_FMA: tl.constexpr,
    MASKED: tl.constexpr
):  # fmt: skip
    """One block of keys: the running maximum m (to base 2), the total of p and acc move on."""
    SCALE: tl.constexpr = LOG2E * D**-0.5
    k, k2 = _load(k_ptr, first, k_row, Sk, BLOCK, D, WIDE, REST, MASKED)
    v, v2 = _load(v_ptr, first, v_row, Sk, BLOCK, D, WIDE, REST, MASKED)
    s = _dot_t(q, q2, k, k2, REST)  # [BLOCK_Q, BLOCK]
    if MASKED:
        s = tl.where((tl.arange(0, BLOCK) < Sk - first)[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * SCALE)
    p = _exp2(s * SCALE - m_new[:, None], BLOCK, BY_FMA)
    alpha = tl.exp2(m - m_new)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if REST:
        acc2 = acc2 * alpha[:, None]
    acc, acc2 = _add_dot(acc, acc2, p.to(v.dtype), v, v2, REST)
    return acc, acc2, m_new, total


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, Sq, Sk, H, q_batch, q_row, q_head, k_batch, k_row,
    k_head, v_batch, v_row, v_head, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    LOOP: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BY_FMA: tl.constexpr = 0
):  # fmt: skip
    blocks = tl.cdiv(Sq, BLOCK_Q)
    head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_Q
    q_ptr = _head(q_ptr, head, H, q_batch, q_head)
    k_ptr = _head(k_ptr, head, H, k_batch, k_head)
    v_ptr = _head(v_ptr, head, H, v_batch, v_head)
    out_ptr = _head(out_ptr, head, H, tl.cast(Sq, tl.int64) * H * D, D)

    q, q2 = _load(q_ptr, first, q_row, Sq, BLOCK_Q, D, WIDE, REST, True)
    acc, acc2 = _zeros(BLOCK_Q, WIDE, REST)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    whole = Sk // BLOCK_K * BLOCK_K
    if LOOP:
        tl.assume(whole > 0)  # else the wgmma of a loop that may be empty are serialised
        for key in range(0, whole, BLOCK_K):
            acc, acc2, m, total = _fwd_block(
                acc, acc2, m, total, q, q2, k_ptr, v_ptr, key, Sk, k_row, v_row,
                D, WIDE, REST, BLOCK_K, BY_FMA, False
            )  # fmt: skip
    if TAIL:
        acc, acc2, m, total = _fwd_block(
            acc, acc2, m, total, q, q2, k_ptr, v_ptr, whole, Sk, k_row, v_row,
            D, WIDE, REST, TAIL, BY_FMA, True
        )  # fmt: skip
    acc = acc / total[:, None]
    if REST:
        acc2 = acc2 / total[:, None]
    _store(out_ptr, first, H * D, Sq, acc, acc2, BLOCK_Q, D, WIDE, REST)
    rows = first + tl.arange(0, BLOCK_Q)
    lse_ptr += tl.cast(head, tl.int64) * Sq
    tl.store(lse_ptr + rows, (m + tl.log2(total)) / LOG2E, mask=rows < Sq)


@triton.jit
def _dq_block(
    dq, dq2, q, q2, do, do2, lse, delta, k_ptr, v_ptr, first, Sk, k_row, v_row, D: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, BY_FMA: tl.constexpr,
    MASKED: tl.constexpr
):  # fmt: skip
    """One block of keys: dq += ds k, where ds = p (dp - delta) and p = 2^(s - lse)."""
    SCALE: tl.constexpr = LOG2E * D**-0.5
    k, k2 = _load(k_ptr, first, k_row, Sk, BLOCK, D, WIDE, REST, MASKED)
    v, v2 = _load(v_ptr, first, v_row, Sk, BLOCK, D, WIDE, REST, MASKED)
    s = _dot_t(q, q2, k, k2, REST) * SCALE  # [BLOCK_Q, BLOCK]
    p = _exp2(s - lse[:, None], BLOCK, BY_FMA)
    if MASKED:  # past the end p is 2^-lse, infinite where all scores are very negative
        p = tl.where((tl.arange(0, BLOCK) < Sk - first)[None, :], p, 0.0)
    ds = p * (_dot_t(do, do2, v, v2, REST) - delta[:, None])
    return _add_dot(dq, dq2, ds.to(k.dtype), k, k2, REST)


@triton.jit
def _attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, stat_ptr, Sq, Sk, H, stat_row, do_batch,
    do_row, do_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    dq_batch, dq_row, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, LOOP: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BY_FMA: tl.constexpr = 0
):  # fmt: skip
    blocks = tl.cdiv(Sq, BLOCK_Q)
    head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_Q
    do_ptr = _head(do_ptr, head, H, do_batch, do_head)
    q_ptr = _head(q_ptr, head, H, q_batch, q_head)
    k_ptr = _head(k_ptr, head, H, k_batch, k_head)
    v_ptr = _head(v_ptr, head, H, v_batch, v_head)
    out_ptr = _head(out_ptr, head, H, tl.cast(Sq, tl.int64) * H * D, D)
    dq_ptr = _head(dq_ptr, head, H, dq_batch, D)

    do, do2 = _load(do_ptr, first, do_row, Sq, BLOCK_Q, D, WIDE, REST, True)
    out, out2 = _load(out_ptr, first, H * D, Sq, BLOCK_Q, D, WIDE, REST, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if REST:
        delta += tl.sum(do2.to(tl.float32) * out2.to(tl.float32), 1)
    rows = first + tl.arange(0, BLOCK_Q)
    lse = tl.load(lse_ptr + tl.cast(head, tl.int64) * Sq + rows, mask=rows < Sq, other=0.0) * LOG2E
    stat_ptr += tl.cast(head, tl.int64) * 2 * stat_row + rows
    tl.store(stat_ptr, lse, mask=rows < stat_row)
    tl.store(stat_ptr + stat_row, delta, mask=rows < stat_row)

    q, q2 = _load(q_ptr, first, q_row, Sq, BLOCK_Q, D, WIDE, REST, True)
    dq, dq2 = _zeros(BLOCK_Q, WIDE, REST)
    whole = Sk // BLOCK_K * BLOCK_K
    if LOOP:
        tl.assume(whole > 0)  # else the wgmma of a loop that may be empty are serialised
        for key in range(0, whole, BLOCK_K):
            dq, dq2 = _dq_block(
                dq, dq2, q, q2, do, do2, lse, delta, k_ptr, v_ptr, key, Sk, k_row, v_row,
                D, WIDE, REST, BLOCK_K, BY_FMA, False
            )  # fmt: skip
    if TAIL:
        dq, dq2 = _dq_block(
            dq, dq2, q, q2, do, do2, lse, delta, k_ptr, v_ptr, whole, Sk, k_row, v_row,
            D, WIDE, REST, TAIL, BY_FMA, True
        )  # fmt: skip
    dq *= D**-0.5
    if REST:
        dq2 *= D**-0.5
    _store(dq_ptr, first, dq_row, Sq, dq, dq2, BLOCK_Q, D, WIDE, REST)


@triton.jit
def _dkv_block(
    dk, dk2, dv, dv2, k, k2, v, v2, q_ptr, do_ptr, stat_ptr, first, Sq, stat_row, q_row, do_row,
    D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr
):  # fmt: skip
    """One block of queries: dv += p^T do and dk += ds^T q. Past the end do = 0 and so is ds."""
    SCALE: tl.constexpr = LOG2E * D**-0.5
    rows = first + tl.arange(0, BLOCK)
    if MASKED:
        lse = tl.load(stat_ptr + rows, mask=rows < Sq, other=0.0)
        delta = tl.load(stat_ptr + stat_row + rows, mask=rows < Sq, other=0.0)
    else:
        lse = tl.load(stat_ptr + rows)
        delta = tl.load(stat_ptr + stat_row + rows)
    q, q2 = _load(q_ptr, first, q_row, Sq, BLOCK, D, WIDE, REST, MASKED)
    do, do2 = _load(do_ptr, first, do_row, Sq, BLOCK, D, WIDE, REST, MASKED)
    p = tl.exp2(_dot_t(k, k2, q, q2, REST) * SCALE - lse[None, :])  # [BLOCK_K, BLOCK]
    dv, dv2 = _add_dot(dv, dv2, p.to(do.dtype), do, do2, REST)
    ds = p * (_dot_t(v, v2, do, do2, REST) - delta[None, :])
    dk, dk2 = _add_dot(dk, dk2, ds.to(q.dtype), q, q2, REST)
    return dk, dk2, dv, dv2


@triton.jit
def _attention_bwd_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, stat_ptr, dk_ptr, dv_ptr, Sq, Sk, H, stat_row, do_batch, do_row,
    do_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dk_batch,
    dk_row, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, LOOP: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(Sk, BLOCK_K)
    head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_K
    do_ptr = _head(do_ptr, head, H, do_batch, do_head)
    q_ptr = _head(q_ptr, head, H, q_batch, q_head)
    k_ptr = _head(k_ptr, head, H, k_batch, k_head)
    v_ptr = _head(v_ptr, head, H, v_batch, v_head)
    dk_ptr = _head(dk_ptr, head, H, dk_batch, D)
    dv_ptr = _head(dv_ptr, head, H, dk_batch, D)
    stat_ptr += tl.cast(head, tl.int64) * 2 * stat_row

    k, k2 = _load(k_ptr, first, k_row, Sk, BLOCK_K, D, WIDE, REST, True)
    v, v2 = _load(v_ptr, first, v_row, Sk, BLOCK_K, D, WIDE, REST, True)
    dk, dk2 = _zeros(BLOCK_K, WIDE, REST)
    dv, dv2 = _zeros(BLOCK_K, WIDE, REST)
    whole = Sq // BLOCK_Q * BLOCK_Q
    if LOOP:
        tl.assume(whole > 0)  # else the wgmma of a loop that may be empty are serialised
        for query in range(0, whole, BLOCK_Q):
            dk, dk2, dv, dv2 = _dkv_block(
                dk, dk2, dv, dv2, k, k2, v, v2, q_ptr, do_ptr, stat_ptr, query, Sq, stat_row,
                q_row, do_row, D, WIDE, REST, BLOCK_Q, False
            )  # fmt: skip
    if TAIL:
        dk, dk2, dv, dv2 = _dkv_block(
            dk, dk2, dv, dv2, k, k2, v, v2, q_ptr, do_ptr, stat_ptr, whole, Sq, stat_row,
            q_row, do_row, D, WIDE, REST, TAIL, True
        )  # fmt: skip
    dk *= D**-0.5
    if REST:
        dk2 *= D**-0.5
    _store(dk_ptr, first, dk_row, Sk, dk, dk2, BLOCK_K, D, WIDE, REST)
    _store(dv_ptr, first, dk_row, Sk, dv, dv2, BLOCK_K, D, WIDE, REST)


def _shape_class(k: Tensor) -> str:
    """The nearest of the shape classes of SIZES: by dtype, head dim and number of keys."""
    length, d = k.shape[1], k.shape[3]
    if k.dtype == torch.float32:
        return "f32_d32" if d <= 32 else "f32_d64" if d <= 64 else "f32"
    if d <= 32:
        return "d32"
    if d <= 64:
        return "d64_short" if length <= 512 else "d64_long"
    return "d80" if d <= 80 else "d128"


def _sizes(kernel: str, k: Tensor, blocked: str, length: int) -> dict[str, int]:
    """A kernel's constexprs: its sizes, and those that follow from d and from the length that it
    runs over in blocks."""
    sizes, d = configs.pick(kernel, _shape_class(k)), k.shape[3]
    wide = 1 << d.bit_length() - 1
    if wide == d and (d == 128 or (d > 16 and k.dtype == torch.float32)):
        wide //= 2  # sm_80, and any GPU in fp32, holds a whole part of q in registers
    rest = triton.next_power_of_2(d - wide) if d > wide else 0
    loop, tail = divmod(length, sizes[blocked])
    tail = max(16, triton.next_power_of_2(tail)) if tail else 0
    return {"D": d, "WIDE": wide, "REST": rest, "LOOP": loop > 0, "TAIL": tail, **sizes}


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """-> out [B, Sq, H, d], and the scores' log-sum-exp, f32 [B, H, Sq] (natural logarithm)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # contiguous, whatever q is
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    sizes = _sizes("attention_fwd", k, "BLOCK_K", k.shape[1])
    _attention_fwd_kernel[(batch * heads * triton.cdiv(queries, sizes["BLOCK_Q"]),)](
        q, k, v, out, lse, queries, k.shape[1], heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **sizes
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq [B, Sq, H, d], dk and dv [B, Sk, H, d]."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    _backward(dout, q, k, v, out, lse, dq, dk, dv)
    return dq, dk, dv


def _split(qkv: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return q[:, first:], k, v


def attention_qkv_fwd(qkv: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """qkv [B, S, 3, H, d] -> as attention_fwd of the queries from `first` on."""
    return attention_fwd(*_split(qkv, first))


def attention_qkv_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """-> the gradient of qkv [B, S, 3, H, d], contiguous; zeros for queries that were not asked."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    first = qkv.shape[1] - out.shape[1]
    dqkv[:, :first, 0].zero_()
    _backward(dout, *_split(qkv, first), out, lse, *_split(dqkv, first))
    return dqkv


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq, dk, dv
) -> None:
    """Writes dq, and dk and dv, which have the same strides; heads lie together in each."""
    dout, q, k, v = _rows(dout), _rows(q), _rows(k), _rows(v)
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    # log-sum-exp to base 2, and delta: whole blocks of 16, so that both rows of a head are aligned
    row = triton.cdiv(queries, 16) * 16
    stat = torch.empty((batch, heads, 2, row), dtype=torch.float32, device=q.device)
    strides = [n for t in (dout, q, k, v) for n in t.stride()[:3]]
    sizes = _sizes("attention_bwd_dq", k, "BLOCK_K", keys)
    _attention_bwd_dq_kernel[(batch * heads * triton.cdiv(queries, sizes["BLOCK_Q"]),)](
        dout, q, k, v, out.contiguous(), lse.contiguous(), dq, stat, queries, keys, heads,
        row, *strides, *dq.stride()[:2], **sizes
    )  # fmt: skip
    sizes = _sizes("attention_bwd_dkv", k, "BLOCK_Q", queries)
    _attention_bwd_dkv_kernel[(batch * heads * triton.cdiv(keys, sizes["BLOCK_K"]),)](
        dout, q, k, v, stat, dk, dv, queries, keys, heads, row, *strides, *dk.stride()[:2], **sizes
    )  # fmt: skip
