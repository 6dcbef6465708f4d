"""What a training step holds in memory, by formula: parameters, tokens, bytes."""

from typing import NamedTuple

from mae_fast.config import ModelConfig
from mae_fast.masking import num_keep

USABLE = 0.92  # of a device's memory; assumed: the rest is the runtime's own, and holes
# At 0% nothing is left to predict: the decoder and the loss are then those of this mask.
BASE_RATIO = 0.9


class Rows(NamedTuple):
    """Tokens of one clip: `kept`, `masked`; `seen` by the encoder, `every` of the decoder, cls
    included; `decoder`: those that its blocks give, over all blocks."""

    kept: int
    masked: int
    seen: int
    every: int
    decoder: int


def rows(cfg: ModelConfig, ratio: float) -> Rows:
    """At ratio 0 the encoder sees all, the rest is as at BASE_RATIO."""
    length, cls = cfg.num_patches, int(cfg.cls_embed)
    kept = num_keep("random", cfg.grid, ratio or BASE_RATIO)
    masked = length - kept
    seen = cls + (kept if ratio else length)
    decoder = (cfg.decoder_depth - 1) * (cls + length) + masked
    return Rows(kept, masked, seen, cls + length, decoder)


def parameters(cfg: ModelConfig) -> int:
    """Every parameter of the native model."""
    return encoder_parameters(cfg) + decoder_parameters(cfg)


def encoder_parameters(cfg: ModelConfig) -> int:
    """Patch embedding, cls, positions, blocks and the norm after them."""
    dim, cls = cfg.embed_dim, int(cfg.cls_embed)
    embedding = dim * (cfg.in_chans * cfg.t_patch_size * cfg.patch_size**2 + 1 + cls)
    blocks = cfg.depth * _block_parameters(cfg, dim)
    return embedding + _positions(cfg, dim, cfg.sep_pos_embed) + blocks + 2 * dim


def decoder_parameters(cfg: ModelConfig) -> int:
    """Its entry, tokens, positions, blocks, norm and head."""
    dim, own_cls = cfg.decoder_embed_dim, cfg.cls_embed and cfg.variant == "mae_st"
    entry = dim * (cfg.embed_dim + 1) + dim * (1 + own_cls)
    positions = _positions(cfg, dim, cfg.sep_pos_embed and cfg.variant == "mae_st")
    blocks = cfg.decoder_depth * _block_parameters(cfg, dim)
    return entry + positions + blocks + 2 * dim + cfg.pred_dim * (dim + 1)


def _positions(cfg: ModelConfig, dim: int, separate: bool) -> int:
    t, h, w = cfg.grid
    return dim * ((t + h * w if separate else t * h * w) + int(cfg.cls_embed))


def _block_parameters(cfg: ModelConfig, dim: int) -> int:
    hidden = int(dim * cfg.mlp_ratio)
    biases = dim * (2 if cfg.no_qkv_bias else 5) + hidden
    return 4 * dim * dim + 2 * dim * hidden + biases + 4 * dim


class Memory(NamedTuple):
    """Bytes of a step on one device: `state` stays (weights, two moments, copies of the weights for
    the products), `gradients` come as `saved` goes; `a_clip` is saved for backward, and held while
    backward begins, by each clip."""

    state: float
    gradients: float
    a_clip: float
    peak: float


def memory(
    cfg: ModelConfig,
    clips: int,
    ratio: float,
    p: int,
    shards: int = 1,
    keep: bool = False,
    shard: str = "none",
) -> Memory:
    """Of the model, its optimizer and what backward needs; without the runtime's own. p: bytes of a
    value that products take, 2 or 4; `shards`: devices among which train.shard parts weights,
    moments and gradients (backward keeps the copies for products of all); keep: norms and
    activations are not made again."""
    r, count = rows(cfg, ratio), parameters(cfg)
    state = 12 * count / shards + (p * count if p < 4 else 0)
    if shards > 1:  # what is gathered: all, or the block that computes and the next
        state += 4 * count if shard == "optimizer" else 8 * _block_parameters(cfg, cfg.embed_dim)
    encoder, decoder = _saved(cfg, r, p, keep)
    making = 0
    if cfg.target == "features":
        state += (4 + (p if p < 4 else 0)) * encoder_parameters(cfg)
        # The sum, what a block adds to it, and fc1's output and its activation.
        hidden = int(cfg.mlp_ratio * cfg.embed_dim)
        making = ((4 + p) * cfg.embed_dim + 2 * p * hidden) * r.every
        encoder += 4 * cfg.embed_dim * cfg.num_patches  # the targets
    if cfg.target in ("tokens", "features"):
        # The error in fp32; under autocast a copy before it and its gradient, which else is pred's.
        decoder += (4 if p == 4 else 12) * r.masked * cfg.pred_dim
    # The last block's backward begins with g made again and dg, when the head's are gone.
    begins = p * int(cfg.mlp_ratio * cfg.decoder_embed_dim) * r.masked
    a_clip = encoder + decoder + begins
    gradients = 4 * count / shards
    after_decoder = clips * encoder + 4 * decoder_parameters(cfg) / shards
    peak = state + max(clips * a_clip, after_decoder, gradients, clips * making)
    return Memory(state, gradients, a_clip, peak)


def tuning(cfg: ModelConfig, clips: int, ratio: float, p: int) -> Memory:
    """The same of fine-tuning, of the encoder alone on what a mask leaves (ratio 0: all)."""
    count = encoder_parameters(cfg)
    a_clip, _ = _saved(cfg, rows(cfg, ratio), p, keep=False)
    state, gradients = 12 * count + (p * count if p < 4 else 0), 4 * count
    return Memory(state, gradients, a_clip, state + max(clips * a_clip, gradients))


def keeps(cfg: ModelConfig, clips: int, ratio: float, p: int, has: float) -> bool:
    """Whether a device that has so many bytes holds a step that makes nothing again."""
    return memory(cfg, clips, ratio, p, keep=True).peak <= USABLE * has


def _saved(cfg: ModelConfig, r: Rows, p: int, keep: bool) -> tuple[int, int]:
    """Bytes that the encoder and the decoder keep of one clip for backward.

    A block: two residual sums (fp32) with their statistics, q, k, v, attention's out and its lse,
    and fc1's out; with `keep` norms' and gelu's outputs, which else are made again.
    """

    def block(queries: int, keys: int, dim: int, heads: int) -> int:
        hidden = int(dim * cfg.mlp_ratio)
        sums = 4 * dim * (keys + queries) + 8 * (keys + queries)
        qkv = p * dim * (2 * queries + 2 * keys) + 4 * heads * queries
        again = p * dim * (keys + queries) + p * hidden * queries
        return sums + qkv + p * hidden * queries + keep * again

    dim, dec = cfg.embed_dim, cfg.decoder_embed_dim
    video = cfg.in_chans * cfg.num_frames * cfg.img_size**2
    encoder = video + cfg.depth * block(r.seen, r.seen, dim, cfg.num_heads)
    encoder += (4 + p) * r.seen * dim  # the last sum, and its norm
    decoder = (cfg.decoder_depth - 1) * block(r.every, r.every, dec, cfg.decoder_num_heads)
    decoder += block(r.masked, r.every, dec, cfg.decoder_num_heads)
    decoder += r.masked * ((4 + p) * dec + p * cfg.pred_dim)  # sum, norm, pred's gradient
    return encoder, decoder


def greatest_batch(
    cfg: ModelConfig, ratio: float, p: int, has: float, shards: int = 1, shard: str = "none"
) -> int:
    """Clips of the largest step that a device with so many bytes holds; 0 if none."""
    low, high = 0, 1 << 16
    while low < high:
        clips = (low + high + 1) // 2
        fits = memory(cfg, clips, ratio, p, shards, shard=shard).peak <= USABLE * has
        low, high = (clips, high) if fits else (low, clips - 1)
    return low
