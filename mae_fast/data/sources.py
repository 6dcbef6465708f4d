"""Where the videos of an index come from: folders, lists, and the files of known datasets."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mae_fast.errors import DataError

_SUFFIXES = (
    "mp4 m4v mov mkv webm avi mpg mpeg ts m2ts mts flv wmv asf 3gp ogv vob mxf gif h264 h265 y4m"
)
VIDEO_SUFFIXES = frozenset("." + s for s in _SUFFIXES.split())
# A path up to its first video suffix, then a blank or a comma, then the label.
_LINE = re.compile(rf"(.+?\.(?:{'|'.join(_SUFFIXES.split())}))(?:\s*[,\s]\s*(.*))?", re.IGNORECASE)


class Source(NamedTuple):
    """A video to be indexed: absolute path, label, and (begin, end) seconds or None."""

    path: str
    label: str | None = None
    segment: tuple[float, float] | None = None


def find_videos(sources: Iterable[str | Path]) -> list[Source]:
    """All videos of folders, lists (.txt, .csv, .json) and single files, each once, in a fixed
    order. A file named in a list need not exist. Raises DataError."""
    found: dict[tuple, Source] = {}
    for source in sources:
        path = Path(os.path.abspath(source))
        if not path.exists():
            raise DataError(f"{source}: no such file or folder")
        if path.is_dir():
            videos = _folder(path)
        elif path.suffix.lower() == ".json":
            videos = _something_something(path)
        elif path.suffix.lower() in (".txt", ".csv", ".tsv", ".list"):
            videos = _list(path)
        else:
            videos = iter([Source(str(path))])
        for video in videos:
            found.setdefault((video.path, video.segment), video)
    return list(found.values())


def _walk(root: Path) -> Iterator[str]:
    """Every visible video file under a folder, sorted; links are followed, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in VIDEO_SUFFIXES and not name.startswith("."):
                yield os.path.join(folder, name)


def _folder(root: Path) -> Iterator[Source]:
    """The label is the name of the folder that a video lies in, except at the top."""
    for path in _walk(root):
        parent = os.path.dirname(path)
        yield Source(path, None if parent == str(root) else os.path.basename(parent))


def _list(path: Path) -> Iterator[Source]:
    """Lines `path label`, `path,label` or `path`, or the CSV of Kinetics."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not a readable list: {e}") from e
    if lines and "youtube_id" in lines[0].split(","):
        yield from _kinetics(path, lines)
        return
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise DataError(f"{path}: line {number} names no video: {line[:80]!r}")
        name, label = match.groups()
        yield Source(os.path.join(path.parent, name), (label or "").strip() or None)


def _stems(path: Path) -> dict[str, str]:
    """Videos beside a dataset's file and below, by name without suffix."""
    return {os.path.splitext(os.path.basename(p))[0]: p for p in _walk(path.parent)}


def _kinetics(path: Path, lines: list[str]) -> Iterator[Source]:
    """Columns [label,]youtube_id,time_start,time_end,split; files `<id>_<start>_<end>` as its tools
    name them, or `<id>`."""
    files = _stems(path)
    for row in csv.DictReader(lines):
        try:
            name, begin, end = row["youtube_id"], float(row["time_start"]), float(row["time_end"])
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{path}: not a Kinetics list: {e!r} in {row}") from e
        label = row.get("label") or None
        cut = files.get(f"{name}_{int(begin):06d}_{int(end):06d}")
        if cut:
            yield Source(cut, label)
        else:
            whole = files.get(name, os.path.join(path.parent, f"{name}.mp4"))
            yield Source(whole, label, (begin, end))


def _something_something(path: Path) -> Iterator[Source]:
    """A list of objects with `id` and, but for the test set, `template` or `label`."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        ids = [(str(e["id"]), e.get("template") or e.get("label")) for e in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path}: not a Something-Something list of id and label: {e!r}") from e
    files = _stems(path)
    for name, label in ids:
        label = re.sub(r"[\[\]]", "", label) if label else None
        yield Source(files.get(name, os.path.join(path.parent, f"{name}.webm")), label)
