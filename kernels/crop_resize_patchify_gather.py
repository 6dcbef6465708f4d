"""crop_resize_patchify_gather in Triton: one program resamples the pixels of one token.

Clips of different sizes, boxes and colours lie in one buffer, and a table on the device says how:
nothing of a launch depends on its numbers, so that it may be part of a CUDA graph. An id that is no
token, a box that is not within its frames, or a frame that is not within the buffer, gives NaN, and
reads nothing. The columns of the table are those of mae_fast/ops/source.py.
"""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels.patchify_gather import locate

_NUMBERS = 14  # a table's columns before the places of the frames

SIZES = {
    "crop_resize_patchify_gather_fwd": {
        # With 32 lines to 2 warps Triton 3.6 takes 127 registers where 3.8 takes 80, and at a limit
        # of 80 it spills; with 4 warps it spills on sm_100.
        "channel_first": [
            {"LINES": 16, "num_warps": 2},
            {"LINES": 32, "num_warps": 4},
            {"LINES": 32, "num_warps": 2},
        ],
        "channel_last": [{"LINES": 32, "num_warps": 8}, {"LINES": 16, "num_warps": 8}],
    },
}


@triton.jit
def _taps(pixel, start, length, SIZE: tl.constexpr):
    """The two source pixels of a bilinear sample, and the share of the second, in the arithmetic of
    F.interpolate with align_corners=False: output pixels of SIZE, source [start, start + length).
    """
    scale = tl.div_rn(length.to(tl.float32), 1.0 * SIZE)
    real = tl.maximum(tl.fma(scale, pixel.to(tl.float32) + 0.5, -0.5), 0.0)
    low = tl.minimum(real.to(tl.int32), length - 1)
    share = tl.minimum(real - low.to(tl.float32), 1.0)
    return start + low, start + tl.minimum(low + 1, length - 1), share


@triton.jit
def _byte(at, mask):
    return tl.load(at, mask=mask, other=0).to(tl.int32)


@triton.jit
def _pixel(frame, y, x, chan, mask, rows, across, planar, luma, bright, by_u, by_v):
    """R, G or B of the pixel (y, x) of a frame of rows x across, in fp32."""
    y, x, half = y.to(tl.int64), x.to(tl.int64), (across + 1) // 2
    at = y * across + x
    lit = _byte(frame + tl.where(planar, at, at * 3 + chan), mask)
    beside = rows * across + y // 2 * half + x // 2
    u = _byte(frame + beside, mask & planar)
    v = _byte(frame + beside + (rows + 1) // 2 * half, mask & planar)
    value = (8 * lit - luma) * bright >> 16
    value += ((8 * u - 1024) * by_u >> 16) + ((8 * v - 1024) * by_v >> 16)
    value = tl.minimum(tl.maximum(value, 0), 255)
    return tl.where(planar, value, lit).to(tl.float32)


@triton.jit
def _crop_resize_patchify_gather_fwd_kernel(
    out,
    flat,
    table,
    ids,
    length,
    bytes_,
    columns,
    scale,
    shift,
    SIZE: tl.constexpr,
    T_PATCH: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNEL_LAST: tl.constexpr,
    NUMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
):
    clip = tl.program_id(1).to(tl.int64)
    row = clip * tl.num_programs(0) + tl.program_id(0)
    side: tl.constexpr = SIZE // PATCH
    there, t, r, c = locate(tl.load(ids + row), length, side, side)

    entry = table + clip * columns
    rows, across = tl.load(entry), tl.load(entry + 1)
    top, left = tl.load(entry + 2), tl.load(entry + 3)
    height, width = tl.load(entry + 4), tl.load(entry + 5)
    there = there & (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
    there = there & (top <= rows - height) & (left <= across - width)
    there = there & (rows < 1 << 20) & (across < 1 << 20)
    planar = tl.load(entry + 7) != 0
    chroma = 2 * ((rows + 1) // 2) * ((across + 1) // 2)
    bytes_ -= tl.where(planar, rows * across + chroma, 3 * rows * across)
    for i in tl.static_range(T_PATCH):
        begin = tl.load(entry + NUMBERS + t * T_PATCH + i)
        there = there & (begin >= 0) & (begin <= bytes_)
    luma, bright = tl.load(entry + 8).to(tl.int32), tl.load(entry + 9).to(tl.int32)
    crv, cgu = tl.load(entry + 10).to(tl.int32), tl.load(entry + 11).to(tl.int32)
    cgv, cbu = tl.load(entry + 12).to(tl.int32), tl.load(entry + 13).to(tl.int32)

    # A line of the output: values i = (x, c) of one (u, y), or pixels x of one (c, u, y).
    chans: tl.constexpr = 3
    each: tl.constexpr = chans if CHANNEL_LAST else 1
    lines: tl.constexpr = chans // each * T_PATCH * PATCH
    i = tl.arange(0, WIDTH)[None, :]
    column = c * PATCH + i // each
    column = tl.where(tl.load(entry + 6) != 0, SIZE - 1 - column, column)
    near, far, p = _taps(column, left.to(tl.int32), width.to(tl.int32), SIZE)
    for first in tl.static_range(0, lines, LINES):
        line = first + tl.arange(0, LINES)[:, None]
        above, below, q = _taps(
            r * PATCH + line % PATCH, top.to(tl.int32), height.to(tl.int32), SIZE
        )
        chan = i % each + line // (T_PATCH * PATCH)
        u = line // PATCH % T_PATCH
        frame = flat + tl.load(entry + NUMBERS + t * T_PATCH + u)
        mask = (line < tl.where(there, lines, 0)) & (i < PATCH * each)
        by_u = tl.where(chan == 0, 0, tl.where(chan == 1, cgu, cbu))
        by_v = tl.where(chan == 0, crv, tl.where(chan == 1, cgv, 0))
        how = (chan, mask, rows, across, planar, luma, bright, by_u, by_v)
        a, b = _pixel(frame, above, near, *how), _pixel(frame, above, far, *how)
        first_row = (1 - p) * a + p * b
        a, b = _pixel(frame, below, near, *how), _pixel(frame, below, far, *how)
        value = (1 - q) * first_row + q * ((1 - p) * a + p * b)
        value = tl.where(there, tl.fma(value, scale, shift), float("nan"))
        # Another shape, so that the stores' width does not spread the loads over more lines.
        value = tl.reshape(value.to(out.dtype.element_ty), [LINES * WIDTH])
        j = tl.arange(0, LINES * WIDTH)
        to = (first + j // WIDTH) * (PATCH * each) + j % WIDTH
        mask = (first + j // WIDTH < lines) & (j % WIDTH < PATCH * each)
        tl.store(out + row * (lines * PATCH * each) + to, value, mask=mask)


def crop_resize_patchify_gather_fwd(
    flat, table, ids, size, t_patch, patch, mean, std, dtype, channel_last
):
    """uint8 [bytes], its table int64 [B, 14 + T], ids [B, K] -> [B, K, P]."""
    out = torch.empty((*ids.shape, 3 * t_patch * patch * patch), dtype=dtype, device=ids.device)
    if out.numel():
        width = patch * 3 if channel_last else patch
        order = "channel_last" if channel_last else "channel_first"
        frames = table.shape[1] - _NUMBERS
        _crop_resize_patchify_gather_fwd_kernel[ids.shape[1], ids.shape[0]](
            out,
            flat,
            table.contiguous(),
            ids.contiguous(),
            frames // t_patch * (size // patch) ** 2,
            flat.numel(),
            table.shape[1],
            1 / (255 * std),
            -mean / std,
            size,
            t_patch,
            patch,
            channel_last,
            _NUMBERS,
            triton.next_power_of_2(width),
            **configs.pick("crop_resize_patchify_gather_fwd", order),
        )
    return out
