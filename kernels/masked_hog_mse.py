"""masked_hog_mse in Triton: one program makes the histograms, the error and the gradient of one
masked token, channel after channel.

A pixel's eight neighbours are eight loads of the patch, moved by a pixel: all but the first find
what they read in a cache. No angle is computed: an edge of a bin is compared with, which of bytes,
whose gradients are integers, is exact. An id that is no token gives NaN, and no pixel is read.
"""

import math

import torch
import triton
import triton.language as tl

from mae_fast.kernels.masked_mse import _factors, _on_device, masked_mse_bwd
from mae_fast.kernels.patchify_gather import locate

BINS, CELL = 9, 8
_EDGES = [k * math.pi / BINS for k in range(1, BINS)]
_COS = tl.constexpr([math.cos(edge) for edge in _EDGES])
_SIN = tl.constexpr([math.sin(edge) for edge in _EDGES])

masked_hog_mse_bwd = masked_mse_bwd


@triton.jit
def _reflected(i, size):
    """What is one pixel outside of a frame is its neighbour's neighbour."""
    i = tl.where(i < 0, -i, i)
    return tl.where(i >= size, 2 * (size - 1) - i, i)


@triton.jit
def _pixels(frame, y, x, dy: tl.constexpr, dx: tl.constexpr, height, width, sh, sw, mask):
    y, x = _reflected(y + dy, height), _reflected(x + dx, width)
    at = frame + y.to(tl.int64) * sh + x.to(tl.int64) * sw
    return tl.load(at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _masked_hog_mse_fwd_kernel(
    errors,
    saved,
    pred,
    video,
    ids,
    frames,
    length,
    height,
    width,
    sb,
    sc,
    st,
    sh,
    sw,
    pred_clip,
    pred_token,
    factor,
    least,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    PIXELS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    clip, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = clip * tl.num_programs(0) + token
    there, t, r, c = locate(tl.load(ids + row), length, ROWS, COLUMNS)
    y, x = tl.arange(0, PIXELS)[:, None], tl.arange(0, PIXELS)[None, :]
    mask = (y < tl.where(there, PATCH, 0)) & (x < PATCH)
    y, x = r * PATCH + y, c * PATCH + x
    corner = video + clip * sb + tl.load(frames + t).to(tl.int64) * st
    cells: tl.constexpr = PATCH // 8
    k, i, j = (
        tl.arange(0, 16)[:, None, None],
        tl.arange(0, PIXELS // 8)[None, :, None],
        tl.arange(0, PIXELS // 8)[None, None, :],
    )
    inside = (k < 9) & (i < cells) & (j < cells)
    place = (k * cells + i) * cells + j
    of_channel: tl.constexpr = 9 * cells * cells
    values: tl.constexpr = CHANNELS * of_channel
    error = tl.zeros([16, PIXELS // 8, PIXELS // 8], tl.float32)
    for channel in tl.static_range(CHANNELS):
        frame = corner + channel * sc
        nw = _pixels(frame, y, x, -1, -1, height, width, sh, sw, mask)
        n = _pixels(frame, y, x, -1, 0, height, width, sh, sw, mask)
        ne = _pixels(frame, y, x, -1, 1, height, width, sh, sw, mask)
        w = _pixels(frame, y, x, 0, -1, height, width, sh, sw, mask)
        e = _pixels(frame, y, x, 0, 1, height, width, sh, sw, mask)
        sw_ = _pixels(frame, y, x, 1, -1, height, width, sh, sw, mask)
        s = _pixels(frame, y, x, 1, 0, height, width, sh, sw, mask)
        se = _pixels(frame, y, x, 1, 1, height, width, sh, sw, mask)
        gx = (nw + 2 * w + sw_) - (ne + 2 * e + se)
        gy = (nw - sw_) + 2 * (n - s) + (ne - se)
        magnitude = tl.sqrt_rn(gx * gx + gy * gy)
        turn = (gx < 0) | ((gx == 0) & (gy < 0))  # an angle within [0, pi)
        gx, gy = tl.where(turn, -gx, gx), tl.where(turn, -gy, gy)
        bin_ = tl.zeros([PIXELS, PIXELS], tl.int32)
        for edge in tl.static_range(8):
            bin_ += (gx * _COS[edge] >= gy * _SIN[edge]).to(tl.int32)
        parts = tl.where(bin_[None, :, :] == tl.arange(0, 16)[:, None, None], magnitude, 0.0)
        sums = tl.reshape(parts, [16, PIXELS // 8, 8, PIXELS // 8, 8])
        sums = tl.sum(tl.sum(sums, 4), 2)  # [16, cells, cells]
        norm = tl.sqrt_rn(tl.sum(sums * sums, 0, keep_dims=True))
        target = tl.div_rn(sums, tl.maximum(norm, least))
        target = tl.where(there, target, float("nan"))
        at = channel * of_channel + place
        from_ = pred + clip * pred_clip + token * pred_token
        value = tl.load(from_ + at, mask=inside, other=0).to(tl.float32)
        difference = tl.where(inside, value - target, 0.0)
        error += difference * difference
        if GRADIENT:
            gradient = (difference * factor).to(saved.dtype.element_ty)
            tl.store(saved + row * values + at, gradient, mask=inside)
    total = tl.sum(tl.sum(tl.sum(error, 2), 1), 0)
    tl.store(errors + row, total / values)


def masked_hog_mse_fwd(pred, video, ids, frames, patch, std, need_grad):
    """pred [B, M, P]; video [B, C, T, H, W]; ids [B, M] -> as masked_mse_fwd."""
    _, channels, length, height, width = video.shape
    if any(f < 0 or f >= length for f in frames):
        raise IndexError(f"masked_hog_mse: frames {list(frames)} of a clip of {length}")
    pred = pred if pred.stride(2) == 1 else pred.contiguous()
    saved = torch.empty(pred.shape if need_grad else (0,), dtype=pred.dtype, device=pred.device)
    errors = torch.empty(ids.numel(), dtype=torch.float32, device=pred.device)
    if ids.numel():
        rows, columns = height // patch, width // patch
        _masked_hog_mse_fwd_kernel[ids.shape[1], ids.shape[0]](
            errors,
            saved,
            pred,
            video,
            ids.contiguous(),
            _on_device(tuple(frames), pred.device),
            len(frames) * rows * columns,
            height,
            width,
            *video.stride(),
            *pred.stride()[:2],
            _factors(pred)[0],
            1e-12 * (255 * std if video.dtype == torch.uint8 else 1.0),
            rows,
            columns,
            channels,
            patch,
            triton.next_power_of_2(patch),
            need_grad,
            num_warps=4,  # of one size: not timed anywhere
        )
    return errors.mean(), saved
