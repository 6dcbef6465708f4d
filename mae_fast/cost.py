"""What a training step costs, by formula: parameters, bytes, memory, time, communication.

FLOP and bytes are those of mae_fast/bench/flops.py. Time is a model, no measurement: each kind of
work has an amount, counted from shapes, and a rate, which is a ceiling of the device times a share
of it; kinds do not overlap.
"""

from typing import NamedTuple

import torch

from mae_fast.bench.flops import BASE_RATIO, by_part, step_work
from mae_fast.config import ModelConfig
from mae_fast.masking import num_keep
from mae_fast.ops.work import ADAMW_BYTES, Both

USABLE = 0.92  # of a device's memory; assumed: the rest is the runtime's own, and holes
# Shares of a GPU's ceilings: assumed before anything had run on one; docs/gpu.md has steps of an
# H200 beside what they predict.
GPU_SHARES = {
    "encoder products": 0.75,
    "decoder products": 0.60,
    "attention products": 0.80,
    "attention exponentials": 0.90,
    "norms and gelu": 0.85,
    "casts and sums": 0.85,
    "loss and decoder input": 0.80,
    "optimizer": 0.85,
}
# Of a CPU's: those of single ops in benchmarks/results/ops.jsonl, rounded (linear 81-88%; attention
# 82% of the decoder's with 5 products back; norms 46-61%, gelu 60%, decoder_tokens 26%, loss 21%).
# Its attention's exponentials are in the share of its products.
CPU_SHARES = {
    "encoder products": 0.85,
    "decoder products": 0.85,
    "attention products": 0.82,
    "norms and gelu": 0.55,
    "casts and sums": 0.55,
    "loss and decoder input": 0.25,
    "optimizer": 1.0,
}


class Device(NamedTuple):
    """Ceilings, as large products and copies reach them, and shares of these. `link` and `network`:
    bytes a second of one device to its node and to others, one way. attention_backward: products
    that attention's backward does, where forward does 2."""

    name: str
    products: float  # FLOP a second
    copy: float  # bytes read and written, a second
    exponentials: float | None  # a second; None: within the share of attention's products
    memory: float  # bytes
    link: float | None
    network: float | None
    shares: dict[str, float]
    product_bytes: int = 2  # of a value that a product takes: bf16, with fp32 masters
    attention_backward: int = 7  # two kernels, each with its own scores


def _gpu(name: str, products: float, copy: float, sms: int, ghz: float, *rest: float) -> Device:
    """16 exponentials a clock and multiprocessor."""
    return Device(name, products, copy, 16e9 * sms * ghz, *rest, GPU_SHARES)


# Dense bf16 products: 81% of the datasheet's rate, copies: 90% of its bandwidth. These two ratios
# are those of H100's 798 TFLOP/s and 3.0 TB/s, and are assumed for the rest.
DEVICES = {
    d.name: d
    for d in (
        _gpu("h100", 798e12, 3.0e12, 132, 1.755, 80e9, 450e9, 50e9),
        _gpu("h200", 798e12, 4.3e12, 132, 1.755, 141e9, 450e9, 50e9),
        _gpu("a100", 252e12, 1.83e12, 108, 1.41, 80e9, 300e9, 25e9),
        _gpu("b200", 1815e12, 7.2e12, 148, 1.85, 180e9, 900e9, 50e9),
    )
}


class Term(NamedTuple):
    """One kind of work of a step: `amount` of FLOP, bytes or exponentials, at `share` of the
    ceiling."""

    name: str
    amount: float
    ceiling: float
    share: float

    @property
    def seconds(self) -> float:
        return self.amount / (self.ceiling * self.share)


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


def step_bytes(cfg: ModelConfig, clips: int, ratio: float, p: int) -> dict[str, float]:
    """Bytes that each op moves in a step, forward and backward, p bytes a value that products take
    and give: the least (mae_fast/ops/work.py), and what is made again in backward."""
    found: dict[str, float] = {"casts and sums": 0.0, "adamw": ADAMW_BYTES * parameters(cfg)}
    half = p < 4  # as on a GPU, which keeps norms and activations, and makes one product of q, k, v
    for (_, op), (forward, backward) in _work(cfg, clips, ratio, p).items():
        # Else a norm's output is made again from the sum, an activation's from fc1's.
        again = {"layer_norm": 1.0, "add_layer_norm": 0.5, "bias_gelu": 1.0}.get(op, 0.0)
        found[op] = found.get(op, 0.0) + forward.bytes * (1 + again * (not half)) + backward.bytes
    # In half: the residual's gradient is written in 16 bits too, for two products, and the
    # gradients of five products are read again for their biases'. Else: the gradients of q's, k's
    # and v's input are summed.
    r, dim, dec = rows(cfg, ratio), cfg.embed_dim, cfg.decoder_embed_dim
    values = r.decoder * dec + cfg.depth * r.seen * dim  # of blocks, once each
    found["casts and sums"] = clips * values * ((2 + 5) * p if half else 6 * p)
    return found


def _work(cfg: ModelConfig, clips: int, ratio: float, p: int) -> dict[tuple[str, str], Both]:
    dtype = torch.bfloat16 if p == 2 else torch.float32
    return step_work(cfg, clips, ratio or BASE_RATIO, encode_all=ratio == 0, dtype=dtype)


def terms(cfg: ModelConfig, clips: int, ratio: float, device: Device) -> list[Term]:
    """The work of one step of `clips` on one device."""
    moved = step_bytes(cfg, clips, ratio, device.product_bytes)
    flop = by_part(_work(cfg, clips, ratio, device.product_bytes))
    heads = {
        "encoder": cfg.embed_dim // cfg.num_heads,
        "decoder": cfg.decoder_embed_dim // cfg.decoder_num_heads,
    }
    attention = {phase: flop[f"{phase} attention"].forward for phase in heads}
    amounts = {
        "encoder products": sum(flop["patch embedding"] + flop["encoder products"]),
        "decoder products": sum(flop["decoder products"] + flop["head"]),
        "attention products": sum(attention.values()) * (1 + device.attention_backward / 2),
        # One a score: of its FLOP, 4 a value of a head. In each kernel of backward too.
        "attention exponentials": 3 * sum(attention[x] / (4 * d) for x, d in heads.items()),
        "norms and gelu": sum(moved[op] for op in ("layer_norm", "add_layer_norm", "bias_gelu")),
        "casts and sums": moved["casts and sums"],
        "loss and decoder input": sum(
            moved.get(op, 0.0) for op in ("masked_mse", "masked_hog_mse", "decoder_tokens")
        ),
        "optimizer": moved["adamw"],
    }

    def ceiling(name: str) -> float:
        if name == "attention exponentials":
            return device.exponentials
        return device.products if name.endswith("products") else device.copy

    return [Term(n, amounts[n], ceiling(n), share) for n, share in device.shares.items()]


def compute_seconds(cfg: ModelConfig, clips: int, ratio: float, device: Device) -> float:
    """A step on one device, where launches are hidden (large batches, or a CUDA graph)."""
    return sum(term.seconds for term in terms(cfg, clips, ratio, device))


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
    device: Device,
    shards: int = 1,
    keep: bool = False,
) -> Memory:
    """Of the model, its optimizer and what backward needs; without the runtime's own. `shards`:
    devices among which FSDP parts weights, moments and gradients; keep: norms and activations are
    not made again."""
    p, r, count = device.product_bytes, rows(cfg, ratio), parameters(cfg)
    state = 12 * count / shards + (p * count if p < 4 else 0)
    encoder, decoder = _saved(cfg, r, p, keep)
    # The last block's backward begins with g made again and dg, when the head's are gone.
    begins = p * int(cfg.mlp_ratio * cfg.decoder_embed_dim) * r.masked
    a_clip = encoder + decoder + begins
    gradients = 4 * count / shards
    after_decoder = clips * encoder + 4 * decoder_parameters(cfg) / shards
    peak = state + max(clips * a_clip, after_decoder, gradients)
    return Memory(state, gradients, a_clip, peak)


def keeps(cfg: ModelConfig, clips: int, ratio: float, has: float) -> bool:
    """Whether a GPU that has so many bytes holds a step that makes nothing again."""
    a_gpu = DEVICES["h100"]
    return memory(cfg, clips, ratio, a_gpu, keep=True).peak <= USABLE * has


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


def greatest_batch(cfg: ModelConfig, ratio: float, device: Device, shards: int = 1) -> int:
    """Clips of the largest step that fits; 0 if none does."""
    low, high = 0, 1 << 16
    while low < high:
        clips = (low + high + 1) // 2
        fits = memory(cfg, clips, ratio, device, shards).peak <= USABLE * device.memory
        low, high = (clips, high) if fits else (low, clips - 1)
    return low


def communication_seconds(
    cfg: ModelConfig, gpus: int, gpus_per_node: int, device: Device, strategy: str
) -> float:
    """What a step's collectives take in rings at full bandwidth. ddp: all-reduce of fp32
    gradients. fsdp: weights gathered forward and backward in the products' dtype, gradients
    scattered in fp32."""
    if gpus == 1:
        return 0.0
    bandwidth = device.link if gpus <= gpus_per_node else device.network
    each = {"ddp": 2 * 4, "fsdp": 2 * device.product_bytes + 4}[strategy]
    return (gpus - 1) / gpus * each * parameters(cfg) / bandwidth


def exposed_seconds(communication: float, compute: float) -> float:
    """The part of communication that backward, two thirds of a step, does not hide."""
    return max(0.0, communication - compute * 2 / 3)
