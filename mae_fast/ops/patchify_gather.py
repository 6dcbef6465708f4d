"""patchify_gather: the patches of just the wanted tokens, normalised, from a clip of any strides.

out[b, k] = norm(video[b, :, t*u:(t+1)*u, r*p:(r+1)*p, c*p:(c+1)*p]) where ids[b, k] is token
(t, r, c), flattened channel first (C, u, p, p), the order of the patch embedding's weight.
norm(x) is (x / 255 - mean) / std for a uint8 clip and x for a float one.
"""

import torch
from torch import Tensor


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
    if pixels.dtype == torch.uint8:
        return (pixels.to(dtype) / 255 - mean) / std
    return pixels.to(dtype)


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
