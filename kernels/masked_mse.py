"""masked_mse in Triton: one program makes the error and the gradient of one masked token.

Its pixels are read as they lie in the clip, line by line, summed there, and put into the order of
the prediction, channel last, within the program (`tl.gather`): both are read and written in wide
pieces. By channel, they are normalised before they are put in order. The sums of bytes are exact
integers. The rows' errors are averaged by torch, in an order that depends on their number only. An
id that is no token gives NaN, and no pixel is read.
"""

import functools

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels.patchify_gather import locate, normalise, offsets

SIZES = {
    "masked_mse_fwd": {
        "any": [  # values at a time; one warp alone would exchange bytes by shuffles, 32 for each
            {"CHUNK": 256, "num_warps": 2},
            {"CHUNK": 1024, "num_warps": 4},
            {"CHUNK": 1024, "num_warps": 2},
            {"CHUNK": 512, "num_warps": 2},
        ]
    },
    "masked_mse_bwd": {
        "any": [{"BLOCK": 4096, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}],
    },
}


@triton.jit
def _statistics(pixels, mask, std, VALUES: tl.constexpr, CHANNEL: tl.constexpr):
    """(the mean, 1 / the standard deviation) of a patch [N], or of its channels [C, N]; of bytes
    both times VALUES, exactly."""
    axis: tl.constexpr = 1 if CHANNEL else 0
    if pixels.dtype == tl.uint8:
        x = pixels.to(tl.int32)
        average = tl.sum(x, axis, keep_dims=CHANNEL)
        squares = tl.sum(x * x, axis, keep_dims=CHANNEL).to(tl.int64)
        total = (squares * VALUES - average.to(tl.int64) * average).to(tl.float32) * VALUES
        unit = 255.0 * VALUES * std
    else:
        x = pixels.to(tl.float32)
        average = tl.div_rn(tl.sum(x, axis, keep_dims=CHANNEL), 1.0 * VALUES)
        if CHANNEL:  # a flat one's, to the last bit: what is left would be divided by 1e-6
            average += tl.sum(tl.where(mask, x - average, 0.0), 1, keep_dims=True) / VALUES
        x = tl.where(mask, x - average, 0.0)
        total = tl.sum(x * x, axis, keep_dims=CHANNEL)
        unit = 1.0
    variance = total / (VALUES - 1)
    if CHANNEL:
        return average, 1 / (tl.sqrt(variance) + 1e-6 * unit)
    return average, tl.rsqrt(variance + 1e-6 * unit * unit)


@triton.jit
def _deviation(pixels, average, VALUES: tl.constexpr):
    if pixels.dtype == tl.uint8:
        return (pixels.to(tl.int32) * VALUES - average).to(tl.float32)
    else:
        return pixels.to(tl.float32) - average


@triton.jit
def _masked_mse_fwd_kernel(
    errors,
    saved,
    pred,
    video,
    ids,
    frames,
    length,
    sb,
    sc,
    st,
    sh,
    sw,
    pred_clip,
    pred_token,
    mean,
    std,
    factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    T_PATCH: tl.constexpr,
    PATCH: tl.constexpr,
    LINES: tl.constexpr,
    PIXELS: tl.constexpr,
    BAND: tl.constexpr,
    NORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    clip, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = clip * tl.num_programs(0) + token
    there, t, r, c = locate(tl.load(ids + row), length, ROWS, COLUMNS)
    corner = clip * sb + r.to(tl.int64) * PATCH * sh + c.to(tl.int64) * PATCH * sw
    lines: tl.constexpr = CHANNELS * T_PATCH * PATCH
    values: tl.constexpr = lines * PATCH
    line = tl.arange(0, LINES)[:, None]  # (c, u, y)
    if BAND != T_PATCH * PATCH:  # that many of each channel, the last of them empty
        of = line % BAND
        line = tl.where(of < T_PATCH * PATCH, line // BAND * T_PATCH * PATCH + of, lines)
    x = tl.arange(0, PIXELS)[None, :]
    u = line // PATCH % T_PATCH
    frame = tl.zeros_like(line)
    for i in tl.static_range(T_PATCH):
        frame = tl.where(u == i, tl.load(frames + t * T_PATCH + i), frame)
    at = video + corner + offsets(line, frame, x, sc, st, sh, sw, T_PATCH, PATCH)
    mask = (line < tl.where(there, lines, 0)) & (x < PATCH)
    pixels = tl.load(at, mask=mask, other=0)
    average, scale = 0.0, 1.0
    if NORM == "channel":
        pixels = tl.reshape(pixels, [LINES // BAND, BAND * PIXELS])
        mask = tl.reshape(mask, [LINES // BAND, BAND * PIXELS])
        of_channel: tl.constexpr = values // CHANNELS
        mean_of, scale_of = _statistics(pixels, mask, std, of_channel, True)
        pixels = _deviation(pixels, mean_of, of_channel) * scale_of
    pixels = tl.reshape(pixels, [LINES * PIXELS])
    if NORM == "patch":
        mask = tl.reshape(mask, [LINES * PIXELS])
        average, scale = _statistics(pixels, mask, std, values, False)
    scale = tl.where(there, scale, float("nan"))

    from_ = pred + clip * pred_clip + token * pred_token
    error = tl.zeros([CHUNK], tl.float32)
    for first in tl.static_range(0, values, CHUNK):
        j = first + tl.arange(0, CHUNK)  # (u, y, x, c)
        inside = j < values
        place = j % CHANNELS * BAND + j // (CHANNELS * PATCH * PATCH) * PATCH
        place = (place + j // (CHANNELS * PATCH) % PATCH) * PIXELS + j // CHANNELS % PATCH
        target = tl.gather(pixels, tl.where(inside, place, 0), 0)
        if NORM == "patch":
            target = _deviation(target, average, values)
        else:
            target = normalise(target, mean, std)
        value = tl.load(from_ + j, mask=inside, other=0).to(tl.float32)
        difference = tl.where(inside, value - target * scale, 0.0)
        error += difference * difference
        if GRADIENT:
            gradient = (difference * factor).to(saved.dtype.element_ty)
            tl.store(saved + row * values + j, gradient, mask=inside)
    tl.store(errors + row, tl.sum(error, 0) / values)


@triton.jit
def _masked_mse_bwd_kernel(dpred, saved, dloss, factor, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(saved + at, mask=at < size, other=0).to(tl.float32)
    value = value * tl.load(dloss).to(tl.float32) * factor
    tl.store(dpred + at, value.to(dpred.dtype.element_ty), mask=at < size)


@functools.cache
def _on_device(numbers, device):
    """int32 numbers on a device: copied there once, not in every step."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def masked_mse_fwd(pred, video, ids, frames, t_patch, patch, mean, std, norm_pix, need_grad):
    """pred [B, M, P]; video [B, C, T, H, W]; ids [B, M] -> (loss [], (pred - target) * factor
    [B, M, P], or [0]), where factor is that of `_factors`."""
    _, channels, length, height, width = video.shape
    if any(f < 0 or f >= length for f in frames):
        raise IndexError(f"masked_mse: frames {list(frames)} of a clip of {length}")
    pred = pred if pred.stride(2) == 1 else pred.contiguous()
    saved = torch.empty(pred.shape if need_grad else (0,), dtype=pred.dtype, device=pred.device)
    errors = torch.empty(ids.numel(), dtype=torch.float32, device=pred.device)
    if ids.numel():
        band = t_patch * patch
        if norm_pix == "channel":  # its sums are over a row of a tensor
            band = triton.next_power_of_2(band)
            # Read column by column, a row's sum is over lanes that lie apart, which Triton 3.6 adds
            # up wrong, and 3.8 does not.
            video = video.contiguous() if video.stride(3) == 1 else video
        rows, columns = height // patch, width // patch
        _masked_mse_fwd_kernel[ids.shape[1], ids.shape[0]](
            errors,
            saved,
            pred,
            video,
            ids.contiguous(),
            _on_device(tuple(frames), pred.device),
            len(frames) // t_patch * rows * columns,
            *video.stride(),
            *pred.stride()[:2],
            mean,
            std,
            _factors(pred)[0],
            rows,
            columns,
            channels,
            t_patch,
            patch,
            triton.next_power_of_2(channels * band),
            triton.next_power_of_2(patch),
            band,
            norm_pix,
            need_grad,
            **configs.pick("masked_mse_fwd"),
        )
    return errors.mean(), saved


def masked_mse_bwd(saved, dloss):
    """The gradient of pred: saved * dloss, times what forward left out."""
    dpred = torch.empty_like(saved)
    if saved.numel():
        sizes = configs.pick("masked_mse_bwd")
        _masked_mse_bwd_kernel[(triton.cdiv(saved.numel(), sizes["BLOCK"]),)](
            dpred, saved, dloss, _factors(saved)[1], saved.numel(), **sizes
        )
    return dpred


def _factors(pred):
    """What forward and backward multiply by, 2 / B M P in all: it would vanish in fp16."""
    factor = 2 / max(pred.numel(), 1)
    return (1.0, factor) if pred.dtype == torch.float16 else (factor, 1.0)
