"""crop_resize_patchify_gather in Triton: one program resamples the pixels of one token.

Clips of different sizes and places in memory come as a table of addresses, strides and sizes,
copied to the device without a wait: a launch is right for these frames only, and so is no part of
a CUDA graph (RuntimeError). An id that is no token, or a box that is not within its frames, gives
NaN, and reads nothing.
"""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels.patchify_gather import locate


@triton.jit
def _taps(pixel, start, length, SIZE: tl.constexpr):
    """The two source pixels of a bilinear sample, and the share of the second, in the arithmetic of
    F.interpolate with align_corners=False: output pixels of SIZE, source [start, start + length).
    """
    scale = tl.div_rn(length.to(tl.float32), 1.0 * SIZE)
    real = tl.maximum(tl.fma(scale, pixel.to(tl.float32) + 0.5, -0.5), 0.0)
    low = tl.minimum(real.to(tl.int64), length - 1)
    share = tl.minimum(real - low.to(tl.float32), 1.0)
    return start + low, start + tl.minimum(low + 1, length - 1), share


@triton.jit
def _crop_resize_patchify_gather_fwd_kernel(
    out,
    table,
    boxes,
    flips,
    ids,
    length,
    scale,
    shift,
    SIZE: tl.constexpr,
    T_PATCH: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNEL_LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
):
    clip = tl.program_id(1).to(tl.int64)
    row = clip * tl.num_programs(0) + tl.program_id(0)
    side: tl.constexpr = SIZE // PATCH
    there, t, r, c = locate(tl.load(ids + row), length, side, side)

    entry = table + clip * 7
    frames = tl.load(entry).to(tl.pointer_type(tl.uint8))
    st, sh, sw, sc = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    top, left = tl.load(boxes + clip * 4).to(tl.int64), tl.load(boxes + clip * 4 + 1).to(tl.int64)
    height = tl.load(boxes + clip * 4 + 2).to(tl.int64)
    width = tl.load(boxes + clip * 4 + 3).to(tl.int64)
    there = there & (top >= 0) & (left >= 0) & (height > 0) & (width > 0)
    there = there & (top + height <= tl.load(entry + 5)) & (left + width <= tl.load(entry + 6))

    # A line of the output: pixels x of one (c, u, y), or values (x, c) of one (u, y).
    chans: tl.constexpr = 3
    across: tl.constexpr = chans if CHANNEL_LAST else 1
    lines: tl.constexpr = chans // across * T_PATCH * PATCH
    i = tl.arange(0, WIDTH)[None, :]
    column = c * PATCH + i // across
    column = tl.where(tl.load(flips + clip), SIZE - 1 - column, column)
    near, far, p = _taps(column, left, width, SIZE)
    near, far = near * sw + i % across * sc, far * sw + i % across * sc
    for first in tl.static_range(0, lines, LINES):
        line = first + tl.arange(0, LINES)[:, None]
        above, below, q = _taps(r * PATCH + line % PATCH, top, height, SIZE)
        frame = (t * T_PATCH + line // PATCH % T_PATCH).to(tl.int64)
        plane = frames + frame * st + line // (T_PATCH * PATCH) * sc
        mask = (line < tl.where(there, lines, 0)) & (i < PATCH * across)
        above, below = plane + above * sh, plane + below * sh
        a = tl.load(above + near, mask=mask, other=0).to(tl.int32).to(tl.float32)
        b = tl.load(above + far, mask=mask, other=0).to(tl.int32).to(tl.float32)
        first_row = (1 - p) * a + p * b
        a = tl.load(below + near, mask=mask, other=0).to(tl.int32).to(tl.float32)
        b = tl.load(below + far, mask=mask, other=0).to(tl.int32).to(tl.float32)
        value = (1 - q) * first_row + q * ((1 - p) * a + p * b)
        value = tl.where(there, tl.fma(value, scale, shift), float("nan"))
        # Another shape, so that the stores' width does not spread the loads over more lines.
        value = tl.reshape(value.to(out.dtype.element_ty), [LINES * WIDTH])
        j = tl.arange(0, LINES * WIDTH)
        to = (first + j // WIDTH) * (PATCH * across) + j % WIDTH
        mask = (first + j // WIDTH < lines) & (j % WIDTH < PATCH * across)
        tl.store(out + row * (lines * PATCH * across) + to, value, mask=mask)


def crop_resize_patchify_gather_fwd(
    frames, boxes, flips, ids, size, t_patch, patch, mean, std, dtype, channel_last
):
    """B clips uint8 [T, H, W, 3], boxes int32 [B, 4], flips bool [B], ids [B, K] -> [B, K, P]."""
    out = torch.empty((*ids.shape, 3 * t_patch * patch * patch), dtype=dtype, device=ids.device)
    if out.numel():
        width = patch * 3 if channel_last else patch
        order = "channel_last" if channel_last else "channel_first"
        _crop_resize_patchify_gather_fwd_kernel[ids.shape[1], ids.shape[0]](
            out,
            _table(frames),
            boxes.contiguous(),
            flips.contiguous(),
            ids.contiguous(),
            frames[0].shape[0] // t_patch * (size // patch) ** 2,
            1 / (255 * std),
            -mean / std,
            size,
            t_patch,
            patch,
            channel_last,
            triton.next_power_of_2(width),
            **configs.pick("crop_resize_patchify_gather_fwd", order),
        )
    return out


def _table(frames):
    """Each clip's address, strides, height and width, int64 [B, 7] on the clips' device."""
    device = frames[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("crop_resize_patchify_gather: a CUDA graph would keep these frames")
    rows = [(f.data_ptr(), *f.stride(), *f.shape[1:3]) for f in frames]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)
