"""What every baseline is run with: the official optimizer and the official loop's one step."""

import abc
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mae_fast.config import ModelConfig
from mae_fast.optim import param_groups
from mae_fast.spans import span

# PRETRAIN.md of MAE-ST. The learning rate is the recipe's at its peak on one GPU (2 videos).
BETAS, WEIGHT_DECAY, CLIP_GRAD = (0.9, 0.95), 0.05, 0.02
LR = 1.6e-3 * 2 / 256
# Of one forward: (clips, noise, mask_ratio, encode_all) -> loss.
LossOf = Callable[[Tensor, Tensor, float, bool], Tensor]


class Built(NamedTuple):
    """A baseline ready to train: step(clips [B, C, T, H, W], noise [B, L], mask_ratio, encode_all)
    -> loss.

    clips are uint8, or normalised float where the loader's share is not to be timed. mask_ratio is
    by default that of the build. encode_all is masking at 0%: the encoder sees every token; the
    decoder and the loss stay those of the mask.
    """

    model: nn.Module
    optimizer: torch.optim.AdamW
    step: Callable[..., float]


class Baseline(abc.ABC):
    """What trains by the official loop: `parts` are its model with its own starting values, its
    forward's loss, and whether its AdamW is fused."""

    @abc.abstractmethod
    def parts(self, cfg: ModelConfig) -> tuple[nn.Module, LossOf, bool]: ...

    def build(
        self,
        cfg: ModelConfig,
        mask_ratio: float = 0.9,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> Built:
        """The model on its device, the official optimizer, and one step of the official loop, its
        host syncs included; bf16 runs forward under autocast, the official code is fp32. ValueError
        on a model it lacks."""
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
        model, loss_of, fused = self.parts(cfg)
        params = list(model.to(device).train().parameters())
        optimizer = make_optimizer(model, fused)

        def step(
            clips: Tensor,
            noise: Tensor,
            mask_ratio: float = mask_ratio,
            encode_all: bool = False,
        ) -> float:
            with torch.autocast(clips.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(clips, noise, mask_ratio, encode_all)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value}")
            loss.backward()
            with span("optimizer", "adamw"):
                torch.nn.utils.clip_grad_norm_(params, CLIP_GRAD)
                optimizer.step()
            optimizer.zero_grad()
            if clips.is_cuda:
                torch.cuda.synchronize()
            return value

        return Built(model, optimizer, step)


def make_optimizer(model: nn.Module, fused: bool = False) -> torch.optim.AdamW:
    """AdamW on the official groups, multi-tensor as in the official code, or fused."""
    groups = param_groups(model, WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, foreach=not fused, fused=fused)
