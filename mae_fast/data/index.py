"""An index: one row for each video, with what it holds or the reason why it cannot be used.

build_index makes it from folders, lists and dataset files (see sources.py), read_index reads it.
"""

import base64
import contextlib
import dataclasses
import io
import json
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_fast.data.decode import check_decoder
from mae_fast.data.helpers import answers
from mae_fast.data.packed import INDEX, fetch, folder_of, here, is_pack, sound_index
from mae_fast.data.remote import is_remote
from mae_fast.data.sources import Source, find_videos
from mae_fast.data.timeline import Access
from mae_fast.environment import usable_cores
from mae_fast.errors import ConfigError, DataError
from mae_fast.fields import check_fields, require, shown
from mae_fast.files import check_output, write, writing

_MOST = 2**31 - 1  # frames, pixels, frames a second: beyond it numbers overflow
_MANY_PACKETS = 10**7
_FORMATS = (".jsonl", ".parquet")
_COUNTS = ("start", "frames", "fps", "duration", "width", "height", "bytes", "total", "gop")


@dataclass(frozen=True)
class VideoRow:
    """One video of an index: `frames` usable frames from frame `start` on, at `fps` on average.
    Raises ConfigError with the column and the value for what no video has.

    duration in seconds, width and height in pixels as displayed, mtime in seconds. Upright is: the
    picture flipped left to right if mirrored, then turned by rotation degrees counterclockwise.
    total, ordered, seekable, hidden: the Access of the whole file (total 0: an index of before).
    gop: most frames from one keyframe to the next. damaged: frames that FFmpeg flags, or that lean
    on such; -1: not all were decoded. `error`: why a file is unusable, or None.

    weight: how often it is drawn beside the others.

    A video in a pack (packed.py) has the path PACK/SHARD/NAME: `bytes` of the shard from `at` on
    (-1: a file of its own), of CRC-32 crc, `packets` records of the table from `first` on, and in
    setup (base64) what its decoder is told; `source` was its file.
    """

    path: str
    label: str | None = None
    start: int = 0
    frames: int = 0
    fps: float = 0.0
    duration: float = 0.0
    width: int = 0
    height: int = 0
    codec: str = ""
    pix_fmt: str = ""
    rotation: int = 0
    bytes: int = 0
    mtime: float = 0.0
    error: str | None = None
    mirrored: bool = False
    total: int = 0
    ordered: bool = True
    seekable: bool = True
    hidden: str = ""
    gop: int = 0
    damaged: int = -1
    at: int = -1
    first: int = 0
    packets: int = 0
    crc: int = 0
    setup: str = ""
    source: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.path != "", "path must name a file", self.path)
        for name in _COUNTS:
            value, most = getattr(self, name), 2**63 - 1 if name == "bytes" else _MOST
            if not 0 <= value <= most:
                raise ConfigError(f"{name} must be in [0, {most}], got {shown(value)}")
        require(0 < self.weight <= _MOST, "weight must be a number above 0", self.weight)
        require(self.rotation % 90 == 0, "rotation must be in quarters of a turn", self.rotation)
        require(-1 <= self.damaged <= _MOST, "damaged must be -1 or a count", self.damaged)
        for name in ("first", "packets", "crc"):
            require(
                0 <= getattr(self, name) < 2**40, f"{name} is out of range", getattr(self, name)
            )
        require(-1 <= self.at < 2**62, "at must be -1 or a byte of a shard", self.at)
        require(_is_base64(self.setup), "setup must be base64", self.setup)
        end = self.start + self.frames
        if self.total and end > self.total:
            raise ConfigError(f"start and frames end at {end}, after a total of {self.total}")
        require(_few(self.hidden), "hidden must be ranges of packets as 0-3,17", self.hidden)

    @property
    def access(self) -> Access | None:
        """How the file's frames are found; None in an index that did not look."""
        if not self.total:
            return None
        return Access(self.total, self.ordered, self.seekable, self.hidden, self.damaged == 0)


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return True


def _few(hidden: str) -> bool:
    """Whether a text is ranges of packets, and no more of them than a video can have."""
    if not hidden:
        return True
    ends = [part.split("-") for part in hidden.split(",")]
    if not all(len(e) <= 2 and all(x.isdecimal() and len(x) < 10 for x in e) for e in ends):
        return False
    lengths = [int(e[-1]) - int(e[0]) for e in ends]
    return min(lengths) >= 0 and sum(lengths) <= _MANY_PACKETS


_COLUMNS = [f.name for f in dataclasses.fields(VideoRow)]


@dataclass(frozen=True)
class IndexSummary:
    """What build_index found: usable videos and their hours, broken ones counted by the kind of
    reason, how many rows were taken over from an earlier run, and the number of labels."""

    path: str
    videos: int
    hours: float
    broken: dict[str, int]
    reused: int
    labels: int = 0

    def __str__(self) -> str:
        text = f"{self.path}: {self.videos} videos, {self.hours:.2f} hours"
        if self.labels:
            text += f", {self.labels} labels"
        if self.broken:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.broken.items())
            text += f"; {sum(self.broken.values())} broken ({kinds})"
        return text + (f"; {self.reused} unchanged" if self.reused else "")


def build_index(
    sources: Iterable[str | Path],
    out: str | Path,
    *,
    workers: int | None = None,
    timeout: float = 300.0,
    progress: bool = True,
    verify: bool = False,
    root: str | Path | None = None,
    weights: Sequence[float] = (),
) -> IndexSummary:
    """Probe every video of `sources` in parallel processes and write `out` (.jsonl or .parquet).

    Relative paths in lists begin at `root`, by default at each list's own folder. weights: of each
    source, how often one of its videos is drawn beside those of others (default: as often).

    Rows are kept in `<out>.partial` as they come: a second call goes on from there, and takes over
    the good rows of `out` whose file has the same size and time. A file that takes longer than
    `timeout` seconds (a large one has more), or kills its process, becomes a row with an error.
    verify decodes all of every video, and counts its damaged frames. Raises DataError, ConfigError
    where `out` is one of the sources, and WriteError where it cannot be written.
    """
    require(not isinstance(sources, str), "sources must be a list of paths", sources)
    check_decoder("pyav")
    sources, out = list(sources), Path(out)
    _check_format(out)
    check_output(out, *sources)
    found = find_videos(sources, root, weights)
    if not found:
        raise DataError(f"no videos in {', '.join(map(str, sources))}")
    partial = out.with_name(out.name + ".partial")
    # Rows of whole files that say all that is known of one today.
    known = {
        r.path: r
        for r in [*_earlier(out), *_earlier(partial)]
        if not r.error and r.frames == r.total and (r.damaged >= 0 or not verify)
    }
    rows: dict[Source, VideoRow] = {}
    todo = []
    for source in found:
        row = known.get(source.path) if source.segment is None else None
        if row and (row.bytes, row.mtime) == file_stat(source.path):
            rows[source] = dataclasses.replace(row, label=source.label, weight=source.weight)
        else:
            todo.append(source)
    reused = len(rows)
    with writing(partial):
        out.parent.mkdir(parents=True, exist_ok=True)
        end_last_line(partial)
        log = open(partial, "ab", buffering=0)  # nothing is left to be written at its end
    with log, progress_bar("indexing", len(found), reused, progress) as advance:
        for source, row in _probe_all(todo, workers or usable_cores(), timeout, verify):
            rows[source] = row
            with writing(partial):
                log.write(json.dumps(dataclasses.asdict(row)).encode() + b"\n")
            advance()
    ordered = [rows[source] for source in found]
    write_index(ordered, out)
    partial.unlink(missing_ok=True)  # the same command may have ended beside this one
    good = [r for r in ordered if not r.error]
    broken = Counter(r.error.split(":")[0] for r in ordered if r.error)
    hours = sum(r.duration for r in good) / 3600
    labels = len({r.label for r in good} - {None})
    return IndexSummary(str(out), len(good), hours, dict(broken.most_common()), reused, labels)


def read_index(path: str | Path, broken: bool = False, checked: bool = True) -> list[VideoRow]:
    """The usable videos of an index or of a pack, in its order; with broken=True every row.

    Relative paths in it are taken from its own folder. A URL is a pack's. checked: a pack's shards
    must be there, and as long as they were. Raises DataError: missing file, wrong columns, no
    usable video.
    """
    if is_remote(path):
        folder = path.rstrip("/").removesuffix("/" + INDEX)
        fetch(folder)
        path = sound_index(folder) if checked else here(folder) / INDEX
    else:
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        if checked and is_pack(folder) and (path.is_dir() or path.name == INDEX):
            path = sound_index(folder)
        folder = folder.absolute()
    if not os.path.isfile(path):
        folder = str(path) if path.is_dir() else "FOLDER"
        made = str(path) if path.suffix in _FORMATS else "index.jsonl"
        how = shlex.join(["mae-fast", "index", folder, "-o", made])
        raise DataError(f"{path}: no such index; make one with `{how}`")
    records = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    rows = [_checked(path, number, record, folder) for number, record in records]
    good = [r for r in rows if not r.error]
    if not good:
        raise DataError(f"{path}: no usable videos among {len(rows)} rows")
    for url in {folder_of(r.path) for r in good if is_remote(r.path)} - {folder}:
        fetch(url)
    return rows if broken else good


def read_source(source: str | Path) -> list[VideoRow]:
    """The usable videos of a folder of them, which is indexed now, of an index or of a pack."""
    if is_pack(source) or Path(source).suffix in _FORMATS:
        return read_index(source)
    with tempfile.TemporaryDirectory() as scratch:
        build_index([source], Path(scratch) / "index.jsonl", progress=False)
        return read_index(Path(scratch) / "index.jsonl")


def _checked(path: Path, number: int, record: dict, folder: str | Path) -> VideoRow:
    """The row of a record. DataError that names the file, the row, the column and the value."""
    unknown = set(record) - set(_COLUMNS)
    if "path" not in record or unknown:
        raise DataError(
            f"{path}: row {number}: not an index: columns {', '.join(map(str, record))} "
            f"(expected {', '.join(_COLUMNS)})"
        )
    try:
        row = VideoRow(**record)
        for name in () if row.error else ("frames", "fps"):
            require(getattr(row, name) > 0, f"{name} must be positive", getattr(row, name))
    except ConfigError as e:
        raise DataError(f"{path}: row {number}: {e}") from None
    if not is_remote(row.path):
        object.__setattr__(row, "path", os.path.join(folder, row.path))
    return row


def end_last_line(path: Path) -> None:
    """Complete the last line of a log that a kill cut off, so that the next starts a line."""
    with open(path, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")


def _check_format(out: Path) -> None:
    if out.suffix not in _FORMATS:
        raise DataError(f"{out}: an index is a .jsonl or .parquet file")
    if out.suffix == ".parquet":
        _pyarrow()


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise DataError(f"parquet needs pyarrow (pip install pyarrow), or use .jsonl: {e}") from e
    return pyarrow


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """(number from 1, row) of each; bytes are text that is not UTF-8."""
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            twice = [name for name, n in Counter(file.schema_arrow.names).items() if n > 1]
            if twice:
                raise DataError(f"{path}: not an index: two columns are called {twice[0]!r}")
            records = file.read().to_pylist()
    except (OSError, ValueError, OverflowError, arrow.ArrowException) as e:
        raise DataError(f"{path}: not a readable index: {' '.join(str(e).split())}") from e
    for number, record in enumerate(records, 1):
        texts = {k: _text(v) for k, v in record.items() if isinstance(v, bytes)}
        yield number, {**record, **texts}


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(number of its line, row) of each."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise DataError(f"{path}: not a readable index: {e}") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}: not a readable index: row {number}: {e}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}: row {number} is not a row, but {shown(record)}")
        yield number, record


def _once(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(name for name, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"two columns are called {twice!r}")
    return record


def _earlier(path: Path) -> list[VideoRow]:
    """Rows of an earlier run, as far as they can be read."""
    if path.suffix != ".partial":
        with contextlib.suppress(DataError):
            return read_index(path)
        return []
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            # The last line may be cut off: the run before this one was killed.
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                rows.append(VideoRow(**json.loads(line)))
    return rows


def write_index(rows: list[VideoRow], out: str | Path) -> None:
    """Write all rows at once or not at all; paths under the index's folder become relative. Raises
    WriteError."""
    out = Path(out)
    folder = out.absolute().parent
    records = []
    for row in rows:
        record = dataclasses.asdict(row)
        if Path(row.path).is_relative_to(folder):
            record["path"] = str(Path(row.path).relative_to(folder))
        records.append(record)
    if out.suffix == ".parquet":
        write(out, _parquet(records))
    else:
        write(out, "".join(json.dumps(r) + "\n" for r in records))


def _parquet(records: list[dict]) -> bytes:
    """A column of text in which some is not UTF-8, as names of files may be, is one of bytes."""
    arrow = _pyarrow()
    kinds = {int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_()}
    types = {f.name: kinds.get(f.type, arrow.string()) for f in dataclasses.fields(VideoRow)}
    for name in [name for name, kind in types.items() if kind == arrow.string()]:
        texts = [r[name] and r[name].encode("utf-8", "surrogateescape") for r in records]
        if any(text and _text(text) != text.decode("utf-8", "replace") for text in texts):
            types[name] = arrow.binary()
            records = [{**r, name: text} for r, text in zip(records, texts, strict=True)]
    buffer = io.BytesIO()
    table = arrow.Table.from_pylist(records, schema=arrow.schema(types.items()))
    arrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def file_stat(path: str) -> tuple[int, float]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0.0
    return status.st_size, status.st_mtime


@contextlib.contextmanager
def progress_bar(title: str, total: int, done: int, show: bool = True):
    """A progress bar; gives a function that moves it on by one video, and may say more."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.description}"), disable=not show)
    with bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda more="": bar.update(task, advance=1, description=more)


def _probe_all(todo: list[Source], workers: int, timeout: float, verify: bool):
    """Yield (source, row) as they are done, from at most `workers` processes."""
    # Its size and time before it is read: one that grows meanwhile is another the next time.
    tasks = (((s, *file_stat(s.path)), (s.path, s.segment, verify)) for s in todo)
    make = "mae_fast.data.index:_probe"
    count = max(1, min(workers, len(todo)))
    for (source, size, mtime), facts in answers(tasks, make, count, timeout):
        facts |= {"bytes": size, "mtime": mtime, "weight": source.weight}
        yield source, VideoRow(source.path, source.label, **facts)


def _probe(path: str, segment: tuple[float, float] | None, verify: bool) -> dict:
    from mae_fast.data.container import BadVideo
    from mae_fast.data.decode import probe

    facts = probe(path, segment, verify)
    try:
        VideoRow(path, **facts)
    except ConfigError as e:
        raise BadVideo(path, f"damaged header: {e}") from None
    return facts
