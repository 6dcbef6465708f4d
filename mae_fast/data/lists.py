"""Text lists of videos: what their columns mean is decided for a file as a whole.

A line is a path and, after blanks, a tab, a comma or a semicolon, one of FORMS; `#` begins a
comment, fields may be quoted as CSV has it. A first line of column names decides. Without one,
lines that could be read in two ways are refused, never guessed: so is one unlike those before it.
"""

import csv
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mae_fast.errors import DataError
from mae_fast.fields import either, shown

_SUFFIXES = (
    "mp4 m4v mov mkv webm avi mpg mpeg ts m2ts mts flv wmv asf 3gp ogv vob mxf gif h264 h265 y4m"
)
VIDEO_SUFFIXES = frozenset("." + s for s in _SUFFIXES.split())
_END_OF_PATH = re.compile(rf"\.(?:{'|'.join(_SUFFIXES.split())})(?=$|[\s,;])", re.IGNORECASE)
_QUOTED = re.compile(r'"((?:[^"]|"")+)"(?=$|[\s,;])')
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
# What a first line may call a column, the name that counts first. Any other column is not read.
_NAMES = {
    "path": "path video_path file_path filepath video_name video filename file_name file fname",
    "youtube_id": "youtube_id",
    "label": "label label_name class_name class action category target label_id class_id",
    "frames": "frames num_frames total_frames n_frames frame_count",
    "start": "start time_start start_time start_seconds begin",
    "end": "end time_end end_time end_seconds",
}
_IN_FRAMES = ("start_frame", "end_frame", "start_idx", "end_idx")

Segment = tuple[float, float] | None
# What the columns after the path say: (label, segment), or None where they cannot.
Said = tuple[str | None, Segment] | None


class Entry(NamedTuple):
    """A line of a list: `path` as it stands there, or `youtube_id` with path ""; begin and end of
    the segment in seconds, or None."""

    path: str
    label: str | None
    segment: Segment
    youtube_id: str = ""


def read_list(path: Path, root: Path) -> list[Entry]:
    """The entries of a list. DataError with the line and its value for what cannot be read, or in
    two ways. `root`: where relative paths begin, to tell a path from a label that looks like one.
    """
    lines = list(_lines(path))
    if lines:
        where, line = lines[0]
        for delimiter in ",\t; ":
            try:
                names = [f.lower() for f in _columns(where, line, delimiter)]
            except DataError:  # quotes for another delimiter
                continue
            if {"path", "youtube_id"} & _roles(where, names).keys() and not any(
                map(_number, names)
            ):
                return [_named(*each, delimiter, names, root) for each in lines[1:]]
    return _by_form([(where, *_path(where, line, root)) for where, line in lines])


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(`file: line n`, text) of each line that is neither blank nor a comment."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: not a readable list: {e.strerror}") from e
    if b"\0" in data:
        raise DataError(f"{path}: not a list: it holds null bytes (save UTF-16 as UTF-8)")
    # File names are bytes: what is not UTF-8 names the file of the same bytes.
    text = data.decode("utf-8", "surrogateescape")
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        line = line.strip("\ufeff \t")
        if line and not line.startswith("#"):
            yield f"{path}: line {number}", line


def _columns(where: str, line: str, delimiter: str) -> list[str]:
    """The fields of a line, unquoted; blanks count once."""
    try:
        fields = next(
            csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True), []
        )
    except csv.Error as e:
        raise DataError(f"{where}: {shown(line)}: {e}") from e
    fields = [f for f in fields if f] if delimiter == " " else [f.strip() for f in fields]
    while fields and not fields[-1]:
        fields.pop()
    return fields


# With a first line of names.


def _roles(where: str, names: list[str]) -> dict[str, int]:
    """{what a column means: its number}."""
    roles = {}
    for role, spelled in _NAMES.items():
        for name in reversed(spelled.split()):
            if names.count(name) > 1:
                raise DataError(f"{where}: two columns are called {name!r}")
            if name in names:
                roles[role] = names.index(name)
    return roles


def _named(where: str, line: str, delimiter: str, names: list[str], root: Path) -> Entry:
    """A line by the names of its columns."""
    roles = _roles(where, names)
    for name in names:
        if name in _IN_FRAMES:
            raise DataError(f"{where}: a column {name!r}: give `start` and `end` in seconds")
    if ("start" in roles) != ("end" in roles):
        raise DataError(f"{where}: one of the columns start and end without the other")
    if delimiter == " " and roles.get("path") == 0:  # blanks in paths and in labels at the end
        name, _, rest = _path(where, line, root)
        fields = [name, *_columns(where, rest, " ")]
        if roles.get("label") == len(names) - 1:
            fields[len(names) - 1 :] = [" ".join(fields[len(names) - 1 :])]
    else:
        fields = _columns(where, line, delimiter)
    fields += [""] * (len(names) - len(fields))
    if len(fields) > len(names):
        raise DataError(f"{where}: {shown(line)} has {len(fields)} columns, not {len(names)}")
    found = {role: fields[column] for role, column in roles.items()}
    first = "path" if "path" in found else "youtube_id"
    if not found[first]:
        raise DataError(f"{where}: {shown(line)} has no {first}")
    segment = _bounds(found.get("start", ""), found.get("end", ""))
    if segment is None:
        said = f"{found['start']!r} to {found['end']!r}"
        raise DataError(f"{where}: a segment in seconds must rise from 0 or above, got {said}")
    label, youtube_id = found.get("label") or None, found.get("youtube_id", "")
    return Entry(found.get("path", ""), label, segment or None, youtube_id)


def _bounds(start: str, end: str) -> tuple[float, ...] | None:
    """(begin, end) in seconds, () for a whole video (`0 -1`, or nothing), None for no segment."""
    if not start and not end:
        return ()
    if not (_NUMBER.fullmatch(start) and _NUMBER.fullmatch(end)):
        return None
    low, high = float(start), float(end)
    if (low, high) == (0, -1):
        return ()
    return (low, high) if 0 <= low < high < math.inf else None


# Without.


def _path(where: str, line: str, root: Path) -> tuple[str, str, str]:
    """(path, delimiter, rest): the path in quotes, or up to a video's suffix."""
    if line.startswith('"'):
        match = _QUOTED.match(line)
        if not match:
            raise DataError(f"{where}: {shown(line)}: a quote is not closed")
        name, end = match[1].replace('""', '"'), match.end()
        if not _END_OF_PATH.search(name):
            raise DataError(f"{where} names no video: {shown(line)}")
    else:
        ends = [m.end() for m in _END_OF_PATH.finditer(line)]
        if not ends:
            raise DataError(f"{where} names no video: {shown(line)}")
        if len(ends) > 1:
            there = [end for end in ends if os.path.exists(root / line[:end])]
            if len(there) != 1:
                may = either(repr(line[:end]) for end in ends)
                raise DataError(f"{where}: {shown(line)} may name {may}: quote the path")
            ends = there
        name, end = line[: ends[0]], ends[0]
    delimiter, rest = re.fullmatch(r"\s*([,;]?)\s*(.*)", line[end:]).groups()
    return name, delimiter or ("\t" if "\t" in line[end:] else " "), rest


def _by_form(lines: list[tuple[str, str, str, str]]) -> list[Entry]:
    alive, read = set(FORMS), []
    for where, name, delimiter, rest in lines:
        fields = _columns(where, rest, delimiter)
        joined = rest if delimiter in ", " and '"' not in rest else ""
        said = dict.fromkeys(FORMS, (None, None))
        if fields:
            said = {form: found for form, say in FORMS.items() if (found := say(fields, joined))}
        if not alive & said.keys():
            form = f"not as the lines before it: `path {either(sorted(alive))}`" if said else ""
            raise DataError(
                f"{where}: after the path, {shown(rest)} is {form or f'none of {_HINT}'}"
            )
        alive &= said.keys()
        read.append((where, rest, name, said))
    undecided = [(where, rest) for where, rest, *_ in read if rest]
    if undecided and len(alive) > 1:
        where, rest = undecided[0]
        raise DataError(
            f"{where}: {shown(rest)} may be {either(f'`{form}`' for form in sorted(alive))}: add a "
            f"first line that names the columns, such as `path {min(alive)}`"
        )
    form = min(alive)
    return [Entry(name, *said[form]) for _, _, name, said in read]


def _number(*fields: str) -> bool:
    return all(_NUMBER.fullmatch(f) for f in fields)


def _label(fields: list[str], text: str) -> Said:
    if len(fields) == 1:
        return fields[0], None
    # A text of several words or with a comma, but not one that begins or ends as the others do.
    plain = text and all(fields) and not _number(fields[0]) and not _number(*fields[-2:])
    return (text, None) if plain else None


def _frames_label(fields: list[str], text: str) -> Said:
    counted = len(fields) > 1 and fields[0].isdecimal() and int(fields[0]) > 0
    if not counted or (len(fields) > 2 and _number(fields[1])) or not all(fields):
        return None
    return " ".join(fields[1:]), None


def _start_end(fields: list[str], text: str) -> Said:
    bounds = _bounds(*fields) if len(fields) == 2 else None
    return None if bounds is None else (None, bounds or None)


def _start_end_label(fields: list[str], text: str) -> Said:
    bounds = _bounds(*fields[:2]) if len(fields) > 2 and all(fields) else None
    if bounds is None or (len(fields) > 3 and _number(fields[2])):
        return None
    return " ".join(fields[2:]), bounds or None


def _label_start_end(fields: list[str], text: str) -> Said:
    bounds = _bounds(*fields[-2:]) if len(fields) > 2 and all(fields) else None
    if bounds is None or (len(fields) > 3 and _number(fields[0])):
        return None
    return " ".join(fields[:-2]), bounds or None


# What follows a path. Frames are not believed: `index` counts them. `0 -1` is a whole video.
FORMS = {
    "label": _label,
    "frames label": _frames_label,
    "start end": _start_end,
    "start end label": _start_end_label,
    "label start end": _label_start_end,
}
_HINT = either(f"`{form}`" for form in FORMS)
