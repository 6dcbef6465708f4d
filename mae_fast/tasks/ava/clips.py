"""Clips around keyframes, with the persons in them: random crops for training, whole frames for
tests. A movie is one file, in a pack or not, or a folder of pictures.
"""

import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.data import BadVideo, Batch, ClipDataset, VideoRow, read_index
from mae_fast.data.planes import Pictures, images, of_rgb
from mae_fast.data.sampling import shrink
from mae_fast.data.workers import produce
from mae_fast.errors import ConfigError
from mae_fast.ops.crop_resize_patchify_gather import crop_resize
from mae_fast.tasks.ava.boxes import alive, cropped, extended, jittered, square_crop
from mae_fast.tasks.ava.config import AvaConfig
from mae_fast.tasks.ava.evaluate import Key
from mae_fast.tasks.ava.files import (
    Frames,
    LeftOut,
    Person,
    around,
    frame_folders,
    frame_path,
    movie_of,
    movies_of,
)

ALPHACTION = ((122.7717, 115.9465, 102.9801), (57.375,) * 3)  # of 255
_TRIES = 10


@dataclass(frozen=True)
class Keyframes:
    """Keyframe i: rows[i], the segment of its movie that its clip takes; indices [n, T], the clip's
    frames in the movie's file; seconds[i]; people[i]."""

    rows: list[VideoRow]
    indices: np.ndarray
    seconds: list[int]
    people: list[list[Person]]

    def __len__(self) -> int:
        return len(self.rows)

    def movie(self, i: int) -> str:
        return movie_of(self.rows[i])

    def digest(self) -> str:
        """Of seconds, boxes and labels, in their order."""
        found = hashlib.sha256()
        for second, persons in zip(self.seconds, self.people, strict=True):
            said = [(p.box, sorted(p.classes), p.score) for p in persons]
            found.update(f"{second}{said!r}".encode())
        return found.hexdigest()


def keyframes(
    frames: Frames,
    movies: dict[str, VideoRow],
    rule: tuple[int, int, float],
    begins: float,
    left: LeftOut,
    excluded: Collection[Key] = (),
) -> Keyframes:
    """The keyframes whose movies are here; rule: frames of a clip, their distance, target_fps."""
    found = movies_of(frames, movies, left, excluded)
    rows, indices = [], []
    for movie, second, _ in found:
        where = around(movie, second, begins, *rule) + movie.start
        first, last = int(where[0]), int(where[-1])
        rows.append(replace(movie, label=str(second), start=first, frames=last - first + 1))
        indices.append(where)
    seconds, people = [x[1] for x in found], [x[2] for x in found]
    return Keyframes(rows, np.stack(indices), seconds, people)


def read_movies(index: str, ava: AvaConfig, named: Collection[str]) -> dict[str, VideoRow]:
    """Movies by name: of ava.frames, or of an index or pack; broken ones too. Raises DataError."""
    if ava.frames:
        return frame_folders(ava.frames, named)
    if not index:
        raise ConfigError(
            "where are the movies? data.index: `mae-fast index MOVIES`, better a pack of it; or "
            "ava.frames: a folder of folders of pictures"
        )
    return {movie_of(row): row for row in read_index(index, broken=True)}


class KeyframeClips(ClipDataset):
    """Item g: the clips of a keyframe, and in `labels` a row for each person that is left in one:
    float64 (number of the clip, x1, y1, x2, y2 in its pixels, one of each class or zero)."""

    planar = False  # its pictures are RGB

    def __init__(
        self, rows: list[VideoRow], cfg, num_frames: int, seed: int, *,
        keyframes: Keyframes, ava: AvaConfig, size: int,
    ) -> None:  # fmt: skip
        super().__init__(rows, cfg, num_frames, seed)
        self.ava, self.size, self.indices = ava, size, keyframes.indices
        self.pictures = np.array([r.codec == "pictures" for r in rows])
        # Arrays, not objects: see ClipDataset.
        self.firsts = np.cumsum([0, *(len(p) for p in keyframes.people)])
        everyone = [p for persons in keyframes.people for p in persons]
        self.boxes = np.array([p.box for p in everyone])
        self.labels = np.zeros((len(everyone), ava.num_classes), bool)
        for row, person in zip(self.labels, everyone, strict=True):
            row[[c - 1 for c in person.classes]] = True

    def _clips(self, rng, video: int, path: str, g: int, bad: list) -> Batch:
        if video in self._known_bad:
            raise BadVideo(path, self._known_bad[video])
        pixels = self.pixels(video, path)
        some = slice(*self.firsts[video : video + 2])
        height, width = pixels.shape[1:3]
        boxes = _in_pixels(self.boxes[some], height, width)
        repeats, crops, flips, rows = self.cfg.repeat_aug, [], [], []
        for k in range(repeats):
            flip = rng.random() < self.cfg.flip
            crop, here, there = self._crop(rng, boxes, height, width, flip)
            here = jittered(rng, here[there], self.ava.box_jitter, self.size)
            number = np.full((len(here), 1), g * repeats + k)
            rows.append(np.concatenate([number, here, self.labels[some][there]], axis=1))
            crops.append(crop)
            flips.append(flip)
        return Batch.of_rgb(
            [pixels] * repeats,
            torch.tensor(crops, dtype=torch.int32, device="cpu"),
            torch.tensor(flips, device="cpu"),
            g * repeats + torch.arange(repeats, device="cpu"),
            [path] * repeats,
            bad,
            torch.from_numpy(np.concatenate(rows)),
        )

    def _crop(self, rng, boxes: np.ndarray, height: int, width: int, flip: bool):
        """(crop, boxes in it, which are left): drawn again up to ten times until somebody is left,
        and then laid around the first."""
        for _ in range(_TRIES):
            crop = square_crop(rng, height, width, self.size, self.ava.short_sides)
            here = cropped(boxes, crop, self.size, flip)
            if (there := alive(here)).any():
                return crop, here, there
        side = crop[2]
        x, y = (boxes[0, :2] + boxes[0, 2:]) / 2 - side / 2
        top, left = (int(min(max(v, 0), n - side)) for v, n in ((y, height), (x, width)))
        crop = top, left, side, side
        return crop, cropped(boxes, crop, self.size, flip), np.arange(len(boxes)) == 0

    def pixels(self, video: int, path: str, short_side: int | None = None) -> Tensor:
        """The clip's frames, uint8 [T, H, W, 3]. Raises BadVideo."""
        unique, where = np.unique(self.indices[video], return_inverse=True)
        start, frames = self._spans[video].tolist()
        wanted = torch.from_numpy(unique)
        found = images(self._tried(video, path, start + frames, wanted, short_side))
        return found[torch.from_numpy(where)]

    def _read(
        self, video: int, path: str, frames: int, wanted: Tensor, short_side=None
    ) -> Pictures:
        if not self.pictures[video]:
            return super()._read(video, path, frames, wanted, short_side)
        size = self.cfg.short_side if short_side is None else short_side
        return of_rgb(torch.cat([shrink(_picture(path, int(i)), size) for i in wanted]))


def _picture(path: str, i: int) -> Tensor:
    """Frame i of a folder of pictures, uint8 [1, H, W, 3]."""
    from PIL import Image, UnidentifiedImageError

    file = frame_path(Path(path), i)
    try:
        with Image.open(file) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))[None]
    except (OSError, UnidentifiedImageError, SyntaxError) as e:
        raise BadVideo(path, f"damaged: {file.name}: {' '.join(str(e).split())}", False) from None


def _in_pixels(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return boxes * np.array([width, height] * 2)


def statistics(ava: AvaConfig, family: tuple) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, of pixels in [0, 1]: [3, 1, 1, 1] each."""
    both = [[x / 255 for x in t] for t in ALPHACTION] if ava.pixels == "alphaction" else family
    mean, std = (torch.tensor(t, device="cpu").view(3, 1, 1, 1) for t in both)
    return mean, std


def training_video(
    rng: np.random.Generator, batch: Batch, size: int, ava: AvaConfig, family: tuple
) -> Tensor:
    """The cropped, coloured, normalised clips [n, 3, T, size, size], where the frames are."""
    numbers = zip(batch.frames, batch.boxes.tolist(), batch.flips.tolist(), strict=True)
    clips = [crop_resize(f, box, flip, size, 0.0, 1.0) for f, box, flip in numbers]
    if any(ava.color):
        clips = [shift_color(clip, *rng.uniform(-1, 1, 3) * ava.color) for clip in clips]
    video = torch.stack(clips)
    mean, std = (t.to(video) for t in statistics(ava, family))
    return video.sub_(mean).div_(std)


def shift_color(rgb: Tensor, hue: float, saturation: float, value: float) -> Tensor:
    """A clip [3, ...] in [0, 1], shifted in HSV: hue in degrees, the others in shares (AlphAction's
    ColorJitter, in floats where it has OpenCV's bytes)."""
    top, low = rgb.amax(0), rgb.amin(0)
    spread = top - low
    r, g, b = rgb
    safe = spread.clamp_min(1e-12)
    sector = torch.where(
        top == r, (g - b) / safe % 6, torch.where(top == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    sector = torch.where(spread > 0, sector, 0.0) + hue / 60
    s = (spread / top.clamp_min(1e-12) + saturation).clamp(0, 1)
    v = (top + value).clamp(0, 1)
    found = []
    for n in (5, 3, 1):  # v - v s max(0, min(k, 4 - k, 1)), k = n + sector
        k = (n + sector) % 6
        found.append(v - v * s * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(found)


class WholeFrames:
    """Clips of keyframes for a test: the whole frame, its short side at short_side pixels.

    Item i is a Batch of one clip, in whose `labels` are the persons' boxes in pixels, [P, 4], as
    the head is to see them. A clip that does not decode is black, and has its reason in `bad`.
    """

    def __init__(
        self, keyframes: Keyframes, cfg, num_frames: int, ava: AvaConfig, short_side: int
    ) -> None:
        self.keyframes, self.ava, self.short_side = keyframes, ava, short_side
        how = dict(keyframes=keyframes, ava=ava, size=short_side)
        self.reader = KeyframeClips(keyframes.rows, cfg, num_frames, 0, **how)

    def batch(self, i: int) -> Batch:
        row, bad = self.keyframes.rows[i], []
        try:
            frames = self.reader.pixels(i, os.fspath(row.path), self.short_side)
        except BadVideo as e:
            bad = [(f"{row.path} at second {self.keyframes.seconds[i]}", e.reason)]
            shape = (len(self.reader.indices[i]), self.short_side, self.short_side, 3)
            frames = torch.zeros(shape, dtype=torch.uint8, device="cpu")
        height, width = self.scaled(*frames.shape[1:3])
        boxes = np.array([p.box for p in self.keyframes.people[i]])
        boxes = np.clip(_in_pixels(boxes, height, width), 0, np.array([width, height] * 2))
        boxes = extended(boxes, self.ava.box_extend, height, width)
        return Batch.of_rgb(
            [frames],
            torch.tensor([(0, 0, *frames.shape[1:3])], dtype=torch.int32, device="cpu"),
            torch.zeros(1, dtype=torch.bool, device="cpu"),
            torch.tensor([i], device="cpu"),
            [os.fspath(row.path)],
            bad,
            torch.from_numpy(boxes),
        )

    def middle(self, i: int) -> np.ndarray:
        """The keyframe itself, uint8 [H, W, 3]. Raises BadVideo."""
        row, which = self.keyframes.rows[i], self.reader.indices[i]
        wanted = torch.from_numpy(which[len(which) // 2 :][:1])
        how = (i, os.fspath(row.path), row.start + row.frames, wanted, self.short_side)
        return images(self.reader._tried(*how))[0].numpy()

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """The frame's size at short_side: the long side rounded down, as the official codes."""
        short = min(height, width)
        return height * self.short_side // short, width * self.short_side // short

    def video(self, batch: Batch, patch: int, family: tuple) -> Tensor:
        """Normalised [1, 3, T, H, W], zeros to the right and below up to whole patches."""
        frames = batch.frames[0]
        size = self.scaled(*frames.shape[1:3])
        x = frames.permute(0, 3, 1, 2).float()
        if size != tuple(x.shape[2:]):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        mean, std = (t.to(x) for t in statistics(self.ava, family))
        x = (x.transpose(0, 1) / 255 - mean) / std
        down, right = (math.ceil(n / patch) * patch - n for n in size)
        return F.pad(x, (0, right, 0, down))[None]

    def of(self, numbers, workers: int, waiting: Callable[[], None]) -> Iterator[Batch]:
        return produce(self.batch, numbers, workers, waiting)
