"""From an index to batches: frames as decoded, with crop box, flip and sample as numbers."""

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mae_fast.config import DataConfig
from mae_fast.data.container import BadVideo
from mae_fast.data.decode import VideoReader
from mae_fast.data.index import VideoRow, end_last_line
from mae_fast.data.packed import PackReader, Place, check_size
from mae_fast.data.planes import Pictures, stays
from mae_fast.data.sampling import clip_indices, crop_box, draw, order, weights_of
from mae_fast.data.timeline import Access
from mae_fast.data.workers import produce
from mae_fast.errors import DataError
from mae_fast.fields import require
from mae_fast.ops.crop_resize_patchify_gather import crop_resized
from mae_fast.ops.source import (
    BOX_HEIGHT,
    BOX_WIDTH,
    COLUMNS,
    FLIP,
    LEFT,
    TOP,
    Source,
    frame_bytes,
    of_rgb,
)

log = logging.getLogger("mae_fast")

# Replacements tried for one draw before the run stops.
_ATTEMPTS = 20
_LISTED = 20
# Bytes of a buffer that is kept on a GPU for the largest batch; a larger one has its own size.
_MOST = 1 << 30
# Seconds before another try of what may be a moment's trouble: a network's, or another thread's.
_PAUSES = (0.0, 0.5)


@dataclass
class Batch:
    """Clips before augmentation: their frames as they were decoded, in one uint8 buffer, and the
    table that says where and how they lie, their boxes and flips (ops/source.py).

    samples int64 [n], the number of the clip in the whole run; paths [n]; bad, the (path, reason)
    met while making it; labels int64 [n], the classes of labelled clips; capacity, the bytes of the
    buffer on a GPU, that no batch exceeds as far as the index says (0: unknown). `placed` is the
    table on the device of the frames; all else stays on the host, so that no use of it waits.
    """

    flat: Tensor
    table: Tensor
    samples: Tensor
    paths: list[str]
    bad: list[tuple[str, str]]
    labels: Tensor | None = None
    capacity: int = 0
    placed: Tensor | None = None

    @classmethod
    def of_rgb(cls, frames: list[Tensor], boxes: Tensor, flips: Tensor, *rest) -> "Batch":
        """Of clips uint8 [T, H, W, 3], boxes int32 [n, 4] (top, left, height, width), flips bool
        [n]; and what follows the table."""
        source = of_rgb(frames, boxes, flips, 0)
        return cls(source.flat, source.table, *rest)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def boxes(self) -> Tensor:
        """int32 [n, 4]: top, left, height, width."""
        return self.table[:, [TOP, LEFT, BOX_HEIGHT, BOX_WIDTH]].int()

    @property
    def flips(self) -> Tensor:
        return self.table[:, FLIP].bool()

    @property
    def frames(self) -> list[Tensor]:
        """Each clip's frames, RGB, uint8 [T, H, W, 3]; made anew at every call."""
        return Source(self.flat, self.table, 0).rgb()

    def to(self, device, non_blocking: bool = False) -> "Batch":
        """The same batch on a device; on a GPU in a buffer of `capacity`, so that steps may be
        replayed."""
        device, size = torch.device(device), self.flat.numel()
        if device.type == "cuda" and size < self.capacity:
            flat = torch.empty(self.capacity, dtype=torch.uint8, device=device)
            flat[:size].copy_(self.flat, non_blocking=non_blocking)
        else:
            flat = self.flat.to(device, non_blocking=non_blocking)
        placed = self.table.to(device, non_blocking=non_blocking)
        return replace(self, flat=flat, placed=placed)

    def pin_memory(self) -> "Batch":
        """The same batch, what goes to a device in pinned memory, of which torch keeps the blocks
        and gives them out again; torch's loader calls this."""
        flat, table, samples = (t.pin_memory() for t in (self.flat, self.table, self.samples))
        return replace(self, flat=flat, table=table, samples=samples)

    def source(self, size: int) -> Source:
        """Where the pixels of the augmented clips [n, 3, T, size, size] come from."""
        return Source(self.flat, self.table if self.placed is None else self.placed, size)

    def video(self, size: int) -> Tensor:
        """The augmented, normalised clips, float32 [n, 3, T, size, size], where the frames are, by
        plain torch: for other models than ours, and what ours is tested against."""
        return crop_resized(Source(self.flat, self.table, size), torch.float32)

    def pack(self) -> tuple[tuple[Tensor, ...], tuple]:
        """(the frames' uint8 vectors, the rest), for another process; see unpack."""
        flats = self.flat if isinstance(self.flat, tuple) else (self.flat,)
        given = (self.table, self.samples, self.labels)
        numbers = [None if t is None else t.numpy() for t in given]
        return flats, (numbers, self.paths, self.bad, self.capacity)

    @staticmethod
    def unpack(flat: Tensor, rest: tuple) -> "Batch":
        """The inverse of pack; flat: its vectors in a row."""
        numbers, paths, bad, capacity = rest
        table, samples, labels = (None if x is None else torch.from_numpy(x) for x in numbers)
        return Batch(flat, table, samples, paths, bad, labels, capacity)


def join(batches: list[Batch], cat: Callable = torch.cat) -> Batch:
    """One batch of several; their frames are copied into one block of memory. With `tuple` they
    stay as they are, to be sent one after another (pack)."""
    tables, at = [], 0
    for b in batches:
        tables.append(b.table.clone())
        tables[-1][:, COLUMNS:] += at
        at += b.flat.numel()
    return Batch(
        flat=cat([b.flat for b in batches]),
        table=torch.cat(tables),
        samples=torch.cat([b.samples for b in batches]),
        paths=[p for b in batches for p in b.paths],
        bad=[x for b in batches for x in b.bad],
        labels=None if batches[0].labels is None else torch.cat([b.labels for b in batches]),
    )


class ClipDataset(Dataset):
    """Item g, the global draw number, is a Batch of the repeat_aug clips of that draw's video.

    A function of (seed, epoch, video) alone; where weights draw a video several times in an epoch,
    of how many came before too. A bad video is replaced by one chosen from these and the number of
    the attempt, and reported in `bad`; DataError after 20 in a row.
    """

    planar = True  # frames stay as they were decoded, where they can

    def __init__(self, rows: list[VideoRow], cfg: DataConfig, num_frames: int, seed: int):
        if not rows:
            raise DataError("no videos to draw from")
        self.cfg, self.num_frames, self.seed = cfg, num_frames, seed
        # Arrays, not objects: counting references to a long list would copy it into every worker.
        self._paths = np.array([os.fsencode(r.path) for r in rows])
        self._spans = np.array([(r.start, r.frames) for r in rows], dtype=np.int64)
        self._fps = np.array([r.fps for r in rows])
        self._weights = weights_of(rows)
        self._access = np.array(
            [(r.total, r.ordered, r.seekable, r.damaged == 0) for r in rows], dtype=np.int64
        )
        self._hidden = {i: r.hidden for i, r in enumerate(rows) if r.hidden}
        check_size(rows, cfg.short_side)
        self.capacity = _capacity(rows, cfg, self.planar) * cfg.repeat_aug * num_frames
        self._packed = np.array(
            [(r.at, r.bytes, r.first, r.packets, r.mirrored, r.rotation) for r in rows]
        )
        coded = [
            os.fsencode(f"{r.codec}\0{r.pix_fmt}\0{r.setup}\0.") if r.at >= 0 else b"" for r in rows
        ]
        self._coded, self._code = np.unique(np.array(coded), return_inverse=True)
        self._packs: PackReader | None = None  # made in the process that reads
        self._known_bad: dict[int, str] = {}

    def __getitem__(self, g: int) -> Batch:
        n = len(self._paths)
        epoch, video = draw(n, g, self.seed, self._weights)
        key, bad = (self.seed, epoch, video), []
        if self._weights:
            drawn = order(n, self.seed, epoch, self._weights)[: g % n]
            again = np.count_nonzero(drawn == video)
            key += (0, again) * bool(again)  # other clips of it
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng((*key, attempt) if attempt else key)
            if attempt:
                video = int(rng.integers(n))
                if self._weights:
                    video = int(order(n, self.seed, epoch, self._weights)[video])
            path = os.fsdecode(self._paths[video])
            try:
                return self._clips(rng, video, path, g, bad)
            except BadVideo as e:
                # Not a damaged frame, nor what another try may read: other draws of it may be good,
                # and a resumed run, which knows nothing of this one, must decide the same.
                if e.lasting:
                    self._known_bad[video] = e.reason
                bad.append((path, e.reason))
        error = DataError(f"draw {g}: {_ATTEMPTS} bad videos in a row:\n{_listing(dict(bad))}")
        error.bad = bad
        raise error

    def _clips(self, rng, video: int, path: str, g: int, bad: list) -> Batch:
        if video in self._known_bad:
            raise BadVideo(path, self._known_bad[video])
        start, frames = self._spans[video].tolist()
        repeats = self.cfg.repeat_aug
        indices = torch.stack(self._indices(rng, frames, float(self._fps[video]))) + start
        unique, where = indices.unique(return_inverse=True)
        pixels = self._tried(video, path, start + frames, unique)
        size, how = (pixels.height, pixels.width), (self.cfg.crop_area, self.cfg.crop_aspect)
        clips = [
            (each, crop_box(rng, *size, *how), rng.random() < self.cfg.flip)
            for each in where.tolist()
        ]
        source = pixels.source(clips, 0)
        return Batch(
            flat=source.flat,
            table=source.table,
            samples=g * repeats + torch.arange(repeats, device="cpu"),
            paths=[path] * repeats,
            bad=bad,
        )

    def _tried(self, *what) -> Pictures:
        """_read, and again after what may be a moment's trouble."""
        for pause in _PAUSES:
            try:
                return self._read(*what)
            except BadVideo as e:
                if e.lasting:
                    raise
                time.sleep(pause)
        return self._read(*what)

    def _read(
        self, video: int, path: str, frames: int, wanted: Tensor, short_side: int | None = None
    ) -> Pictures:
        size = self.cfg.short_side if short_side is None else short_side
        wanted = wanted.tolist()
        if self._packed[video, 0] >= 0:
            self._packs = self._packs or PackReader(self.cfg.strict)
            return self._packs.pictures(self._place(video, path), wanted, size, self.planar)
        with VideoReader(path, self.cfg.decoder, self._access_of(video), self.cfg.strict) as r:
            if r.num_frames < frames:
                raise BadVideo(path, f"changed: {r.num_frames} frames, {frames} when indexed")
            return r.pictures(wanted, size, self.planar)

    def _access_of(self, video: int) -> Access | None:
        total, ordered, seekable, whole = self._access[video].tolist()
        hidden = self._hidden.get(video, "")
        return Access(total, bool(ordered), bool(seekable), hidden, bool(whole)) if total else None

    def _place(self, video: int, path: str) -> Place:
        at, length, first, packets, mirrored, rotation = self._packed[video].tolist()
        codec, pix_fmt, setup, _ = os.fsdecode(self._coded[self._code[video]]).split("\0")
        place = (path, at, length, first, packets, codec, setup, bool(mirrored), rotation, pix_fmt)
        return Place(*place)

    def _indices(self, rng, frames: int, fps: float) -> list[Tensor]:
        """Frame numbers of each clip; all within one window of span_seconds, unless that is 0."""
        cfg, lo, hi = self.cfg, 0.0, None
        if cfg.span_seconds:
            clip_seconds = cfg.sampling_rate * self.num_frames / cfg.target_fps
            span = max(cfg.span_seconds, clip_seconds) * fps
            lo = rng.uniform(0, max(frames - span, 0))
            hi = lo + span
        rate = (self.num_frames, cfg.sampling_rate, cfg.target_fps)
        return [clip_indices(rng, frames, fps, *rate, lo, hi) for _ in range(cfg.repeat_aug)]


class Loader:
    """The batches of make_loader, in order. Raises DataError when a worker fails or is lost."""

    def __init__(self, dataset: ClipDataset, firsts: range, size: int, waiting):
        self._dataset, self._firsts, self._size, self._waiting = dataset, firsts, size, waiting

    def __len__(self) -> int:
        return len(self._firsts)

    def __iter__(self) -> Iterator[Batch]:
        workers = self._dataset.cfg.workers
        cat = tuple if workers else torch.cat
        make = functools.partial(_batch, self._dataset, self._size, cat)
        return produce(make, self._firsts, workers, self._waiting)


def _batch(dataset: ClipDataset, size: int, cat: Callable, first: int) -> Batch:
    batch = join([dataset[g] for g in range(first, first + size)], cat)
    return replace(batch, capacity=min(dataset.capacity * size, _MOST))


def _capacity(rows: list[VideoRow], cfg: DataConfig, planar: bool) -> int:
    """The most bytes of a frame, as the index knows the videos; 0 where it does not."""
    most = 0
    for r in rows:
        if not r.width or not r.height:
            return 0
        plain = planar and not r.rotation and not r.mirrored and cfg.decoder != "torchcodec"
        if plain and stays(r.pix_fmt, r.height, r.width, cfg.short_side):
            found = frame_bytes(r.height, r.width, True)
        else:
            short = min(r.height, r.width)
            size = min(cfg.short_side or short, short)
            found = frame_bytes(r.height * size // short, r.width * size // short, False)
        most = max(most, found)
    return most


def make_loader(
    rows: list[VideoRow],
    cfg: DataConfig,
    *,
    num_frames: int,
    batch_size: int,
    seed: int,
    steps: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    waiting: Callable[[], None] = lambda: None,
    clips: Callable[..., ClipDataset] = ClipDataset,
) -> Loader:
    """Batches of steps start, ..., start + steps - 1, each of batch_size videos times repeat_aug.

    Step s of rank r holds the global draws from (s * world + r) * batch_size on, so a run that
    starts in mid-epoch, or is split over ranks, draws the same samples. cfg.workers processes.
    `waiting` is called while a batch is waited for, ten times a second; it may raise. `clips` makes
    the dataset. Raises ConfigError for a rank that there is not.
    """
    require(0 <= rank < world, f"the rank must be in [0, {world})", rank)
    # A range, not a list: a bench asks for a thousand million steps.
    stride = world * batch_size
    first = start * stride + rank * batch_size
    firsts = range(first, first + steps * stride, stride)
    return Loader(clips(rows, cfg, num_frames, seed), firsts, batch_size, waiting)


class BadVideos:
    """Bookkeeping of the broken files met in a run of `total` videos: each is warned of once and
    listed in `folder`/bad_videos.jsonl (no folder: not listed), which is read again on resume: by
    every rank, as all must judge alike; only a `writer` adds to it.

    add() raises DataError with the list once more than max_share of the videos are broken.
    """

    def __init__(
        self,
        max_share: float,
        total: int,
        folder: str | Path | None = None,
        writer: bool = True,
    ):
        self.max_share, self.total, self.writer = max_share, total, writer
        self.found: dict[str, str] = {}
        self._file = Path(folder) / "bad_videos.jsonl" if folder is not None else None
        if self._file and self._file.is_file():
            if writer:
                end_last_line(self._file)
            for line in self._file.read_text(errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                    path, reason = record["path"], record["reason"]
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue  # cut off by a kill, or damaged
                if isinstance(path, str):
                    self.found[path] = str(reason)

    def add(self, bad: list[tuple[str, str]]) -> None:
        """Take note of (path, reason) pairs."""
        for path, reason in bad:
            if path in self.found:
                continue
            self.found[path] = reason
            log.warning("bad video, replaced by another: %s: %s", path, reason)
            if self._file and self.writer:
                record = {"path": path, "reason": reason, "time": time.time()}
                with open(self._file, "a") as f:
                    f.write(json.dumps(record) + "\n")
        if bad and len(self.found) > self.max_share * self.total:
            raise DataError(
                f"{len(self.found)} of {self.total} videos are bad, more than data.max_bad_share "
                f"{self.max_share:g} allows:\n{_listing(self.found)}"
            )


def _listing(found: dict[str, str]) -> str:
    lines = [f"  {path}: {reason}" for path, reason in list(found.items())[:_LISTED]]
    more = len(found) - len(lines)
    return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))
