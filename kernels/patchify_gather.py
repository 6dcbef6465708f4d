"""patchify_gather in Triton: one program reads the pixel lines of one token and writes them.

A line is a patch's row of one channel and frame: 16 bytes for patches of 16, one load where the
clip's rows are contiguous. An id that is no token gives a row of NaN, and reads nothing.
"""

import math

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs

SIZES = {
    "patchify_gather_fwd": {
        "any": [
            {"LINES": 32, "num_warps": 1},  # of the 96 lines of a token of ViT-B
            {"LINES": 128, "num_warps": 4},
            {"LINES": 32, "num_warps": 2, "maxnreg": 80},
            {"LINES": 16, "num_warps": 1},
        ]
    },
}


@triton.jit
def divide(a, b, reciprocal):
    """a / b rounded once, if `reciprocal` is 1 / b rounded once (Markstein's theorem)."""
    q = a * reciprocal
    return tl.fma(tl.fma(-q, b, a), reciprocal, q)


@triton.jit
def normalise(pixels, mean, std):
    """Pixels in fp32; bytes as (x / 255 - mean) / std, each step rounded as plain torch does."""
    if pixels.dtype == tl.uint8:
        x = divide(pixels.to(tl.int32).to(tl.float32), 255.0, tl.div_rn(1.0, 255.0))
        return divide(x - mean, std, tl.div_rn(1.0, std))
    else:
        return pixels.to(tl.float32)


@triton.jit
def locate(token, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(whether it is a token of these `length`, its t, its row and its column in their grid)."""
    there = (token >= 0) & (token < length)
    token = tl.where(there, token, 0).to(tl.int32)
    t = token // (ROWS * COLUMNS)
    return there, t, token // COLUMNS - t * ROWS, token % COLUMNS


@triton.jit
def offsets(line, frame, x, sc, st, sh, sw, T_PATCH: tl.constexpr, PATCH: tl.constexpr):
    """Where pixel x of line (c, u, y) of a patch lies in a clip, from `frame`s and a corner."""
    line = line.to(tl.int64)
    at = line // (T_PATCH * PATCH) * sc + frame.to(tl.int64) * st + line % PATCH * sh
    return at + x.to(tl.int64) * sw


@triton.jit
def _patchify_gather_fwd_kernel(
    out,
    video,
    ids,
    length,
    sb,
    sc,
    st,
    sh,
    sw,
    mean,
    std,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    T_PATCH: tl.constexpr,
    PATCH: tl.constexpr,
    PIXELS: tl.constexpr,
    LINES: tl.constexpr,
):
    clip = tl.program_id(1).to(tl.int64)
    row = clip * tl.num_programs(0) + tl.program_id(0)
    there, t, r, c = locate(tl.load(ids + row), length, ROWS, COLUMNS)
    corner = clip * sb + r.to(tl.int64) * PATCH * sh + c.to(tl.int64) * PATCH * sw
    lines: tl.constexpr = CHANNELS * T_PATCH * PATCH
    x = tl.arange(0, PIXELS)[None, :]
    for first in tl.static_range(0, lines, LINES):
        line = first + tl.arange(0, LINES)[:, None]
        frame = t * T_PATCH + line // PATCH % T_PATCH
        at = video + corner + offsets(line, frame, x, sc, st, sh, sw, T_PATCH, PATCH)
        mask = (line < tl.where(there, lines, 0)) & (x < PATCH)
        value = normalise(tl.load(at, mask=mask, other=0), mean, std)
        value = tl.where(there, value, float("nan")).to(out.dtype.element_ty)
        to = out + row * (lines * PATCH) + line * PATCH + x
        tl.store(to, value, mask=(line < lines) & (x < PATCH))


def patchify_gather_fwd(video, ids, t_patch, patch, mean, std, dtype):
    """video [B, C, T, H, W] of any strides, ids [B, K] -> patches [B, K, C*t_patch*patch*patch]."""
    _, channels, frames, height, width = video.shape
    lines = channels * t_patch * patch
    out = torch.empty((*ids.shape, lines * patch), dtype=dtype, device=video.device)
    if out.numel():
        grid = (frames // t_patch, height // patch, width // patch)
        _patchify_gather_fwd_kernel[ids.shape[1], ids.shape[0]](
            out,
            video,
            ids.contiguous(),
            math.prod(grid),
            *video.stride(),
            mean,
            std,
            *grid[1:],
            channels,
            t_patch,
            patch,
            triton.next_power_of_2(patch),
            **configs.pick("patchify_gather_fwd"),
        )
    return out
