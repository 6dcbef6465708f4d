"""masked_mse: the loss on masked patches, its target read straight from the clip, or made of just
these tokens from the source of one.

loss = mean over (b, m, value) of (pred - target)^2, target = norm(patch of token ids[b, m]).
A target patch is flattened channel last (u, p, p, C), unlike the patch embedding's. norm_pix says
what is normalised alone, var unbiased: "patch", all its values, (x - mean) / sqrt(var + 1e-6) as
MAE-ST; "channel", those of one channel, (x - mean) / (sqrt(var) + 1e-6) as VideoMAE; or "none".
Forward makes the gradient in the same pass, 2 (pred - target) / (B M P) in pred's dtype, and saves
nothing else: backward multiplies it by dloss, and has nothing to do where that is known to be 1.
fp16, in which so small numbers vanish, saves pred - target.
"""

import torch
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.ops.crop_resize_patchify_gather import crop_resize_patchify_gather
from mae_fast.ops.patchify_gather import gather_patches, normalise, why_not_cuda, why_not_triton
from mae_fast.ops.source import Source
from mae_fast.spans import spanned

NORM_PIX = ("none", "patch", "channel")


def target_patches(
    video: Tensor | Source,
    ids: Tensor,
    frames: tuple[int, ...],
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    dtype: torch.dtype,
) -> Tensor:
    """The pixels to predict, before norm_target: [B, M, t_patch*patch*patch*C].

    video [B, C, T, H, W]; `frames` are the input frames that are targets, t_patch of them a token.
    """
    if isinstance(video, Source):
        how = t_patch, patch, mean, std, dtype
        return crop_resize_patchify_gather(video.of_frames(frames), ids, *how, channel_last=True)
    # A tensor of frame numbers would be copied from the host, which then waits.
    targets = torch.stack([video.select(2, frame) for frame in frames], dim=2)
    cells = gather_patches(targets, ids, t_patch, patch)
    return normalise(cells, mean, std, dtype).permute(0, 1, 3, 4, 5, 2).flatten(2)


def norm_target(target: Tensor, norm_pix: str, chans: int) -> tuple[Tensor, Tensor, Tensor]:
    """(target [B, M, P] normalised, and the mean and the deviation that it was normalised with,
    [B, M, 1], or [B, M, P] by channel, or 0 and 1)."""
    if norm_pix == "none":
        return target, target.new_zeros(()), target.new_ones(())
    if norm_pix == "patch":
        mean = target.mean(dim=-1, keepdim=True)
        std = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    else:
        values = target.shape[-1] // chans
        cells = target.unflatten(-1, (values, chans))
        mean = cells.mean(dim=-2).repeat(1, 1, values)
        std = (cells.var(dim=-2).sqrt() + 1e-6).repeat(1, 1, values)
    return (target - mean) / std, mean, std


def masked_mse_ref(
    pred: Tensor,
    video: Tensor,
    ids: Tensor,
    frames: tuple[int, ...],
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    norm_pix: str,
) -> Tensor:
    """The specification. The mean over no patches is NaN."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    target = target_patches(video, ids, frames, t_patch, patch, mean, std, wide)
    target, _, _ = norm_target(target, norm_pix, video.shape[1])
    return (pred.to(wide) - target).square().mean()


dispatch.LIBRARY.define(
    "masked_mse_fwd(Tensor pred, Tensor video, Tensor ids, int[] frames, int t_patch, int patch,"
    " float mean, float std, str norm_pix, bool need_grad) -> (Tensor, Tensor)"
)
dispatch.LIBRARY.define("masked_mse_bwd(Tensor saved, Tensor dloss) -> Tensor")


@torch.library.register_fake("mae_fast::masked_mse_fwd")
def _(pred, video, ids, frames, t_patch, patch, mean, std, norm_pix, need_grad):
    loss = pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))
    return loss, pred.new_empty(pred.shape if need_grad else (0,))


@torch.library.register_fake("mae_fast::masked_mse_bwd")
def _(saved, dloss):
    return torch.empty_like(saved)


def scaled_backward(op: str, arguments: int) -> None:
    """The autograd of an op whose forward gives (loss, pred's gradient where the loss's is 1), for
    the first of its `arguments`."""

    def save(ctx, inputs, output):
        saved = output[1]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved)

    @dispatch.once_differentiable
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * arguments
        (saved,) = ctx.saved_tensors  # an error if a gradient given out was changed in place
        ready = saved.dtype != torch.float16 and _is_one(dloss)
        operator = getattr(torch.ops.mae_fast, f"{op}_bwd")
        return saved if ready else operator(saved, dloss), *(None,) * (arguments - 1)

    torch.library.register_autograd(f"mae_fast::{op}_fwd", backward, setup_context=save)


def _is_one(dloss: Tensor) -> bool:
    """Whether dloss is known to be 1: that of a plain tensor on a CPU, where asking is free."""
    return type(dloss) is Tensor and dloss.device.type == "cpu" and dloss.tolist() == 1


scaled_backward("masked_mse", arguments=10)


def _why_not_cpp(pred: Tensor, video: Tensor, ids: Tensor, norm_pix: str) -> str | None:
    if video.requires_grad:
        return "the clip wants a gradient"
    return dispatch.why_not_cpp(pred, video, ids) or dispatch.why_not_dtype(pred.dtype)


def _why_not_triton(pred: Tensor, video: Tensor, ids: Tensor, norm_pix: str) -> str | None:
    if pred.shape[-1] > 2**15:
        return f"a patch has {pred.shape[-1]} values, more than {2**15}"
    return dispatch.why_not_triton(pred) or why_not_triton(video, ids, pred.dtype)


def _why_not_cuda(pred: Tensor, video: Tensor, ids: Tensor, norm_pix: str) -> str | None:
    if norm_pix == "channel":
        return "it does not normalise by channel"
    if pred.shape[-1] > 12_000:
        return f"four patches of {pred.shape[-1]} bytes are more than its shared memory"
    return dispatch.why_not_cuda(pred) or why_not_cuda(video, ids, pred.dtype)


OP = dispatch.Op(
    "masked_mse",
    "per-patch-normalised target from uint8 pixels, loss and gradient in one pass",
    {
        "cpp": _why_not_cpp,
        "triton": _why_not_triton,
        "cuda": _why_not_cuda,  # not measured faster than triton
        "reference": dispatch.anything,
    },
)


@spanned("loss", "masked_mse")
def masked_mse(
    pred: Tensor,
    video: Tensor | Source,
    ids: Tensor,
    frames: tuple[int, ...],
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
    norm_pix: str,
) -> Tensor:
    """pred [B, M, P] float; video [B, C, T, H, W] uint8, or float already normalised, or the source
    of such clips; ids [B, M] int -> the loss, a scalar in fp32 (fp64 for double).

    `frames`: the numbers of the frames that are targets, t_patch of them a token. Raises ValueError
    on a norm_pix that is none of NORM_PIX, on a shape or an ids dtype that does not fit, IndexError
    on an id out of range.
    """
    if norm_pix not in NORM_PIX:
        raise ValueError(f"masked_mse: norm_pix must be one of {NORM_PIX}, got {norm_pix!r}")
    size = t_patch * patch * patch * video.shape[1]
    if pred.shape != (*ids.shape, size) or ids.shape[:1] != video.shape[:1]:
        raise ValueError(
            f"masked_mse: pred {list(pred.shape)}, ids {list(ids.shape)} and video "
            f"{list(video.shape)} do not fit: a patch has {size} values"
        )
    dispatch.check_ids(ids)
    dispatch.check_device("masked_mse", pred=pred, video=video, ids=ids)
    if isinstance(video, Source):
        wide = torch.promote_types(pred.dtype, torch.float32)
        targets = target_patches(video, ids, frames, t_patch, patch, mean, std, wide)
        video, ids, frames = _as_clip(targets, t_patch, patch)
    args = (pred, video, ids, frames, t_patch, patch, mean, std, norm_pix)
    if OP.choose(pred, video, ids, norm_pix) == "reference":
        rows, columns = video.shape[3] // patch, video.shape[4] // patch
        dispatch.check_range(ids, len(frames) // t_patch * rows * columns)
        return masked_mse_ref(*args)
    need_grad = torch.is_grad_enabled() and pred.requires_grad
    return torch.ops.mae_fast.masked_mse_fwd(*args, need_grad)[0]


def _as_clip(targets: Tensor, t_patch: int, patch: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Target patches [B, M, P] as a clip of one token after another, a view; and their ids and
    frames in it."""
    batch, masked = targets.shape[:2]
    pixels = targets.view(batch, masked * t_patch, patch, patch, 3).permute(0, 4, 1, 2, 3)
    ids = torch.arange(masked, dtype=torch.int32, device=targets.device).expand(batch, -1)
    return pixels, ids, tuple(range(masked * t_patch))


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
