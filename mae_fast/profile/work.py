"""The least that each part of a step must compute and move, and what the machine would need for it.

FLOP: mae_fast/bench/flops.py. Bytes: every tensor read or written once, as the kernels of mae_fast
do it, with p bytes a value that products take and give; the residual is fp32. A baseline's parts
have the same formulas, at its own number of tokens.
"""

from typing import NamedTuple

from mae_fast import cost
from mae_fast.bench import engines
from mae_fast.bench.engines import OURS, Masking
from mae_fast.config import ModelConfig
from mae_fast.profile.trace import Where


class Work(NamedTuple):
    """FLOP and bytes of one direction of one op in one phase."""

    flop: float = 0.0
    bytes: float = 0.0

    def seconds(self, product_rate: float, copy_rate: float) -> float:
        """What it takes at the machine's limits: the roofline."""
        return max(self.flop / product_rate, self.bytes / copy_rate)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)


def least(
    name: str, cfg: ModelConfig, clips: int, masking: Masking, p: int = 4
) -> dict[Where, Work]:
    """The work of a step of engine `name`, where there are formulas for it."""
    parts = engines.parts(name, cfg, clips, masking)
    if parts is None:
        return {}
    ours, cfg = name == OURS, engines.model_of(name, cfg)
    length, cls = cfg.num_patches, int(cfg.cls_embed)
    masked, every = length - masking.keep, length + cls
    seen = cls + (length if masking.encode_all else masking.keep)
    embedded = masking.keep if ours and not masking.encode_all else length
    predicted = masked if ours else length
    last = masked if ours else every  # tokens that the last decoder block gives
    tokens = (cfg.depth * seen, (cfg.decoder_depth - 1) * every + last)
    found: dict[Where, Work] = {}

    def put(phase: str, op: str, forward: Work, backward: Work) -> None:
        for where, work in ((False, forward), (True, backward)):
            key = Where(phase, op, where)
            found[key] = found.get(key, Work()) + work

    pixels = cfg.in_chans * cfg.t_patch_size * cfg.patch_size**2
    flop = parts["patch embedding"]
    moved = clips * embedded * (pixels + 4 * cfg.embed_dim) + p * pixels * cfg.embed_dim
    put("patch embedding", "patch_embed", Work(flop.forward, moved), Work(flop.backward, moved))
    sizes = {
        "encoder": (tokens[0], cfg.embed_dim, cfg.depth),
        "decoder": (tokens[1], cfg.decoder_embed_dim, cfg.decoder_depth),
    }
    for phase, (count, dim, depth) in sizes.items():
        values, hidden = clips * count * dim, clips * count * int(dim * cfg.mlp_ratio)
        products = [parts[f"{phase} products"]]
        weights = depth * dim * dim * (4 + 2 * cfg.mlp_ratio)
        rows = 8 * values + 2 * hidden + 2 * values  # in and out of q, k, v, proj, fc1, fc2
        if phase == "decoder":
            products.append(parts["head"])
            weights += dim * (cfg.embed_dim + cfg.pred_dim)
            rows += clips * predicted * (dim + cfg.pred_dim)
        each = Work(sum(x.forward for x in products), p * (rows + weights))
        back = Work(sum(x.backward for x in products), 2 * p * (rows + weights))
        put(phase, "linear", each, back)
        flop = parts[f"{phase} attention"]
        attention = Work(flop.forward, 4 * p * values), Work(flop.backward, 8 * p * values)
        put(phase, "attention", *attention)
        # Two norms a block: x, y -> sum, out; then dsum, dout, sum -> dx.
        norm = "add_layer_norm" if ours else "layer_norm"
        put(phase, norm, Work(0, 2 * values * (8 + 2 * p)), Work(0, 2 * values * (12 + p)))
        put(phase, "bias_gelu", Work(0, 2 * p * hidden), Work(0, 3 * p * hidden))
    decoder_input = clips * every * cfg.decoder_embed_dim
    put("decoder", "decoder_tokens", Work(0, 8 * decoder_input), Work(0, 8 * decoder_input))
    pred = clips * masked * cfg.pred_dim  # pred and uint8 pixels -> pred's gradient
    put("loss", "masked_mse", Work(0, (2 * p + 1) * pred), Work())
    adamw = Work(0, 32 * cost.parameters(cfg))  # the gradient twice; weight, moments: in and out
    found[Where("optimizer", "adamw", False)] = adamw
    return found
