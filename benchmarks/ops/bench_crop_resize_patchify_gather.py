"""Visible patches from frames at source size, against resizing whole clips and then gathering."""

import torch

from benchmarks.ops.case import MEAN, STD, Case, clip_and_ids, entry, forward_backward
from mae_fast.ops.crop_resize_patchify_gather import (
    crop_resize_patchify_gather,
    crop_resize_patchify_gather_ref,
)


def encoder(cfg, clips):
    _, _, ids, _ = clip_and_ids(cfg, clips)
    height, width = cfg.img_size * 8 // 7, cfg.img_size * 3 // 2  # 256 x 336 for 224
    frames = [
        torch.randint(0, 256, (cfg.num_frames, height, width, 3), dtype=torch.uint8)
        for _ in range(clips)
    ]
    boxes = torch.tensor([[3, 5, height - 9, width - 40]], dtype=torch.int32).repeat(clips, 1)
    flips = torch.arange(clips) % 2 == 1
    numbers = (cfg.img_size, cfg.t_patch_size, cfg.patch_size, MEAN, STD, torch.float32)
    args = (frames, boxes, flips, ids, *numbers)
    values = ids.numel() * 3 * cfg.t_patch_size * cfg.patch_size**2
    return Case(
        "crop_resize_patchify_gather",
        f"{clips} clips of {height} x {width}, {ids.shape[1]} of {cfg.num_patches} patches",
        forward_backward(lambda: crop_resize_patchify_gather(*args)),
        forward_backward(lambda: crop_resize_patchify_gather_ref(*args)),
        "official",
        bytes=5 * values,  # about a byte of a frame -> a float
    )


def smallest():
    args = (
        [torch.zeros(1, 1, 1, 3, dtype=torch.uint8)],
        torch.tensor([[0, 0, 1, 1]], dtype=torch.int32),
        torch.tensor([False]),
        torch.zeros(1, 1, dtype=torch.int32),
        *(1, 1, 1, MEAN, STD, torch.float32),
    )

    def bare(*args):
        return torch.ops.mae_fast.crop_resize_patchify_gather_fwd(*args, False)

    return crop_resize_patchify_gather, bare, crop_resize_patchify_gather_ref, args


bench_crop_resize_patchify_gather = entry(
    "crop_resize_patchify_gather", encoder, baseline="official"
)
