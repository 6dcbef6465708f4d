"""crop_resize_patchify_gather: patches of just the wanted tokens of a crop, resized and flipped.

out[b, k] = the patch of token ids[b, k] of crop_resize(frames of clip b, its box, its flip, size),
as patchify_gather flattens it, (C, u, p, p), or with channel_last (u, p, p, C), as a target is.
The frames are as they were decoded (source.py). No clip is made: only the pixels of the wanted
tokens are converted to RGB, and resampled, in fp32 (fp64 for double).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.ops.patchify_gather import count_tokens, gather_patches
from mae_fast.ops.source import BOX_HEIGHT, BOX_WIDTH, COLUMNS, FLIP, LEFT, TOP, Source
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


def crop_resized(
    source: Source, dtype: torch.dtype, mean: float = 0.45, std: float = 0.225
) -> Tensor:
    """All of the clips, normalised, [B, 3, T, size, size]: the reference's way."""
    clips = []
    for frames, row in zip(source.rgb(), source.table.tolist(), strict=True):
        box = [row[i] for i in (TOP, LEFT, BOX_HEIGHT, BOX_WIDTH)]
        clips.append(crop_resize(frames, box, bool(row[FLIP]), source.size, mean, std, dtype))
    return torch.stack(clips)


def crop_resize_patchify_gather_ref(
    source: Source,
    ids: Tensor,
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
    channel_last: bool = False,
) -> Tensor:
    """The specification."""
    wide = torch.promote_types(dtype, torch.float32)
    clips = crop_resized(source, wide, mean, std)
    cells = gather_patches(clips, ids, t_patch, patch)  # [B, K, C, u, p, p]
    return (cells.permute(0, 1, 3, 4, 5, 2) if channel_last else cells).flatten(2).to(dtype)


dispatch.LIBRARY.define(
    "crop_resize_patchify_gather_fwd(Tensor flat, Tensor table, Tensor ids, int size, int t_patch,"
    " int patch, float mean, float std, ScalarType dtype, bool channel_last) -> Tensor"
)


@torch.library.register_fake("mae_fast::crop_resize_patchify_gather_fwd")
def _(flat, table, ids, size, t_patch, patch, mean, std, dtype, channel_last):
    return flat.new_empty((*ids.shape, 3 * t_patch * patch * patch), dtype=dtype)


def _why_not_cpp(source, ids, dtype) -> str | None:
    reason = dispatch.why_not_cpp(source.flat, source.table, ids)
    return reason or dispatch.why_not_dtype(dtype)


def _why_not_triton(source, ids, dtype) -> str | None:
    if dtype == torch.float64:
        return "the kernels do not compute in float64"
    reason = dispatch.why_not_triton(source.flat, source.table, ids)
    return reason or dispatch.why_not_dtype(dtype)


OP = dispatch.Op(
    _NAME,
    "normalised patches of the wanted tokens, from frames as decoded, a box and a flip",
    {"cpp": _why_not_cpp, "triton": _why_not_triton, "reference": dispatch.anything},
)


@spanned(op="crop_resize_patchify_gather")
def crop_resize_patchify_gather(
    source: Source,
    ids: Tensor,
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
    channel_last: bool = False,
) -> Tensor:
    """source: the frames of B clips; ids [B, K], tokens of the size x size clips -> [B, K, P].

    Raises ValueError on arguments that do not fit, also on a box that is not within its frames or a
    frame that is not within the buffer, and IndexError on an id that is no token.
    """
    flat, table, size = source.flat, source.table, source.size
    if flat.dtype != torch.uint8 or flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(
            f"{_NAME}: the frames must be one contiguous buffer of uint8, got {flat.dtype} "
            f"{[*flat.shape]}"
        )
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] <= COLUMNS:
        raise ValueError(
            f"{_NAME}: the table must be int64 [B, {COLUMNS} + T], got {table.dtype} "
            f"{[*table.shape]}"
        )
    dispatch.check_ids(ids)
    if len(table) == 0 or len(ids) != len(table):
        raise ValueError(f"{_NAME}: ids {[*ids.shape]} do not fit {len(table)} clips")
    dispatch.check_device(_NAME, flat=flat, table=table, ids=ids)
    tokens = count_tokens(_NAME, source.shape[2:], t_patch, patch)
    numbers = (t_patch, patch, mean, std, dtype, channel_last)
    if OP.choose(source, ids, dtype) == "reference":
        dispatch.check_range(ids, tokens)
        return crop_resize_patchify_gather_ref(source, ids, *numbers)
    return torch.ops.mae_fast.crop_resize_patchify_gather_fwd(flat, table, ids, size, *numbers)


def whole(source: Source, patch: int, mean: float, std: float) -> Tensor:
    """All of the clips, normalised, float32 [B, 3, T, size, size], by the op: no host waits."""
    batch, _, length, side = *source.shape[:3], source.size // patch
    ids = torch.arange(length * side**2, dtype=torch.int32, device=source.device)
    patches = crop_resize_patchify_gather(
        source, ids.expand(batch, -1), 1, patch, mean, std, torch.float32
    )
    cells = patches.view(batch, length, side, side, 3, patch, patch)
    return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, 3, length, source.size, source.size)
