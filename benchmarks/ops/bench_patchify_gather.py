"""Patches of the visible 10% from a uint8 clip, against normalising and patchifying all of it."""

import torch

from benchmarks.ops.case import MEAN, STD, Case, clip_and_ids, entry, forward_backward, rows
from mae_fast.ops.patchify_gather import patchify_gather, patchify_gather_ref


def encoder(cfg, clips):
    video, _, ids, _ = clip_and_ids(cfg, clips)
    (t, h, w), u, p = cfg.grid, cfg.t_patch_size, cfg.patch_size
    args = (video, ids, u, p, MEAN, STD, torch.float32)

    def official():
        x = ((video.float() / 255 - MEAN) / STD).reshape(clips, -1, t, u, h, p, w, p)
        return rows(torch.einsum("nctuhpwq->nthwcupq", x).reshape(clips, t * h * w, -1), ids)

    values = ids.numel() * cfg.in_chans * u * p * p
    return Case(
        "patchify_gather",
        f"{clips} clips, {ids.shape[1]} of {cfg.num_patches} patches",
        forward_backward(lambda: patchify_gather(*args)),
        forward_backward(official),
        "official",
        bytes=5 * values,  # a byte of the clip -> a float
    )


def smallest():
    video, ids = torch.zeros(1, 1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    args = video, ids, 1, 1, MEAN, STD, torch.float32
    return patchify_gather, torch.ops.mae_fast.patchify_gather_fwd, patchify_gather_ref, args


bench_patchify_gather = entry("patchify_gather", encoder, baseline="official")
