"""AVA's files: boxes with labels (csv), detected persons (csv), classes (pbtxt), excluded seconds
(csv). A row that cannot be read is left out, counted and listed; nothing ends for one.
"""

import csv
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mae_fast.data import VideoRow
from mae_fast.errors import ConfigError, DataError
from mae_fast.tasks.ava.evaluate import Key, Labelled, iou

FIRST, LAST = 902, 1798  # seconds that have labels
FRAMES_FPS = 30.0  # of frame folders: SlowFast's and LFB's `ffmpeg -r 30`
_LISTED = 20
Box = tuple[float, float, float, float]


@dataclass
class LeftOut:
    """What could not be used of the files: lines with the reason, and how often each reason."""

    lines: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, reason: str, times: int = 1) -> None:
        if len(self.lines) < 1000:
            self.lines.append(f"{where}: {reason}")
        kind = reason.split(":")[0]
        self.counts[kind] = self.counts.get(kind, 0) + times

    def say(self) -> list[str]:
        """One line a reason, with its first places."""
        said = []
        for kind, count in self.counts.items():
            some = [x for x in self.lines if f": {kind}" in x]
            few = "; ".join(some[:3]) + ("; ..." if len(some) > 3 else "")
            said.append(f"{count} {kind}: {few}")
        return said


def read_classes(path: str | Path) -> dict[int, str]:
    """{number: name} of a label list (.pbtxt), in its order. Raises DataError."""
    found: dict[int, str] = {}
    name = None
    for number, line in enumerate(_text(path).splitlines(), 1):
        key, _, value = line.strip().partition(":")
        value = value.strip()
        if key == "name":
            name = value.strip('"')
        elif key in ("id", "label_id"):
            if not value.isdecimal() or int(value) < 1 or name is None or int(value) in found:
                raise DataError(f"{path}: line {number}: not a class of its own: {line.strip()!r}")
            found[int(value)], name = name, None
    if not found:
        raise DataError(f"{path}: no classes: the label list has `name:` and `id:` lines")
    return found


def read_excluded(path: str | Path, left: LeftOut) -> set[Key]:
    """The (movie, second) of a file of excluded timestamps."""
    found = set()
    for where, row in _rows(path):
        second = _number(row[1]) if len(row) == 2 else None
        if second is None:
            left.add(where, f"bad rows: not `movie,second`: {','.join(row)[:60]!r}")
        else:
            found.add((row[0], f"{second:.6f}"))
    return found


def read_boxes(path: str | Path, left: LeftOut, most: int = 80) -> list[Labelled]:
    """The rows of a csv of boxes: movie, second, x1, y1, x2, y2, class (none: a box without one),
    and of the truth a person's number, of detections a score. `movie,second` alone is a frame
    without a box. A box that is partly outside the frame is counted and kept as it is: the model
    sees what is inside, the evaluation takes its coordinates."""
    found = []
    for where, row in _rows(path):
        said = _labelled(row, most)
        if isinstance(said, str):
            left.add(where, said)
            continue
        x1, y1, x2, y2 = said.box
        if said.class_id is not None and (x1 >= 1 or y1 >= 1 or x2 <= 0 or y2 <= 0):
            left.add(where, f"bad rows: nothing of the box is in the frame: {_shown(said.box)}")
            continue
        if min(said.box) < 0 or max(said.box) > 1:
            left.add(where, f"boxes partly outside the frame, cut at its edge: {_shown(said.box)}")
        found.append(said)
    if not found:
        raise DataError(f"{path}: no row can be used{_first(left)}")
    return found


def _labelled(row: list[str], most: int) -> Labelled | str:
    """A row, or why it is none. Class -1: a box without one; None: no box."""
    if len(row) not in (2, 7, 8):
        return f"bad rows: {len(row)} columns, not 7 or 8"
    second = _number(row[1])
    if not row[0] or second is None or second != int(second):
        return f"bad rows: not a movie and a second: {','.join(row[:2])[:60]!r}"
    if not FIRST <= second <= LAST:
        return f"bad rows: second {second:g} is outside {FIRST} to {LAST}"
    if len(row) == 2:
        return Labelled(row[0], second, (0.0, 0.0, 0.0, 0.0), None)
    numbers = [_number(x) for x in row[2:6]]
    if None in numbers:
        return f"bad rows: not four numbers: {','.join(row[2:6])[:60]!r}"
    if numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return f"bad rows: a box without an area: {_shown(numbers)}"
    label = int(row[6]) if row[6].isdecimal() else -1 if row[6] in ("", "-1") else 0
    if not label or label > most:
        return f"bad rows: class {row[6]!r} is none of 1 to {most}"
    score = _number(row[7]) if len(row) == 8 and row[7] != "" else 1.0
    if score is None:
        return f"bad rows: score {row[7]!r} is no number"
    return Labelled(row[0], second, tuple(numbers), label, score)


@dataclass(frozen=True)
class Person:
    """A box (x1, y1, x2, y2 in shares of the frame), its classes, and how sure the detector was."""

    box: Box
    classes: frozenset[int] = frozenset()
    score: float = 1.0


Frames = dict[tuple[str, int], list[Person]]  # (movie, second) -> who is there


def people(rows: Collection[Labelled], least: float = -math.inf) -> Frames:
    """Who is in each frame: rows of the same box are one person. Scores below `least` are not read;
    of the same box's the first counts."""
    found: dict[tuple[str, int], dict[Box, tuple[set[int], float]]] = {}
    for row in rows:
        if row.class_id is None or row.score < least:
            continue
        frame = found.setdefault((row.movie, int(row.second)), {})
        labels, _ = frame.setdefault(row.box, (set(), row.score))
        labels |= {row.class_id} - {-1}
    return {
        key: [Person(box, frozenset(labels), score) for box, (labels, score) in frame.items()]
        for key, frame in found.items()
    }


def with_detections(truth: Frames, detections: Frames, least_iou: float = 0.9) -> Frames:
    """The truth's boxes, and beside them the detections that lie on one (IoU of `least_iou` and
    more), with the classes of the box that they overlap most."""
    found = {}
    for key, persons in truth.items():
        more = []
        if others := detections.get(key):
            overlap = iou(np.array([p.box for p in others]), np.array([p.box for p in persons]))
            held = {p.box for p in persons}
            for other, row in zip(others, overlap, strict=True):
                if row.max() >= least_iou and other.box not in held:
                    more.append(replace(other, classes=persons[int(row.argmax())].classes))
        found[key] = [*persons, *more]
    return found


def movies_of(
    frames: Frames, rows: dict[str, VideoRow], left: LeftOut, excluded: Collection[Key] = ()
) -> list[tuple[VideoRow, int, list[Person]]]:
    """(movie, second, persons) of every keyframe whose movie is here, sorted by movie and second;
    missing movies are counted by keyframes, and listed."""
    found, missing = [], {}
    for (movie, second), persons in sorted(frames.items(), key=lambda item: item[0]):
        if (movie, f"{second:.6f}") in excluded:
            continue
        row = rows.get(movie)
        if row is None or row.error or not row.frames:
            missing[movie] = missing.get(movie, 0) + 1
        else:
            found.append((row, second, persons))
    for movie, count in missing.items():
        row = rows.get(movie)
        reason = (row.error or "no frames") if row else "not in the index"
        left.add(movie, f"keyframes of missing movies: {count} of them, {reason}", count)
    if not found:
        none_left = "is left by classes, ava.score, ava.val_every and the excluded seconds"
        raise DataError(f"no keyframe {f'has its movie{_first(left)}' if missing else none_left}")
    return found


def around(
    movie: VideoRow, second: int, begins: float, count: int, rate: int, target_fps: float
) -> np.ndarray:
    """The frames of the clip around a second, int64 [count]: `count` frames, `rate` apart at
    target_fps, from half a clip before it on (SlowFast's get_sequence); the first and the last one
    again where the movie has no more. Raises ConfigError where the file cannot hold that second."""
    at = second - begins
    if not 0 <= at <= movie.duration + 1:
        raise ConfigError(
            f"{movie.path}: second {second} is not in its {movie.duration:.0f} s, which begin at "
            f"ava.begins_at {begins:g}: 900 for movies cut to 15 minutes, 0 for whole ones"
        )
    steps = (np.arange(count) * rate - count * rate // 2) / target_fps
    return np.clip(np.round((at + steps) * movie.fps), 0, movie.frames - 1).astype(np.int64)


def frame_folders(root: str | Path, movies: Collection[str]) -> dict[str, VideoRow]:
    """Movies as folders of pictures, ROOT/MOVIE/MOVIE_000001.jpg ... at 30 frames a second; a
    folder without its first picture is no movie. Counted by bisection: no folder is listed."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of frames")
    found = {}
    for movie in sorted(set(movies)):
        folder = root / movie
        low, high = 0, 1
        while frame_path(folder, high - 1).is_file():
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if frame_path(folder, middle - 1).is_file() else (low, middle)
            )
        if low:
            found[movie] = VideoRow(
                os.path.abspath(folder), frames=low, fps=FRAMES_FPS, duration=low / FRAMES_FPS,
                codec="pictures",
            )  # fmt: skip
    return found


def frame_path(folder: Path, i: int) -> Path:
    """Picture i, from 0, of a folder of frames."""
    return folder / f"{folder.name}_{i + 1:06d}.jpg"


def movie_of(row: VideoRow) -> str:
    """A movie's name: that of its file, or before it was packed, without suffix."""
    return os.path.splitext(os.path.basename(row.source or row.path))[0]


def _rows(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """(`file: line n`, fields) of each line that is not empty."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            fields = [x.strip() for x in next(csv.reader([line]))]
            yield f"{Path(path).name}: line {number}", fields


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from e


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _shown(box) -> str:
    return ", ".join(f"{x:g}" for x in box)


def _first(left: LeftOut) -> str:
    return f" ({left.lines[0]})" if left.lines else ""
