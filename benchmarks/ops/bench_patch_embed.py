"""Patch embedding at 90%: visible tokens from uint8, against the official convolution over all."""

import torch
import torch.nn.functional as F

from benchmarks.ops.case import MEAN, STD, Case, clip_and_ids, entry, forward_backward, rows
from mae_fast.ops.linear import linear
from mae_fast.ops.patchify_gather import patchify_gather_ref


def encoder(cfg, clips):
    video, normal, ids, _ = clip_and_ids(cfg, clips)
    size = (cfg.t_patch_size, cfg.patch_size, cfg.patch_size)
    weight = torch.randn(cfg.embed_dim, cfg.in_chans, *size).mul_(0.02)
    leaves = weight, torch.zeros(cfg.embed_dim)

    def ours():
        patches = patchify_gather_ref(video, ids, *size[:2], MEAN, STD, weight.dtype)
        return linear(patches, weight.flatten(1), leaves[1])

    def official():
        """The clip is normalised by the loader, for free."""
        return rows(F.conv3d(normal, *leaves, stride=size).flatten(2).transpose(1, 2), ids)

    return Case(
        "patch_embed",
        f"{clips} clips, {ids.shape[1]} of {cfg.num_patches} patches",
        forward_backward(ours, leaves),
        forward_backward(official, leaves),
        "official",
        flop=4 * ids.numel() * weight.numel(),  # forward and the weight's gradient
    )


bench_patch_embed = entry("patch_embed", encoder, baseline="official")
