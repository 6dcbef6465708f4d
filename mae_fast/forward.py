"""THE forward: parameters + specification + video + mask -> loss and prediction.

One function for every family of masked autoencoder. It knows no module and no parameter name:
a model (or an adapter) hands over `Params` and a `Spec`. Work is left out only where the
mathematics does not need it: only visible tokens are embedded; the decoder's input is
[cls | visible | masked], since attention does not see order, and never unshuffled; its last block
computes queries, projection, MLP, norm and head for masked tokens only.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.ops.masked_mse import masked_mse_ref, target_patches
from mae_fast.ops.patchify_gather import patchify_gather_ref


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
) -> tuple[Tensor, Tensor]:
    """(loss, pred) of a clip [B, C, T, H, W], uint8 or normalised float, under one mask.

    ids_keep [B, K] and ids_mask [B, M] split the L tokens. pred is [B, M, P], in the order of
    ids_mask, or with full_pred [B, L, P] in patch order.
    """
    latent = encode(params, spec, video, ids_keep)
    pred = decode(params, spec, latent, ids_keep, ids_mask, everything=full_pred)
    target = targets(spec, video, ids_mask, params.pos.dtype)
    masked = pred[:, ids_keep.shape[1] :] if full_pred else pred
    loss = masked_mse_ref(masked, target, spec.norm_pix_loss)
    if full_pred:
        order = torch.cat([ids_keep, ids_mask], dim=1).argsort(dim=1)
        pred = pred.gather(1, order[..., None].expand(-1, -1, pred.shape[-1]))
    return loss, pred


def encode(params: Params, spec: Spec, video: Tensor, ids_keep: Tensor) -> Tensor:
    """The encoder on visible tokens only: [B, (1 +) K, D] after its last norm, cls first."""
    patches = patchify_gather_ref(
        video, ids_keep, spec.t_patch, spec.patch, spec.mean, spec.std, params.pos.dtype
    )
    x = F.linear(patches, *params.patch_embed) + F.embedding(ids_keep, params.pos)
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
) -> Tensor:
    """The decoder: pred [B, M, P] of the masked tokens, or [B, K + M, P] of visible then masked."""
    visible = F.linear(latent, *params.decoder_embed)
    cls, visible = visible.split([latent.shape[1] - ids_keep.shape[1], ids_keep.shape[1]], dim=1)
    visible = visible + F.embedding(ids_keep, params.decoder_pos)
    masked = params.mask_token + F.embedding(ids_mask, params.decoder_pos)
    tokens = [visible, masked.to(visible.dtype)]
    if params.decoder_cls is not None:
        own = params.decoder_cls.expand(visible.shape[0], 1, -1)
        tokens.insert(0, (cls + own if spec.keep_encoder_cls else own).to(visible.dtype))
    x = torch.cat(tokens, dim=1)
    # The last block's output is needed from here on: keys and values still come from every token.
    first = x.shape[1] - ids_mask.shape[1] - (ids_keep.shape[1] if everything else 0)
    for block in params.decoder_blocks[:-1]:
        x = transformer_block(x, block, spec.decoder_num_heads, spec.eps)
    x = transformer_block(x, params.decoder_blocks[-1], spec.decoder_num_heads, spec.eps, first)
    return F.linear(layer_norm(x, params.decoder_norm, spec.eps), *params.head)


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


def transformer_block(x: Tensor, p: Block, heads: int, eps: float, first: int = 0) -> Tensor:
    """x [B, S, D] -> [B, S - first, D]: the block's output for the tokens from `first` on."""
    h = layer_norm(x, p.norm1, eps)
    x = x[:, first:] + attention(h[:, first:], h, p, heads)
    h = F.gelu(F.linear(layer_norm(x, p.norm2, eps), *p.fc1))
    return x + F.linear(h, *p.fc2)


def attention(h: Tensor, context: Tensor, p: Block, heads: int) -> Tensor:
    """Multi-head attention of h [B, Q, D] over context [B, S, D], projected: [B, Q, D]."""
    q, k, v = (
        F.linear(x, *w).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, w in ((h, p.q), (context, p.k), (context, p.v))
    )
    out = F.scaled_dot_product_attention(q, k, v)  # [B, heads, Q, D / heads]
    return F.linear(out.transpose(1, 2).flatten(2), *p.proj)


def layer_norm(x: Tensor, p: Affine, eps: float) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], p.weight, p.bias, eps)
