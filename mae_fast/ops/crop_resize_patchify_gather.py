"""crop_resize_patchify_gather: patches of just the wanted tokens of a crop, resized and flipped.

out[b, k] = the patch of token ids[b, k] of crop_resize(frames[b], boxes[b], flips[b], size), as
patchify_gather flattens it, (C, u, p, p), or with channel_last (u, p, p, C), as a target is. No
clip is made: only the pixels of the wanted tokens are resampled, in fp32 (fp64 for double).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.ops.patchify_gather import count_tokens, gather_patches
from mae_fast.spans import spanned

_NAME = "crop_resize_patchify_gather"


def crop_resize(
    frames: Tensor,
    box: Sequence[int],
    flip: bool,
    size: int,
    mean: float = 0.45,
    std: float = 0.225,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cut one box out of every frame, normalise, resize to size x size, mirror if flip.

    uint8 [T, H, W, 3] and (top, left, height, width) -> dtype [3, T, size, size], on the frames'
    device. Bilinear with align_corners=False and no antialias, as the official code. Raises
    ValueError on a box that is not within the frames.
    """
    top, left, height, width = box
    rows, columns = frames.shape[1:3]
    if not (0 <= top <= rows - height < rows and 0 <= left <= columns - width < columns):
        raise ValueError(f"box {tuple(box)} is not within a frame of {rows}x{columns}")
    cut = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2)  # [T, 3, h, w]
    x = F.interpolate(cut.to(dtype), size=(size, size), mode="bilinear", align_corners=False)
    # The official code normalises first: the same to rounding, and more pixels to do it for.
    x = (x / 255 - mean) / std
    return (x.flip(-1) if flip else x).transpose(0, 1)


def crop_resize_patchify_gather_ref(
    frames: list[Tensor],
    boxes: Tensor,
    flips: Tensor,
    ids: Tensor,
    size: int,
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
    channel_last: bool = False,
) -> Tensor:
    """The specification."""
    wide = torch.promote_types(dtype, torch.float32)
    numbers = zip(frames, boxes.tolist(), flips.tolist(), strict=True)
    clips = [crop_resize(f, box, flip, size, mean, std, wide) for f, box, flip in numbers]
    cells = gather_patches(torch.stack(clips), ids, t_patch, patch)  # [B, K, C, u, p, p]
    return (cells.permute(0, 1, 3, 4, 5, 2) if channel_last else cells).flatten(2).to(dtype)


dispatch.LIBRARY.define(
    "crop_resize_patchify_gather_fwd(Tensor[] frames, Tensor boxes, Tensor flips, Tensor ids,"
    " int size, int t_patch, int patch, float mean, float std, ScalarType dtype,"
    " bool channel_last) -> Tensor"
)


@torch.library.register_fake("mae_fast::crop_resize_patchify_gather_fwd")
def _(frames, boxes, flips, ids, size, t_patch, patch, mean, std, dtype, channel_last):
    return frames[0].new_empty((*ids.shape, 3 * t_patch * patch * patch), dtype=dtype)


def _why_not_cpp(frames, boxes, flips, ids, dtype) -> str | None:
    return dispatch.why_not_cpp(*frames, boxes, flips, ids) or dispatch.why_not_dtype(dtype)


def _why_not_triton(frames, boxes, flips, ids, dtype) -> str | None:
    if dtype == torch.float64:
        return "the kernels do not compute in float64"
    reason = dispatch.why_not_triton(*frames, boxes, flips, ids)
    return reason or dispatch.why_not_dtype(dtype)


OP = dispatch.Op(
    _NAME,
    "normalised patches of the wanted tokens, from frames at source size, a box and a flip",
    {"cpp": _why_not_cpp, "triton": _why_not_triton, "reference": dispatch.anything},
)


@spanned(op="crop_resize_patchify_gather")
def crop_resize_patchify_gather(
    frames: list[Tensor],
    boxes: Tensor,
    flips: Tensor,
    ids: Tensor,
    size: int,
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
    channel_last: bool = False,
) -> Tensor:
    """frames: B clips uint8 [T, H, W, 3] of any size and strides; boxes int32 [B, 4] (top, left,
    height, width); flips bool [B]; ids [B, K], tokens of the size x size clip -> [B, K, P].

    Raises ValueError on arguments that do not fit, also on a box that is not within its frames,
    and IndexError on an id that is no token.
    """
    batch = len(frames)
    if batch == 0:
        raise ValueError(f"{_NAME}: no frames")
    length = frames[0].shape[0] if frames[0].dim() else 0
    for f in frames:
        if f.dtype != torch.uint8 or f.dim() != 4 or (f.shape[0], f.shape[3]) != (length, 3):
            raise ValueError(
                f"{_NAME}: frames must be uint8 [{length}, H, W, 3], got {f.dtype} {[*f.shape]}"
            )
    if (boxes.shape, flips.shape, ids.shape[:1]) != ((batch, 4), (batch,), (batch,)):
        raise ValueError(
            f"{_NAME}: boxes {[*boxes.shape]}, flips {[*flips.shape]} and ids {[*ids.shape]} do "
            f"not fit {batch} clips"
        )
    if boxes.dtype != torch.int32 or flips.dtype != torch.bool:
        raise ValueError(
            f"{_NAME}: boxes must be int32 and flips bool, got {boxes.dtype} and {flips.dtype}"
        )
    dispatch.check_ids(ids)
    other = next((i for i, f in enumerate(frames) if f.device != ids.device), 0)
    # The reference reads boxes and flips as numbers, from wherever they are.
    dispatch.check_device(_NAME, **{f"frames[{other}]": frames[other], "ids": ids})
    tokens = count_tokens(_NAME, (length, size, size), t_patch, patch)
    args = (frames, boxes, flips, ids, size, t_patch, patch, mean, std, dtype, channel_last)
    if OP.choose(frames, boxes, flips, ids, dtype) == "reference":
        dispatch.check_range(ids, tokens)
        return crop_resize_patchify_gather_ref(*args)
    return torch.ops.mae_fast.crop_resize_patchify_gather_fwd(*args)
