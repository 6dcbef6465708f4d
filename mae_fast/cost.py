"""What a training step costs, by formula: bytes, time, communication. memory.py has its memory.

FLOP and bytes are those of mae_fast/bench/flops.py. Time is a model, no measurement: each kind of
work has an amount, counted from shapes, and a rate, which is a ceiling of the device times a share
of it; kinds do not overlap.
"""

from typing import NamedTuple

import torch

from mae_fast.bench.calls import TARGET
from mae_fast.bench.flops import BASE_RATIO, Flop, by_part, step_work
from mae_fast.config import ModelConfig
from mae_fast.memory import encoder_parameters, parameters, rows
from mae_fast.ops.work import ADAMW_BYTES, Both, Work

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

# What is bound by copies, and the ops that it is made of; "loss" is torch's own.
COPIED = {
    "norms and gelu": ("layer_norm", "add_layer_norm", "bias_gelu"),
    "casts and sums": ("casts and sums",),
    "loss and decoder input": ("masked_mse", "masked_hog_mse", "loss", "decoder_tokens"),
    "optimizer": ("adamw", "ema"),
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


def step_bytes(cfg: ModelConfig, clips: int, ratio: float, p: int) -> dict[str, float]:
    """Bytes that each op moves in a step, forward and backward, p bytes a value that products take
    and give: the least (mae_fast/ops/work.py), and what is made again in backward."""
    r = rows(cfg, ratio)
    values = r.decoder * cfg.decoder_embed_dim + cfg.depth * r.seen * cfg.embed_dim
    found = {"casts and sums": _cast(clips * values, p), "adamw": ADAMW_BYTES * parameters(cfg)}
    found |= _moved(_work(cfg, clips, ratio, p), again=p == 4)
    if cfg.target == "features":
        found["ema"] = 12.0 * encoder_parameters(cfg)  # read, read, written
    if cfg.target in ("tokens", "features"):
        # Of each value predicted, in torch's own operators: its copy in fp32, the error or the
        # logarithm, and the gradient, each written and read, and the gradient in p bytes.
        found["loss"] = clips * r.masked * cfg.pred_dim * (24.0 + 3 * p)
    return found


def _cast(values: int, p: int) -> float:
    """Bytes of casts and sums beside the ops, for so many values of blocks. On a GPU the residual's
    gradient is written in 16 bits too, for two products, and the gradients of five products are
    read again for their biases'. On a CPU the gradients of q's, k's and v's input are summed."""
    return values * ((2 + 5) * p if p < 4 else 6 * p)


def _moved(work: dict[tuple[str, str], Both], again: bool) -> dict[str, float]:
    """Bytes by op. again: in backward a norm's output is made from the sum, an activation's from
    fc1's; a GPU keeps them."""
    found: dict[str, float] = {}
    more = {"layer_norm": 1.0, "add_layer_norm": 0.5, "bias_gelu": 1.0}
    for (phase, op), (forward, backward) in work.items():
        times = 1 + (more.get(op, 0.0) if again and phase != TARGET else 0.0)
        found[op] = found.get(op, 0.0) + forward.bytes * times + backward.bytes
    return found


def _work(cfg: ModelConfig, clips: int, ratio: float, p: int) -> dict[tuple[str, str], Both]:
    dtype = torch.bfloat16 if p == 2 else torch.float32
    return step_work(cfg, clips, ratio or BASE_RATIO, encode_all=ratio == 0, dtype=dtype)


def terms(cfg: ModelConfig, clips: int, ratio: float, device: Device) -> list[Term]:
    """The work of one step of `clips` on one device."""
    p = device.product_bytes
    return _terms(cfg, device, _work(cfg, clips, ratio, p), step_bytes(cfg, clips, ratio, p))


def encoder_terms(
    cfg: ModelConfig, clips: int, ratio: float, device: Device, train: bool
) -> list[Term]:
    """The encoder alone, on the patches that a mask leaves (ratio 0: all): a step of fine-tuning,
    but for the head, or without `train` forward, as in a test."""
    p = device.product_bytes
    work = {
        (phase, op): both if train else (both[0], Work())
        for (phase, op), both in _work(cfg, clips, ratio, p).items()
        if phase in ("patch embedding", "encoder")
    }
    moved = _moved(work, again=train and p == 4)
    moved["casts and sums"] = train * _cast(
        clips * cfg.depth * rows(cfg, ratio).seen * cfg.embed_dim, p
    )
    moved["adamw"] = train * ADAMW_BYTES * encoder_parameters(cfg)
    return [t for t in _terms(cfg, device, work, moved, train) if t.amount]


def _terms(
    cfg: ModelConfig,
    device: Device,
    work: dict[tuple[str, str], Both],
    moved: dict[str, float],
    train: bool = True,
) -> list[Term]:
    flop = by_part(work)
    # Of attention, whose backward makes scores again, in each of its two kernels.
    products, exponentials = (1 + device.attention_backward / 2, 3) if train else (1, 1)
    encoder, decoder = flop["encoder attention"].forward, flop["decoder attention"].forward
    target = {
        f"{TARGET} {kind}": flop.get(f"{TARGET} {kind}", Flop(0, 0)).forward
        for kind in ("products", "attention")
    }
    # FLOP of attention's products for each score.
    a_score = 4 * cfg.embed_dim // cfg.num_heads
    a_decoder_score = 4 * cfg.decoder_embed_dim // cfg.decoder_num_heads
    amounts = {
        "encoder products": sum(flop["patch embedding"] + flop["encoder products"]),
        "decoder products": sum(flop["decoder products"] + flop["head"]),
        "attention products": products * (encoder + decoder),
        "attention exponentials": exponentials * (encoder / a_score + decoder / a_decoder_score)
        + target[f"{TARGET} attention"] / a_score,
    }
    amounts |= {kind: sum(moved.get(op, 0.0) for op in ops) for kind, ops in COPIED.items()}
    shares = dict(device.shares)
    if any(target.values()):
        amounts |= target
        shares |= zip(
            target, (shares["encoder products"], shares["attention products"]), strict=True
        )

    def ceiling(kind: str) -> float:
        if kind == "attention exponentials":
            return device.exponentials
        return device.copy if kind in COPIED else device.products

    return [Term(kind, amounts[kind], ceiling(kind), share) for kind, share in shares.items()]


def compute_seconds(cfg: ModelConfig, clips: int, ratio: float, device: Device) -> float:
    """A step on one device, where launches are hidden (large batches, or a CUDA graph)."""
    return sum(term.seconds for term in terms(cfg, clips, ratio, device))


def clips_per_second(
    cfg: ModelConfig, clips: int, ratio: float, device: Device, gpus: int, gpus_per_node: int = 8
) -> float:
    """Of `gpus` devices with `clips` each under DDP, where loading is fast enough."""
    compute = compute_seconds(cfg, clips, ratio, device)
    sent = communication_seconds(cfg, gpus, gpus_per_node, device)
    return gpus * clips / (compute + exposed_seconds(sent, compute))


def communication_seconds(
    cfg: ModelConfig, gpus: int, gpus_per_node: int, device: Device, shard: str = "none"
) -> float:
    """What a step's collectives take in rings at full bandwidth, all of fp32. none: gradients are
    added up everywhere. With train.shard gradients are added up where they belong, and weights
    gathered: once (optimizer), or forward and backward (full)."""
    if gpus == 1:
        return 0.0
    bandwidth = device.link if gpus <= gpus_per_node else device.network
    each = {"none": 2 * 4, "optimizer": 4 + 4, "full": 4 + 2 * 4}[shard]
    return (gpus - 1) / gpus * each * parameters(cfg) / bandwidth


def exposed_seconds(communication: float, compute: float) -> float:
    """The part of communication that backward, two thirds of a step, does not hide."""
    return max(0.0, communication - compute * 2 / 3)


def efficiencies(
    cfg: ModelConfig,
    clips: int,
    ratio: float,
    gpus_per_node: int,
    device: Device,
    shard: str = "none",
) -> dict[int, float]:
    """What of each GPU's time is of use where 1, 2, 4 ... share a step of `clips`: one alone takes
    so much longer than all. Each has a clip at least."""
    found, alone = {}, compute_seconds(cfg, clips, ratio, device)
    for n in (1 << i for i in range(clips.bit_length())):
        compute = compute_seconds(cfg, clips // n, ratio, device)
        sent = communication_seconds(cfg, n, gpus_per_node, device, shard)
        found[n] = (
            alone * (clips // n * n / clips) / (n * (compute + exposed_seconds(sent, compute)))
        )
    return found
