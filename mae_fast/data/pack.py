"""`mae-fast pack`: the videos of an index re-encoded once, so that any frame decodes by itself.

See packed.py for what a pack is, encode.py for how one video is made. Videos wait in PACK/.partial
until those of a shard are there; a shard, and what is known of its rows, appears whole or not at
all, so that a pack that was stopped goes on.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from mae_fast.data import filters
from mae_fast.data.decode import check_decoder
from mae_fast.data.encode import CODING, PRESET, SCALER, even_size
from mae_fast.data.helpers import answers
from mae_fast.data.index import VideoRow, progress_bar, read_index, write_index
from mae_fast.data.packed import HOW, INDEX, PACKET, TABLE, find_damage, how_made, is_pack
from mae_fast.data.remote import is_remote
from mae_fast.environment import usable_cores
from mae_fast.errors import ConfigError, DataError, WriteError
from mae_fast.fields import positive, require
from mae_fast.files import locked, write, writing

# Bytes a pixel at crf 23 .. 26: 0.03 seen of real footage; x264 halves it each 6 steps of crf.
_BYTES_A_PIXEL = 0.03
_LISTED = 20
_BEGUN = "how.json"


def pack(
    source: Annotated[str, tyro.conf.arg(metavar="INDEX|PACK")],
    /,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "pack",
    short_side: int = 256,
    crf: int = 26,
    gop: int = 1,
    copy: bool = False,
    shard: int = 1000,
    workers: int | None = None,
    shots: bool = False,
    min_seconds: float = 0.0,
    static: bool = False,
    black: bool = False,
    near_duplicates: bool = False,
    check: bool = False,
) -> None:
    """Re-encode the videos of an index once, for loading at many times the speed: every frame and
    timestamp is kept, upright, each frame coded by itself (H.264, yuv420p, scaled by swscale's
    bicubic). PACK then stands wherever an index does. The same command goes on where it stopped.

    A pack holds tars of mp4 files, index.jsonl, packets.npy (where each packet lies) and pack.json.

    Args:
        source: an index; with --check, a pack.
        output: the folder to write.
        short_side: pixels that the short side is brought down to (0: never).
        crf: x264's quality, 0 to 51: lower is better and larger.
        gop: frames from one keyframe to the next; above 1 is smaller, and slower to read.
        copy: keep the videos' packets as they are; only where they lie is written down. Nothing is
            scaled or turned, whatever --short-side, --crf and --gop say; what cannot be copied is
            listed.
        shard: videos a tar.
        workers: processes that encode; by default one a core.
        shots: cut videos where PySceneDetect sees another scene begin (pip install
            'mae-fast[shots]'); each shot is a row of the index, and filtered by itself.
        min_seconds: drop what is shorter.
        static: drop what shows one picture only, such as a slide.
        black: drop what is black.
        near_duplicates: drop what looks as an earlier one does, by a perceptual hash.
        check: read all of a pack, and name what has changed since it was written.
    """
    if check:
        print(check_pack(source))
        return
    require(0 <= short_side <= 16384, "--short-side must be in [0, 16384]", short_side)
    require(0 <= crf <= 51, "--crf must be in [0, 51]", crf)
    require(1 <= gop <= 600, "--gop must be in [1, 600]", gop)
    require(1 <= shard <= 10**6, "--shard must be in [1, 1000000]", shard)
    require(0 <= min_seconds <= 86400, "--min-seconds must be in [0, 86400]", min_seconds)
    positive(workers=workers)
    how = {"short_side": short_side, "crf": crf, "gop": gop, "copy": copy, "shard": shard}
    if copy:
        how = {"short_side": 0, "crf": None, "gop": None, "copy": True, "shard": shard}
    given = (min_seconds, static, black, near_duplicates, shots)
    how |= {name: value for name, value in zip(filters.OPTIONS, given, strict=True) if value}
    if shots:
        filters.check_shots()
    print(write_pack(source, output, how, workers or usable_cores()))


def check_pack(folder: str | Path) -> str:
    """One line for a sound pack. Raises DataError that names every damaged place."""
    if not is_pack(folder):
        raise DataError(f"{folder}: not a finished pack: it has no {HOW}")
    folder = folder.rstrip("/") if is_remote(folder) else Path(folder)
    rows = read_index(f"{folder}/{INDEX}", checked=False)
    how = how_made(folder)
    found = find_damage(folder, rows)
    if found:
        lines = "".join(f"\n  {line}" for line in found[:_LISTED])
        more = f"\n  and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise DataError(f"{folder}: {len(found)} damaged:{lines}{more}")
    read_index(folder)
    return f"{folder}: sound: {len(rows)} videos in {len(how['shards'])} shards"


def write_pack(source: str | Path, out: str | Path, how: dict[str, Any], workers: int) -> str:
    """Pack the videos of an index into the folder `out`; returns what there is to say of it.
    Raises DataError, ConfigError and WriteError."""
    check_decoder("pyav")
    rows = read_index(source, broken=True)
    if any(r.at >= 0 for r in rows):
        raise ConfigError(f"{source} is of a pack already")
    require(not is_remote(out), "a pack is written to a local folder, and copied then", out)
    out = Path(out)
    digest = hashlib.sha256("\n".join(map(repr, rows)).encode("utf-8", "surrogatepass"))
    how = {**how, "index": digest.hexdigest()[:16]}
    partial = out / ".partial"
    if is_pack(out):
        same = {k: how_made(out).get(k) for k in how} == how
        require(same, "the folder holds another pack: choose another --output", str(out))
        return f"{out}: done already"
    free = (partial / _BEGUN).exists() or not (out / INDEX).exists()
    require(free, f"the folder has an {INDEX} of its own: choose another --output", str(out))
    with writing(out):
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / "lock", "w")
    with lock:
        if not locked(lock):
            raise WriteError(f"{out} is being written by another `mae-fast pack`")
        _go_on(partial, how)
        work = _Work(out, partial, rows, how)
        work.ask_for_disk()
        work.encode(workers)
        said = work.finish()
    shutil.rmtree(partial)
    return said


def _go_on(partial: Path, how: dict[str, Any]) -> None:
    begun = partial / _BEGUN
    if not begun.exists():
        write(begun, json.dumps(how))
        return
    was = json.loads(begun.read_text())
    changed = [f"{k}: {was.get(k)} -> {v}" for k, v in how.items() if was.get(k) != v]
    if changed:
        raise ConfigError(
            f"{partial.parent} holds a pack begun otherwise ({'; '.join(changed)}): choose another "
            f"--output, or delete it"
        )


class _Work:
    """A pack that is being written: which rows are done, and which shards."""

    def __init__(self, out: Path, partial: Path, rows: list[VideoRow], how: dict[str, Any]):
        self.out, self.partial, self.rows, self.how = out, partial, rows, how
        self.size, self.seen = how["shard"], filters.Seen()
        self.shards = range(-(-len(rows) // self.size))

    def members(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, len(self.rows)))

    def tar(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05}.tar"

    def file(self, i: int) -> Path:
        """Of a video that waits for its shard, without suffix."""
        return self.partial / f"{i:08}"

    def complete(self, shard: int) -> bool:
        return self.tar(shard).exists() and self.facts(shard).exists()

    def facts(self, shard: int) -> Path:
        return self.partial / f"shard-{shard:05}.json"

    def ask_for_disk(self) -> None:
        """Raises WriteError where what is left to do would not fit, by a rough estimate."""
        left = [self.rows[i] for s in self.shards if not self.complete(s) for i in self.members(s)]
        if self.how["copy"]:
            need = sum(r.bytes for r in left if not r.error)
        else:
            need = _BYTES_A_PIXEL * 2 ** ((26 - self.how["crf"]) / 6)
            sizes = (even_size(r.height, r.width, self.how["short_side"]) for r in left)
            need *= sum(r.frames * h * w for r, (h, w) in zip(left, sizes, strict=True))
        free = shutil.disk_usage(self.out).free
        if need > free:
            raise WriteError(
                f"cannot write {self.out}: it would take about {need / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free"
            )

    def encode(self, workers: int) -> None:
        """Encode what is not there yet, and write each shard as soon as its videos are."""
        waiting = {s: set() for s in self.shards if not self.complete(s)}
        tasks, errors, ready = [], {}, 0
        for s in waiting:
            for i in self.members(s):
                row = self.rows[i]
                if row.error or self.file(i).with_suffix(".json").exists():
                    ready += 1
                    continue
                waiting[s].add(i)
                row = dataclasses.asdict(row)
                tasks.append((i, (row["path"], row, self.how, str(self.file(i)))))
        ready += sum(len(self.members(s)) for s in self.shards if s not in waiting)
        longest = max((self.rows[i].frames for i, _ in tasks), default=0)
        for s in self.shards:
            if s not in waiting:
                for name, code in json.loads(self.facts(s).read_text()).get("hashes", ()):
                    self.seen.duplicate(name, code)
        self.write_ready(waiting, errors)
        # A second for three frames of the longest: a process that is slower than that is stuck.
        timeout = 600 + longest / 3
        todo = answers(
            tasks, "mae_fast.data.encode:encode", max(1, min(workers, len(tasks))), timeout
        )
        size = 0
        with progress_bar("packing", len(self.rows), ready) as advance:
            for i, facts in todo:
                if "error" in facts:
                    errors[i] = facts["error"]
                else:
                    write(self.file(i).with_suffix(".json"), json.dumps(facts))
                    size += facts.get("bytes", 0)
                advance(f"{size / 1e6:,.0f} MB")
                waiting[i // self.size].discard(i)
                self.write_ready(waiting, errors)

    def write_ready(self, waiting: dict[int, set[int]], errors: dict[int, str]) -> None:
        """Write the shards whose videos are there, in order: what is a duplicate depends on it."""
        while waiting and not waiting[first := next(iter(waiting))]:
            self.write_shard(first, errors)
            del waiting[first]

    def write_shard(self, shard: int, errors: dict[int, str]) -> None:
        """The tar of a shard's videos, and their rows and packets beside; then forget its parts."""
        tar, rows, tables, psnr = self.tar(shard), [], [np.zeros(0, PACKET)], []
        hashes: list[tuple[str, str]] = []
        temporary = tar.with_name(tar.name + ".tmp")
        files = []
        with writing(tar), open(temporary, "wb") as f:
            with tarfile.open(fileobj=f, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for i in self.members(shard):
                    row = self.rows[i]
                    if row.error or i in errors:
                        error = row.error or errors[i]
                        rows.append(dataclasses.asdict(dataclasses.replace(row, error=error)))
                        continue
                    facts = json.loads(self.file(i).with_suffix(".json").read_text())
                    kept, dropped = self.sort(row, facts.pop("pieces", None), hashes)
                    rows += map(dataclasses.asdict, dropped)
                    if not kept:
                        continue
                    name = f"{i:08}-{_clean(row.path)}.mp4"
                    info = tarfile.TarInfo(name)
                    info.size, info.mode = facts["bytes"], 0o644
                    at = archive.offset + tarfile.BLOCKSIZE
                    with open(self.file(i).with_suffix(".mp4"), "rb") as video:
                        archive.addfile(info, video)
                    table = np.load(self.file(i).with_suffix(".npy"))
                    table["at"] += at
                    psnr += [facts.pop("psnr")] * len(kept)
                    where = {"path": f"{tar.name}/{name}", "at": at, "source": row.path}
                    where |= {"mtime": 0.0, "first": sum(map(len, tables))}
                    # The file begins at the row's first frame, unless it was copied whole.
                    begins = facts["start"] - row.start
                    for each in kept:
                        own = {"start": each.start + begins}
                        rows.append({**dataclasses.asdict(each), **facts, **where, **own})
                    tables.append(table)
                    files.append(i)
            f.flush()
            os.fsync(f.fileno())
            np.save(self.facts(shard).with_suffix(".npy"), np.concatenate(tables))
        write(self.facts(shard), json.dumps({"rows": rows, "psnr": psnr, "hashes": hashes}))
        with writing(tar):
            os.replace(temporary, tar)
        for i in self.members(shard):
            for suffix in (".mp4", ".npy", ".json"):
                self.file(i).with_suffix(suffix).unlink(missing_ok=True)

    def sort(self, row: VideoRow, pieces: list[dict] | None, hashes: list) -> tuple[list, list]:
        """(what is kept of a video, what is dropped), each with its frames; all where nothing was
        filtered. hashes: those of the shard's kept ones, added to."""
        kept: list[VideoRow] = []
        dropped: list[VideoRow] = []
        for piece in pieces or [{"start": 0, "error": None}]:
            code, error = piece.pop("hash", ""), piece.pop("error")
            name = f"{row.path}, frame {row.start + piece['start']} on"
            if not error and self.how.get("near_duplicates"):
                error = self.seen.duplicate(name, code)
                hashes += [] if error else [(name, code)]
            piece["start"] += row.start
            if not self.how.get("shots"):
                piece = {}
            (dropped if error else kept).append(dataclasses.replace(row, **piece, error=error))
        return kept, dropped

    def finish(self) -> str:
        """Join what is known of all shards; pack.json comes last."""
        rows, psnr, first = [], [], 0
        tables = []
        for s in self.shards:
            facts = json.loads(self.facts(s).read_text())
            for record in facts["rows"]:
                row = VideoRow(**record)
                if not row.error:
                    path = str(self.out.absolute() / row.path)
                    row = dataclasses.replace(row, path=path, first=row.first + first)
                rows.append(row)
            psnr += facts["psnr"]
            tables.append(np.load(self.facts(s).with_suffix(".npy"), mmap_mode="r"))
            first += len(tables[-1])
        good = [r for r in rows if not r.error]
        if not good:
            for s in self.shards:
                self.tar(s).unlink()
            shutil.rmtree(self.partial)
            raise DataError(f"{self.out}: no video could be packed{_broken(rows)}")
        with writing(self.out / TABLE):
            joined = np.lib.format.open_memmap(
                self.out / (TABLE + ".tmp"), mode="w+", dtype=PACKET, shape=(first,)
            )
            at = 0
            for table in tables:
                joined[at : at + len(table)] = table
                at += len(table)
            joined.flush()
            os.replace(self.out / (TABLE + ".tmp"), self.out / TABLE)
        write_index(rows, self.out / INDEX)
        self.describe(good, psnr)
        return self.say(rows, good, psnr)

    def describe(self, good: list[VideoRow], psnr: list[float | None]) -> None:
        import av

        how = {
            **self.how,
            "codec": "copied" if self.how["copy"] else f"h264, x264 {PRESET} {CODING}, yuv420p",
            "scaler": None if self.how["copy"] else SCALER,
            "psnr": float(np.mean(psnr)) if psnr and None not in psnr else None,
            "videos": len(good),
            "ffmpeg": ".".join(map(str, av.library_versions["libavcodec"])),
            "index_crc": zlib.crc32((self.out / INDEX).read_bytes()),
            "table_bytes": (self.out / TABLE).stat().st_size,
            "table_crc": zlib.crc32((self.out / TABLE).read_bytes()),
            "shards": {self.tar(s).name: self.tar(s).stat().st_size for s in self.shards},
        }
        write(self.out / HOW, json.dumps(how, indent=1))

    def say(self, rows: list[VideoRow], good: list[VideoRow], psnr: list[float | None]) -> str:
        size = sum({r.path: r.bytes for r in good}.values())
        was = sum(r.bytes for r in self.rows if not r.error)
        hours = sum(r.duration for r in good) / 3600
        unit = "shots" if self.how.get("shots") else "videos"
        said = (
            f"{self.out}: {len(good)} {unit}, {hours:.2f} hours, {size / 1e6:,.1f} MB "
            f"({size / max(was, 1):.2f}x of the sources) in {len(self.shards)} shards"
        )
        if psnr and None not in psnr:
            worst = int(np.argmin(psnr))
            said += (
                f"; PSNR of three frames of each against the scaled source {np.mean(psnr):.1f} dB, "
                f"the lowest {psnr[worst]:.1f} ({os.path.basename(good[worst].source)})"
            )
        damaged = sum(r.damaged > 0 for r in good)
        if damaged:
            said += f"; {damaged} with damaged frames, which are refused when drawn (data.strict)"
        return said + _broken(rows)


def _broken(rows: list[VideoRow]) -> str:
    """What is not in the pack: broken, and dropped by a filter; counted, then listed."""
    out = [r for r in rows if r.error]
    kinds = [r.error.split(":")[0] for r in out]
    said = ""
    for word, found in (
        ("broken", [k for k in kinds if k not in filters.KINDS]),
        ("dropped", [k for k in kinds if k in filters.KINDS]),
    ):
        if found:
            counted = (f"{n} {kind}" for kind, n in Counter(found).most_common())
            said += f"; {len(found)} {word} ({', '.join(counted)})"
    for r in out[:_LISTED]:
        where = f", frame {r.start} on" if r.start else ""
        said += f"\n  {r.path}{where}: {r.error}"
    more = f"\n  and {len(out) - _LISTED} more, in {INDEX}" if len(out) > _LISTED else ""
    return said + more


def _clean(path: str) -> str:
    """A video's name without what a tar or webdataset would take otherwise: they cut at dots."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60] or "video"
