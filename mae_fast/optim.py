"""The official optimizer: what decays, the learning rate, and a step without host sync."""

import math

import torch
from torch import Tensor, nn

from mae_fast.config import TrainConfig
from mae_fast.ops.adamw import clipped_adamw


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: no decay for 1-D parameters and biases, decay for the rest.

    Tokens and position tables are 3-D, so they decay, as in the official code.
    """
    decay, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (rest if p.ndim == 1 or name.endswith(".bias") else decay).append(p)
    return [{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """torch's fused AdamW on the official groups; lr is set before every step."""
    groups = param_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=cfg.betas, eps=cfg.eps, fused=True)


def peak_lr(cfg: TrainConfig, world: int) -> float:
    """blr * batch * accum * processes / 256; repeat_aug is not in it (official, deliberate)."""
    return cfg.blr * videos_per_step(cfg, world) / 256


def lr_at(at: float, total: float, warmup: float, peak: float, floor: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine down to `floor`. Units of at, total and warmup are
    the caller's (epochs or steps); the first step has lr 0 when there is a warm-up."""
    if at < warmup:
        return peak * at / warmup
    progress = (at - warmup) / max(total - warmup, 1e-12)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def videos_per_step(cfg: TrainConfig, world: int) -> int:
    """Of all processes; repeat_aug's clips of a video are not counted."""
    return cfg.batch_size * cfg.accum_steps * world


def total_steps(cfg: TrainConfig, videos: int, world: int) -> int:
    """Optimizer steps of a whole run: train.steps, or train.epochs passes over the videos."""
    if cfg.steps:
        return cfg.steps
    return max(1, int(cfg.epochs * videos / videos_per_step(cfg, world)))


def learning_rate(cfg: TrainConfig, step: int, total: int, videos: int, world: int) -> float:
    """The rate of the step numbered `step` from 0, warmed up per step, in the official shape."""
    warmup = cfg.warmup_steps
    if not cfg.steps:
        warmup = cfg.warmup_epochs * videos / videos_per_step(cfg, world)
    return lr_at(step, total, warmup, peak_lr(cfg, world), cfg.min_lr)


def clipped_step(optimizer: torch.optim.AdamW, lr: float | Tensor, clip: float) -> Tensor:
    """One AdamW step with global-norm clipping; returns the norm before clipping, on the device.

    Clipping costs no pass of its own, and a step whose norm is not finite changes nothing; neither
    makes the host wait. A CUDA graph would freeze a number: give it lr as an fp32 scalar on the
    device.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    for group in optimizer.param_groups:
        scaled = lr * group["lr_scale"] if "lr_scale" in group else lr  # layer decay
        group["lr"], group["capturable"] = scaled, capturing  # torch refuses, or warns of the other
    norm = clipped_adamw(optimizer, clip)
    optimizer.zero_grad(set_to_none=True)
    return norm
