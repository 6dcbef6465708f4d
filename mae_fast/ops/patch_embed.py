"""patch_embed: patches of just the wanted tokens @ weight.T + bias + pos[ids].

video [B, C, T, H, W] uint8 or float, or the source of one, ids [B, K], weight [D,
C*t_patch*patch*patch], bias [D] or None, pos [L, D] -> [B, K, D], of the dtype that plain torch
gives. Patches are gathered again in backward: it saves video and ids only; those of a source it
saves. Under autocast the product is of autocast's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.ops.crop_resize_patchify_gather import crop_resize_patchify_gather
from mae_fast.ops.linear import product
from mae_fast.ops.patchify_gather import (
    check_clip,
    count_tokens,
    patchify_gather_ref,
    why_not_cpp,
    why_not_triton,
)
from mae_fast.ops.source import Source
from mae_fast.spans import spanned


def patch_embed_ref(
    video: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
) -> Tensor:
    """The specification."""
    patches = video  # as they are, of a source
    if video.dim() == 5:
        patches = patchify_gather_ref(video, ids, t_patch, patch, mean, std, weight.dtype)
    return product(patches, weight, bias) + F.embedding(ids, pos)


# video: a clip, or the patches themselves [B, K, P], of the weight's dtype.
dispatch.LIBRARY.define(
    "patch_embed_fwd(Tensor video, Tensor ids, Tensor weight, Tensor? bias, Tensor pos,"
    " int t_patch, int patch, float mean, float std) -> Tensor"
)
# The gradients of weight, bias and pos; a weight's or pos' that nobody needs has no rows.
dispatch.LIBRARY.define(
    "patch_embed_bwd(Tensor dout, Tensor video, Tensor ids, SymInt length, int t_patch, int patch,"
    " float mean, float std, ScalarType dtype, ScalarType pos_dtype, bool needs_weight,"
    " bool needs_pos) -> (Tensor, Tensor, Tensor)"
)
# What the CPU's implementation puts around torch's product: csrc/cpu/patch_embed.h.
dispatch.LIBRARY.define("patch_embed_add_pos(Tensor(a!) out, Tensor ids, Tensor pos) -> ()")
dispatch.LIBRARY.define(
    "patch_embed_grads(Tensor dout, Tensor ids, SymInt length, ScalarType dtype,"
    " ScalarType pos_dtype, bool needs_pos) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mae_fast::patch_embed_fwd")
def _(video, ids, weight, bias, pos, t_patch, patch, mean, std):
    dtype = torch.promote_types(weight.dtype, pos.dtype)
    return weight.new_empty((*ids.shape, weight.shape[0]), dtype=dtype)


@torch.library.register_fake("mae_fast::patch_embed_bwd")
def _(dout, video, ids, length, t_patch, patch, mean, std, dtype, pos_dtype, *needs):
    size = dout.shape[-1]
    dweight = dout.new_empty((size if needs[0] else 0, _values(video, t_patch, patch)), dtype=dtype)
    dpos = dout.new_empty((length if needs[1] else 0, size), dtype=pos_dtype)
    return dweight, dout.new_empty(size, dtype=dtype), dpos


def _values(video: Tensor, t_patch: int, patch: int) -> int:
    """Of a patch."""
    return video.shape[2] if video.dim() == 3 else video.shape[1] * t_patch * patch * patch


def _patches_cpu(video, *how):
    return video if video.dim() == 3 else torch.ops.mae_fast.patchify_gather_fwd(video, *how)


def _forward_cpu(video, ids, weight, bias, pos, t_patch, patch, mean, std):
    ops = torch.ops.mae_fast
    patches = _patches_cpu(video, ids, t_patch, patch, mean, std, weight.dtype)
    out = product(patches, weight, bias).to(torch.promote_types(weight.dtype, pos.dtype))
    ops.patch_embed_add_pos(out, ids, pos)
    return out


def _backward_cpu(dout, video, ids, length, t_patch, patch, mean, std, dtype, pos_dtype, *needs):
    needs_weight, needs_pos = needs
    ops = torch.ops.mae_fast
    columns, dbias, dpos = ops.patch_embed_grads(dout, ids, length, dtype, pos_dtype, needs_pos)
    dweight = dout.new_empty((0, _values(video, t_patch, patch)), dtype=dtype)
    if needs_weight:
        patches = _patches_cpu(video, ids, t_patch, patch, mean, std, dtype)
        dweight = product(columns, patches.flatten(0, 1).t())
    return dweight, dbias, dpos


dispatch.LIBRARY.impl("patch_embed_fwd", _forward_cpu, "CPU")
dispatch.LIBRARY.impl("patch_embed_bwd", _backward_cpu, "CPU")


def _save(ctx, inputs, output):
    video, ids, weight, _, pos, *ctx.numbers = inputs
    ctx.length, ctx.dtypes = pos.shape[0], (weight.dtype, pos.dtype)
    ctx.save_for_backward(video, ids)


@dispatch.once_differentiable
def _backward(ctx, dout):
    needs = ctx.needs_input_grad[2:5]
    grads = torch.ops.mae_fast.patch_embed_bwd(
        dout, *ctx.saved_tensors, ctx.length, *ctx.numbers, *ctx.dtypes, needs[0], needs[2]
    )
    grads = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return None, None, *grads, None, None, None, None


torch.library.register_autograd("mae_fast::patch_embed_fwd", _backward, setup_context=_save)


def _why_not_cpp(video: Tensor, ids: Tensor, weight: Tensor, bias, pos: Tensor) -> str | None:
    return dispatch.why_not_cpp(weight, bias, pos) or why_not_cpp(
        video, ids, weight.dtype, pos.dtype
    )


def _why_not_triton(video: Tensor, ids: Tensor, weight: Tensor, bias, pos: Tensor) -> str | None:
    return dispatch.why_not_triton(weight, bias, pos) or why_not_triton(
        video, ids, weight.dtype, pos.dtype
    )


OP = dispatch.Op(
    "patch_embed",
    "the patch embedding of the wanted tokens, and their positions",
    {"cpp": _why_not_cpp, "triton": _why_not_triton, "reference": dispatch.anything},
)


@spanned("patch embedding", "patch_embed")
def patch_embed(
    video: Tensor | Source,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    t_patch: int,
    patch: int,
    mean: float,
    std: float,
) -> Tensor:
    """The embedded tokens [B, K, D] of ids [B, K].

    Raises ValueError on arguments that do not fit, IndexError on an id that is no token.
    """
    if isinstance(video, Source):
        length = count_tokens("patch_embed", video.shape[2:], t_patch, patch)
    else:
        length = check_clip("patch_embed", video, ids, t_patch, patch)
    shapes = [list(x.shape) for x in (weight, bias, pos) if x is not None]
    size, values = weight.shape[0], video.shape[1] * t_patch * patch * patch
    if shapes != [[size, values], *([[size]] if bias is not None else []), [length, size]]:
        raise ValueError(
            f"patch_embed: weight, bias and pos {shapes} do not fit {length} tokens of {values} "
            "values"
        )
    dispatch.check_device("patch_embed", video=video, weight=weight, bias=bias, pos=pos)
    dtype = dispatch.autocast_dtype(video.device.type)
    if dtype is not None and weight.dtype != torch.float64:  # autocast lets that one be
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"patch_embed: weight is {weight.dtype} and bias {bias.dtype}")
    if isinstance(video, Source):
        video = crop_resize_patchify_gather(video, ids, t_patch, patch, mean, std, weight.dtype)
    args = (video, ids, weight, bias, pos, t_patch, patch, mean, std)
    if OP.choose(*args[:5]) == "reference":
        dispatch.check_range(ids, length)
        return patch_embed_ref(*args)
    return torch.ops.mae_fast.patch_embed_fwd(*args)
