"""An index: one row for each video, with what it holds or the reason why it cannot be used.

build_index makes it from folders, lists and dataset files (see sources.py), read_index reads it.
"""

import contextlib
import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from mae_fast.data.sources import Source, find_videos
from mae_fast.data.timeline import Access
from mae_fast.errors import DataError


@dataclass(frozen=True)
class VideoRow:
    """One video of an index: `frames` usable frames from frame `start` on, at `fps` on average.

    duration in seconds, width and height in pixels as displayed, mtime in seconds. Upright is: the
    picture flipped left to right if mirrored, then turned by rotation degrees counterclockwise.
    total, ordered, seekable, hidden: the Access of the whole file (total 0: an index of before).
    gop: most frames from one keyframe to the next. damaged: frames that FFmpeg flags, or that lean
    on such; -1: not all were decoded. `error`: why a file is unusable, or None.
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

    @property
    def access(self) -> Access | None:
        """How the file's frames are found; None in an index that did not look."""
        if not self.total:
            return None
        return Access(self.total, self.ordered, self.seekable, self.hidden, self.damaged == 0)


_COLUMNS = [f.name for f in dataclasses.fields(VideoRow)]


@dataclass(frozen=True)
class IndexSummary:
    """What build_index found: usable videos and their hours, broken ones counted by the kind of
    reason, and how many rows were taken over from an earlier run."""

    path: str
    videos: int
    hours: float
    broken: dict[str, int]
    reused: int

    def __str__(self) -> str:
        text = f"{self.path}: {self.videos} videos, {self.hours:.2f} hours"
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
) -> IndexSummary:
    """Probe every video of `sources` in parallel processes and write `out` (.jsonl or .parquet).

    Rows are kept in `<out>.partial` as they come: a second call goes on from there, and takes over
    the good rows of `out` whose file has the same size and time. A file that takes longer than
    `timeout` seconds, or kills its process, becomes a row with an error. verify decodes all of
    every video, and counts its damaged frames. Raises DataError.
    """
    out = Path(out)
    _check_format(out)
    found = find_videos(sources)
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
        if row and (row.bytes, row.mtime) == _stat(source.path):
            rows[source] = dataclasses.replace(row, label=source.label)
        else:
            todo.append(source)
    reused = len(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    end_last_line(partial)
    with open(partial, "a") as log, _bar(len(found), reused, progress) as advance:
        for source, row in _probe_all(todo, workers or os.cpu_count() or 1, timeout, verify):
            rows[source] = row
            log.write(json.dumps(dataclasses.asdict(row)) + "\n")
            log.flush()
            advance()
    ordered = [rows[source] for source in found]
    write_index(ordered, out)
    partial.unlink()
    good = [r for r in ordered if not r.error]
    broken = Counter(r.error.split(":")[0] for r in ordered if r.error)
    hours = sum(r.duration for r in good) / 3600
    return IndexSummary(str(out), len(good), hours, dict(broken.most_common()), reused)


def read_index(path: str | Path, broken: bool = False) -> list[VideoRow]:
    """The usable videos of an index, in its order; with broken=True every row.

    Relative paths in it are taken from its own folder. Raises DataError: missing file, wrong
    columns, no usable video.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such index; make one with `mae-fast index FOLDER -o {path}`")
    try:
        records = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
        for record in records:
            if "path" not in record or set(record) - set(_COLUMNS):
                raise DataError(
                    f"{path}: not an index: columns {', '.join(map(str, record))} "
                    f"(expected {', '.join(_COLUMNS)})"
                )
        folder = path.absolute().parent
        rows = [VideoRow(**{**r, "path": os.path.join(folder, r["path"])}) for r in records]
    except (OSError, ValueError, TypeError) as e:
        raise DataError(f"{path}: not a readable index: {e}") from e
    good = [r for r in rows if not r.error and r.frames > 0 and r.fps > 0]
    if not good:
        raise DataError(f"{path}: no usable videos among {len(rows)} rows")
    return rows if broken else good


def end_last_line(path: Path) -> None:
    """Complete the last line of a log that a kill cut off, so that the next starts a line."""
    with open(path, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")


def _check_format(out: Path) -> None:
    if out.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{out}: an index is a .jsonl or .parquet file")
    if out.suffix == ".parquet":
        _pyarrow()


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise DataError(f"parquet needs pyarrow (pip install pyarrow), or use .jsonl: {e}") from e
    return pyarrow


def _read_parquet(path: Path) -> list[dict]:
    return _pyarrow().parquet.read_table(path).to_pylist()


def _read_jsonl(path: Path) -> list[dict]:
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not a row")
            records.append(record)
    return records


def _earlier(path: Path) -> list[VideoRow]:
    """Rows of an earlier run, as far as they can be read."""
    if path.suffix != ".partial":
        with contextlib.suppress(DataError):
            return read_index(path)
        return []
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            # The last line may be cut off: the run before this one was killed.
            with contextlib.suppress(ValueError, TypeError):
                rows.append(VideoRow(**json.loads(line)))
    return rows


def write_index(rows: list[VideoRow], out: Path) -> None:
    """Write all rows at once or not at all; paths under the index's folder become relative."""
    folder = out.absolute().parent
    records = []
    for row in rows:
        record = dataclasses.asdict(row)
        if Path(row.path).is_relative_to(folder):
            record["path"] = str(Path(row.path).relative_to(folder))
        records.append(record)
    temporary = out.with_name(out.name + ".tmp")
    if out.suffix == ".parquet":
        arrow = _pyarrow()
        kinds = {int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_()}
        schema = arrow.schema(
            (f.name, kinds.get(f.type, arrow.string())) for f in dataclasses.fields(VideoRow)
        )
        arrow.parquet.write_table(arrow.Table.from_pylist(records, schema=schema), temporary)
    else:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records))
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, out)


def _stat(path: str) -> tuple[int, float]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0.0
    return status.st_size, status.st_mtime


@contextlib.contextmanager
def _bar(total: int, done: int, show: bool):
    """A progress bar; gives a function that moves it on by one video."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        "indexing", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not show
    )
    with bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda: bar.advance(task)


def _probe_all(todo: list[Source], workers: int, timeout: float, verify: bool):
    """Yield (source, row) as they are done, from at most `workers` processes."""
    workers = max(1, min(workers, len(todo)))
    idle: queue.SimpleQueue[_Prober] = queue.SimpleQueue()
    probers = [_Prober(timeout) for _ in range(workers)]
    for prober in probers:
        idle.put(prober)

    def one(source: Source) -> tuple[Source, VideoRow]:
        prober = idle.get()
        try:
            return source, _row(source, prober.ask(source.path, source.segment, verify))
        finally:
            idle.put(prober)

    pool = ThreadPoolExecutor(workers)
    try:
        # Few at a time: a long list costs no memory, and Ctrl-C has little left to cancel.
        waiting, pending = iter(todo), set()
        while True:
            while len(pending) < 4 * workers and (source := next(waiting, None)):
                pending.add(pool.submit(one, source))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for future in pending:
            future.cancel()
        for prober in probers:
            prober.stop()
        pool.shutdown()


def _row(source: Source, facts: dict) -> VideoRow:
    size, mtime = _stat(source.path)
    return VideoRow(path=source.path, label=source.label, bytes=size, mtime=mtime, **facts)


class _Prober:
    """A process that probes one file after another; replaced when it dies or takes too long."""

    def __init__(self, timeout: float):
        self.timeout, self.process, self.stopped = timeout, None, False

    def ask(self, path: str, segment: tuple[float, float] | None, verify: bool) -> dict:
        """The facts of a file or of a segment of it, or {"error": reason}."""
        if self.stopped:
            return {"error": "stopped"}
        if not os.path.exists(path):
            return {"error": "missing: no such file"}
        if self.process is None:
            self.process = self._start()
        try:
            self.process.stdin.write(json.dumps([path, segment, verify]) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], self.timeout)
            line = self.process.stdout.readline() if ready else ""
        except (OSError, ValueError):
            ready, line = True, ""
        if line:
            return json.loads(line)
        code = self._end()
        if not ready:
            return {"error": f"timeout: not probed within {self.timeout:g} s"}
        return {"error": f"crash: the decoder died with exit status {code}"}

    def stop(self) -> None:
        self.stopped = True
        self._end()

    def _start(self) -> subprocess.Popen:
        # Not multiprocessing: that would import the caller's script again in each process.
        process = subprocess.Popen(
            [sys.executable, "-c", "from mae_fast.data.index import _answer; _answer()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if process.stdout.readline() != "ready\n":
            raise DataError(f"a probing process ends at once: exit status {process.wait()}")
        return process

    def _end(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.kill()
        code = process.wait()
        process.stdout.close()
        with contextlib.suppress(OSError):
            process.stdin.close()
        return code


def _answer() -> None:
    """The loop of a probing process: what to probe a line in, a JSON object a line out."""
    from mae_fast.data.container import BadVideo
    from mae_fast.data.decode import probe

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            facts = probe(*json.loads(line))
        except BadVideo as e:
            facts = {"error": e.reason}
        except Exception as e:
            facts = {"error": f"cannot be probed: {type(e).__name__}: {e}"}
        print(json.dumps(facts), flush=True)
