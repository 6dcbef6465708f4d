"""What a training step costs, by formula: bytes, time, communication. memory.py has its memory.

FLOP and bytes are those of mae_fast/bench/flops.py. Time is a model, no measurement: each kind of
work has an amount, counted from shapes, and a rate, which is a ceiling of the device times a share
of it; kinds do not overlap.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mae_fast.bench.calls import TARGET
from mae_fast.bench.flops import BASE_RATIO, by_part, step_work
from mae_fast.config import ModelConfig
from mae_fast.memory import Memory, encoder_parameters, memory, parameters, rows, tuning
from mae_fast.ops.work import ADAMW_BYTES, Both, Work

# Of ceilings, on a GPU and on a CPU. A GPU's were assumed before anything had run on one;
# docs/gpu.md has steps of an H200 beside what they predict. A CPU's are those of single ops in
# benchmarks/results/ops.jsonl, rounded (linear 81-88%; attention 82% of the decoder's with 5
# products back; norms 46-61%, gelu 60%, decoder_tokens 26%, loss 21%); its attention's exponentials
# are in the share of its products.
SHARES = {
    "encoder products": (0.75, 0.85),
    "decoder products": (0.60, 0.85),
    "attention products": (0.80, 0.82),
    "attention exponentials": (0.90, None),
    "norms and gelu": (0.85, 0.55),
    "casts and sums": (0.85, 0.55),
    "loss and decoder input": (0.80, 0.25),
    "optimizer": (0.85, 1.0),
}
GPU_SHARES = {kind: gpu for kind, (gpu, _) in SHARES.items()}
CPU_SHARES = {kind: cpu for kind, (_, cpu) in SHARES.items() if cpu}
# What is bound by copies, and the ops that it is made of; "loss" is torch's own.
COPIED = {
    "norms and gelu": ("layer_norm", "add_layer_norm", "bias_gelu"),
    "casts and sums": ("casts and sums",),
    "loss and decoder input": ("masked_mse", "masked_hog_mse", "loss", "decoder_tokens"),
    "optimizer": ("adamw", "ema"),
}
# Of an op's bytes forward, those of what fp32 makes again in backward.
MADE_AGAIN = {"layer_norm": 1.0, "add_layer_norm": 0.5, "bias_gelu": 1.0}


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


@dataclass(frozen=True)
class Step:
    """A step of `clips` on each of `gpus` devices. Of the `part` "all" it is pre-training's, of
    "encoder" fine-tuning's but for the head (the encoder alone, on the patches that a mask leaves;
    ratio 0: all), and of "forward" the same without backward, as in a test."""

    cfg: ModelConfig
    clips: int
    ratio: float
    device: Device
    part: str = "all"
    gpus: int = 1
    gpus_per_node: int = 8
    shard: str = "none"

    def work(self) -> dict[tuple[str, str], Both]:
        """(forward, backward) by phase and op."""
        dtype = torch.bfloat16 if self.device.product_bytes == 2 else torch.float32
        ratio, every = self.ratio or BASE_RATIO, self.ratio == 0
        found = step_work(self.cfg, self.clips, ratio, encode_all=every, dtype=dtype)
        if self.part == "all":
            return found
        return {
            (phase, op): (forward, backward if self.part == "encoder" else Work())
            for (phase, op), (forward, backward) in found.items()
            if phase in ("patch embedding", "encoder")
        }

    def bytes(self) -> dict[str, float]:
        """By op, forward and backward: the least (mae_fast/ops/work.py), and what is made again in
        backward: a norm's output from the sum, an activation's from fc1's; a GPU keeps them."""
        cfg, p, r = self.cfg, self.device.product_bytes, rows(self.cfg, self.ratio)
        every, train, found = self.part == "all", self.part != "forward", {}
        if train:
            values = every * r.decoder * cfg.decoder_embed_dim + cfg.depth * r.seen * cfg.embed_dim
            trained = parameters(cfg) if every else encoder_parameters(cfg)
            found = {
                "casts and sums": _cast(self.clips * values, p)
                + every * _between(self.clips * r.every * cfg.decoder_embed_dim, p),
                "adamw": ADAMW_BYTES * trained,
            }
        for (phase, op), (forward, backward) in self.work().items():
            again = MADE_AGAIN.get(op, 0.0) if train and p == 4 and phase != TARGET else 0.0
            found[op] = found.get(op, 0.0) + forward.bytes * (1 + again) + backward.bytes
        if every and cfg.target == "features":
            found["ema"] = 12.0 * encoder_parameters(cfg)  # read, read, written
        if every and cfg.target in ("tokens", "features"):
            # Of each value predicted, in torch's own operators: its copy in fp32, the error or the
            # logarithm, and the gradient, each written and read, and the gradient in p bytes.
            found["loss"] = self.clips * r.masked * cfg.pred_dim * (24.0 + 3 * p)
        return found

    def terms(self) -> list[Term]:
        """What it does on one device."""
        cfg, device, flop, moved = self.cfg, self.device, by_part(self.work()), self.bytes()
        forward = {part: both.forward for part, both in flop.items()}
        encoder, decoder, target = (
            forward.get(f"{phase} attention", 0) for phase in ("encoder", "decoder", TARGET)
        )
        # Of attention, whose backward makes scores again, in each of its two kernels.
        train = self.part != "forward"
        products, exponentials = (1 + device.attention_backward / 2, 3) if train else (1, 1)
        # FLOP of attention's products for each score.
        a_score = 4 * cfg.embed_dim // cfg.num_heads
        a_decoder_score = 4 * cfg.decoder_embed_dim // cfg.decoder_num_heads
        amounts = {
            "encoder products": sum(flop["patch embedding"] + flop["encoder products"]),
            "decoder products": sum(flop["decoder products"] + flop["head"]),
            "attention products": products * (encoder + decoder),
            "attention exponentials": exponentials * (encoder / a_score + decoder / a_decoder_score)
            + target / a_score,
            f"{TARGET} products": forward.get(f"{TARGET} products", 0),
            f"{TARGET} attention": target,
        }
        amounts |= {kind: sum(moved.get(op, 0.0) for op in ops) for kind, ops in COPIED.items()}
        ceilings = dict.fromkeys(COPIED, device.copy)
        ceilings["attention exponentials"] = device.exponentials
        shares = device.shares | {
            f"{TARGET} products": device.shares["encoder products"],
            f"{TARGET} attention": device.shares["attention products"],
        }
        return [
            Term(kind, amounts[kind], ceilings.get(kind, device.products), share)
            for kind, share in shares.items()
            if amounts[kind]
        ]

    @functools.cached_property
    def compute(self) -> float:
        """Seconds on one device, where launches are hidden (large batches, or a CUDA graph)."""
        return sum(term.seconds for term in self.terms())

    @property
    def communication(self) -> float:
        """Seconds of its collectives in rings at full bandwidth, all of fp32. none: gradients are
        added up everywhere. With train.shard gradients are added up where they belong, and weights
        gathered: once (optimizer), or forward and backward (full)."""
        if self.gpus == 1 or self.part == "forward":
            return 0.0
        link, network = self.device.link, self.device.network
        each = {"none": 2 * 4, "optimizer": 4 + 4, "full": 4 + 2 * 4}[self.shard]
        sent = (self.gpus - 1) / self.gpus * each * parameters(self.cfg)
        return sent / (link if self.gpus <= self.gpus_per_node else network)

    @property
    def exposed(self) -> float:
        return exposed_seconds(self.communication, self.compute)

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def clips_per_second(self) -> float:
        """Of all devices, where loading is fast enough."""
        return self.gpus * self.clips / self.seconds

    def held(self) -> Memory:
        """What it holds in memory."""
        cfg, ratio, p = self.cfg, self.ratio, self.device.product_bytes
        if self.part != "all":
            return tuning(cfg, self.clips, ratio, p)
        shards = self.gpus if self.shard != "none" else 1
        return memory(cfg, self.clips, ratio, p, shards, shard=self.shard)

    def efficiencies(self) -> dict[int, float]:
        """What of each GPU's time is of use where 1, 2, 4 ... share all clips of the step: one
        alone takes so much longer than all. Each has a clip at least."""
        clips, found = self.gpus * self.clips, {}
        alone = replace(self, clips=clips).compute
        for n in (1 << i for i in range(clips.bit_length())):
            of_n = replace(self, clips=clips // n, gpus=n)
            found[n] = alone * (clips // n * n / clips) / (n * of_n.seconds)
        return found


def _cast(values: int, p: int) -> float:
    """Bytes of casts and sums beside the ops, for so many values of blocks. On a GPU the residual's
    gradient is written in 16 bits too, for two products, and those of q, k and v are read again for
    their biases'. On a CPU the gradients of q's, k's and v's input are summed."""
    return values * ((2 + 3) * p if p < 4 else 6 * p)


def _between(values: int, p: int) -> float:
    """Bytes of what stands between the ops, for so many values of the decoder's input. On a GPU the
    first block's q, k, v are looked up, and their gradients gathered: 6 p; what is put together,
    added and cast at both ends, and the loss's pass over its gradient: 9 p, by the budget of a step
    in docs/gpu.md, which a test holds this to. On a CPU they are within the shares."""
    return values * 15 * p if p < 4 else 0.0


def exposed_seconds(communication: float, compute: float) -> float:
    """The part of communication that backward, two thirds of a step, does not hide."""
    return max(0.0, communication - compute * 2 / 3)
