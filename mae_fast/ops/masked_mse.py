"""masked_mse: the loss on masked patches, its target read straight from the clip.

loss = mean over (b, m, value) of (pred - target)^2, target = norm(patch of token ids_mask[b, m]).
A target patch is flattened channel last (u, p, p, C), unlike the patch embedding's. With
norm_pix_loss it is (x - mean) / sqrt(var + 1e-6) over all its values, var unbiased, eps inside.
"""

import torch
from torch import Tensor

from mae_fast.ops.patchify_gather import gather_patches, normalise


def target_patches(
    video: Tensor,
    ids: Tensor,
    frames: tuple[int, ...],
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
) -> Tensor:
    """The pixels to predict, not yet normalised by patch: [B, M, t_patch*patch*patch*C].

    video [B, C, T, H, W]; `frames` are the input frames that are targets, t_patch of them a token.
    """
    index = torch.tensor(frames, device=video.device)
    cells = gather_patches(video.index_select(2, index), ids, t_patch, patch)
    return normalise(cells, mean, std, dtype).permute(0, 1, 3, 4, 5, 2).flatten(2)


def norm_pix(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(target [B, M, P] normalised by patch, mean [B, M, 1], standard deviation [B, M, 1])."""
    mean = target.mean(dim=-1, keepdim=True)
    std = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (target - mean) / std, mean, std


def masked_mse_ref(pred: Tensor, target: Tensor, norm_pix_loss: bool) -> Tensor:
    """pred, target [B, M, P] -> scalar, in the target's precision (NaN when M is 0)."""
    if norm_pix_loss:
        target, _, _ = norm_pix(target)
    return (pred.to(target.dtype) - target).square().mean()


def unpatchify(patches: Tensor, grid: tuple[int, int, int], patch: int, chans: int = 3) -> Tensor:
    """Put target patches [B, L, u*p*p*C] of a (t, h, w) grid back: video [B, C, t*u, h*p, w*p].

    Raises ValueError when the patches do not fill the grid.
    """
    t, h, w = grid
    u = patches.shape[-1] // (patch * patch * chans)
    if patches.shape[1:] != (t * h * w, u * patch * patch * chans) or u == 0:
        raise ValueError(
            f"patches {list(patches.shape)} do not fill a {t}x{h}x{w} grid of {patch}x{patch}x"
            f"{chans} patches"
        )
    cells = patches.unflatten(1, (t, h, w)).unflatten(-1, (u, patch, patch, chans))
    video = cells.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C, t, u, h, p, w, p]
    return video.reshape(patches.shape[0], chans, t * u, h * patch, w * patch)
