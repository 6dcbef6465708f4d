"""Fine-tuning: the training loop of `pretrain` with a classifier, labels, and rates by layer."""

import contextlib
import functools
import hashlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_fast import checkpoint
from mae_fast.classifier import VideoClassifier, init_head, param_groups
from mae_fast.config import num_keep
from mae_fast.data import Batch, Loader, VideoRow, read_index
from mae_fast.distributed import World
from mae_fast.masking import draw_ids
from mae_fast.optim import lr_at
from mae_fast.run import Run
from mae_fast.signals import Signals, Told
from mae_fast.tasks import score
from mae_fast.tasks.augment import erase, mix, soft_cross_entropy, timms_mixup
from mae_fast.tasks.clips import LabelledClips, Views, classes_of, normalised, numbers_of
from mae_fast.tasks.config import FinetuneConfig
from mae_fast.weights import classifier as weights
from mae_fast.window import Window

log = logging.getLogger("mae_fast")


class FinetuneRun(Run):
    """A run that learns labels. What is not here is every run's."""

    cfg: FinetuneConfig
    mixed = True
    judged_by = "acc1"  # val_... of the averaged weights too
    kind, load = VideoClassifier, staticmethod(weights.load)

    def __init__(self, cfg: FinetuneConfig, world: World, signals: Signals) -> None:
        self.micro = 0  # of this step
        super().__init__(cfg, world, signals)

    def _read_rows(self) -> tuple[list[VideoRow], list[VideoRow]]:
        rows, val_rows = super()._read_rows()
        self.classes = classes_of(rows, self.cfg.data.classes)
        # As in a test, videos that are known to be broken count as wrong.
        self.judged = read_index(self.cfg.data.val_index, broken=True) if val_rows else []
        numbers_of(self.judged, self.classes)
        return rows, val_rows

    def _make_model(self) -> VideoClassifier:
        cfg = self.cfg
        if cfg.augment.mixup or cfg.augment.cutmix:
            timms_mixup()  # or it would be missed once all held-out videos are judged
        model = self.kind(cfg.classifier_of(len(self.classes)))
        scratch, begun = cfg.init == "scratch", bool(checkpoint.checkpoints(self.folder))
        if cfg.classifier.family != "mae_st":
            init_head(model, cfg.classifier.head_scale)
        if not scratch and not begun:
            for line in self.load(model, cfg.init):
                if self.world.writer:
                    log.warning("%s: %s", cfg.init, line)
        if cfg.classifier.family == "mae_st" and not scratch:
            init_head(model, cfg.classifier.head_scale)
        return model.train()

    def _make_optimizer(self) -> torch.optim.AdamW:
        t = self.cfg.train
        groups = param_groups(self.model, t.weight_decay, t.layer_decay)
        return torch.optim.AdamW(groups, lr=0.0, betas=t.betas, eps=t.eps, fused=True)

    def _rate(self, step: int) -> float:
        return learning_rate(self.cfg, step, self.total, len(self.rows), self.world.size)

    def _loader(self) -> Loader:
        how = dict(classes=self.classes, policy=self.cfg.augment.randaugment)
        return super()._loader(functools.partial(LabelledClips, **how))

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """video [B, C, T, H, W], target [B, classes] and, under a mask, ids_keep [B, K]."""
        cfg, a = self.cfg, self.cfg.augment
        # Its number in the step, so that two processes draw what one draws in two micro-steps.
        place = self.micro % cfg.train.accum_steps * self.world.size + self.world.rank
        key = (cfg.train.seed, self.step, place)
        self.micro += 1
        rng = np.random.default_rng(key)
        torch.manual_seed(int(rng.integers(2**62)))  # dropout's and drop path's, also once resumed
        video = normalised(batch, self.model)
        if a.erasing:
            erase(rng, video, a.erasing)
        labels = batch.labels.to(video.device, non_blocking=True)
        target = mix(
            rng, video, labels, len(self.classes), mixup=a.mixup, cutmix=a.cutmix,
            probability=a.mix_prob, switch=a.switch_prob, smoothing=a.smoothing,
        )  # fmt: skip
        ratio = mask_ratio(cfg.train.mask_ratio, self.step, self.total)
        length = cfg.model.num_patches
        if num_keep("random", cfg.model.grid, ratio) == length:
            return video, target
        how = dict(seed=cfg.train.seed, step=self.step, samples=batch.samples)
        keep, _ = draw_ids("random", cfg.model.grid, ratio, **how)
        return video, target, keep.to(video.device, non_blocking=True)

    def _loss(self, video: Tensor, target: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        return soft_cross_entropy(self.model(video, ids_keep), target)

    def _state(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._labels()).hexdigest()
        return super()._state() | {"classes": list(self.classes), "labels": digest[:16]}

    def _labels(self) -> bytes:
        """What training learns, which a resumed run must not change."""
        return repr(numbers_of(self.rows, self.classes)).encode()

    def _graph(self) -> bool:
        how = self.cfg.train.cuda_graph
        if how == "off" or not self.cfg.train.mask_ratio:
            return super()._graph()
        if how == "on" or self.world.device.type == "cuda":
            log.warning("train.cuda_graph is not used: masked steps differ in their tokens")
        return False

    def _one_step(self, batches: Iterator[Batch], window: Window) -> None:
        decay, params = self.cfg.train.ema, list(self.model.parameters())
        first = decay and not self._has_average()
        start = [p.detach().clone() for p in params] if first else None
        super()._one_step(batches, window)
        if decay:
            average(self.optimizer, params, decay, start)

    def _has_average(self) -> bool:
        return "ema" in self.optimizer.state.get(self.model.head.weight, {})

    def _held_out(self) -> dict[str, Any]:
        """What _scores finds, and of the averaged weights the figure that judges; by the writer
        alone."""
        if not self.val_rows or not self.world.writer:
            return {}
        row = self._scores()
        if row and self._has_average():
            with averaged(self.optimizer, list(self.model.parameters())):
                also = self._scores()
            name = self.judged_by
            row |= {f"val_ema_{name}": also[f"val_{name}"]} if also else {}
        return row

    def _scores(self) -> dict[str, Any]:
        """Loss and accuracy of one middle view of every held-out video."""
        cfg = self.cfg
        short = cfg.test.short_side or cfg.model.img_size
        views = Views(self.judged, cfg.data, cfg.model.num_frames, short, 1, 1)
        labels = torch.tensor(numbers_of(self.judged, self.classes), device="cpu")
        try:
            logits, bad = score.logits_of(
                self.model, views, range(len(views.rows)), cfg.train.precision,
                self.signals.look_up,
            )  # fmt: skip
        except Told:
            return {}
        finally:
            self.model.train()
        if bad:
            said = ": ".join(bad[0])
            log.warning("held out: %d videos do not decode, counted as wrong: %s", len(bad), said)
        logits = logits[:, 0]
        good = logits.isfinite().all(1)
        loss = torch.nn.functional.cross_entropy(logits[good], labels[good])
        right = (logits.argmax(1) == labels) & good
        return {"val_loss": float(loss), "val_acc1": float(right.double().mean())}


@torch.no_grad()
def average(
    optimizer: torch.optim.Optimizer, params: list[Tensor], decay: float, start: list[Tensor] | None
) -> None:
    """timm's ModelEma after a step: decay * average + (1 - decay) * weights. It is part of the
    optimizer's state, so of every checkpoint; it begins at `start`, given after a first step."""
    if start is not None:
        for p, value in zip(params, start, strict=True):
            optimizer.state[p]["ema"] = value
    torch._foreach_lerp_([optimizer.state[p]["ema"] for p in params], params, 1 - decay)


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Iterator[None]:
    """The averaged weights in the model's place."""

    @torch.no_grad()
    def swap() -> None:
        for p in params:
            ema, kept = optimizer.state[p]["ema"], p.clone()
            p.copy_(ema)
            ema.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()


def mask_ratio(first: float, step: int, total: int) -> float:
    """The share of patches that are left out in a step: from `first` to 0 by half a cosine."""
    return first * 0.5 * (1 + math.cos(math.pi * step / total))


def learning_rate(cfg: FinetuneConfig, step: int, total: int, videos: int, world: int) -> float:
    """The rate of the topmost layers in the step numbered `step` from 0, as each official code
    warms up: VideoMAE reaches the peak in the last step of it, the others in the one after."""
    t = cfg.train
    videos_a_step = t.batch_size * t.accum_steps * world
    scale = videos_a_step * (cfg.data.repeat_aug if t.count_repeats else 1) / 256
    floor_scale = scale if t.scale_min_lr else 1.0
    peak, floor, start = t.blr * scale, t.min_lr * floor_scale, t.warmup_lr * floor_scale
    warmup = t.warmup_steps if t.steps else t.warmup_epochs * videos / videos_a_step
    if step < warmup:
        to_last = cfg.classifier.family in ("videomae", "transformers")
        return start + (peak - start) * step / max(warmup - to_last, 1)
    return lr_at(step, total, warmup, peak, floor)
