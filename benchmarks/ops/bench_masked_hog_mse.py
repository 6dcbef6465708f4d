"""HOG's loss at 90%: masked patches only, from uint8, against the official operator's way, which
makes the histograms of every pixel of every target frame."""

import math

import torch
import torch.nn.functional as F

from benchmarks.ops.case import STD, Case, clip_and_ids, entry, forward_backward, rows
from mae_fast.ops.masked_hog_mse import masked_hog_mse


def decoder(cfg, clips):
    video, _, _, masked = clip_and_ids(cfg, clips)
    (t, h, w), p = cfg.grid, cfg.patch_size
    n, frames = p // 8, tuple(range(0, cfg.num_frames, cfg.t_patch_size))
    pred = torch.rand(*masked.shape, cfg.in_chans * 9 * n * n)
    # Bytes as they are: HOG has no scale, and no gradient of theirs is 0 by rounding alone.
    normal = video.float()
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(3, 1, 3, 3)

    def official():
        x = normal[:, :, :: cfg.t_patch_size].transpose(1, 2).flatten(0, 1)
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        gx = F.conv2d(x, sobel, groups=3)
        gy = F.conv2d(x, sobel.transpose(2, 3), groups=3)
        magnitude = torch.stack([gx, gy], -1).norm(dim=-1)[:, :, None]
        bins = (torch.atan2(gx, gy) / math.pi * 9).floor().long()[:, :, None] % 9
        parts = torch.zeros(*gx.shape[:2], 9, *gx.shape[2:]).scatter_add_(2, bins, magnitude)
        cells = F.normalize(parts.unfold(3, 8, 8).unfold(4, 8, 8).sum((-1, -2)), dim=2)
        cells = cells.flatten(1, 2).permute(0, 2, 3, 1).unfold(1, n, n).unfold(2, n, n)
        target = cells.flatten(3).reshape(clips, t * h * w, -1)
        return (pred - rows(target, masked)).square().mean()

    return Case(
        "masked_hog_mse",
        f"{clips} clips, pred {list(pred.shape)}",
        forward_backward(lambda: masked_hog_mse(pred, video, masked, frames, p, STD), [pred]),
        forward_backward(official, [pred]),
        "official",
        # pred and its gradient; a patch of bytes and the pixels around it
        bytes=8 * pred.numel() + masked.numel() * 3 * (p + 2) ** 2,
    )


bench_masked_hog_mse = entry("masked_hog_mse", decoder, baseline="official")
