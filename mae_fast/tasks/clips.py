"""Labelled clips: how a training clip lies in its video, and the views of a test."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mae_fast.classifier import VideoClassifier
from mae_fast.data import BadVideo, Batch, ClipDataset, VideoRow, clip_indices
from mae_fast.data.planes import images
from mae_fast.data.workers import produce
from mae_fast.errors import DataError
from mae_fast.ops.crop_resize_patchify_gather import crop_resized
from mae_fast.ops.source import Source
from mae_fast.tasks.config import ClipsConfig, ViewsConfig
from mae_fast.tasks.randaugment import randaugment


def classes_of(rows: list[VideoRow], order: str = "") -> tuple[str, ...]:
    """The labels in the order of their numbers: of the file `order`, or those of the rows, sorted,
    as numbers where all are. Raises DataError for a video without a label, or of a class without a
    number."""
    bare = next((r.path for r in rows if r.label is None), None)
    if bare is not None:
        raise DataError(f"{bare} has no label: index a list or folders with labels")
    found = {r.label for r in rows}
    if not order:
        numbers = all(label.isdecimal() for label in found)
        return tuple(sorted(found, key=lambda name: (int(name) if numbers else 0, name)))
    try:
        text = Path(order).read_text(encoding="utf-8-sig")
        if order.endswith(".json"):
            table = {_bare(k): int(v) for k, v in json.loads(text).items()}
            names = sorted(table, key=table.get)
            right = sorted(table.values()) == list(range(len(table)))
        else:
            names, right = [line for line in text.split("\n") if line], True
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise DataError(f"{order}: not a file of classes: {' '.join(str(e).split())}") from e
    if not right or len(set(names)) != len(names):
        raise DataError(f"{order}: its numbers are not 0, 1, 2, ... each once")
    if unknown := found - set(names):
        raise DataError(f"{order} has no class {min(unknown)!r} ({len(unknown)} such)")
    return tuple(names)


def _bare(label: str) -> str:
    """Something-Something's label without the brackets of its placeholders, as `index` keeps it."""
    return label.replace("[", "").replace("]", "")


def numbers_of(rows: list[VideoRow], classes: tuple[str, ...]) -> list[int]:
    """The class of each row. Raises DataError for one that training did not have."""
    number = {label: i for i, label in enumerate(classes)}
    unknown = next((r for r in rows if r.label not in number), None)
    if unknown is not None:
        raise DataError(f"{unknown.path}: its label {unknown.label!r} is none of the classes")
    return [number[r.label] for r in rows]


class LabelledClips(ClipDataset):
    """A ClipDataset whose batches have labels, and whose frames went through RandAugment."""

    planar = False  # its pictures are RGB

    def __init__(
        self,
        rows: list[VideoRow],
        cfg: ClipsConfig,
        num_frames: int,
        seed: int,
        classes: tuple[str, ...],
        policy: str,
    ):
        super().__init__(rows, cfg, num_frames, seed)
        self.labels, self.policy = np.array(numbers_of(rows, classes)), policy

    def _clips(self, rng, video: int, path: str, g: int, bad: list) -> Batch:
        batch = super()._clips(rng, video, path, g, bad)
        labels = torch.full((len(batch),), int(self.labels[video]), device="cpu")
        if not self.policy:
            return replace(batch, labels=labels)
        frames = [randaugment(rng, f, self.policy) for f in batch.frames]
        rest = batch.samples, batch.paths, batch.bad, labels
        return Batch.of_rgb(frames, batch.boxes, batch.flips, *rest)

    def _indices(self, rng, frames: int, fps: float) -> list[Tensor]:
        count = 1 if self.cfg.same_frames else self.cfg.repeat_aug
        if self.cfg.sampling == "seconds":
            rate = (self.num_frames, self.cfg.sampling_rate, self.cfg.target_fps)
            found = [clip_indices(rng, frames, fps, *rate) for _ in range(count)]
        elif self.cfg.sampling == "frames":
            rate = self.cfg.sampling_rate
            found = [by_frames(rng, frames, self.num_frames, rate) for _ in range(count)]
        else:
            found = [uniform(rng, frames, self.num_frames) for _ in range(count)]
        return found * (self.cfg.repeat_aug // count)


def by_frames(rng: np.random.Generator, n: int, count: int, rate: int) -> Tensor:
    """VideoMAE's training clip: `count` frames of a window of count * rate, whatever the frames a
    second; of a shorter video every rate-th, and the last one again and again (kinetics.py)."""
    window = count * rate
    if n <= window:
        index = np.linspace(0, n, num=n // rate)
        index = np.concatenate([index, np.full(count - n // rate, n)]).clip(0, n - 1)
    else:
        end = int(rng.integers(window, n))
        index = np.linspace(end - window, end, num=count).clip(end - window, end - 1)
    return torch.from_numpy(index.astype(np.int64))


def uniform(rng: np.random.Generator, n: int, count: int) -> Tensor:
    """A random frame of each of `count` equal parts (TSN; ssv2.py); of a video of fewer frames the
    first one."""
    part = n // count
    if part:
        index = np.arange(count) * part + rng.integers(part, size=count)
    else:
        index = np.zeros(count, np.int64)
    return torch.from_numpy(index)


def views_in_time(cfg: ClipsConfig, n: int, fps: float, count: int, views: int) -> list[Tensor]:
    """The frames of each temporal view of a video of n frames, by the rule of cfg.sampling.

    seconds: mae_st's, the i-th of v starts at i * floor(rest / (v - 1)), one alone in the middle.
    frames: VideoMAE's, windows of the list of every rate-th frame. uniform: the middles of `count`
    equal parts; of two views, these and the parts' beginnings in one sorted list, every second.
    """
    if cfg.sampling == "seconds":
        span = cfg.sampling_rate * count / cfg.target_fps * fps
        rest = max(n - span, 0)
        step = rest // (views - 1) if views > 1 else 0
        starts = [i * step for i in range(views)] if views > 1 else [rest // 2]
        ramps = (torch.linspace(s, s + span - 1, count, device="cpu") for s in starts)
        return [ramp.clamp(0, n - 1).long() for ramp in ramps]
    if cfg.sampling == "frames":
        every = list(range(0, n, cfg.sampling_rate))
        every += every[-1:] * (count - len(every))
        rest = len(every) - count
        starts = [int(i * (rest / (views - 1))) for i in range(views)] if views > 1 else [rest // 2]
        return [torch.tensor(every[s : s + count], device="cpu") for s in starts]
    tick = n / count
    middles = [int(tick / 2 + tick * i) for i in range(count)]
    if views == 1:
        return [torch.tensor(middles, device="cpu")]
    both = sorted(middles + [int(tick * i) for i in range(count)])
    return [torch.tensor(both[i::2], device="cpu") for i in range(2)]


def views_in_space(cfg: ClipsConfig, height: int, width: int, views: int) -> list[tuple[int, ...]]:
    """Square boxes (top, left, side, side) along the longer side: both ends and the middle, or it
    alone. Half a pixel is rounded up in mae_st, down in VideoMAE."""
    side, rest = min(height, width), abs(height - width)
    middle = math.ceil(rest / 2) if cfg.sampling == "seconds" else rest // 2
    offsets = [0, middle, rest] if views == 3 else [middle]
    tall = height > width
    return [(o, 0, side, side) if tall else (0, o, side, side) for o in offsets]


class Views:
    """Item i: all views of row i as one Batch, temporal by temporal, and the middle one last.

    A video that does not decode gives one black clip, and its reason in `bad`.
    """

    def __init__(
        self,
        rows: list[VideoRow],
        cfg: ClipsConfig,
        num_frames: int,
        short_side: int,
        temporal: int,
        spatial: int,
    ) -> None:
        ViewsConfig(temporal, spatial, short_side).check_sampling(cfg.sampling)
        self.rows, self.cfg, self.num_frames = rows, cfg, num_frames
        self.short_side, self.temporal, self.spatial = short_side, temporal, spatial
        # Which refuses a pack of smaller pictures than these, and not than training's.
        self.reader = ClipDataset(rows, replace(cfg, short_side=short_side), num_frames, 0)
        self.reader.planar = False

    def __len__(self) -> int:
        """Views of a video, the middle one included."""
        return self.temporal * self.spatial + (self.temporal * self.spatial > 1)

    def batch(self, i: int) -> Batch:
        row = self.rows[i]
        try:
            return self._batch(i, row)
        except BadVideo as e:
            frames = [torch.zeros(self.num_frames, 8, 8, 3, dtype=torch.uint8, device="cpu")]
            return self._made(i, frames, [(0, 0, 8, 8)], [(row.path, e.reason)])

    def _batch(self, i: int, row: VideoRow) -> Batch:
        if row.error is not None or not row.frames:
            raise BadVideo(row.path, row.error or "no frames")
        how = (self.cfg, row.frames, row.fps, self.num_frames)
        clips = views_in_time(*how, self.temporal)
        alone = len(clips) * self.spatial == 1
        clips = clips if alone else [*clips, *views_in_time(*how, 1)]
        indices = torch.stack(clips) + row.start
        unique, where = indices.unique(return_inverse=True)
        end = row.start + row.frames
        found = self.reader._tried(i, os.fspath(row.path), end, unique, self.short_side)
        pixels = images(found)
        boxes = views_in_space(self.cfg, *pixels.shape[1:3], self.spatial)
        middle = views_in_space(self.cfg, *pixels.shape[1:3], 1)
        frames, crops = [], []
        for k, index in enumerate(where):
            last = not alone and k == len(where) - 1
            for box in middle if last else boxes:
                frames.append(pixels[index])
                crops.append(box)
        return self._made(i, frames, crops, [])

    def _made(self, i: int, frames: list[Tensor], boxes: list, bad: list) -> Batch:
        count = len(frames)
        return Batch.of_rgb(
            frames,
            torch.tensor(boxes, dtype=torch.int32, device="cpu"),
            torch.zeros(count, dtype=torch.bool, device="cpu"),
            torch.full((count,), i, device="cpu"),
            [self.rows[i].path] * count,
            bad,
        )

    def of(self, numbers: range, waiting: Callable[[], None] = lambda: None) -> Iterator[Batch]:
        """The batches of these rows, in order, by cfg.workers processes."""
        return produce(self.batch, numbers, self.cfg.workers, waiting)


def normalised(batch: Batch, model: VideoClassifier) -> Tensor:
    """The cropped, resized and mirrored clips [n, 3, T, size, size], normalised by the family's
    mean and deviation of each channel, where the frames are."""
    source = Source(batch.flat, batch.table, model.cfg.model.img_size)
    video = crop_resized(source, torch.float32, 0.0, 1.0)
    mean, std = (video.new_tensor(t).view(3, 1, 1, 1) for t in model.family.pixels)
    return video.sub_(mean).div_(std)
