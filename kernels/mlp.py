"""mlp in Triton: products that have the GELU in them. A program makes one tile of the result."""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels._rows import sum_parts
from mae_fast.kernels.bias_gelu import normal


def _tiles(m, n, warps):
    of = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "GROUP": 8}
    return of | {"num_warps": warps, "num_stages": 3}


# A guess each: nothing of it has run on a GPU.
SIZES = {
    "mlp_fwd": {
        "any": [
            _tiles(128, 128, warps=8),  # 2 programs an SM
            _tiles(128, 256, warps=8),
            _tiles(64, 128, warps=4),
        ]
    },
    "mlp_bwd": {
        "any": [
            _tiles(128, 128, warps=8),
            _tiles(64, 128, warps=4),
            _tiles(128, 128, warps=8) | {"maxnreg": 128},
        ]
    },
}


@triton.jit
def _tile(rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(number, first row, first column) of this program's tile: GROUP tiles of rows take turns on
    all columns, whose weights they find in the L2 cache."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    tile = first + within % size
    return tile, tl.cast(tile, tl.int64) * BLOCK_M, within // size * BLOCK_N


@triton.jit
def _product(
    x, weight, rows, columns, K, STRIDE_N, STRIDE_K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """x [rows, K] @ weight [K, columns] in fp32, zeros past the ends of a tile."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(x + (m * K + k[None, :]), mask=(m < rows) & (k < K)[None, :], other=0.0)
        at = n * STRIDE_N + k[:, None] * STRIDE_K
        right = tl.load(weight + at, mask=(n < columns) & (k < K)[:, None], other=0.0)
        total = tl.dot(left, right, total)
    return total


@triton.jit(do_not_specialize=["rows"])
def _mlp_fwd_kernel(
    x, weight, bias, hidden, out, rows, K, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    _, row, column = _tile(rows, N, BLOCK_M, BLOCK_N, GROUP)
    of = x + row * K, weight + column * K, rows - row, N - column
    value = _product(*of, K, K, 1, BLOCK_M, BLOCK_N, BLOCK_K).to(hidden.dtype.element_ty)
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    inside = n < N - column
    h = value.to(tl.float32) + tl.load(bias + column + n, mask=inside, other=0.0).to(tl.float32)
    at, mask, first = m * N + n, (m < rows - row) & inside, row * N + column
    tl.store(hidden + first + at, value, mask=mask)
    cdf, _ = normal(h, True)
    tl.store(out + first + at, h * cdf, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _mlp_bwd_kernel(
    dout, weight, hidden, bias, dhidden, parts, rows, K, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    tile, row, column = _tile(rows, N, BLOCK_M, BLOCK_N, GROUP)
    of = dout + row * K, weight + column, rows - row, N - column
    d = _product(*of, K, 1, N, BLOCK_M, BLOCK_N, BLOCK_K)
    # One half of the columns after the other: all at once take twice the registers.
    halves = tl.split(tl.permute(tl.reshape(d, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N // 2)[None, :]
    for i in tl.static_range(2):
        first = column + i * (BLOCK_N // 2)
        inside = n < N - first
        b = tl.load(bias + first + n, mask=inside, other=0.0).to(tl.float32)
        mask = (m < rows - row) & inside
        h = tl.load(hidden + row * N + first + (m * N + n), mask=mask, other=0.0).to(tl.float32) + b
        cdf, bell = normal(h, True)
        half = halves[i] * (cdf + h * (0.3989422804014327 * bell))  # rows past the end are 0
        tl.store(dhidden + row * N + first + (m * N + n), half, mask=mask)
        to = parts + tl.cast(tile, tl.int64) * N + first + n
        tl.store(to, tl.sum(half, 0)[None, :], mask=inside)


def _sizes(kernel, rows, columns):
    """(tiles of rows, all tiles, the sizes)"""
    sizes = configs.pick(kernel)
    down = triton.cdiv(rows, sizes["BLOCK_M"])
    return down, down * triton.cdiv(columns, sizes["BLOCK_N"]), sizes


def mlp_fwd(x, weight, bias):
    """x [M, K], weight [N, K], bias [N] -> (x weight^T, its GELU with the bias), [M, N] each."""
    x, weight, (rows, width), columns = x.contiguous(), weight.contiguous(), x.shape, len(weight)
    hidden = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    out = torch.empty_like(hidden)
    _, tiles, sizes = _sizes("mlp_fwd", rows, columns)
    given = x, weight, bias.contiguous(), hidden, out, rows, width, columns
    _mlp_fwd_kernel[(tiles,)](*given, **sizes)
    return hidden, out


def mlp_bwd(dout, weight, hidden, bias):
    """dout [M, K], weight [K, N], hidden [M, N], bias [N] -> (dhidden [M, N], dbias [N]); partial
    sums by tile of rows, then their sum in order."""
    dout, weight, hidden = (t.contiguous() for t in (dout, weight, hidden))
    (rows, width), columns = dout.shape, weight.shape[1]
    dhidden = torch.empty_like(hidden)
    down, tiles, sizes = _sizes("mlp_bwd", rows, columns)
    parts = torch.empty((down, 1, columns), dtype=torch.float32, device=dout.device)
    given = dout, weight, hidden, bias.contiguous(), dhidden, parts, rows, width, columns
    _mlp_bwd_kernel[(tiles,)](*given, **sizes)
    return dhidden, *sum_parts(parts, bias.dtype)
