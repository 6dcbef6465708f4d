"""THE forward: parameters + specification + video + mask -> loss and prediction.

One function for every family of masked autoencoder. It knows no module and no parameter name:
a model (or an adapter) hands over `Params` and a `Spec`. Work is left out only where the
mathematics does not need it; SAVINGS names each of these, and each can be switched off.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops.linear import linear
from mae_fast.ops.masked_mse import masked_mse_ref, target_patches
from mae_fast.ops.patchify_gather import patchify_gather_ref

# What the official code computes and this does not, by name; `without` switches one off.
SAVINGS = {
    "visible_embed": "only visible tokens are embedded",
    "no_unshuffle": "the decoder's input is [cls | visible | masked]: attention sees no order",
    # The next two build on that order.
    "masked_last_block": "the last decoder block and the head have outputs for masked tokens only",
    "shared_mask_tokens": "the first decoder block's q, k, v of mask tokens: once, not per clip",
}


class Affine(NamedTuple):
    """Weight and bias of a linear layer or a norm. A bias may be absent."""

    weight: Tensor
    bias: Tensor | None


class Block(NamedTuple):
    """One pre-norm transformer block of width D: q, k, v, proj [D, D]; fc1 [F, D]; fc2 [D, F]."""

    norm1: Affine
    q: Affine
    k: Affine
    v: Affine
    proj: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


class Params(NamedTuple):
    """The parameters of a masked autoencoder, positions already composed.

    patch_embed.weight [D, C*u*p*p]; pos [L, D]; cls [D] with its position, or None; decoder_pos
    [L, E]; decoder_cls [E] with its position, or None; mask_token [E]; head [P, E].
    """

    patch_embed: Affine
    pos: Tensor
    cls: Tensor | None
    blocks: list[Block]
    norm: Affine
    decoder_embed: Affine
    mask_token: Tensor
    decoder_pos: Tensor
    decoder_cls: Tensor | None
    decoder_blocks: list[Block]
    decoder_norm: Affine
    head: Affine


class Spec(NamedTuple):
    """What the parameters' shapes do not say.

    `keep_encoder_cls`: the decoder's cls token is the encoder's, projected, plus decoder_cls.
    """

    t_patch: int
    patch: int
    num_heads: int
    decoder_num_heads: int
    target_frames: tuple[int, ...]
    pred_t_patch: int
    norm_pix_loss: bool
    keep_encoder_cls: bool
    eps: float = 1e-6
    mean: float = 0.45
    std: float = 0.225


def forward(
    params: Params,
    spec: Spec,
    video: Tensor,
    ids_keep: Tensor,
    ids_mask: Tensor,
    full_pred: bool = False,
    without: Collection[str] = (),
) -> tuple[Tensor, Tensor]:
    """(loss, pred) of a clip [B, C, T, H, W], uint8 or normalised float, under one mask.

    ids_keep [B, K] and ids_mask [B, M] split the L tokens. pred is [B, M, P], in the order of
    ids_mask, or with full_pred [B, L, P] in patch order. `without` names SAVINGS to switch off.
    """
    unknown = set(without) - set(SAVINGS)
    if unknown:
        raise ValueError(f"unknown savings {sorted(unknown)} (known: {', '.join(SAVINGS)})")
    latent = encode(params, spec, video, ids_keep, without)
    pred = decode(params, spec, latent, ids_keep, ids_mask, full_pred, without)
    target = targets(spec, video, ids_mask, params.pos.dtype)
    masked = pred[:, ids_keep.shape[1] :] if full_pred else pred
    loss = masked_mse_ref(masked, target, spec.norm_pix_loss)
    if full_pred:
        pred = _rows(pred, torch.cat([ids_keep, ids_mask], dim=1).argsort(dim=1))
    return loss, pred


def encode(
    params: Params, spec: Spec, video: Tensor, ids_keep: Tensor, without: Collection[str] = ()
) -> Tensor:
    """The encoder on visible tokens only: [B, (1 +) K, D] after its last norm, cls first."""
    ids = ids_keep
    if "visible_embed" in without:
        ids = torch.arange(len(params.pos), device=video.device).expand(video.shape[0], -1)
    patches = patchify_gather_ref(
        video, ids, spec.t_patch, spec.patch, spec.mean, spec.std, params.pos.dtype
    )
    x = linear(patches, *params.patch_embed)
    if "visible_embed" in without:
        x = _rows(x, ids_keep)
    x = x + F.embedding(ids_keep, params.pos)
    if params.cls is not None:
        x = torch.cat([params.cls.expand(x.shape[0], 1, -1).to(x.dtype), x], dim=1)
    for block in params.blocks:
        x = transformer_block(x, block, spec.num_heads, spec.eps)
    return layer_norm(x, params.norm, spec.eps)


def decode(
    params: Params,
    spec: Spec,
    latent: Tensor,
    ids_keep: Tensor,
    ids_mask: Tensor,
    everything: bool = False,
    without: Collection[str] = (),
) -> Tensor:
    """The decoder: pred [B, M, P] of the masked tokens, or [B, K + M, P] of visible then masked."""
    visible = linear(latent, *params.decoder_embed)
    cls, visible = visible.split([latent.shape[1] - ids_keep.shape[1], ids_keep.shape[1]], dim=1)
    visible = visible + F.embedding(ids_keep, params.decoder_pos)
    masked = params.mask_token + params.decoder_pos  # [L, E], the same for every clip
    tokens = [visible, F.embedding(ids_mask, masked).to(visible.dtype)]
    if params.decoder_cls is not None:
        own = params.decoder_cls.expand(visible.shape[0], 1, -1)
        tokens.insert(0, (cls + own if spec.keep_encoder_cls else own).to(visible.dtype))
    x = torch.cat(tokens, dim=1)
    heads, eps = spec.decoder_num_heads, spec.eps
    blocks, qkv = params.decoder_blocks, None
    # The outputs asked for stand last; keys and values come from every token all the same.
    wanted = ids_mask.shape[1] + (ids_keep.shape[1] if everything else 0)
    first = x.shape[1] - wanted
    ids = torch.cat([ids_keep, ids_mask], dim=1)
    if "no_unshuffle" in without:
        x = torch.cat([x[:, : -ids.shape[1]], _rows(x[:, -ids.shape[1] :], ids.argsort(dim=1))], 1)
    elif len(blocks) > 1 and ids_mask.numel() > len(masked) and "shared_mask_tokens" not in without:
        qkv = _shared_qkv(x[:, : -ids_mask.shape[1]], masked, ids_mask, blocks[0], heads, eps)
    for block in blocks[:-1]:
        x = transformer_block(x, block, heads, eps, qkv=qkv)
        qkv = None
    if "no_unshuffle" in without or "masked_last_block" in without:
        x = transformer_block(x, blocks[-1], heads, eps)
        if "no_unshuffle" in without:
            x = _rows(x[:, -ids.shape[1] :], ids)
        x = x[:, -wanted:]
    else:
        x = transformer_block(x, blocks[-1], heads, eps, first)
    return linear(layer_norm(x, params.decoder_norm, eps), *params.head)


def _rows(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, D], ids [B, K] -> the rows x[b, ids[b]], [B, K, D]."""
    return x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[-1]))


def _shared_qkv(
    others: Tensor, masked: Tensor, ids_mask: Tensor, p: Block, heads: int, eps: float
) -> list[Tensor]:
    """q, k, v [B, heads, S, d] of [others | mask tokens]: those of mask tokens are computed once
    for each position ([L, E]) and looked up, so their gradients are summed over clips first."""
    others, masked = layer_norm(others, p.norm1, eps), layer_norm(masked, p.norm1, eps)
    qkv = []
    for w in (p.q, p.k, p.v):
        table = linear(masked, *w)
        qkv.append(torch.cat([linear(others, *w), F.embedding(ids_mask, table)], dim=1))
    return [_heads(x, heads) for x in qkv]


def targets(spec: Spec, video: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The pixels of tokens `ids` [B, M] that the decoder predicts, before norm_pix: [B, M, P]."""
    return target_patches(
        video,
        ids,
        spec.target_frames,
        spec.pred_t_patch,
        spec.patch,
        spec.mean,
        spec.std,
        dtype,
    )


def transformer_block(
    x: Tensor, p: Block, heads: int, eps: float, first: int = 0, qkv: list[Tensor] | None = None
) -> Tensor:
    """x [B, S, D] -> [B, S - first, D]: the block's output for the tokens from `first` on.

    qkv, where given, holds the queries, keys and values [B, heads, S, d] that x would give.
    """
    if qkv is None:
        h = layer_norm(x, p.norm1, eps)
        inputs = ((h[:, first:], p.q), (h, p.k), (h, p.v))
        qkv = [_heads(linear(y, *w), heads) for y, w in inputs]
    a = F.scaled_dot_product_attention(*qkv)  # [B, heads, S - first, d]
    x = x[:, first:] + linear(a.transpose(1, 2).flatten(2), *p.proj)
    h = F.gelu(linear(layer_norm(x, p.norm2, eps), *p.fc1))
    return x + linear(h, *p.fc2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * d] -> [B, heads, S, d], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def layer_norm(x: Tensor, p: Affine, eps: float) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], p.weight, p.bias, eps)
