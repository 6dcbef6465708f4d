"""THE forward: parameters + specification + video + mask -> loss and prediction.

One function for every family of masked autoencoder. It knows no module and no parameter name:
a model (or an adapter) hands over `Params` and a `Spec`. Work is left out only where the
mathematics does not need it; SAVINGS names each of these, and each can be switched off.
"""

import functools
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mae_fast.ops import dispatch
from mae_fast.ops.add_layer_norm import add_layer_norm
from mae_fast.ops.attention import attention, attention_qkv, split_qkv
from mae_fast.ops.bias_gelu import bias_gelu
from mae_fast.ops.crop_resize_patchify_gather import whole
from mae_fast.ops.decoder_tokens import decoder_tokens
from mae_fast.ops.layer_norm import layer_norm
from mae_fast.ops.linear import linear, linears
from mae_fast.ops.masked_hog_mse import hog_patches, masked_hog_mse
from mae_fast.ops.masked_mse import masked_mse, target_patches
from mae_fast.ops.patch_embed import patch_embed
from mae_fast.ops.source import Source
from mae_fast.remade import keeping, kept, remade
from mae_fast.replays import replayed
from mae_fast.spans import spanned

# What the official code computes and this does not, by name; `without` switches one off.
SAVINGS = {
    "visible_embed": "only visible tokens are embedded",
    "no_unshuffle": "the decoder's input is [cls | visible | masked]: attention sees no order",
    # The next two build on that order.
    "masked_last_block": "the last decoder block and the head have outputs for masked tokens only",
    "shared_mask_tokens": "the first decoder block's q, k, v of mask tokens: once, not per clip",
}


class Affine(NamedTuple):
    """Weight and bias of a linear layer. Only q, k, v and decoder_embed may lack a bias."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer) -> "Affine":
        """Those of an nn.Linear."""
        return cls(layer.weight, layer.bias)


# What stands for a linear layer: its weight and bias; or, where it is more than a linear layer, a
# callable x -> y in its place (the module itself); or a list of these, one after another (dropout).
Layer = Affine | Callable[[Tensor], Tensor] | list


class Norm(NamedTuple):
    """Weight and bias of a layer norm over the last dimension, and the eps under its root."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, layer) -> "Norm":
        """Those of an nn.LayerNorm."""
        return cls(layer.weight, layer.bias, layer.eps)


class Block(NamedTuple):
    """One pre-norm transformer block of width D: q, k, v, proj [D, D]; fc1 [F, D]; fc2 [D, F].

    Without k and v, q is a callable that gives all three of every token. `attend` takes the place
    of `attention` (dropout of probabilities).
    """

    norm1: Norm
    q: Affine | Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    k: Affine | None
    v: Affine | None
    proj: Layer
    norm2: Norm
    fc1: Layer
    fc2: Layer
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def is_plain(self) -> bool:
        """There is nothing but weights: nothing random, no module of another's."""
        layers = self.q, self.proj, self.fc1, self.fc2
        return self.attend is None and all(type(layer) is Affine for layer in layers)


# A block that runs as a module of its own: block(x, y, first, fused) -> (x, y), as of
# `transformer_block`. fused(x, y, p) is what the fused forward computes there of a Block p.
OwnBlock = Callable[[Tensor, Tensor | None, int, Callable], tuple[Tensor, Tensor | None]]


class Params(NamedTuple):
    """The parameters of a masked autoencoder, positions already composed.

    patch_embed.weight [D, C*u*p*p]; pos [L, D]; cls [D] with its position, or None; decoder_pos
    [L, E]; decoder_cls [E] with its position, or None; mask_token [E]; head [P, E].
    """

    patch_embed: Affine
    pos: Tensor
    cls: Tensor | None
    blocks: list[Block | OwnBlock]
    norm: Norm | None
    decoder_embed: Layer
    mask_token: Tensor
    decoder_pos: Tensor
    decoder_cls: Tensor | None
    decoder_blocks: list[Block | OwnBlock]
    decoder_norm: Norm
    head: Layer


class Spec(NamedTuple):
    """What the parameters' shapes do not say.

    `norm_pix`: the values of a target patch that are normalised together; `hog`: the targets are
    their histograms of gradients. `keep_encoder_cls`: the decoder's cls token is the encoder's,
    projected, plus decoder_cls. `checkpoint`: a block keeps its input only, and runs again in
    backward.
    """

    t_patch: int
    patch: int
    num_heads: int
    decoder_num_heads: int
    target_frames: tuple[int, ...]
    pred_t_patch: int
    norm_pix: Literal["none", "patch", "channel"]
    keep_encoder_cls: bool
    mean: float = 0.45
    std: float = 0.225
    checkpoint: bool = False
    hog: bool = False


@replayed
def forward(
    params: Params,
    spec: Spec,
    video: Tensor | Source,
    ids_keep: Tensor,
    ids_mask: Tensor,
    full_pred: bool = False,
    without: Collection[str] = (),
    pixels: Tensor | None = None,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, pred) of a clip [B, C, T, H, W], uint8 or normalised float, or of the source of one,
    under one mask.

    ids_keep [B, K] and ids_mask [B, M] split the L tokens, or some of them: no other token takes
    part. pred is [B, M, P], in the order of ids_mask, or with full_pred [B, K + M, P] in patch
    order. `without` names SAVINGS to switch off. The targets are those of the clip `pixels`, or of
    all L tokens in `target`, as of `masked_loss`.
    """
    unknown = set(without) - set(SAVINGS)
    if unknown:
        raise ValueError(f"unknown savings {sorted(unknown)} (known: {', '.join(SAVINGS)})")
    latent = encode(params, spec, video, ids_keep, without)
    pred = decode(params, spec, latent, ids_keep, ids_mask, full_pred, without)
    masked = pred[:, ids_keep.shape[1] :] if full_pred else pred
    loss = masked_loss(spec, masked, video if pixels is None else pixels, ids_mask, target)
    if full_pred:
        pred = _rows(pred, torch.cat([ids_keep, ids_mask], dim=1).argsort(dim=1))
    return loss, pred


@spanned("target encoder")
@torch.no_grad()
def features(params: Params, spec: Spec, video: Tensor | Source) -> Tensor:
    """V-JEPA's targets, [B, L, D]: the encoder on all tokens, cls left out, and over each of them a
    layer norm without weights (eps 1e-5). Both last norms in the residual's precision."""
    ids = torch.arange(len(params.pos), device=video.device).expand(video.shape[0], -1)
    x = _encode(params._replace(norm=None), spec, video, ids)[:, -ids.shape[1] :]
    return F.layer_norm(layer_norm(x, *params.norm, None), x.shape[-1:])


def _encode(
    params: Params,
    spec: Spec,
    video: Tensor | Source,
    ids_keep: Tensor,
    without: Collection[str] = (),
) -> Tensor:
    """The encoder on visible tokens: [B, (1 +) K, D] after its last norm (if any), cls first."""
    everywhere = "visible_embed" in without
    ids = ids_keep
    if everywhere:
        ids = torch.arange(len(params.pos), device=video.device).expand(video.shape[0], -1)
    pixels = (spec.t_patch, spec.patch, spec.mean, spec.std)
    x = patch_embed(video, ids, *params.patch_embed, params.pos, *pixels)
    if everywhere:
        x = _rows(x, ids_keep)
    if params.cls is not None:
        x = torch.cat([params.cls.expand(x.shape[0], 1, -1).to(x.dtype), x], dim=1)
    y = None
    for block in params.blocks:
        x, y = _run(spec, x, y, block, spec.num_heads)
    if params.norm is None:
        return x if y is None else x + y
    return _norm(x, y, params.norm)[1]


encode = replayed(spanned("encoder")(_encode))


@replayed
@spanned("decoder")
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
    visible = apply_layer(latent, params.decoder_embed)
    cls, visible = visible.split([latent.shape[1] - ids_keep.shape[1], ids_keep.shape[1]], dim=1)
    if params.decoder_cls is None:
        cls = None
    elif spec.keep_encoder_cls:
        cls = cls[:, 0] + params.decoder_cls
    else:
        cls = params.decoder_cls.expand(visible.shape[0], -1)
    tokens_of = functools.partial(
        decoder_tokens, visible, cls, params.mask_token, params.decoder_pos, ids_keep
    )
    x = tokens_of(ids_mask)
    heads, blocks, y, qkv = spec.decoder_num_heads, params.decoder_blocks, None, None
    # The outputs asked for stand last; keys and values come from every token all the same.
    wanted = ids_mask.shape[1] + (ids_keep.shape[1] if everything else 0)
    length, tokens = len(params.decoder_pos), ids_keep.shape[1] + ids_mask.shape[1]
    if "no_unshuffle" in without:
        order = torch.cat([ids_keep, ids_mask], dim=1).argsort(dim=1)
        x = torch.cat([x[:, :-tokens], _rows(x[:, -tokens:], order)], dim=1)
    elif (
        len(blocks) > 1
        and ids_mask.numel() > length
        and "shared_mask_tokens" not in without
        and isinstance(blocks[0], Block)
        and blocks[0].k is not None
    ):
        table = params.mask_token + params.decoder_pos  # [L, E], the same for every clip
        others = tokens_of(ids_mask[:, :0])  # again: a slice of x has a gradient as large as x
        qkv = _shared_qkv(others, table, ids_mask, blocks[0], heads)
    for block in blocks[:-1]:
        x, y = _run(spec, x, y, block, heads, qkv=qkv)
        qkv = None
    everywhere = "no_unshuffle" in without or "masked_last_block" in without
    first = 0 if everywhere else x.shape[1] - wanted
    x, y = _run(spec, x, y, blocks[-1], heads, first)
    if everywhere:
        parts = [t for t in (x, y) if t is not None]
        if "no_unshuffle" in without:
            parts = [_rows(t[:, -tokens:], order.argsort(dim=1)) for t in parts]
        x, y, *_ = *(t[:, -wanted:] for t in parts), None
    return apply_layer(_norm(x, y, params.decoder_norm)[1], params.head)


def _rows(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, D], ids [B, K] -> the rows x[b, ids[b]], [B, K, D]."""
    return x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[-1]))


def _shared_qkv(
    others: Tensor, table: Tensor, ids_mask: Tensor, p: Block, heads: int
) -> list[Tensor]:
    """q, k, v of [others | mask tokens], as of `_qkv`: those of mask tokens are computed once for
    each position ([L, E]) and looked up, so their gradients are summed over clips first."""
    others, table = (_norm(x, None, p.norm1)[1] for x in (others, table))
    count = others.shape[0] * others.shape[1]
    ids = torch.arange(count, dtype=ids_mask.dtype, device=ids_mask.device)
    ids = torch.cat([ids.view(others.shape[:2]), ids_mask + count], dim=1)

    def in_order(others: Tensor, table: Tensor) -> Tensor:
        """[B, n, ...] and [L, ...] -> [B, n + M, ...], each of its rows written once."""
        return F.embedding(ids, torch.cat([others.flatten(0, 1), table]).flatten(1))

    layers = p.q, p.k, p.v
    both = [linears(x, layers) for x in (others, table)]
    if both[0] is not None and both[1] is not None:
        return [in_order(*both).unflatten(-1, (3, heads, -1))]
    return [
        in_order(*(linear(x, *w) for x in (others, table))).unflatten(-1, (heads, -1))
        for w in layers
    ]


@spanned("loss")
def masked_loss(
    spec: Spec,
    pred: Tensor,
    video: Tensor | Source,
    ids_mask: Tensor,
    target: Tensor | None = None,
) -> Tensor:
    """The loss of predictions [B, M, P] of the tokens ids_mask [B, M].

    `target`, of all tokens, in place of the pixels': classes [B, L], the cross-entropy of P of them
    in nats; or features [B, L, P], the absolute error.
    """
    if target is not None:
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        if target.is_floating_point():
            return (pred - _rows(target, ids_mask)).abs().mean()
        return F.cross_entropy(pred.flatten(0, 1), target.gather(1, ids_mask.long()).flatten())
    if spec.hog:
        video, frames = _around(spec, video)
        return masked_hog_mse(pred, video, ids_mask, frames, spec.patch, spec.std)
    target = (spec.target_frames, spec.pred_t_patch, spec.patch, spec.mean, spec.std)
    return masked_mse(pred, video, ids_mask, *target, spec.norm_pix)


def _around(spec: Spec, video: Tensor | Source) -> tuple[Tensor, tuple[int, ...]]:
    """(pixels, numbers of the target frames in them): a gradient is of what surrounds a patch too,
    so that of a source the target frames are made whole."""
    if not isinstance(video, Source):
        return video, spec.target_frames
    pixels = whole(video.of_frames(spec.target_frames), spec.patch, spec.mean, spec.std)
    return pixels, tuple(range(len(spec.target_frames)))


def targets(spec: Spec, video: Tensor | Source, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What the decoder predicts of tokens `ids` [B, M], pixels before norm_pix: [B, M, P]."""
    if spec.hog:
        video, frames = _around(spec, video)
        return hog_patches(video, ids, frames, spec.patch, spec.std, dtype)
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


def apply_layer(x: Tensor, p: Layer) -> Tensor:
    """What a linear layer, or what stands in its place, makes of x."""
    if type(p) is Affine:
        return linear(x, *p)
    if isinstance(p, list):
        for each in p:
            x = apply_layer(x, each)
        return x
    return p(x)


def _run(
    spec: Spec,
    x: Tensor,
    y: Tensor | None,
    p: Block | OwnBlock,
    heads: int,
    first: int = 0,
    qkv: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """transformer_block, as it is or kept as its input only; or a block's own way."""
    if not isinstance(p, Block):
        return p(x, y, first, lambda x, y, p: _run(spec, x, y, p, heads, first))
    if not spec.checkpoint or not torch.is_grad_enabled():
        return transformer_block(x, y, p, heads, first, qkv)

    def run(*args) -> tuple[Tensor, Tensor]:
        with keeping():  # what a block keeps lives for the length of its own backward only
            return transformer_block(*args)

    how = dict(use_reentrant=False, preserve_rng_state=not p.is_plain())
    return checkpoint(run, x, y, p, heads, first, qkv, **how)


def transformer_block(
    x: Tensor,
    y: Tensor | None,
    p: Block,
    heads: int,
    first: int = 0,
    qkv: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The block's output for the tokens from `first` on, as the two parts [B, S - first, D] of a
    sum that the next norm takes; its input is x + y [B, S, D] (y None: x alone).

    qkv, where given, is what `_qkv` gives of the input. Norms and activations are made again in
    backward, but within `keeping`.
    """
    if qkv is None:
        # The whole sum is what a norm is made again from.
        x, h = _norm(x, y, p.norm1, first if kept() else 0)
        qkv = _qkv(x, h, p, heads, first)
    a = _attend(p, qkv, first).flatten(2)  # [B, S - first, D]
    x, h = _norm(x[:, x.shape[1] - a.shape[1] :], apply_layer(a, p.proj), p.norm2)
    if type(p.fc1) is Affine:
        with remade(h, layer_norm, x, *p.norm2, h.dtype):
            activation = bias_gelu, linear(h, p.fc1.weight), p.fc1.bias
    else:
        activation = F.gelu, apply_layer(h, p.fc1)
    g = activation[0](*activation[1:])
    # A module of another's may write into its input: it keeps what it likes.
    with remade(g, *activation) if type(p.fc2) is Affine else nullcontext():
        return x, apply_layer(g, p.fc2)


def _attend(p: Block, qkv: list[Tensor], first: int) -> Tensor:
    """Attention of what `_qkv` gives, [B, S - first, heads, d]."""
    if len(qkv) == 3:
        return (p.attend or attention)(*qkv)
    return p.attend(*split_qkv(*qkv, first)) if p.attend else attention_qkv(*qkv, first)


def _qkv(x: Tensor, h: Tensor, p: Block, heads: int, first: int) -> list[Tensor]:
    """q [B, S - first, heads, d], k and v [B, S, heads, d] of h [B, S, D], the norm of x; or all in
    one tensor [B, S, 3, heads, d]."""
    if p.k is None:
        q, k, v = p.q(h)
        return [t.unflatten(-1, (heads, -1)) for t in (q[:, first:], k, v)]
    with remade(h, layer_norm, x, *p.norm1, h.dtype):
        one = linears(h, (p.q, p.k, p.v))
        if one is not None:
            return [one.unflatten(-1, (heads, -1))]
        asked = h[:, first:]
        if h.dtype != x.dtype:  # torch rounds before it adds the bias where rows lie apart
            asked = asked.contiguous()
        inputs = ((asked, p.q), (h, p.k), (h, p.v))
        return [linear(t, *w).unflatten(-1, (heads, -1)) for t, w in inputs]


def _norm(x: Tensor, y: Tensor | None, p: Norm, first: int = 0) -> tuple[Tensor, Tensor]:
    """(x + y from token `first` on, the layer norm of all), where y may be absent. The norm is
    rounded once, to the dtype of the products that take it, each of which would cast it for
    itself."""
    dtype = _product_dtype(x)
    if y is None:
        return x[:, first:], layer_norm(x, *p, dtype)
    return add_layer_norm(x, y, *p, dtype, first)


def _product_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to for a product; None where it lets x be."""
    return None if x.dtype == torch.float64 else dispatch.autocast_dtype(x.device.type)
