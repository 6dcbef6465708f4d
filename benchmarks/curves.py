"""Loss curves: training with every op forced to its reference, and with the ops chosen as ever.

    python -m benchmarks.curves --model vit_base --out benchmarks/results/curves.jsonl

Same starting values, clips and masks; the losses may differ by rounding only.
"""

import torch
import tyro

import mae_fast
from mae_fast.bench.cell import Cell, Setting, stepper
from mae_fast.bench.engines import OURS, QUICK
from mae_fast.bench.ours import Ours
from mae_fast.bench.records import append, conditions
from mae_fast.ops import OPS

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
        quick: a tiny model and three steps, to see that the harness works.
    """
    model, steps = (QUICK, 3) if quick else (model, steps)
    with mae_fast.backends(**dict.fromkeys(OPS, "reference")):
        reference = losses(model, steps, batch)
    chosen = losses(model, steps, batch)
    for step, (c, r) in enumerate(zip(chosen, reference, strict=True)):
        print(f"step {step:3}  chosen {c:.7f}  reference {r:.7f}")
    greatest = max(abs(c / r - 1) for c, r in zip(chosen, reference, strict=True))
    print(f"greatest relative difference {greatest:.1e}")
    if out:
        record = {
            "kind": "losses",
            "what": "losses, ops chosen against all forced to reference",
            **conditions(model, batch, 0.9, "fp32"),
            "lr": LR,
            "losses": {"chosen": chosen, "reference": reference},
            "greatest_relative_difference": greatest,
        }
        append(out, record)


def losses(model: str, steps: int, clips: int) -> list[float]:
    """The loss of each training step, from seeds."""
    torch.manual_seed(0)
    cell = Cell(model, "random", 0.9, OURS)
    cfg = cell.cfg
    built = Ours(lr=LR).build(cfg)
    size = (clips, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    video = lambda: torch.randint(0, 256, size, dtype=torch.uint8)  # noqa: E731
    step = stepper(cell, built, video, Setting("cpu", "fp32", seed=0))
    return [float(step()) for _ in range(steps)]


if __name__ == "__main__":
    tyro.cli(main)
