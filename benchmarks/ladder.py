"""Training steps of mae_fast beside the official code's, rung by rung, and a peer's.

    python -m benchmarks.ladder --batch 1 2 4 --out benchmarks/results/ladder.jsonl
    python -m benchmarks.ladder --engines mae_fast_encode_all --out benchmarks/results/ladder.jsonl

Steps are taken in turn (mae_fast/bench/timing.py), the machine's limits among them. Before anything
is timed, engines that compute the same model must give the same loss from the same weights and
mask. Peak memory is that of a process of its own (benchmarks/steps.py).
`--quick` keeps the harness working and says nothing.

`mae_fast_encode_all` is masking at 0%: the encoder sees every token. The decoder and the loss stay
those of the 90% mask, since 0% leaves nothing to predict; the paper's dense encoder is the same.
"""

import statistics
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from benchmarks.steps import measure_memory, peak_memory, time_rounds
from mae_fast.bench import machine
from mae_fast.bench.baselines import BASELINES, OFFICIAL, OfficialMAE, normalise
from mae_fast.bench.baselines.official_repository import OfficialRepository
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.baselines.transformers_videomae import VIDEOMAE_B
from mae_fast.bench.flops import official_step_flop, step_flop
from mae_fast.bench.ours import Ours
from mae_fast.bench.records import append
from mae_fast.bench.timing import ratio
from mae_fast.config import ModelConfig, preset
from mae_fast.environment import environment

OURS = "mae_fast"
WITHOUT = OURS + "_without_"  # one exact saving switched off
ENCODE_ALL = OURS + "_encode_all"
REPOSITORY = "official_repository"
ENGINES = (OURS, "official_eager", "official_sdpa", "official_sdpa_fused_adamw")
QUICK = preset("vit_tiny", img_size=32, depth=2, decoder_depth=2)


@dataclass(frozen=True)
class Args:
    """Compare training steps (forward, backward, clip, AdamW) on random uint8 clips.

    Args:
        model: vit_tiny ... vit_huge, or videomae_base, transformers' default (for its engines).
            Clips of 16 x 224 x 224.
        batch: clips a step; a record for each number.
        ratio: masked share.
        engines: what to compare; see benchmarks/baselines. mae_fast is always there;
            mae_fast_without_visible_embed, say, has that saving switched off.
        official: a checkout of facebookresearch/mae_st, to run as official_repository.
        rounds: timed steps of each engine.
        precision: fp32, or bf16 by autocast.
        out: append the records to this file.
        quick: a tiny model and two rounds, to see that the harness works.
        memory: only run two steps of this engine and print the peak memory in MB.
    """

    model: str = "vit_base"
    batch: tuple[int, ...] = (2,)
    ratio: float = 0.9
    engines: tuple[str, ...] = ENGINES
    official: str = ""
    rounds: int = 5
    precision: str = "fp32"
    out: str = ""
    quick: bool = False
    memory: str = ""

    @property
    def cfg(self) -> ModelConfig:
        if self.quick:
            return QUICK
        return VIDEOMAE_B if self.model == "videomae_base" else preset(self.model)


def main(args: Args) -> None:
    for batch in args.batch:
        if args.memory:
            clips, noise = make_clips(args.cfg, batch), torch.rand(batch, args.cfg.num_patches)
            print(peak_memory(build(args.memory, args), clips, noise))
        else:
            compare(args, batch)


def compare(args: Args, batch: int) -> None:
    """Check, time and record the engines at one number of clips."""
    torch.manual_seed(0)
    cfg, clips = args.cfg, make_clips(args.cfg, batch)
    names = [OURS, *(n for n in args.engines if n != OURS), *([REPOSITORY] * bool(args.official))]
    built = {name: build(name, args) for name in names}
    check_losses(built, clips, args)
    limits = machine.limits(args.quick)
    seconds, update_after = time_rounds(
        built,
        lambda: (clips, torch.rand(batch, cfg.num_patches)),
        2 if args.quick else args.rounds,
        {name: limit.run for name, limit in limits.items()},
    )
    built.clear()  # what follows needs the memory
    engines = {
        name: {
            "clips": batch,
            "until_update": update_after[name],
            "flop": flop(name, cfg, batch, args.ratio),
            "peak_memory_mb": measure_memory(
                "benchmarks.ladder", memory_arguments(name, args, batch)
            ),
        }
        for name in names
    }
    record = {
        "kind": "steps",
        "what": "training step, synthetic clips, interleaved",
        "model": "quick" if args.quick else args.model,
        "batch_clips": batch,
        "ratio": args.ratio,
        "precision": args.precision,
        "device": "cpu",
        "engines": engines,
        "seconds": {name: seconds[name] for name in names},
        "limits": machine.as_record(limits, seconds),
        "environment": environment(),
    }
    if args.official:
        engines[REPOSITORY]["source"] = OfficialRepository(args.official).source()
    for name, engine in engines.items():
        faster = [ratio(of[name], of[OURS]) for of in (seconds, update_after)]
        print(
            f"{name:28} {batch} clips, {statistics.median(seconds[name]):8.3f} s a step, "
            f"{faster[0]:5.2f}x ours, forward + backward {faster[1]:5.2f}x, "
            f"{engine['peak_memory_mb']:6.0f} MB"
        )
    if args.out:
        append(args.out, record)


def make_clips(cfg: ModelConfig, batch: int) -> Tensor:
    """Random uint8 clips [B, C, T, H, W]."""
    shape = (batch, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def build(name: str, args: Args) -> Built:
    """An engine by name, ready to train."""
    cfg, precision = args.cfg, args.precision
    if name == REPOSITORY:
        return OfficialRepository(args.official).build(cfg, args.ratio, precision=precision)
    if not name.startswith(OURS):
        return BASELINES[name].build(cfg, args.ratio, precision=precision)
    without = [name[len(WITHOUT) :]] if name.startswith(WITHOUT) else []
    ours = Ours(without, encode_all=name == ENCODE_ALL)
    return ours.build(cfg, args.ratio, precision=precision)


def check_losses(built: dict[str, Built], clips: Tensor, args: Args) -> None:
    """The first step's loss, which also warms up: the same weights and mask, the same loss."""
    noise = torch.rand(len(clips), args.cfg.num_patches)
    ours = built[OURS]
    state = {k: v.clone() for k, v in ours.model.state_dict().items()}
    expected = float(ours.step(clips, noise))
    for name, engine in built.items():
        if name == OURS:
            continue
        if name.startswith("transformers"):  # another model
            engine.step(clips, noise)
            continue
        engine.model.load_state_dict(state)
        want = official_encode_all(state, clips, noise, args) if name == ENCODE_ALL else expected
        loss = float(engine.step(clips, noise))
        if not abs(loss / want - 1) <= (1e-5 if args.precision == "fp32" else 1e-2):
            raise SystemExit(f"{name} gives loss {loss}, expected {want}: nothing is timed")


@torch.no_grad()
def official_encode_all(
    state: dict[str, Tensor], clips: Tensor, noise: Tensor, args: Args
) -> float:
    """What the official model gives where its encoder sees every token."""
    model = OfficialMAE(args.cfg, "sdpa")
    model.load_state_dict(state)
    return float(model(normalise(clips), args.ratio, noise, encode_all=True)[0])


def flop(name: str, cfg: ModelConfig, clips: int, mask_ratio: float) -> int | None:
    """FLOP of one step (mae_fast/bench/flops.py); None for a model that is not counted."""
    if name == REPOSITORY or name in OFFICIAL:
        return official_step_flop(cfg, clips, mask_ratio)
    if not name.startswith(OURS):
        return None
    without = [name[len(WITHOUT) :]] if name.startswith(WITHOUT) else []
    return step_flop(cfg, clips, mask_ratio, without, encode_all=name == ENCODE_ALL)


def memory_arguments(name: str, args: Args, batch: int) -> list[str]:
    """Of this module, for the process whose peak memory is measured."""
    found = ["--memory", name, "--model", args.model, "--batch", str(batch)]
    found += ["--ratio", str(args.ratio), "--precision", args.precision]
    return [*found, "--official", args.official, *(["--quick"] if args.quick else [])]


if __name__ == "__main__":
    main(tyro.cli(Args))
