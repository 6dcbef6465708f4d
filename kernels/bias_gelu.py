"""bias_gelu in Triton: a program takes tiles of some columns in turn, and reads their bias once."""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels._rows import LEAST_ROWS, row_programs, sum_parts

SIZES = {
    "bias_gelu_fwd": {
        "any": [
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 2, "COLUMNS": 1024, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 4224, "num_warps": 4},
        ]
    },
    "bias_gelu_bwd": {
        "any": [
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 4, "COLUMNS": 256, "PROGRAMS": 132, "num_warps": 4},
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 132, "num_warps": 4},
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 264, "num_warps": 4},
        ]
    },
}


@triton.jit
def normal(h, NARROW: tl.constexpr):
    """(the normal distribution's cdf at h, exp(-h^2 / 2)): with the exact erf, or for 16 bits with
    one to 1.5e-7 (Abramowitz and Stegun 7.1.26), which needs the same exponential."""
    bell = tl.exp(-0.5 * h * h)
    if NARROW:
        t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(h))
        tail = 0.5 * 1.061405429 * t - 0.5 * 1.453152027
        tail = tail * t + 0.5 * 1.421413741
        tail = tail * t - 0.5 * 0.284496736
        tail = (tail * t + 0.5 * 0.254829592) * t * bell
        cdf = tl.where(h < 0, tail, 1.0 - tail)
    else:
        cdf = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    return cdf, bell


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_fwd_kernel(
    x, bias, out, rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * F + column[None, :]
        mask = (row < rows)[:, None] & (column < F)[None, :]
        h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b
        cdf, _ = normal(h, x.dtype.element_ty.primitive_bitwidth == 16)
        tl.store(out + at, h * cdf, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_bwd_kernel(
    dout, x, bias, dx, parts, rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.load(bias + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * F + column[None, :]
        mask = (row < rows)[:, None] & (column < F)[None, :]
        h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b
        d = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        cdf, bell = normal(h, x.dtype.element_ty.primitive_bitwidth == 16)
        d *= cdf + h * (0.3989422804014327 * bell)
        tl.store(dx + at, d, mask=mask)
        dbias += d
    to = parts + tl.program_id(0).to(tl.int64) * F + column
    tl.store(to, tl.sum(dbias, 0), mask=column < F)


def _sizes(kernel, rows, width, least=1):
    programs, sizes = row_programs(rows, configs.pick(kernel), least)
    return (programs, triton.cdiv(width, sizes["COLUMNS"])), sizes


def bias_gelu_fwd(x, bias):
    """x [..., F], bias [F] -> [..., F] of x's dtype. An x that is not contiguous is copied."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    grid, sizes = _sizes("bias_gelu_fwd", rows, width)
    _bias_gelu_fwd_kernel[grid](x.contiguous(), bias.contiguous(), out, rows, width, **sizes)
    return out


def bias_gelu_bwd(dout, x, bias):
    """-> (dx of x's dtype, dbias); partial sums by program, then their sum in order."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    grid, sizes = _sizes("bias_gelu_bwd", rows, width, LEAST_ROWS)
    parts = torch.empty((grid[0], 1, width), dtype=torch.float32, device=x.device)
    _bias_gelu_bwd_kernel[grid](
        dout.contiguous(), x.contiguous(), bias.contiguous(), dx, parts, rows, width, **sizes
    )
    return dx, *sum_parts(parts, bias.dtype)
