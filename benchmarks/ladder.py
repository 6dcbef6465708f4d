"""Training steps of mae_fast beside the official code's, rung by rung, and a peer's.

    python -m benchmarks.ladder --model vit_base --batch 2 --out benchmarks/results/ladder.jsonl

Every round runs one step of every engine, in an order drawn anew, so that a machine whose speed
drifts is the same for all of them; ratios are taken round by round. Before anything is timed,
engines that compute the same model must give the same loss from the same weights and mask. Peak
memory is that of a process of its own. `--quick` keeps the harness working and says nothing.
"""

import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.baselines import BASELINES
from benchmarks.baselines.training import CLIP_GRAD, LR, Built
from benchmarks.baselines.transformers_videomae import VIDEOMAE_B
from mae_fast.config import ModelConfig, TrainConfig, preset
from mae_fast.environment import environment
from mae_fast.forward import forward
from mae_fast.masking import ids_from_noise, num_keep
from mae_fast.metrics import memory_mb
from mae_fast.model import MaskedAutoencoder
from mae_fast.optim import clipped_step, make_optimizer

OURS = "mae_fast"
WITHOUT = OURS + "_without_"  # one exact saving switched off
ENGINES = (OURS, "official_eager", "official_sdpa", "official_sdpa_fused_adamw")


@dataclass(frozen=True)
class Args:
    """Compare training steps (forward, backward, clip, AdamW) on random uint8 clips.

    Args:
        model: vit_tiny ... vit_huge, or videomae_base, transformers' default (for its engines).
            Clips of 16 x 224 x 224.
        batch: clips a step.
        ratio: masked share.
        engines: what to compare; see benchmarks/baselines. mae_fast is always there;
            mae_fast_without_visible_embed, say, has that saving switched off.
        rounds: timed steps of each engine.
        precision: fp32, or bf16 by autocast.
        out: append the record to this file.
        quick: a tiny model and two rounds, to see that the harness works.
        memory: only run two steps of this engine and print the peak memory in MB.
    """

    model: str = "vit_base"
    batch: int = 2
    ratio: float = 0.9
    engines: tuple[str, ...] = ENGINES
    rounds: int = 5
    precision: str = "fp32"
    out: str = ""
    quick: bool = False
    memory: str = ""


def main(args: Args) -> None:
    cfg = VIDEOMAE_B if args.model == "videomae_base" else preset(args.model)
    if args.quick:
        cfg = preset("vit_tiny", img_size=32, depth=2, decoder_depth=1)
    torch.manual_seed(0)
    shape = (args.batch, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    if args.memory:
        built = build(args.memory, cfg, args.ratio, args.precision)
        for _ in range(2):
            built.step(clips, torch.rand(args.batch, cfg.num_patches))
        print(memory_mb(clips.device))
        return
    names = [OURS, *(n for n in args.engines if n != OURS)]
    built = {name: build(name, cfg, args.ratio, args.precision) for name in names}
    check_losses(built, clips, cfg, args.precision)
    seconds = time_rounds(built, clips, cfg, 2 if args.quick else args.rounds)
    memory = {name: measure_memory(name, args) for name in names}
    record = {
        "what": "training step, synthetic clips, interleaved",
        "model": args.model,
        "batch_clips": args.batch,
        "ratio": args.ratio,
        "precision": args.precision,
        "engines": {
            n: {"step": s, "forward_backward": f, "peak_memory_mb": memory[n]}
            for n, (s, f) in seconds.items()
        },
        "environment": environment(),
    }
    for name in names:
        step, both = (ratio(record, name, key) for key in ("step", "forward_backward"))
        print(
            f"{name:28} {statistics.median(seconds[name][0]):8.3f} s a step  "
            f"{step:5.2f}x ours, forward + backward {both:5.2f}x, {memory[name]:6.0f} MB"
        )
    if args.out and not args.quick:
        with open(args.out, "a") as f:
            f.write(json.dumps(record) + "\n")


def ratio(record: dict, name: str, key: str) -> float:
    """Median over rounds of an engine's time over ours in the same round."""
    engines = record["engines"]
    pairs = zip(engines[name][key], engines[OURS][key], strict=True)
    return statistics.median(a / b for a, b in pairs)


def build(name: str, cfg: ModelConfig, mask_ratio: float, precision: str) -> Built:
    """An engine by name, ready to train."""
    if not name.startswith(OURS):
        return BASELINES[name].build(cfg, mask_ratio, precision=precision)
    without = [name[len(WITHOUT) :]] if name.startswith(WITHOUT) else []
    model = MaskedAutoencoder(cfg)
    optimizer = make_optimizer(model, TrainConfig())

    def step(clips: Tensor, noise: Tensor) -> Tensor:
        ids = ids_from_noise(noise, num_keep("random", cfg.grid, mask_ratio))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = forward(model.params(), model.spec, clips, *ids, without=without)
        loss.backward()
        clipped_step(optimizer, LR, CLIP_GRAD)
        return loss.detach()

    return Built(model, optimizer, step)


def check_losses(built: dict[str, Built], clips: Tensor, cfg: ModelConfig, precision: str) -> None:
    """The first step's loss, which also warms up: the same weights and mask, the same loss."""
    noise = torch.rand(len(clips), cfg.num_patches)
    ours = built[OURS]
    state = {k: v.clone() for k, v in ours.model.state_dict().items()}
    expected = float(ours.step(clips, noise))
    for name, engine in built.items():
        if name == OURS or name.startswith("transformers"):
            continue
        engine.model.load_state_dict(state)
        loss = float(engine.step(clips, noise))
        if abs(loss / expected - 1) > (1e-5 if precision == "fp32" else 1e-2):
            raise SystemExit(f"{name} gives loss {loss}, mae_fast {expected}: nothing is timed")


def time_rounds(
    built: dict[str, Built], clips: Tensor, cfg: ModelConfig, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """{engine: (seconds of each step, seconds until its optimizer began)}."""
    times = {name: ([], []) for name in built}
    began_update = [0.0]
    for engine in built.values():
        engine.optimizer.register_step_pre_hook(
            lambda *_: began_update.__setitem__(0, time.perf_counter())
        )
    order = list(built)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            noise = torch.rand(len(clips), cfg.num_patches)
            begin = time.perf_counter()
            built[name].step(clips, noise)
            times[name][0].append(time.perf_counter() - begin)
            times[name][1].append(began_update[0] - begin)
    return times


def measure_memory(name: str, args: Args) -> float:
    """Peak resident memory in MB of a process that does two steps of one engine."""
    command = [sys.executable, "-m", "benchmarks.ladder", "--memory", name, "--model", args.model]
    command += ["--batch", str(args.batch), "--ratio", str(args.ratio)]
    command += ["--precision", args.precision, *(["--quick"] if args.quick else [])]
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return float(run.stdout)


if __name__ == "__main__":
    main(tyro.cli(Args))
