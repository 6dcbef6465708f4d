"""decoder_tokens: [cls | visible + its positions | mask token + its positions], never unshuffled.

visible [B, K, E]; cls [B, E] or None; mask_token [E]; pos [L, E]; ids_keep [B, K] and ids_mask
[B, M] int -> [B, (1 +) K + M, E], of the dtype that visible + pos has. Backward saves the ids; a
position's gradient is summed over clips in their order, so two runs give the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops import dispatch
from mae_fast.spans import spanned


def decoder_tokens_ref(
    visible: Tensor,
    cls: Tensor | None,
    mask_token: Tensor,
    pos: Tensor,
    ids_keep: Tensor,
    ids_mask: Tensor,
) -> Tensor:
    """The specification."""
    visible = visible + F.embedding(ids_keep, pos)
    tokens = [visible, F.embedding(ids_mask, mask_token + pos).to(visible.dtype)]
    if cls is not None:
        tokens.insert(0, cls[:, None].to(visible.dtype))
    return torch.cat(tokens, dim=1)


dispatch.LIBRARY.define(
    "decoder_tokens_fwd(Tensor visible, Tensor? cls, Tensor mask_token, Tensor pos,"
    " Tensor ids_keep, Tensor ids_mask) -> Tensor"
)
dispatch.LIBRARY.define(
    "decoder_tokens_bwd(Tensor dout, Tensor ids_keep, Tensor ids_mask, SymInt length)"
    " -> (Tensor, Tensor)"
)


@torch.library.register_fake("mae_fast::decoder_tokens_fwd")
def _(visible, cls, mask_token, pos, ids_keep, ids_mask):
    batch, kept, width = visible.shape
    tokens = int(cls is not None) + kept + ids_mask.shape[1]
    dtype = torch.promote_types(visible.dtype, pos.dtype)
    return visible.new_empty(batch, tokens, width, dtype=dtype)


@torch.library.register_fake("mae_fast::decoder_tokens_bwd")
def _(dout, ids_keep, ids_mask, length):
    dtype = torch.promote_types(dout.dtype, torch.float32)
    width = dout.shape[-1]
    return dout.new_empty(width, dtype=dtype), dout.new_empty(length, width, dtype=dtype)


def _save(ctx, inputs, output):
    visible, cls, mask_token, pos, ids_keep, ids_mask = inputs
    ctx.save_for_backward(ids_keep, ids_mask)
    ctx.length, ctx.has_cls = pos.shape[0], cls is not None
    ctx.dtypes = visible.dtype, cls.dtype if ctx.has_cls else None, mask_token.dtype, pos.dtype


@dispatch.once_differentiable
def _backward(ctx, dout):
    ids_keep, ids_mask = ctx.saved_tensors
    dmask_token, dpos = torch.ops.mae_fast.decoder_tokens_bwd(dout, ids_keep, ids_mask, ctx.length)
    first = int(ctx.has_cls)
    dvisible = dout[:, first : first + ids_keep.shape[1]]
    grads = [dvisible, dout[:, 0] if first else None, dmask_token, dpos]
    return (
        *(g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)),
        None,
        None,
    )


torch.library.register_autograd("mae_fast::decoder_tokens_fwd", _backward, setup_context=_save)


def _why_not_cpp(visible: Tensor, cls: Tensor | None, mask_token: Tensor, pos: Tensor, *ids):
    return dispatch.why_not_cpp(visible, cls, mask_token, pos, *ids) or dispatch.why_not_dtype(
        visible.dtype, pos.dtype
    )


def _why_not_triton(
    visible: Tensor, cls: Tensor | None, mask_token: Tensor, pos: Tensor, *ids: Tensor
) -> str | None:
    dtypes = {t.dtype for t in (visible, cls, mask_token, pos) if t is not None}
    if torch.float64 in dtypes:
        return "it computes in fp32, and a tensor is float64"
    if not 0 < visible.shape[2] <= 8192:
        return f"a token has {visible.shape[2]} values, and it takes 1 to 8192"
    reason = dispatch.why_not_triton(visible, cls, mask_token, pos, *ids)
    return reason or dispatch.why_not_dtype(*dtypes)


def _why_not_cuda(
    visible: Tensor, cls: Tensor | None, mask_token: Tensor, pos: Tensor, *ids: Tensor
) -> str | None:
    if mask_token.dtype != pos.dtype:
        return f"the mask token is {mask_token.dtype}, and its positions {pos.dtype}"
    if not 0 < visible.shape[2] <= 8192:
        return f"a token has {visible.shape[2]} values, and it takes 1 to 8192"
    dtypes = visible.dtype, pos.dtype
    if torch.float64 in dtypes:
        return "it computes in fp32, and a tensor is float64"
    reason = dispatch.why_not_cuda(visible, cls, mask_token, pos, *ids)
    return reason or dispatch.why_not_dtype(*dtypes)


OP = dispatch.Op(
    "decoder_tokens",
    "the decoder's input from visible tokens, mask token and positions",
    {
        "cpp": _why_not_cpp,
        "triton": _why_not_triton,
        "cuda": _why_not_cuda,  # not measured faster than triton
        "reference": dispatch.anything,
    },
)


@spanned(op="decoder_tokens")
def decoder_tokens(
    visible: Tensor,
    cls: Tensor | None,
    mask_token: Tensor,
    pos: Tensor,
    ids_keep: Tensor,
    ids_mask: Tensor,
) -> Tensor:
    """The decoder's input [B, (1 +) K + M, E]; shapes as above.

    Raises ValueError on shapes or an ids dtype that do not fit, IndexError on an id out of range.
    """
    batch, kept, width = visible.shape
    fits = (
        pos.shape[1:] == mask_token.shape == (width,)
        and ids_keep.shape == (batch, kept)
        and ids_mask.shape[:1] == (batch,)
        and (cls is None or cls.shape == (batch, width))
    )
    if not fits:
        shapes = [None if t is None else list(t.shape) for t in (visible, cls, mask_token, pos)]
        raise ValueError(
            f"decoder_tokens: visible, cls, mask_token, pos {shapes}, ids_keep "
            f"{list(ids_keep.shape)} and ids_mask {list(ids_mask.shape)} do not fit"
        )
    dispatch.check_ids(ids_keep, ids_mask)
    args = (visible, cls, mask_token, pos, ids_keep, ids_mask)
    names = ("visible", "cls", "mask_token", "pos", "ids_keep", "ids_mask")
    dispatch.check_device("decoder_tokens", **dict(zip(names, args, strict=True)))
    if OP.choose(*args) == "reference":
        return decoder_tokens_ref(*args)
    for ids in (ids_keep, ids_mask):
        dispatch.check_range(ids, len(pos))
    return torch.ops.mae_fast.decoder_tokens_fwd(*args)
