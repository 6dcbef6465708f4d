"""What a training step computes and moves at the least, counted from its recorded calls.

FLOP are those of matrix products, 2 a multiply-add. Checked against torch's FlopCounterMode in
tests/test_benchmarks.py.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch

from mae_fast.bench.calls import step_calls
from mae_fast.config import ModelConfig
from mae_fast.forward import SAVINGS
from mae_fast.memory import BASE_RATIO
from mae_fast.ops.work import Both, Work

PARTS = ("patch embedding", "encoder products", "encoder attention", "decoder products")
PARTS += ("decoder attention", "head")


class Flop(NamedTuple):
    """FLOP of one part of a step."""

    forward: int
    backward: int


def step_work(
    cfg: ModelConfig,
    clips: int,
    mask_ratio: float = BASE_RATIO,
    without: Collection[str] = (),
    encode_all: bool = False,
    full_pred: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[tuple[str, str], Both]:
    """{(phase, op): (forward, backward)} of mae_fast's step, its optimizer left out. `without`
    names savings switched off; encode_all: the encoder sees every token, the decoder and the loss
    are as ever; full_pred: every token is predicted."""
    found: dict[tuple[str, str], Both] = {}
    how = (frozenset(without), encode_all, full_pred)
    for call in step_calls(cfg, clips, mask_ratio, dtype, *how):
        key = call.phase, call.op
        before = found.get(key, (Work(), Work()))
        found[key] = tuple(a + b * call.count for a, b in zip(before, call.work(), strict=True))
    return found


def by_part(work: dict[tuple[str, str], Both]) -> dict[str, Flop]:
    """FLOP under PARTS, and of a target encoder where there is one."""
    found = dict.fromkeys(PARTS, Flop(0, 0))
    for (phase, op), (forward, backward) in work.items():
        if forward.flop:
            kind = "" if phase in PARTS else " attention" if op == "attention" else " products"
            before = found.get(phase + kind, Flop(0, 0))
            both = before.forward + int(forward.flop), before.backward + int(backward.flop)
            found[phase + kind] = Flop(*both)
    return found


def step_parts(*args, **how) -> dict[str, Flop]:
    """FLOP of `step_work` by part."""
    return by_part(step_work(*args, **how))


def official_parts(cfg: ModelConfig, clips: int, mask_ratio: float = BASE_RATIO) -> dict[str, Flop]:
    """The same of the official step: no saving, and in mae_st a prediction of every token (cls left
    out, under 0.1% of it). At ratio 0 its encoder and its decoder's entry see every token."""
    every = cfg.variant == "mae_st"
    return by_part(step_work(cfg, clips, mask_ratio, SAVINGS, full_pred=every))


def step_flop(*args, **how) -> int:
    """FLOP of mae_fast's step, forward and backward."""
    return sum(map(sum, step_parts(*args, **how).values()))


def official_step_flop(*args, **how) -> int:
    """FLOP of the official step, forward and backward."""
    return sum(map(sum, official_parts(*args, **how).values()))


def forward_flop(cfg: ModelConfig, mask_ratio: float) -> int:
    """FLOP of the official forward of one clip: the paper's count. Its ratios are the paper's too:
    forward_flop(cfg, 0) / forward_flop(cfg, 0.9) is 7.7 for ViT-L."""
    return sum(part.forward for part in official_parts(cfg, 1, mask_ratio).values())
