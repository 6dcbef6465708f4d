"""`mae-fast bench step`: whole training steps, timed one by one, with their conditions."""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from mae_fast import metrics
from mae_fast.bench.records import append
from mae_fast.config import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig, Variant
from mae_fast.config import preset as make_preset
from mae_fast.environment import environment
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.optim import make_optimizer
from mae_fast.step import Step
from mae_fast.train import pretrain


def step(
    model: str = "vit_base",
    variant: Variant = "mae_st",
    batch: int = 2,
    ratio: float = 0.9,
    steps: int = 10,
    warmup: int = 2,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
    index: str = "",
    workers: int = 2,
    out: str = "",
) -> None:
    """Time training steps: forward, backward, clip and AdamW, on uint8 clips of 16 x 224 x 224.

    Args:
        model: vit_tiny, vit_small, vit_base, vit_large or vit_huge.
        variant: which of the two official models.
        batch: clips a step.
        ratio: masked share in [0, 1).
        steps: timed steps.
        warmup: steps before them that are not counted.
        precision: fp32, or bf16 by autocast with fp32 weights.
        device: where the model runs.
        index: take clips of these videos through the loader and the training loop; by default
            the clips are random numbers that lie ready on the device.
        workers: processes that decode, with index.
        out: append the record, one line of JSON, to this file.
    """
    cfg = make_preset(model, variant)
    train = TrainConfig(batch_size=batch, precision=precision, device=device, clip_grad=0.02)
    if index:
        data = DataConfig(index=index, repeat_aug=1, workers=workers)
        run = Config(model=cfg, mask=MaskConfig(ratio=ratio), data=data, train=train)
        seconds, waits = time_run(run, steps, warmup)
    else:
        seconds, waits = time_synthetic(cfg, train, ratio, steps, warmup), []
    median = statistics.median(seconds)
    engine = {"clips": batch, "peak_memory_mb": metrics.memory_mb(torch.device(device))}
    engine |= {"data_wait_share": statistics.median(waits)} if waits else {}
    record = {
        "kind": "steps",
        "what": "training step" + (" from video" if index else ", synthetic clips"),
        "model": model,
        "variant": variant,
        "batch_clips": batch,
        "ratio": ratio,
        "precision": precision,
        "device": device,
        "baseline": "mae_fast",
        "engines": {"mae_fast": engine},
        "seconds": {"mae_fast": seconds},
        "environment": environment(),
    }
    spread = (max(seconds) - min(seconds)) / median
    print(
        f"{model} ({variant}), {record['what']}, {batch} clips, {ratio:.0%} masked, {precision}, "
        f"{device}: {median:.3f} s a step (median of {len(seconds)}, spread {spread:.0%}), "
        f"{batch / median:.2f} clips/s, peak {engine['peak_memory_mb']:.0f} MB"
        + (f", {engine['data_wait_share']:.1%} of the time waiting for data" if waits else "")
    )
    if out:
        append(out, record)


def time_synthetic(
    cfg: ModelConfig, train: TrainConfig, ratio: float, steps: int, warmup: int
) -> list[float]:
    """Seconds of each step on random uint8 clips that lie on the device."""
    device = torch.device(train.device)
    torch.manual_seed(0)
    model = MaskedAutoencoder(cfg).to(device)
    one = Step(
        model,
        make_optimizer(model, train),
        lambda video, keep, masked: model(video, ids_keep=keep, ids_mask=masked)[0],
        clip=train.clip_grad,
        precision=train.precision,
    )
    shape = (train.batch_size, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    samples = torch.arange(train.batch_size, device=device)
    seconds = []
    for i in range(warmup + steps):
        _synchronize(device)
        begin = time.perf_counter()
        keep, masked = draw_ids("random", cfg.grid, ratio, seed=0, step=i, samples=samples)
        one.micro(video, keep, masked)
        one.update(1e-4)
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds[warmup:]


def time_run(cfg: Config, steps: int, warmup: int) -> tuple[list[float], list[float]]:
    """(seconds, share spent waiting for data) of each of the first steps of a real run."""
    # Workers run ahead of the loop: near its end they are done, and steps have both cores.
    ahead = 2 + 2 * cfg.data.workers
    total = warmup + steps + ahead
    with tempfile.TemporaryDirectory() as folder:
        train = replace(cfg.train, steps=total, warmup_steps=0, log_every=1, save_every=total)
        pretrain(replace(cfg, output=folder, train=train))
        rows = metrics.read(Path(folder) / "metrics.jsonl")[warmup : warmup + steps]
    return [r["step_seconds"] for r in rows], [r["data_wait"] for r in rows]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
