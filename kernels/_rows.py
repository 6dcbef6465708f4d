"""What kernels share whose programs take tiles of rows in turn: where rows lie, how many programs
there are, and the sum of their partial results in a fixed order."""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs

# A program has so many rows at least: a program's partial sums, two values a column in fp32, are
# then under a ninth of what a backward reads and writes of its rows in bf16.
LEAST_ROWS = 24

SIZES = {
    "sum_parts": {
        "any": [
            {"ROWS": 128, "COLUMNS": 16, "num_warps": 4},
            {"ROWS": 64, "COLUMNS": 32, "num_warps": 4},
            {"ROWS": 32, "COLUMNS": 64, "num_warps": 4},
        ]
    },
}


def as_rows(x):
    """x [..., D] as [outer, inner, D] whose rows are contiguous: a slice of tokens is no copy."""
    if x.dim() == 3 and x.stride(2) == 1:
        return x
    return x.contiguous().view(1, x.numel() // x.shape[-1], x.shape[-1])


def row_programs(rows, sizes, least=1):
    """(programs, the other sizes): PROGRAMS at most, which loop over rows, `least` or more each."""
    sizes = dict(sizes)
    return max(1, min(sizes.pop("PROGRAMS"), rows // max(least, sizes["ROWS"]))), sizes


@triton.jit
def row_offsets(row, inner, outer_stride, inner_stride):
    """Where rows (int64) of a tensor of `as_rows` begin."""
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit(do_not_specialize=["count"])
def _sum_parts_kernel(
    parts, first, second, third, count, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which, sums = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
        at = (row * sums + which) * D + column[None, :]
        total += tl.load(parts + at, mask=(row < count) & (column < D)[None, :], other=0.0)
    value = tl.sum(total, 0)
    if which == 0:
        tl.store(first + column, value, mask=column < D)
    elif which == 1:
        tl.store(second + column, value, mask=column < D)
    else:
        tl.store(third + column, value, mask=column < D)


def sum_parts(parts, *dtypes):
    """parts [programs, len(dtypes), D] fp32 -> 1 to 3 sums over programs, [D] of each dtype."""
    count, sums, width = parts.shape
    out = [torch.empty(width, dtype=d, device=parts.device) for d in dtypes]
    sizes = configs.pick("sum_parts")
    grid = (triton.cdiv(width, sizes["COLUMNS"]), sums)
    second = out[min(1, sums - 1)]
    _sum_parts_kernel[grid](parts, out[0], second, out[-1], count, width, **sizes)
    return out
