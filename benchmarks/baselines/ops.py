"""What each op replaces: the official code's expression, or torch's where that is one, on the same
arguments. Where the official code computes more (all patches, patch order), so does this.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.bench.baselines.official import normed, normed_by_channel, patches
from mae_fast.masking import mask_from_keep
from mae_fast.ops.crop_resize_patchify_gather import crop_resize_patchify_gather_ref


def same(*results: Tensor) -> tuple[Tensor, ...]:
    return results


class Baseline(NamedTuple):
    """function(*args), whose floating args get gradients. `ours` brings its results, outputs and
    gradients, into the op's form; `theirs` an output's gradient into its own."""

    name: str
    args: tuple
    function: Callable
    ours: Callable = same
    theirs: Callable[[Tensor], Tensor] = lambda dout: dout


def rows(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, D], ids [B, K] -> x[b, ids[b]]."""
    return x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[-1]))


def baseline(op: str, args: tuple) -> Baseline:
    """Of a call op(*args) with memory behind its tensors."""
    return Baseline("torch", args, TORCH[op]) if op in TORCH else OFFICIAL[op](*args)


def _attention(*qkv: Tensor) -> Baseline:
    """It keeps its scores."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    return Baseline("official", qkv, function)


def _patch_embed(video, ids, weight, bias, pos, t_patch, patch, mean, std) -> Baseline:
    """A convolution over all patches of a clip that the loader has normalised, for free."""
    size = (t_patch, patch, patch)
    normal = (video.float() / 255 - mean) / std

    def function(kernel: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
        x = F.conv3d(normal, kernel, bias, stride=size).flatten(2).transpose(1, 2)
        return rows(x + pos, ids)

    def ours(out: Tensor, dkernel: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return out, dkernel.flatten(1), *grads

    kernel = weight.unflatten(1, (video.shape[1], *size))
    return Baseline("official", (kernel, bias, pos), function, ours)


def _patchify_gather(video, ids, t_patch, patch, mean, std, dtype) -> Baseline:
    """All of the clip is normalised and cut up."""

    def function(video: Tensor) -> Tensor:
        normal = (video.to(dtype) / 255 - mean) / std
        return rows(patches(normal, t_patch, patch, "nthwcupq").flatten(2), ids)

    return Baseline("official", (video,), function)


def _decoder_tokens(visible, cls, mask_token, pos, keep, mask) -> Baseline:
    """Repeat, concatenation and an unshuffling gather: patch order, which ours never has."""
    order = torch.cat([keep, mask], dim=1)
    restore = order.long().argsort(dim=1)

    def placed(x: Tensor, ids: Tensor) -> Tensor:
        return torch.cat([x[:, :1], rows(x[:, 1:], ids)], dim=1)

    def function(visible, cls, mask_token, pos) -> Tensor:
        x = torch.cat([visible, mask_token.repeat(len(visible), mask.shape[1], 1)], dim=1)
        return torch.cat([cls[:, None], rows(x, restore) + pos], dim=1)

    def ours(out: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return placed(out, order), *grads

    args = visible, cls, mask_token, pos
    return Baseline("official", args, function, ours, lambda dout: placed(dout, restore))


def _masked_mse(pred, video, ids, frames, t_patch, patch, mean, std, norm_pix) -> Baseline:
    """Targets and a loss of all patches, from a clip that the loader has normalised, for free;
    VideoMAE's ("channel") makes targets of all, and a loss of the masked."""
    normal = (video.float() / 255 - mean) / std
    length = len(frames) // t_patch * (video.shape[3] // patch) * (video.shape[4] // patch)
    wanted = torch.tensor(frames, device=video.device)

    def targets() -> Tensor:
        return patches(normal.index_select(2, wanted), t_patch, patch, "nthwupqc").flatten(2)

    if norm_pix == "channel":

        def by_channel(pred: Tensor) -> Tensor:
            target = normed_by_channel(targets(), video.shape[1])
            return (pred - rows(target, ids)).square().mean()

        return Baseline("official", (pred,), by_channel)
    full = pred.new_zeros(len(pred), length, pred.shape[2])
    full.scatter_(1, ids.long()[..., None].expand_as(pred), pred)
    mask = 1 - mask_from_keep(ids, length)  # of those to keep: here, those that are masked

    def function(full: Tensor) -> Tensor:
        loss = ((full - normed(targets())) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()

    return Baseline("official", (full,), function, lambda loss, grad: (loss, rows(grad, ids)))


def _masked_hog_mse(pred, video, ids, frames, patch, std) -> Baseline:
    """Histograms of every pixel of every target frame. Bytes as they are: HOG has no scale, and of
    normalised pixels rounding decides where a gradient is 0."""
    chans, n = video.shape[1], patch // 8
    wanted = torch.tensor(frames, device=video.device)
    wide = video.to(pred.dtype)
    sobel = torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]], device=video.device)
    sobel = sobel.to(pred.dtype).expand(chans, 1, 3, 3)

    def function(pred: Tensor) -> Tensor:
        x = wide.index_select(2, wanted).transpose(1, 2).flatten(0, 1)
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        gx = F.conv2d(x, sobel, groups=chans)
        gy = F.conv2d(x, sobel.transpose(2, 3), groups=chans)
        magnitude = torch.stack([gx, gy], -1).norm(dim=-1)[:, :, None]
        bins = (torch.atan2(gx, gy) / math.pi * 9).floor().long()[:, :, None] % 9
        parts = magnitude.new_zeros(*gx.shape[:2], 9, *gx.shape[2:])
        parts.scatter_add_(2, bins, magnitude)
        cells = F.normalize(parts.unfold(3, 8, 8).unfold(4, 8, 8).sum((-1, -2)), dim=2)
        cells = cells.flatten(1, 2).permute(0, 2, 3, 1).unfold(1, n, n).unfold(2, n, n)
        target = cells.flatten(3).reshape(len(pred), -1, pred.shape[2])
        return (pred - rows(target, ids)).square().mean()

    return Baseline("official", (pred,), function)


def _torch_layer_norm(x, weight, bias, eps, dtype=None) -> Tensor:
    out = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return out if dtype is None else out.to(dtype)


def _torch_add_layer_norm(x, y, weight, bias, eps, dtype=None, first=0) -> tuple[Tensor, Tensor]:
    total = x + y
    out = _torch_layer_norm(total, weight, bias, eps, dtype)
    return total[:, first:] if first else total, out


TORCH: dict[str, Callable] = {
    "linear": F.linear,
    "layer_norm": _torch_layer_norm,
    "add_layer_norm": _torch_add_layer_norm,
    "bias_gelu": lambda x, bias: F.gelu(x + bias),
}
OFFICIAL: dict[str, Callable[..., Baseline]] = {
    "attention": _attention,
    "patch_embed": _patch_embed,
    "patchify_gather": _patchify_gather,
    # Whole clips are resized, then gathered from.
    "crop_resize_patchify_gather": lambda *args: Baseline(
        "official", args, crop_resize_patchify_gather_ref
    ),
    "decoder_tokens": _decoder_tokens,
    "masked_hog_mse": _masked_hog_mse,
    "masked_mse": _masked_mse,
}
