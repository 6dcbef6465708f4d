"""masked_hog_mse: the loss on masked patches of histograms of oriented gradients (MaskFeat's HOG).

loss = mean over (b, m, value) of (pred - target)^2, target = HOG of the patch of token ids[b, m] in
its target frame, as PySlowFast's HOGLayerC(nbins=9, pool=8): each channel alone, Sobel's gradients
over pixels reflected at the frame's border, magnitudes sqrt(gx^2 + gy^2) summed into 9 unsigned
bins, floor(atan2(gx, gy) / pi * 9) mod 9, of each cell of 8 x 8, which are divided by their norm,
or by 1e-12. A patch's values are in the order (C, bin, cell row, cell column): 108 of 16 x 16 RGB.

Of bytes the gradients are exact integers, and so is every bin: the official code takes them of
pixels that are normalised, in fp32, whose rounding decides where gx is 0 between opposite bins.
Forward makes the gradient in the same pass and saves it alone, as masked_mse does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.ops.masked_mse import scaled_backward
from mae_fast.ops.patchify_gather import why_not_triton

BINS, CELL = 9, 8


def hog(pixels: Tensor, std: float, dtype: torch.dtype) -> Tensor:
    """The histograms of frames [N, C, H, W], uint8 or normalised float: [N, C, 9, H/8, W/8]."""
    unit = 255 * std if pixels.dtype == torch.uint8 else 1.0
    x = F.pad(pixels.to(dtype), (1, 1, 1, 1), mode="reflect")
    above, at, below = x[..., :-2, :], x[..., 1:-1, :], x[..., 2:, :]
    columns = above + 2 * at + below
    gx = columns[..., :-2] - columns[..., 2:]
    rows = above - below
    gy = rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]
    bins = (torch.atan2(gx, gy) / math.pi * BINS).floor().long() % BINS
    magnitude = (gx.square() + gy.square()).sqrt() / unit
    parts = magnitude[:, :, None] * F.one_hot(bins, BINS).movedim(-1, 2)
    cells = parts.unflatten(-1, (-1, CELL)).unflatten(-3, (-1, CELL)).sum((-3, -1))
    return F.normalize(cells, dim=2)


def hog_patches(
    video: Tensor,
    ids: Tensor,
    frames: tuple[int, ...],
    patch: int,
    std: float,
    dtype: torch.dtype,
) -> Tensor:
    """The target of tokens `ids` [B, M]: [B, M, C * 9 * (patch / 8)^2]. video [B, C, T, H, W]."""
    n, rows = patch // CELL, torch.arange(video.shape[0], device=ids.device)[:, None]
    h, w = video.shape[3] // patch, video.shape[4] // patch
    targets = torch.stack([video.select(2, frame) for frame in frames], dim=1)
    cells = hog(targets.flatten(0, 1), std, dtype).unflatten(0, targets.shape[:2])
    cells = cells.unflatten(-1, (w, n)).unflatten(-3, (h, n))  # [B, t, C, 9, h, n, w, n]
    cells = cells.permute(0, 1, 4, 6, 2, 3, 5, 7)
    ids = ids.long()
    return cells[rows, ids // (h * w), ids // w % h, ids % w].flatten(2)


def masked_hog_mse_ref(
    pred: Tensor, video: Tensor, ids: Tensor, frames: tuple[int, ...], patch: int, std: float
) -> Tensor:
    """The specification. The mean over no patches is NaN."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    target = hog_patches(video, ids, frames, patch, std, wide)
    return (pred.to(wide) - target).square().mean()


dispatch.LIBRARY.define(
    "masked_hog_mse_fwd(Tensor pred, Tensor video, Tensor ids, int[] frames, int patch, float std,"
    " bool need_grad) -> (Tensor, Tensor)"
)
dispatch.LIBRARY.define("masked_hog_mse_bwd(Tensor saved, Tensor dloss) -> Tensor")


@torch.library.register_fake("mae_fast::masked_hog_mse_fwd")
def _(pred, video, ids, frames, patch, std, need_grad):
    loss = pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))
    return loss, pred.new_empty(pred.shape if need_grad else (0,))


@torch.library.register_fake("mae_fast::masked_hog_mse_bwd")
def _(saved, dloss):
    return torch.empty_like(saved)


scaled_backward("masked_hog_mse", arguments=7)


def _why_not_cpp(pred: Tensor, video: Tensor, ids: Tensor, patch: int) -> str | None:
    if video.requires_grad:
        return "the clip wants a gradient"
    return dispatch.why_not_cpp(pred, video, ids) or dispatch.why_not_dtype(pred.dtype)


def _why_not_triton(pred: Tensor, video: Tensor, ids: Tensor, patch: int) -> str | None:
    if patch > 32:
        return f"a program holds a patch of 32 pixels a side at most, got {patch}"
    return dispatch.why_not_triton(pred) or why_not_triton(video, ids, pred.dtype)


OP = dispatch.Op(
    "masked_hog_mse",
    "HOG of masked patches straight from the pixels, loss and gradient in one pass",
    {"cpp": _why_not_cpp, "triton": _why_not_triton, "reference": dispatch.anything},
)


def masked_hog_mse(
    pred: Tensor, video: Tensor, ids: Tensor, frames: tuple[int, ...], patch: int, std: float
) -> Tensor:
    """pred [B, M, C * 9 * (patch / 8)^2] float; video [B, C, T, H, W] uint8, or float already
    normalised; ids [B, M] int -> the loss, a scalar in fp32 (fp64 for double).

    `frames`: of each time step its target frame. Raises ValueError on a patch that is no multiple
    of 8, on a shape or an ids dtype that does not fit, IndexError on an id out of range.
    """
    if patch < CELL or patch % CELL:
        raise ValueError(f"masked_hog_mse: patch must be a multiple of {CELL}, got {patch}")
    rows, columns = video.shape[3] // patch, video.shape[4] // patch
    size = video.shape[1] * BINS * (patch // CELL) ** 2
    fits = pred.shape == (*ids.shape, size) and ids.shape[:1] == video.shape[:1]
    if not fits or video.shape[3:] != (rows * patch, columns * patch):
        raise ValueError(
            f"masked_hog_mse: pred {list(pred.shape)}, ids {list(ids.shape)} and video "
            f"{list(video.shape)} do not fit: a patch of {patch} pixels has {size} values"
        )
    if any(not 0 <= f < video.shape[2] for f in frames):
        raise IndexError(f"masked_hog_mse: frames {list(frames)} of a clip of {video.shape[2]}")
    dispatch.check_ids(ids)
    dispatch.check_device("masked_hog_mse", pred=pred, video=video, ids=ids)
    args = (pred, video, ids, frames, patch, std)
    if OP.choose(pred, video, ids, patch) == "reference":
        dispatch.check_range(ids, len(frames) * rows * columns)
        return masked_hog_mse_ref(*args)
    need_grad = torch.is_grad_enabled() and pred.requires_grad
    return torch.ops.mae_fast.masked_hog_mse_fwd(*args, need_grad)[0]
