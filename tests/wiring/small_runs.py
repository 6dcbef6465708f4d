"""Runs of a model that trains in a second, and what is asked of them."""

import json
import sys
import time
from pathlib import Path

import torch

from mae_fast import checkpoint, train
from mae_fast.config import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig

MODEL = dict(
    img_size=32,
    patch_size=16,
    num_frames=4,
    pred_t_dim=2,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=2,
)

TRAIN = dict(
    batch_size=2, steps=20, warmup_steps=2, log_every=5, save_every=10, blr=0.1, clip_grad=1.0
)


def config(index, output, **train) -> Config:
    return Config(
        output=str(output),
        model=ModelConfig(**MODEL),
        mask=MaskConfig(ratio=0.5),
        data=DataConfig(index=index, repeat_aug=2, workers=0, sampling_rate=2),
        train=TrainConfig(**{**TRAIN, **train}),
    )


def toml(cfg: Config, path: Path) -> str:
    lines = [f"output = {json.dumps(cfg.output)}"]
    for section in ("model", "mask", "data", "train"):
        lines.append(f"[{section}]")
        for key, value in vars(getattr(cfg, section)).items():
            value = list(value) if isinstance(value, tuple) else value
            lines.append(f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines))
    return str(path)


def command(cfg: Config, path: Path) -> list[str]:
    return [sys.executable, "-m", "mae_fast", "pretrain", toml(cfg, path)]


def weights(folder) -> dict[str, torch.Tensor]:
    return checkpoint.latest(folder)[1]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def wait_for(path: Path, seconds=60) -> None:
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.02)


def at(monkeypatch, step, do):
    """Call do() once, in the middle of the step numbered `step` from 0."""
    true, done = train.Pretraining._loss, []

    def loss(self, *inputs):
        if self.step == step and not done:
            done.append(step)
            do()
        return true(self, *inputs)

    monkeypatch.setattr(train.Pretraining, "_loss", loss)


def with_data(cfg: Config, **data) -> Config:
    return Config(**{**vars(cfg), "data": DataConfig(**{**vars(cfg.data), **data})})


def saved(folder) -> int:
    return checkpoint.latest(folder)[0]["step"]


class Poisoned(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def poison(monkeypatch, at):
    calls, true = [], train.Pretraining._loss

    def loss(self, *inputs):
        calls.append(self.step)
        value = true(self, *inputs)
        return Poisoned.apply(value) if self.step in at else value

    monkeypatch.setattr(train.Pretraining, "_loss", loss)
