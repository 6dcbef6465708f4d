"""`mae-fast bench step`: steps of a real run of pretrain, with its loader and its loop.

Steps on clips that lie ready, of any engine, are `mae-fast bench ratio --ratios 0.9`.
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from mae_fast import metrics
from mae_fast.bench.cell import Setting
from mae_fast.bench.ratio import Run
from mae_fast.bench.ratio_table import print_tables
from mae_fast.bench.records import append, check_appends, conditions
from mae_fast.bench.timing import spread
from mae_fast.config import Config, DataConfig, MaskConfig, TrainConfig, Variant
from mae_fast.config import preset as make_preset
from mae_fast.fields import positive, require
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
    """Time training steps of mae_fast alone, on uint8 clips of 16 x 224 x 224.

    Args:
        model: vit_tiny, vit_small, vit_base, vit_large or vit_huge.
        variant: which of the two official models.
        batch: clips a step.
        ratio: masked share in [0, 1).
        steps: timed steps.
        warmup: steps before them that are not counted, with index.
        precision: fp32, or bf16 by autocast with fp32 weights.
        device: where the model runs.
        index: take clips of these videos through the loader and the training loop; by default
            the clips are random numbers that lie ready on the device, as in `bench ratio`.
        workers: processes that decode, with index.
        out: append the record, one line of JSON, to this file.
    """
    positive(batch=batch)
    require(steps >= 2, "--steps must be 2 or more", steps)
    require(warmup >= 0, "--warmup must not be negative", warmup)
    check_appends(out)
    if not index:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Setting(device, precision, seed=0), batch, steps, Path(folder))
            named = model if variant == "mae_st" else f"{model}/{variant}"
            found = run.measure(list(run.plan([named], ["random"], [ratio], ["ours"])))
        print_tables(run.told(found))
        for record in found if out else ():
            append(out, record)
        return
    cfg = make_preset(model, variant)
    train = TrainConfig(batch_size=batch, precision=precision, device=device, clip_grad=0.02)
    data = DataConfig(index=index, repeat_aug=1, workers=workers)
    run = Config(model=cfg, mask=MaskConfig(ratio=ratio), data=data, train=train)
    seconds, waits = time_run(run, steps, warmup)
    median, wait = statistics.median(seconds), statistics.median(waits)
    peak = metrics.memory_mb(torch.device(device))
    print(
        f"{model} ({variant}), from video, {batch} clips, {ratio:.0%} masked, {precision}, "
        f"{device}: {median:.3f} s a step (median of {len(seconds)}, spread "
        f"{spread(seconds):.0%}), {batch / median:.2f} clips/s, peak {peak:.0f} MB, "
        f"{wait:.1%} of the time waiting for data"
    )
    if out:
        engine = {"clips": batch, "peak_memory_mb": peak, "data_wait_share": wait}
        record = {
            "kind": "steps",
            "what": "training step from video",
            **conditions(model, batch, ratio, precision, device),
            "variant": variant,
            "baseline": "mae_fast",
            "engines": {"mae_fast": engine},
            "seconds": {"mae_fast": seconds},
        }
        append(out, record)


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
