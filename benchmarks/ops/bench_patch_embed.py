"""Patch embedding at 90%: visible tokens from uint8, against the official convolution over all."""

import torch
import torch.nn.functional as F

from benchmarks.ops.case import MEAN, STD, Case, clip_and_ids, entry, forward_backward, rows
from mae_fast.ops.patch_embed import patch_embed, patch_embed_ref


def encoder(cfg, clips):
    video, normal, ids, _ = clip_and_ids(cfg, clips)
    size = (cfg.t_patch_size, cfg.patch_size, cfg.patch_size)
    weight = torch.randn(cfg.embed_dim, cfg.in_chans, *size).mul_(0.02)
    leaves = weight, torch.zeros(cfg.embed_dim), torch.randn(cfg.num_patches, cfg.embed_dim)

    def ours():
        matrix = weight.flatten(1)
        return patch_embed(video, ids, matrix, *leaves[1:], *size[:2], MEAN, STD)

    def official():
        """The clip is normalised by the loader, for free."""
        x = F.conv3d(normal, *leaves[:2], stride=size).flatten(2).transpose(1, 2)
        return rows(x + leaves[2], ids)

    return Case(
        "patch_embed",
        f"{clips} clips, {ids.shape[1]} of {cfg.num_patches} patches",
        forward_backward(ours, leaves),
        forward_backward(official, leaves),
        "official",
        flop=4 * ids.numel() * weight.numel(),  # forward and the weight's gradient
    )


def smallest():
    video, ids = torch.zeros(1, 1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    weight, bias, pos = (torch.randn(s, requires_grad=True) for s in ((1, 1), (1,), (1, 1)))
    args = video, ids, weight, bias, pos, 1, 1, MEAN, STD
    return patch_embed, torch.ops.mae_fast.patch_embed_fwd, patch_embed_ref, args


bench_patch_embed = entry("patch_embed", encoder, baseline="official")
