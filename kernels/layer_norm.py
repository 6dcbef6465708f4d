"""layer_norm in Triton, alone and after a residual addition: programs take tiles of rows in turn.

A row is loaded once, and its statistics are taken from registers in two passes, since one loses the
variance of a distant mean. A slice of tokens ([B, S, D][:, first:]) is read in place; a gradient
that is not contiguous is copied.
"""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels._rows import LEAST_ROWS, as_rows, row_offsets, row_programs, sum_parts

SIZES = {
    # Rows' shape classes: their width as a power of two. PROGRAMS: how many share the rows.
    "layer_norm_fwd": {
        "512": [
            {"ROWS": 4, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 4224, "num_warps": 2},
            {"ROWS": 1, "PROGRAMS": 8448, "num_warps": 1},
            {"ROWS": 8, "PROGRAMS": 1056, "num_warps": 8},
        ],
        "1024": [
            {"ROWS": 2, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 1, "PROGRAMS": 4224, "num_warps": 2},
            {"ROWS": 4, "PROGRAMS": 1056, "num_warps": 8},
        ],
        "2048": [
            {"ROWS": 1, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 1056, "num_warps": 8},
        ],
    },
    "layer_norm_bwd": {
        "512": [
            {"ROWS": 4, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 4, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 8, "PROGRAMS": 264, "num_warps": 8},
        ],
        "1024": [
            {"ROWS": 2, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 4, "PROGRAMS": 264, "num_warps": 8},
        ],
        "2048": [
            {"ROWS": 2, "PROGRAMS": 264, "num_warps": 8},
            {"ROWS": 1, "PROGRAMS": 528, "num_warps": 4},
        ],
    },
}


@triton.jit(do_not_specialize=["rows", "inner", "y_inner"])
def _layer_norm_fwd_kernel(
    x,
    y,
    weight,
    bias,
    total,
    out,
    mean,
    rstd,
    rows,
    inner,
    x_outer,
    x_inner,
    y_inner,
    y_outer,
    y_row,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < D
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there, mask = row < rows, (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * D + column[None, :]
        start = row_offsets(row, inner, x_outer, x_inner)
        value = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if y is not None:
            start = row_offsets(row, y_inner, y_outer, y_row)
            added = tl.load(y + start[:, None] + column[None, :], mask=mask, other=0.0)
            # What is normalised is the sum as it is stored.
            rounded = (value + added.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=mask)
            value = rounded.to(tl.float32)
        m = tl.sum(value, 1) / D
        distance = tl.where(mask, value - m[:, None], 0.0)
        r = tl.rsqrt(tl.sum(distance * distance, 1) / D + eps)
        tl.store(mean + row, m, mask=there)
        tl.store(rstd + row, r, mask=there)
        tl.store(out + at, distance * r[:, None] * w + b, mask=mask)


@triton.jit(do_not_specialize=["rows", "inner", "tokens", "first"])
def _layer_norm_bwd_kernel(
    dtotal,
    dout,
    x,
    weight,
    mean,
    rstd,
    dx,
    dy,
    parts,
    rows,
    inner,
    x_outer,
    x_inner,
    tokens,
    first,
    D: tl.constexpr,
    PART: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < D
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    total = dbias
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there, mask = row < rows, (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * D + column[None, :]
        start = row_offsets(row, inner, x_outer, x_inner)
        value = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0)
        m = tl.load(mean + row, mask=there, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=there, other=0.0)[:, None]
        # Outside the row d is zero, and so is everything added.
        d = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        n = (value.to(tl.float32) - m) * r
        g = d * w
        a = tl.sum(g, 1)[:, None] / D
        b = tl.sum(g * n, 1)[:, None] / D
        gradient = (g - a - n * b) * r
        if dtotal is not None:
            if PART:
                token = row % tokens - first
                mine = ((row // tokens * (tokens - first) + token) * D)[:, None] + column[None, :]
                there_too = mask & (token >= 0)[:, None]
                gradient += tl.load(dtotal + mine, mask=there_too, other=0.0).to(tl.float32)
            else:
                gradient += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, gradient, mask=mask)
        if dy is not None:
            tl.store(dy + at, gradient, mask=mask)
        dweight += d * n
        dbias += d
        if SUMS:
            total += gradient
    to = parts + tl.program_id(0).to(tl.int64) * (2 + SUMS) * D + column
    tl.store(to, tl.sum(dweight, 0), mask=inside)
    tl.store(to + D, tl.sum(dbias, 0), mask=inside)
    if SUMS:
        tl.store(to + 2 * D, tl.sum(total, 0), mask=inside)


def _sizes(kernel, rows, width, least=1, sums=False):
    """(programs, sizes) for rows of this width; narrow rows share a shape class, and wide ones."""
    block = triton.next_power_of_2(width)
    shape = str(min(max(block, 512), 2048)) + "_sums" * sums
    programs, sizes = row_programs(rows, configs.pick(kernel, shape), least)
    return programs, {"BLOCK": block, **sizes}


def forward(kernel, x, y, weight, bias, eps, dtype):
    """-> (total or None, out of `dtype`, mean, rstd) for x, or for x + y where there is a y."""
    total = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    rows = as_rows(x)
    others = rows if y is None else as_rows(y)
    programs, sizes = _sizes(kernel, mean.numel(), x.shape[-1])
    _layer_norm_fwd_kernel[programs,](
        rows,
        None if y is None else others,
        weight.contiguous(),
        bias.contiguous(),
        total,
        out,
        mean,
        rstd,
        mean.numel(),
        rows.shape[1],
        *rows.stride()[:2],
        others.shape[1],
        *others.stride()[:2],
        eps,
        x.shape[-1],
        **sizes,
    )
    return total, out, mean, rstd


def backward(kernel, dtotal, dout, x, weight, mean, rstd, y_dtype, first=0, sums=False):
    """-> (dx, dy, dweight, dbias, if `sums` those of dx's columns); x is the sum where there was
    one, and dtotal its own gradient, of tokens from `first` on; dy is dx of y_dtype, or holds
    nothing where dx is."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    narrow = y_dtype != x.dtype
    dy = torch.empty(x.shape if narrow else (0,), dtype=y_dtype, device=x.device)
    rows, width = as_rows(x), x.shape[-1]
    programs, sizes = _sizes(kernel, mean.numel(), width, LEAST_ROWS, sums)
    parts = torch.empty((programs, 2 + sums, width), dtype=torch.float32, device=x.device)
    _layer_norm_bwd_kernel[programs,](
        None if dtotal is None else dtotal.contiguous(),
        dout.contiguous(),
        rows,
        weight.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        dx,
        dy if narrow else None,
        parts,
        mean.numel(),
        rows.shape[1],
        *rows.stride()[:2],
        x.shape[-2] if first else 1,
        first,
        width,
        first > 0,
        sums,
        **sizes,
    )
    return dx, dy, *sum_parts(parts, weight.dtype, weight.dtype, *[torch.float32] * sums)


def layer_norm_fwd(x, weight, bias, eps, dtype):
    """x [..., D], weight and bias [D] -> (out [..., D] of `dtype`, mean, rstd [...] fp32)."""
    return forward("layer_norm_fwd", x, None, weight, bias, eps, dtype)[1:]


def layer_norm_bwd(dout, x, weight, mean, rstd):
    """-> (dx, dweight, dbias); partial sums by program, then their sum in order."""
    dx, _, *rest = backward("layer_norm_bwd", None, dout, x, weight, mean, rstd, x.dtype)
    return dx, *rest
