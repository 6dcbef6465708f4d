"""`mae-fast bench finetune`: steps of fine-tuning, side by side with the official code's.

A step is forward, soft cross-entropy, backward, clip and AdamW by layer, on clips that are
normalised already, without drop path and dropout, which not everyone has. Before anything is timed
the official code's logits and gradients are held against ours, from the same weights.
"""

import json as jsonlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from mae_fast.bench.baselines.official_classifier import OfficialClassifier
from mae_fast.bench.baselines.training import Baseline, LossOf
from mae_fast.bench.baselines.transformers_videomae import encoder_settings
from mae_fast.bench.engines import config_of
from mae_fast.bench.records import append, check_appends, conditions
from mae_fast.bench.timing import interleave, ratio, spread
from mae_fast.classifier import ClassifierConfig, VideoClassifier, param_groups
from mae_fast.config import ModelConfig
from mae_fast.errors import ConfigError, MaeFastError
from mae_fast.fields import positive, require
from mae_fast.masking import draw_ids
from mae_fast.step import Step
from mae_fast.tasks.augment import smoothed, soft_cross_entropy

ENGINES = ("mae_fast", "mae_fast_masked", "official_eager", "official_sdpa", "transformers")
LR, DECAY, LAYERS, CLIP = 1e-5, 0.05, 0.75, 5.0
MASKED = 0.5  # of mae_fast_masked: where App. B.3's cosine begins
TOLERANCE = 1e-3  # of the logits and of the norm of all gradients, relative


def finetune(
    model: str = "vit_base",
    engines: tuple[str, ...] = ENGINES,
    batch: int = 1,
    classes: int = 400,
    rounds: int = 5,
    precision: Literal["fp32", "bf16"] = "fp32",
    out: str = "",
    json: bool = False,
) -> None:
    """Time steps of fine-tuning a classifier on this machine's CPU, each engine beside the others.

    Args:
        model: vit_tiny ... vit_huge, or quick, to see that all works.
        engines: mae_fast, mae_fast_masked (50% of the patches left out), official_eager,
            official_sdpa (mae_st's classifier), transformers (VideoMAEForVideoClassification).
        batch: clips a step.
        classes: of the head.
        rounds: timed steps of each engine, in turn.
        precision: fp32, or bf16 by autocast with fp32 weights.
        out: append the record, one line of JSON, to this file.
        json: print the record, and nothing else on stdout.
    """
    unknown = [name for name in engines if name not in ENGINES]
    require(not unknown, f"--engines must be of {', '.join(ENGINES)}", unknown)
    positive(batch=batch, classes=classes)
    check_appends(out)
    require(rounds >= 2, "--rounds must be 2 or more", rounds)
    if "transformers" in engines and not find_spec("transformers"):
        raise ConfigError("the engine transformers needs `pip install transformers`")
    cfg = ClassifierConfig(config_of(model), "mae_st", classes)
    torch.manual_seed(0)
    m = cfg.model
    clip = (batch, m.in_chans, m.num_frames, m.img_size, m.img_size)
    video = torch.randn(clip, device="cpu")
    labels = torch.arange(batch, device="cpu") % classes
    target = smoothed(labels, classes, 0.1)
    check(cfg, video, target)
    steps = {name: stepper(name, cfg, video, target, precision) for name in engines}
    for step in steps.values():
        for _ in range(2):
            step()
    seconds = interleave(steps, rounds)
    record = {
        "kind": "finetune",
        "what": "fine-tuning step of a classifier",
        **conditions(model, batch, 0.0, precision),
        "classes": classes,
        "baseline": engines[0],
        "engines": {name: {"ratio": MASKED * (name == "mae_fast_masked")} for name in engines},
        "seconds": seconds,
    }
    if out:
        append(out, record)
    print(jsonlib.dumps(record) if json else tell(record))


def tell(record: dict) -> str:
    """A line for each engine."""
    first, lines = record["seconds"][record["baseline"]], []
    for name, samples in record["seconds"].items():
        median = statistics.median(samples)
        lines.append(
            f"{name:18} {median:8.3f} s a step (spread {spread(samples):.0%}), "
            f"{ratio(samples, first):.2f} times {record['baseline']}'s"
        )
    return "\n".join(lines)


def check(cfg: ClassifierConfig, video: Tensor, target: Tensor) -> None:
    """Raises MaeFastError where the official code's logits or gradients are not ours."""
    nets = VideoClassifier(cfg), OfficialClassifier(cfg, "sdpa")
    nets[1].load_state_dict(nets[0].state_dict())
    a, b = (net(video) for net in nets)
    for logits in (a, b):
        soft_cross_entropy(logits, target).backward()
    a, b = a.detach(), b.detach()
    x, y = (nn.utils.get_total_norm([p.grad for p in net.parameters()]) for net in nets)
    off = max(float((a - b).norm() / b.norm()), abs(float(x / y) - 1))
    if not off < TOLERANCE:
        raise MaeFastError(f"nothing is timed: the official classifier differs by {off:.1e}")


def stepper(
    name: str, cfg: ClassifierConfig, video: Tensor, target: Tensor, precision: str
) -> Callable[[], object]:
    """One step of an engine, whose state goes on."""
    if name.startswith("mae_fast"):
        return _ours(cfg, video, target, precision, MASKED * (name == "mae_fast_masked"))
    built = Theirs(name, cfg, target).build(cfg.model, precision=precision)
    clips = video.transpose(1, 2).contiguous() if name == "transformers" else video
    return lambda: built.step(clips, None)


@dataclass(frozen=True)
class Theirs(Baseline):
    """A classifier in the official loop: multi-tensor AdamW, and a loss that the host waits for."""

    name: str
    cfg: ClassifierConfig
    target: Tensor

    def parts(self, cfg: ModelConfig) -> tuple[nn.Module, LossOf, bool]:
        if self.name == "transformers":
            from transformers import VideoMAEConfig, VideoMAEForVideoClassification

            how = dict(num_labels=self.cfg.num_classes, attn_implementation="sdpa")
            net = VideoMAEForVideoClassification(VideoMAEConfig(**encoder_settings(cfg), **how))
            logits_of = lambda clips: net(clips).logits  # noqa: E731
        else:
            net = logits_of = OfficialClassifier(self.cfg, self.name.removeprefix("official_"))
        return net, lambda clips, *_: soft_cross_entropy(logits_of(clips), self.target), False


def _ours(
    cfg: ClassifierConfig, video: Tensor, target: Tensor, precision: str, ratio: float
) -> Callable[[], object]:
    net = VideoClassifier(cfg).train()
    groups = param_groups(net, DECAY, LAYERS)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), fused=True)
    loss = lambda video, target, *ids: soft_cross_entropy(net(video, *ids), target)  # noqa: E731
    trainer = Step(net, optimizer, loss, clip=CLIP, precision=precision)
    samples, ids = torch.arange(len(video), device="cpu"), ()
    if ratio:
        ids = draw_ids("random", cfg.model.grid, ratio, seed=0, step=0, samples=samples)[:1]

    def step() -> Tensor:
        trainer.micro(video, target, *ids)
        return trainer.update(LR)[0]

    return step
