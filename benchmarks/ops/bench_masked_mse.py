"""The loss at 90%: masked patches only, from uint8, against the official one over all patches."""

import torch

from benchmarks.ops.case import EPS, MEAN, STD, Case, clip_and_ids, entry, forward_backward, rows
from mae_fast.masking import mask_from_keep
from mae_fast.ops.masked_mse import masked_mse, masked_mse_ref


def decoder(cfg, clips):
    video, normal, keep, masked = clip_and_ids(cfg, clips)
    (t, h, w), u, p, length = cfg.grid, cfg.pred_t_patch_size, cfg.patch_size, cfg.num_patches
    full = torch.randn(clips, length, cfg.pred_dim)
    some = rows(full, masked).contiguous()
    pixels = (cfg.target_frames, u, p, MEAN, STD, True)
    frames = torch.tensor(cfg.target_frames)

    def official():
        """full [B, L, P] in patch order; the clip is normalised by the loader, for free."""
        x = normal.index_select(2, frames).reshape(clips, -1, t, u, h, p, w, p)
        target = torch.einsum("nctuhpwq->nthwupqc", x).reshape(full.shape)
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        loss = ((full - (target - mean) / (var + EPS) ** 0.5) ** 2).mean(-1)
        mask = mask_from_keep(keep, length)
        return (loss * mask).sum() / mask.sum()

    return Case(
        "masked_mse",
        f"{clips} clips, pred {list(some.shape)}",
        forward_backward(lambda: masked_mse(some, video, masked, *pixels), [some]),
        forward_backward(official, [full]),
        "official",
        bytes=9 * some.numel(),  # pred and a byte of the clip -> the gradient
        project=lambda loss, grad: (loss, rows(grad, masked)),
    )


def smallest():
    """A patch of two pixels: the variance of one is not defined."""
    video = torch.zeros(1, 2, 1, 1, 1, dtype=torch.uint8)
    pred, ids = torch.randn(1, 1, 2, requires_grad=True), torch.zeros(1, 1, dtype=torch.int32)
    args = pred, video, ids, (0,), 1, 1, MEAN, STD, True

    def bare(*args):
        return torch.ops.mae_fast.masked_mse_fwd(*args, True)

    return masked_mse, bare, masked_mse_ref, args


bench_masked_mse = entry("masked_mse", decoder, baseline="official")
