"""`mae-fast profile`: one warmed training step, operator by operator."""

from typing import Literal

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from mae_fast.config import TrainConfig, Variant
from mae_fast.config import preset as make_preset
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.optim import clipped_step, make_optimizer


def profile(
    model: str = "vit_base",
    variant: Variant = "mae_st",
    batch: int = 2,
    ratio: float = 0.9,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
    rows: int = 20,
    trace: str = "",
) -> None:
    """Print the operators of one training step on random clips by their own time, and its phases.

    Args:
        model: vit_tiny, vit_small, vit_base, vit_large or vit_huge, at 16 x 224 x 224.
        variant: which of the two official models.
        batch: clips a step.
        ratio: masked share in [0, 1).
        precision: fp32, or bf16 by autocast with fp32 weights.
        device: where the model runs.
        rows: operators shown.
        trace: write a Chrome trace to this file (.json).
    """
    cfg, where = make_preset(model, variant), torch.device(device)
    net = MaskedAutoencoder(cfg).to(where)
    optimizer = make_optimizer(net, TrainConfig())
    shape = (batch, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, device=where)
    samples = torch.arange(batch, device=where)

    def one_step(i: int) -> None:
        with record_function("phase: mask"):
            keep, masked = draw_ids("random", cfg.grid, ratio, seed=0, step=i, samples=samples)
        with (
            record_function("phase: forward"),
            torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"),
        ):
            loss, _, _ = net(video, ids_keep=keep, ids_mask=masked)
        with record_function("phase: backward"):
            loss.backward()
        with record_function("phase: optimizer"):
            clipped_step(optimizer, 1e-4, 0.02)

    for i in range(2):
        one_step(i)
    activities = [ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch_profile(activities=activities) as prof:
        one_step(2)
        if where.type == "cuda":
            torch.cuda.synchronize()
    averages = prof.key_averages()
    own = f"self_{where.type}_time_total"
    print(averages.table(sort_by=own, row_limit=rows, max_name_column_width=50))
    for event in averages:
        if event.key.startswith("phase: "):
            print(f"{event.key:20} {event.cpu_time_total / 1e3:9.1f} ms on the host")
    if trace:
        prof.export_chrome_trace(trace)
        print(f"wrote {trace}")
