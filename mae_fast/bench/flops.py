"""The FLOP of a training step, part by part: 2 a multiply-add, matrix products only.

Backward does two products for each of forward, but one for the patch embedding, whose pixels want
no gradient. What attention computes again in backward because it keeps no scores is not counted.
Checked against torch's FlopCounterMode in tests/test_benchmarks.py.
"""

from collections.abc import Collection
from typing import NamedTuple

from mae_fast.config import ModelConfig
from mae_fast.forward import SAVINGS
from mae_fast.masking import num_keep

# At 0% nothing is left to predict: the decoder and the loss are then those of this mask.
BASE_RATIO = 0.9


class Flop(NamedTuple):
    """FLOP of one part of a step."""

    forward: int
    backward: int


def step_parts(
    cfg: ModelConfig,
    clips: int,
    mask_ratio: float = 0.9,
    without: Collection[str] = (),
    encode_all: bool = False,
) -> dict[str, Flop]:
    """FLOP of mae_fast's step by part. `without` names savings switched off; encode_all: the
    encoder sees every token, the decoder and the loss are as ever."""
    length, cls = cfg.num_patches, int(cfg.cls_embed)
    kept = num_keep("random", cfg.grid, mask_ratio)
    masked, every, dec = length - kept, cls + length, cfg.decoder_embed_dim
    embedded = length if encode_all or "visible_embed" in without else kept
    seen = cls + (length if encode_all else kept)
    wanted = masked  # rows of the last block
    if {"no_unshuffle", "masked_last_block"} & set(without):
        wanted = every
    shared = 0  # tokens whose q, k, v the first decoder block need not compute
    if not {"no_unshuffle", "shared_mask_tokens"} & set(without) and cfg.decoder_depth > 1:
        shared = max(0, clips * masked - length)
    whole = cfg.decoder_depth - 1
    decoder = whole * _products(every, every, dec, cfg.mlp_ratio)
    decoder += _products(wanted, every, dec, cfg.mlp_ratio)
    decoder += _linear(cls + kept, cfg.embed_dim, dec)
    forward = {
        "patch embedding": clips * _linear(embedded, patch_values(cfg), cfg.embed_dim),
        "encoder products": clips * cfg.depth * _products(seen, seen, cfg.embed_dim, cfg.mlp_ratio),
        "encoder attention": clips * cfg.depth * _attention(seen, seen, cfg.embed_dim),
        "decoder products": clips * decoder - 3 * _linear(shared, dec, dec),
        "decoder attention": clips
        * (whole * _attention(every, every, dec) + _attention(wanted, every, dec)),
        "head": clips * _linear(masked, dec, cfg.pred_dim),
    }
    return {
        part: Flop(flop, flop if part == "patch embedding" else 2 * flop)
        for part, flop in forward.items()
    }


def official_parts(cfg: ModelConfig, clips: int, mask_ratio: float = 0.9) -> dict[str, Flop]:
    """FLOP of the official step by part: no saving, and in mae_st a prediction of every token. At
    ratio 0 its encoder sees every token, and so does its decoder's entry."""
    parts = step_parts(cfg, clips, mask_ratio, without=SAVINGS)
    if cfg.variant == "mae_st":
        tokens = cfg.num_patches + int(cfg.cls_embed)
        head = clips * _linear(tokens, cfg.decoder_embed_dim, cfg.pred_dim)
        parts["head"] = Flop(head, 2 * head)
    return parts


def step_flop(
    cfg: ModelConfig,
    clips: int,
    mask_ratio: float = 0.9,
    without: Collection[str] = (),
    encode_all: bool = False,
) -> int:
    """FLOP of mae_fast's step, forward and backward."""
    return sum(map(sum, step_parts(cfg, clips, mask_ratio, without, encode_all).values()))


def official_step_flop(cfg: ModelConfig, clips: int, mask_ratio: float = 0.9) -> int:
    """FLOP of the official step, forward and backward."""
    return sum(map(sum, official_parts(cfg, clips, mask_ratio).values()))


def forward_flop(cfg: ModelConfig, mask_ratio: float) -> int:
    """FLOP of the official forward of one clip: the paper's count. Its ratios are the paper's too:
    forward_flop(cfg, 0) / forward_flop(cfg, 0.9) is 7.7 for ViT-L."""
    return sum(part.forward for part in official_parts(cfg, 1, mask_ratio).values())


def patch_values(cfg: ModelConfig) -> int:
    """Pixels of one patch, all channels."""
    return cfg.in_chans * cfg.t_patch_size * cfg.patch_size**2


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _products(queries: int, keys: int, dim: int, mlp_ratio: float) -> int:
    """A block's linear layers: q, proj and the MLP for queries; k and v for keys."""
    hidden = int(dim * mlp_ratio)
    return _linear(queries, dim, 2 * dim + 2 * hidden) + _linear(keys, dim, 2 * dim)


def _attention(queries: int, keys: int, dim: int) -> int:
    """Scores, and their product with v."""
    return 4 * queries * keys * dim
