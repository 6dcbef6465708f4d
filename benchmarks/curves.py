"""Loss curves: training with every op forced to its reference, and with the ops chosen as ever.

    python -m benchmarks.curves --model vit_base --out benchmarks/results/curves.jsonl

Same starting values, clips and masks; the losses may differ by rounding only.
"""

import torch
import tyro

import mae_fast
from mae_fast.bench.baselines.training import CLIP_GRAD
from mae_fast.bench.records import append
from mae_fast.config import ModelConfig, TrainConfig, preset
from mae_fast.environment import environment
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS
from mae_fast.optim import make_optimizer
from mae_fast.step import Step

LR = 1e-3  # large enough that the losses move in a few steps


def main(
    model: str = "vit_tiny", steps: int = 20, batch: int = 2, out: str = "", quick: bool = False
) -> None:
    """Train twice on the same random clips and compare the losses.

    Args:
        model: vit_tiny ... vit_huge.
        steps: training steps.
        batch: clips a step.
        out: append the record to this file.
        quick: clips of 32 x 32 and three steps, to see that the harness works.
    """
    cfg = preset(model, **({"img_size": 32} if quick else {}))
    steps = 3 if quick else steps
    with mae_fast.backends(**dict.fromkeys(OPS, "reference")):
        reference = losses(cfg, steps, batch)
    chosen = losses(cfg, steps, batch)
    greatest = max(abs(c / r - 1) for c, r in zip(chosen, reference, strict=True))
    for step, (c, r) in enumerate(zip(chosen, reference, strict=True)):
        print(f"step {step:3}  chosen {c:.7f}  reference {r:.7f}")
    print(f"greatest relative difference {greatest:.1e}")
    if out:
        record = {
            "kind": "losses",
            "what": "losses, ops chosen against all forced to reference",
            "model": "quick" if quick else model,
            "batch_clips": batch,
            "ratio": 0.9,
            "precision": "fp32",
            "lr": LR,
            "losses": {"chosen": chosen, "reference": reference},
            "greatest_relative_difference": greatest,
            "environment": environment(),
        }
        append(out, record)


def losses(cfg: ModelConfig, steps: int, clips: int) -> list[float]:
    """The loss of each training step, from seeds."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(cfg)
    one = Step(
        model,
        make_optimizer(model, TrainConfig()),
        lambda video, keep, masked: model(video, ids_keep=keep, ids_mask=masked)[0],
        clip=CLIP_GRAD,
    )
    size = (clips, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    found = []
    for step in range(steps):
        video = torch.randint(0, 256, size, dtype=torch.uint8)
        ids = draw_ids("random", cfg.grid, 0.9, seed=0, step=step, samples=torch.arange(clips))
        one.micro(video, *ids)
        found.append(one.update(LR)[0].item())
    return found


if __name__ == "__main__":
    tyro.cli(main)
