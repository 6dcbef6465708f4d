"""The FLOP that a training step has to do: 2 a multiply-add, matrix products only.

Backward does two products for each of forward, but one for the patch embedding, whose pixels want
no gradient. What attention computes again in backward because it keeps no scores is not counted.
Checked against torch's FlopCounterMode in tests/test_benchmarks.py.
"""

from collections.abc import Collection

from mae_fast.config import ModelConfig
from mae_fast.forward import SAVINGS
from mae_fast.masking import num_keep


def step_flop(
    cfg: ModelConfig,
    clips: int,
    mask_ratio: float = 0.9,
    without: Collection[str] = (),
    encode_all: bool = False,
) -> int:
    """FLOP of mae_fast's step. `without` names savings switched off; encode_all: the encoder sees
    every token, the decoder and the loss are as ever."""
    length, cls = cfg.num_patches, int(cfg.cls_embed)
    kept = num_keep("random", cfg.grid, mask_ratio)
    masked = length - kept
    embedded = length if encode_all or "visible_embed" in without else kept
    wanted = masked  # rows of the last block
    if {"no_unshuffle", "masked_last_block"} & set(without):
        wanted = cls + length
    shared = 0  # tokens whose q, k, v the first decoder block need not compute
    if not {"no_unshuffle", "shared_mask_tokens"} & set(without) and cfg.decoder_depth > 1:
        shared = max(0, clips * masked - length)
    embed = _linear(embedded, cfg.in_chans * cfg.t_patch_size * cfg.patch_size**2, cfg.embed_dim)
    rest = _encoder(cfg, cls + (length if encode_all else kept))
    rest += _linear(cls + kept, cfg.embed_dim, cfg.decoder_embed_dim)
    rest += _decoder(cfg, wanted) + _linear(masked, cfg.decoder_embed_dim, cfg.pred_dim)
    once = 3 * _linear(shared, cfg.decoder_embed_dim, cfg.decoder_embed_dim)
    return clips * (2 * embed + 3 * rest) - 3 * once


def official_step_flop(cfg: ModelConfig, clips: int, mask_ratio: float = 0.9) -> int:
    """FLOP of the official step: no saving, and in mae_st a prediction of every token."""
    flop = step_flop(cfg, clips, mask_ratio, without=SAVINGS)
    if cfg.variant == "mae_st":
        seen = num_keep("random", cfg.grid, mask_ratio) + int(cfg.cls_embed)
        flop += clips * 3 * _linear(seen, cfg.decoder_embed_dim, cfg.pred_dim)
    return flop


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _encoder(cfg: ModelConfig, tokens: int) -> int:
    return cfg.depth * _block(tokens, tokens, cfg.embed_dim, cfg.mlp_ratio)


def _decoder(cfg: ModelConfig, wanted: int) -> int:
    """`wanted`: the tokens that the last block gives."""
    every, dim = int(cfg.cls_embed) + cfg.num_patches, cfg.decoder_embed_dim
    whole = _block(every, every, dim, cfg.mlp_ratio)
    return (cfg.decoder_depth - 1) * whole + _block(wanted, every, dim, cfg.mlp_ratio)


def _block(queries: int, keys: int, dim: int, mlp_ratio: float) -> int:
    """q, proj and the MLP for queries; k and v for keys; scores, and their product with v."""
    linears = _linear(queries, dim, 2 * dim + 2 * int(dim * mlp_ratio)) + _linear(
        keys, dim, 2 * dim
    )
    return linears + 4 * queries * keys * dim
