"""Where the videos of an index come from: folders, lists, and the files of known datasets."""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mae_fast.data.lists import VIDEO_SUFFIXES, Entry, read_list
from mae_fast.errors import ConfigError, DataError
from mae_fast.fields import shown

log = logging.getLogger("mae_fast")


class Source(NamedTuple):
    """A video to be indexed: absolute path, label, (begin, end) seconds or None, and how often it
    is drawn beside others."""

    path: str
    label: str | None = None
    segment: tuple[float, float] | None = None
    weight: float = 1.0


def find_videos(
    sources: Iterable[str | Path],
    root: str | Path | None = None,
    weights: Sequence[float] = (),
) -> list[Source]:
    """All videos of folders, lists (.txt, .csv, .tsv, .list, .json) and single files, each once, in
    a fixed order. Relative paths in a list begin at `root`, by default at the list's own folder. A
    file named in a list need not exist. weights: of each source, by default 1; of a video that is
    in several the first counts. Raises DataError, and ConfigError for wrong weights."""
    found: dict[tuple, Source] = {}
    if root is not None and not os.path.isdir(root):
        raise DataError(f"{root}: no such folder")
    sources = list(sources)
    if weights and len(weights) != len(sources):
        raise ConfigError(f"{len(weights)} weights for {len(sources)} sources: one each")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ConfigError(f"a source's weight must be a number above 0, got {weight}")
    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        path = Path(os.path.abspath(source))
        if not os.path.exists(path):
            raise DataError(f"{source}: no such file or folder")
        below = path.parent if root is None else Path(os.path.abspath(root))
        if path.is_dir():
            videos = _folder(path)
        elif path.suffix.lower() == ".json":
            videos = _something_something(path, below)
        elif path.suffix.lower() in (".txt", ".csv", ".tsv", ".list"):
            videos = _list(path, below)
        else:
            videos = iter([Source(str(path))])
        for video in videos:
            found.setdefault((video.path, video.segment), video._replace(weight=weight))
    return list(found.values())


def _walk(root: Path) -> Iterator[str]:
    """Every visible video file under a folder, sorted; links are followed, each folder once. What
    belongs to others below it (lost+found) is said; DataError for a folder that fails otherwise."""
    seen = set()

    def unread(e: OSError) -> None:
        if not isinstance(e, PermissionError) or e.filename == str(root):
            raise DataError(f"{e.filename}: cannot be read: {e.strerror}")
        log.warning("%s: cannot be read, passed over: %s", e.filename, e.strerror)

    for folder, folders, files in os.walk(root, onerror=unread, followlinks=True):
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


def _list(path: Path, root: Path) -> Iterator[Source]:
    entries = read_list(path, root)
    files = _stems(root) if any(e.youtube_id and not e.path for e in entries) else {}
    for entry in entries:
        if entry.path:
            yield Source(os.path.join(root, entry.path), entry.label, entry.segment)
        else:
            yield _youtube(entry, files, root)


def _stems(root: Path) -> dict[str, str]:
    """Videos below a folder, by name without suffix."""
    return {os.path.splitext(os.path.basename(p))[0]: p for p in _walk(root)}


def _youtube(entry: Entry, files: dict[str, str], root: Path) -> Source:
    """Of the CSV of Kinetics: a file `<id>_<start>_<end>`, as its tools name it, or `<id>`."""
    name, segment = entry.youtube_id, entry.segment
    if segment:
        cut = files.get(f"{name}_{int(segment[0]):06d}_{int(segment[1]):06d}")
        if cut:
            return Source(cut, entry.label)
    return Source(files.get(name, os.path.join(root, f"{name}.mp4")), entry.label, segment)


def _something_something(path: Path, root: Path) -> Iterator[Source]:
    """A list of objects with `id` and, but for the test set, `template` or `label`."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: not a readable list: {' '.join(str(e).split())}") from e
    kind = "a Something-Something list of id and label"
    if not isinstance(entries, list):
        raise DataError(f"{path}: not {kind}: {shown(entries)}")
    files = _stems(root)
    for number, entry in enumerate(entries, 1):
        name = entry.get("id") if isinstance(entry, dict) else None
        label = (entry.get("template") or entry.get("label")) if name else None
        if (
            not isinstance(name, str | int)
            or not isinstance(label, str | None)
            or "\0" in str(name)
        ):
            raise DataError(f"{path}: not {kind}: entry {number} is {shown(entry)}")
        label = re.sub(r"[\[\]]", "", label) if label else None
        yield Source(files.get(str(name), os.path.join(root, f"{name}.webm")), label)
