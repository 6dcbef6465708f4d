"""Fine-tuning on AVA: FinetuneRun with keyframes for videos and persons for labels."""

import functools
import json
import logging
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mae_fast.data import Batch, Loader, VideoRow
from mae_fast.errors import ConfigError, DataError
from mae_fast.files import write
from mae_fast.run import Run
from mae_fast.signals import Told
from mae_fast.tasks.ava import score
from mae_fast.tasks.ava.clips import (
    KeyframeClips,
    Keyframes,
    keyframes,
    read_movies,
    training_video,
)
from mae_fast.tasks.ava.config import FILES
from mae_fast.tasks.ava.files import (
    LeftOut,
    people,
    read_boxes,
    read_classes,
    read_excluded,
    with_detections,
)
from mae_fast.tasks.ava.model import BoxClassifier, box_loss
from mae_fast.tasks.classify import FinetuneRun
from mae_fast.tasks.config import FinetuneConfig
from mae_fast.weights import classifier as weights

log = logging.getLogger("mae_fast")


def training_keyframes(cfg: FinetuneConfig, left: LeftOut) -> Keyframes:
    """The keyframes that have a label, with the true boxes and the detections on them."""
    a = cfg.ava
    if not a.train_csv:
        raise ConfigError("ava.train_csv is empty: ava_train_v2.2.csv, or a file like it")
    frames = people(read_boxes(a.train_csv, left, a.num_classes))
    frames = {k: some for k, all_ in frames.items() if (some := [p for p in all_ if p.classes])}
    if a.train_detections:
        rows = read_boxes(a.train_detections, left, a.num_classes)
        frames = with_detections(frames, people(rows, a.score))
    excluded = read_excluded(a.train_excluded, left) if a.train_excluded else ()
    movies = read_movies(cfg.data.index, a, {movie for movie, _ in frames})
    return keyframes(frames, movies, score.rule(cfg), a.begins_at, left, excluded)


def load(model: BoxClassifier, path: str) -> list[str]:
    """Weights of any family into a BoxClassifier, and what did not fit. Of a VideoMAE classifier
    the norm of pooled features is no norm of tokens: a new one is in its place, as its authors'
    detection has it."""
    said = weights.load(model, path)
    if "fc_norm: taken for norm" not in said:
        return said
    nn.init.ones_(model.norm.weight)
    nn.init.zeros_(model.norm.bias)
    return [x for x in said if x != "fc_norm: taken for norm"] + ["fc_norm: not used; norm: new"]


class AvaRun(FinetuneRun):
    """A run that learns what persons do. What is not here is every fine-tuning's."""

    judged_by = "map"
    kind, load = BoxClassifier, staticmethod(load)

    def _read_rows(self) -> tuple[list[VideoRow], list[VideoRow]]:
        cfg, left = self.cfg, LeftOut()
        if cfg.data.val_index:
            raise ConfigError("data.val_index is for videos with labels: see ava.val_every")
        if not cfg.ava.labels:
            raise ConfigError("ava.labels is empty: the classes that count, a .pbtxt")
        for name in FILES:  # those of the test too, which comes days later
            if (path := getattr(cfg.ava, name)) and not os.path.exists(path):
                raise DataError(f"ava.{name}: there is no {path}")
        self.names = read_classes(cfg.ava.labels)
        if max(self.names) > cfg.ava.num_classes:
            raise ConfigError(
                f"ava.num_classes is {cfg.ava.num_classes}, and {cfg.ava.labels} has a class "
                f"{max(self.names)}"
            )
        self.classes = tuple(self.names.get(i, "") for i in range(1, cfg.ava.num_classes + 1))
        self.train_keyframes = training_keyframes(cfg, left)
        self.test_set = None
        if cfg.ava.val_every:
            self.test_set = score.TestSet.read(cfg, left, cfg.ava.val_every)
        if self.world.writer:
            for line in left.say():
                log.warning("left out: %s", line)
            log.info(
                "%d keyframes of %d movies, %d persons", len(self.train_keyframes),
                len({r.path for r in self.train_keyframes.rows}),
                sum(map(len, self.train_keyframes.people)),
            )  # fmt: skip
        self.left = left
        return self.train_keyframes.rows, self.test_set.keyframes.rows if self.test_set else []

    def _open_folder(self) -> None:
        super()._open_folder()
        if self.world.writer and self.left.lines:
            write(self.folder / "left_out.json", json.dumps(vars(self.left), indent=1))

    def _loader(self) -> Loader:
        how = dict(keyframes=self.train_keyframes, ava=self.cfg.ava, size=self.cfg.model.img_size)
        return Run._loader(self, functools.partial(KeyframeClips, **how))

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """video [B, C, T, H, W], boxes [P, 5], target [P, classes]."""
        cfg = self.cfg
        # Its number in the step, so that two processes draw what one draws in two micro-steps.
        place = self.micro % cfg.train.accum_steps * self.world.size + self.world.rank
        rng = np.random.default_rng((cfg.train.seed, self.step, place))
        self.micro += 1
        torch.manual_seed(int(rng.integers(2**62)))  # dropout's and drop path's, also once resumed
        video = training_video(rng, batch, cfg.model.img_size, cfg.ava, self.model.family.pixels)
        persons = batch.labels
        clip = torch.searchsorted(batch.samples.double(), persons[:, 0].contiguous())
        boxes = torch.cat([clip[:, None].double(), persons[:, 1:5]], dim=1).float()
        target = persons[:, 5:].float()
        return video, *(t.to(video.device, non_blocking=True) for t in (boxes, target))

    def _loss(self, video: Tensor, boxes: Tensor, target: Tensor) -> Tensor:
        return box_loss(self.model(video, boxes), target, len(video))

    def _graph(self) -> bool:
        if self.cfg.train.cuda_graph == "on":
            log.warning("train.cuda_graph is not used: clips differ in their persons")
        return False

    def _labels(self) -> bytes:
        return (self.train_keyframes.digest() + repr(sorted(self.names.items()))).encode()

    def _scores(self) -> dict[str, Any]:
        """mAP of the seconds that are multiples of ava.val_every."""
        numbers = range(len(self.test_set.keyframes))
        try:
            found, bad = score.scores_of(
                self.model, self.test_set, self.cfg, numbers, self.signals.look_up
            )
        except Told:
            return {}
        finally:
            self.model.train()
        if bad:
            log.warning("held out: %d %s: %s", len(bad), score.BAD_CLIPS, ": ".join(bad[0]))
        return {"val_map": self.test_set.papers(found).mean_ap}
