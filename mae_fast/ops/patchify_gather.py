"""patchify_gather: the patches of just the wanted tokens, normalised, from a clip of any strides.

out[b, k] = norm(video[b, :, t*u:(t+1)*u, r*p:(r+1)*p, c*p:(c+1)*p]) where ids[b, k] is token
(t, r, c), flattened channel first (C, u, p, p), the order of the patch embedding's weight.
norm(x) is (x / 255 - mean) / std for a uint8 clip and x for a float one, computed in fp32 (fp64
for double) and rounded once. Only the reference has a gradient, for a float clip.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.spans import spanned


def gather_patches(video: Tensor, ids: Tensor, t_patch: int, patch: int) -> Tensor:
    """video [B, C, T, H, W], ids [B, K] -> [B, K, C, t_patch, patch, patch], dtype as given.

    Token order is (t * rows + row) * columns + column. Only the gathered patches are copied.
    """
    t, h, w = (n // p for n, p in zip(video.shape[2:], (t_patch, patch, patch), strict=True))
    cells = video.unflatten(2, (t, t_patch)).unflatten(4, (h, patch)).unflatten(6, (w, patch))
    cells = cells.permute(0, 2, 4, 6, 1, 3, 5, 7)  # [B, t, h, w, C, u, p, p], a view
    ids = ids.long()
    rows = torch.arange(video.shape[0], device=ids.device)[:, None]
    return cells[rows, ids // (h * w), ids // w % h, ids % w]


def normalise(pixels: Tensor, mean: float, std: float, dtype: torch.dtype) -> Tensor:
    """uint8 pixels to (x / 255 - mean) / std; float ones are taken as already normalised."""
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    wide = pixels.to(torch.promote_types(dtype, torch.float32))
    return ((wide / 255 - mean) / std).to(dtype)


def patchify_gather_ref(
    video: Tensor,
    ids: Tensor,
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
) -> Tensor:
    """video [B, C, T, H, W] uint8 or float, ids [B, K] int -> [B, K, C*t_patch*patch*patch]."""
    return normalise(gather_patches(video, ids, t_patch, patch), mean, std, dtype).flatten(2)


dispatch.LIBRARY.define(
    "patchify_gather_fwd(Tensor video, Tensor ids, int t_patch, int patch, float mean, float std,"
    " ScalarType dtype) -> Tensor"
)


@torch.library.register_fake("mae_fast::patchify_gather_fwd")
def _(video, ids, t_patch, patch, mean, std, dtype):
    return video.new_empty((*ids.shape, video.shape[1] * t_patch * patch * patch), dtype=dtype)


def why_not_cpp(video: Tensor, ids: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why the C++ kernels do not gather from this clip into these dtypes, or None."""
    return dispatch.why_not_cpp(video, ids) or _why_not(video, *dtypes)


def why_not_triton(video: Tensor, ids: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why the Triton kernels do not gather from this clip into these dtypes, or None."""
    if torch.float64 in (video.dtype, *dtypes):
        return "the kernels do not compute in float64"
    return dispatch.why_not_triton(video, ids) or _why_not(video, *dtypes)


def why_not_cuda(video: Tensor, ids: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why the CUDA kernels do not gather from this clip into these dtypes, or None."""
    if video.dtype != torch.uint8:
        return f"the clip is {video.dtype}, and it takes uint8"
    if torch.float64 in dtypes:
        return "the kernels do not compute in float64"
    return dispatch.why_not_cuda(video, ids) or _why_not(video, *dtypes)


def _why_not(video: Tensor, *dtypes: torch.dtype) -> str | None:
    if video.requires_grad:
        return "the video requires a gradient, which only the reference gives"
    return dispatch.why_not_dtype(*dtypes, *(() if video.dtype == torch.uint8 else (video.dtype,)))


OP = dispatch.Op(
    "patchify_gather",
    "normalised patches of the wanted tokens, from a clip of any strides",
    {
        "cpp": why_not_cpp,
        "triton": why_not_triton,
        "cuda": why_not_cuda,  # not measured faster than triton
        "reference": dispatch.anything,
    },
)


def count_tokens(op: str, clip: Sequence[int], t_patch: int, patch: int) -> int:
    """The tokens of a clip of (T, H, W). Raises ValueError unless it is cut into whole patches."""
    parts = (t_patch, patch, patch)
    if any(part < 1 or n < part or n % part for n, part in zip(clip, parts, strict=True)):
        raise ValueError(
            f"{op}: a clip of {tuple(clip)} cannot be cut into patches of {t_patch}x{patch}x{patch}"
        )
    t, h, w = (n // part for n, part in zip(clip, parts, strict=True))
    return t * h * w


def check_clip(op: str, video: Tensor, ids: Tensor, t_patch: int, patch: int) -> int:
    """The tokens of each clip. Raises ValueError on a video or on ids that do not fit."""
    if video.dim() != 5 or ids.shape[:1] != video.shape[:1]:
        raise ValueError(
            f"{op}: video {list(video.shape)} must be [B, C, T, H, W], and ids {list(ids.shape)} "
            "[B, K]"
        )
    dispatch.check_device(op, video=video, ids=ids)
    dispatch.check_ids(ids)
    return count_tokens(op, video.shape[2:], t_patch, patch)


@spanned(op="patchify_gather")
def patchify_gather(
    video: Tensor,
    ids: Tensor,
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
) -> Tensor:
    """video [B, C, T, H, W] uint8 or float, ids [B, K] int -> [B, K, C*t_patch*patch*patch].

    Raises ValueError on arguments that do not fit, IndexError on an id that is no token.
    """
    tokens = check_clip("patchify_gather", video, ids, t_patch, patch)
    args = (video, ids, t_patch, patch, mean, std, dtype)
    if OP.choose(video, ids, dtype) == "reference":
        dispatch.check_range(ids, tokens)
        return patchify_gather_ref(*args)
    return torch.ops.mae_fast.patchify_gather_fwd(*args)
