"""The loss at 90%: masked patches only, from uint8, against the official ones, whose targets are
those of all patches."""

import torch

from benchmarks.ops.case import EPS, MEAN, STD, Case, clip_and_ids, entry, forward_backward, rows
from mae_fast.masking import mask_from_keep
from mae_fast.ops.masked_mse import masked_mse, masked_mse_ref


def decoder(cfg, clips):
    video, normal, keep, masked = clip_and_ids(cfg, clips)
    (t, h, w), u, p, length = cfg.grid, cfg.pred_t_patch_size, cfg.patch_size, cfg.num_patches
    full = torch.randn(clips, length, cfg.pred_dim)
    some = rows(full, masked).contiguous()
    pixels = (cfg.target_frames, u, p, MEAN, STD, "patch")
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


def by_channel(cfg, clips):
    """VideoMAE's: two frames a token, each channel of a patch normalised alone."""
    video, normal, _, masked = clip_and_ids(cfg, clips)
    (t, h, w), u, p = cfg.grid, cfg.t_patch_size, cfg.patch_size
    pred = torch.randn(*masked.shape, cfg.in_chans * u * p * p)
    pixels = (range(cfg.num_frames), u, p, 0.0, 1.0, "channel")

    def official():
        """Its engine makes labels of every patch, from the clip that the loader has normalised."""
        x = (normal * STD + MEAN).reshape(clips, -1, t, u, h, p, w, p)
        x = torch.einsum("nctuhpwq->nthwupqc", x).reshape(clips, t * h * w, u * p * p, -1)
        x = (x - x.mean(-2, keepdim=True)) / (x.var(-2, keepdim=True).sqrt() + EPS)
        return (pred - rows(x.flatten(2), masked)).square().mean()

    return Case(
        "masked_mse",
        f"{clips} clips, pred {list(pred.shape)}, by channel",
        forward_backward(lambda: masked_mse(pred, video, masked, *pixels), [pred]),
        forward_backward(official, [pred]),
        "official",
        bytes=9 * pred.numel(),
    )


def smallest():
    """A patch of two pixels: the variance of one is not defined."""
    video = torch.zeros(1, 2, 1, 1, 1, dtype=torch.uint8)
    pred, ids = torch.randn(1, 1, 2, requires_grad=True), torch.zeros(1, 1, dtype=torch.int32)
    args = pred, video, ids, (0,), 1, 1, MEAN, STD, "patch"

    def bare(*args):
        return torch.ops.mae_fast.masked_mse_fwd(*args, True)

    return masked_mse, bare, masked_mse_ref, args


bench_masked_mse = entry("masked_mse", by_channel, decoder, baseline="official")
