"""What linear has of its own in Triton: the sums of a gradient's columns, a bias's gradient."""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels._rows import LEAST_ROWS, row_programs, sum_parts

SIZES = {
    "linear_sums": {
        "any": [
            {"ROWS": 16, "COLUMNS": 256, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 16, "COLUMNS": 256, "PROGRAMS": 264, "num_warps": 4},
            {"ROWS": 16, "COLUMNS": 256, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 32, "COLUMNS": 256, "PROGRAMS": 528, "num_warps": 8},
        ]
    },
}


@triton.jit(do_not_specialize=["rows"])
def _linear_sums_kernel(x, parts, rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < D)[None, :]
        value = tl.load(x + row[:, None] * D + column[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32)
    to = parts + tl.program_id(0).to(tl.int64) * D + column
    tl.store(to, tl.sum(total, 0), mask=column < D)


def linear_sums(x):
    """x [M, N] -> [N] fp32; partial sums by program, then their sum in order."""
    x = x.contiguous()
    rows, width = x.shape
    programs, sizes = row_programs(rows, configs.pick("linear_sums"), LEAST_ROWS)
    parts = torch.empty((programs, 1, width), dtype=torch.float32, device=x.device)
    grid = programs, triton.cdiv(width, sizes["COLUMNS"])
    _linear_sums_kernel[grid](x, parts, rows, width, **sizes)
    return sum_parts(parts, torch.float32)[0]
