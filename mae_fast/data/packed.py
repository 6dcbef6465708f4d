"""A pack read: the packets of the frames that are asked for, by their places, and nothing else.

A pack is a folder: tars of mp4 files (shard-00000.tar, ...), an index whose rows say where each mp4
lies (index.jsonl), one record a packet (packets.npy, memory-mapped), and how it was made
(pack.json). pack.py writes it.
"""

import json
import os
import zlib
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mae_fast.data import planes, remote
from mae_fast.data.container import BadVideo
from mae_fast.data.frames import HARMLESS
from mae_fast.data.planes import Pictures
from mae_fast.data.remote import is_remote
from mae_fast.errors import ConfigError, DataError
from mae_fast.files import write

INDEX, TABLE, HOW = "index.jsonl", "packets.npy", "pack.json"
# Of each packet, in order of decoding: the byte of its shard, its time in the source's units or in
# the mp4's, its bytes (0: a frame that did not decode), their CRC-32, and what is known of it.
PACKET = np.dtype(
    [("at", "<i8"), ("pts", "<i8"), ("size", "<u4"), ("crc", "<u4"), ("flags", "<u4")]
)
# Decoding can begin there; an edit list leaves it out; no other leans on it; its frame was damaged.
KEY, HIDDEN, LEAF, DAMAGED = 1, 2, 4, 8
_SHARDS, _DECODERS = 64, 16  # open at one time


def is_pack(path) -> bool:
    """Of a URL, which can be of nothing else, it is not asked whether anything is there."""
    return is_remote(path) or os.path.isfile(os.path.join(path, HOW))


def here(folder: str | Path) -> Path:
    """Where pack.json, index and table of a pack lie: of one at a URL, what `fetch` keeps."""
    return remote.kept(folder) if is_remote(folder) else Path(folder)


def fetch(url: str) -> None:
    """Keep pack.json, the index and the table of a pack at a URL, unless they are kept as they are
    there. Raises DataError and WriteError."""
    try:
        with remote.keeping(url) as folder:
            text = remote.tried(lambda: remote.read(f"{url}/{HOW}"))
            how = _parsed(f"{url}/{HOW}", text)
            # A server that knows no parts would send a whole shard for each clip. Of JSON it may
            # know none: many compress that on the way.
            shard = next(iter(how["shards"]), HOW)
            remote.tried(lambda: remote.read(f"{url}/{shard}", 0, 1))
            if _is_kept(folder, text, how):
                return
            (folder / HOW).unlink(missing_ok=True)
            write(folder / INDEX, remote.tried(lambda: remote.read(f"{url}/{INDEX}")))
            remote.download(f"{url}/{TABLE}", folder / TABLE, how["table_bytes"])
            for name, key in ((INDEX, "index_crc"), (TABLE, "table_crc")):
                if zlib.crc32((folder / name).read_bytes()) != how[key]:
                    raise DataError(f"{url}/{name} is not what this pack was written with")
            write(folder / HOW, text)  # last: what is kept is whole
    except FileNotFoundError as e:
        raise DataError(f"{e.filename}: missing from the pack, or no pack is there") from None
    except OSError as e:
        raise DataError(f"{e.filename}: cannot be read: {e.strerror}") from None


def _is_kept(folder: Path, text: bytes, how: dict[str, Any]) -> bool:
    try:
        return (
            (folder / HOW).read_bytes() == text
            and zlib.crc32((folder / INDEX).read_bytes()) == how["index_crc"]
            and (folder / TABLE).stat().st_size == how["table_bytes"]
        )
    except FileNotFoundError:
        return False


def fetch_video(path: str) -> str:
    """Keep one video of a pack at a URL; returns its file here. Raises BadVideo."""
    folder, name = folder_of(path), path.removeprefix(folder_of(path) + "/")
    try:
        with open(here(folder) / INDEX) as f:
            row = next((r for r in map(json.loads, f) if r["path"] == name), None)
        if row is None:
            raise BadVideo(path, "missing: no such video in the pack")
        file = here(folder) / f"{row['crc']:08x}-{os.path.basename(name)}"
        if not file.is_file():
            span = row["at"], row["at"] + row["bytes"]
            data = remote.tried(lambda: remote.read(os.path.dirname(path), *span))
            if zlib.crc32(data) != row["crc"]:
                raise BadVideo(path, f"damaged: bytes {span[0]} to {span[1]} have changed", False)
            write(file, data)
    except OSError as e:
        raise BadVideo(path, f"cannot be read: {e.strerror}", lasting=False) from None
    return str(file)


def how_made(folder: str | Path) -> dict[str, Any]:
    """What pack.json says. Raises DataError."""
    path = here(folder) / HOW
    try:
        return _parsed(path, path.read_bytes())
    except OSError as e:
        raise DataError(f"{path}: not a readable description of a pack: {e!r}") from None


def _parsed(path, text: bytes) -> dict[str, Any]:
    try:
        how = json.loads(text)
        how["short_side"], how["copy"], how["index_crc"], how["shards"].items()
        how["table_bytes"], how["table_crc"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise DataError(f"{path}: not a readable description of a pack: {e!r}") from None
    return how


def sound_index(folder: str | Path) -> Path:
    """The index of a pack whose shards and table are there, and as long as they were. Raises
    DataError with the first that is not."""
    how, index = how_made(folder), here(folder) / INDEX
    wanted = {f"{folder}/{name}": size for name, size in how["shards"].items()}
    wanted[str(here(folder) / TABLE)] = how["table_bytes"]
    with ThreadPoolExecutor(16 if is_remote(folder) else 1) as pool:
        for (path, size), held in zip(wanted.items(), pool.map(_length, wanted), strict=True):
            if held is None:
                raise DataError(f"{path}: missing from the pack")
            if held not in (size, -1):
                raise DataError(f"{path}: {held} bytes, {size} when packed: cut off?")
    if not index.is_file():
        raise DataError(f"{index}: missing from the pack")
    if zlib.crc32(index.read_bytes()) != how["index_crc"]:
        raise DataError(f"{index} is not the index that this pack was written with")
    return index


def _length(path: str) -> int | None:
    """Bytes of a file; None where there is none, -1 where its server does not say."""
    try:
        if not is_remote(path):
            return os.path.getsize(path) if os.path.isfile(path) else None
        held = remote.tried(lambda: remote.size(path))
        return -1 if held is None else held
    except FileNotFoundError:
        return None
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from None


def packs_of(rows: Iterable) -> dict[str, dict[str, Any]]:
    """Folder -> how it was made, of the packs that rows of an index lie in."""
    folders = sorted({folder_of(r.path) for r in rows if r.at >= 0})
    return {f: {k: v for k, v in how_made(f).items() if k != "shards"} for f in folders}


def folder_of(path: str) -> str:
    """The pack of a packed video: PACK/shard-00000.tar/NAME.mp4."""
    return os.path.dirname(os.path.dirname(path))


def check_size(rows: Iterable, short_side: int) -> None:
    """ConfigError where frames are asked for at a larger size than they were packed at."""
    for folder, how in packs_of(rows).items():
        packed = 0 if how["copy"] else how["short_side"]
        if packed and not 0 < short_side <= packed:
            asked = short_side or "0 (the videos' own size)"
            raise ConfigError(
                f"data.short_side {asked} is more than {folder} holds, which was packed with "
                f"--short-side {packed}: lower it, or pack the videos anew"
            )


class Place(NamedTuple):
    """Where a packed video is: path as PACK/SHARD/NAME, the byte of its mp4 in the shard and its
    length, its first packet in the table and their number, what the decoder must be told first
    (base64), and how its pictures become upright."""

    path: str
    at: int
    bytes: int
    first: int
    packets: int
    codec: str
    setup: str = ""
    mirrored: bool = False
    rotation: int = 0
    pix_fmt: str = "yuv420p"


class PackReader:
    """Frames of packed videos. Tables, shards and decoders stay open from one video to the next:
    one reader a process. strict: damaged frames are refused."""

    def __init__(self, strict: bool = True):
        self.strict = strict
        self._tables: dict[str, np.ndarray] = {}
        self._shards: OrderedDict[str, int] = OrderedDict()
        self._decoders: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def read(self, place: Place, indices: Iterable[int], short_side: int = 0) -> Tensor:
        """The frames of these numbers, in any order and repeated or not, upright: uint8
        [n, H, W, 3], shrunk to short_side pixels if larger (0: never). Raises BadVideo."""
        asked = list(map(int, indices))
        return planes.in_order(self.pictures(place, sorted({*asked}), short_side, False), asked)

    def pictures(
        self, place: Place, wanted: list[int], short_side: int = 0, planar: bool = True
    ) -> Pictures:
        """The frames of these numbers, rising: as they were decoded where planes.py keeps them so;
        else, or not planar, RGB as `read` gives it. Raises BadVideo."""
        frames, turned = self.frames(place, wanted), (place.mirrored, place.rotation // 90)
        each = [(i, frame, turned) for i, frame in zip(wanted, frames, strict=True)]
        found = planes.pictures(place.path, each, len(wanted), short_side, planar)
        return found or planes.pictures(place.path, each, len(wanted), short_side, False)

    def frames(self, place: Place, wanted: list[int]) -> list[Any]:
        """PyAV's frames of these rising numbers, as they were coded. Raises BadVideo."""
        table = self._table(place)
        shown = np.flatnonzero((table["flags"] & HIDDEN) == 0)
        order = shown[np.argsort(table["pts"][shown], kind="stable")]
        if wanted[-1] >= len(order):
            raise BadVideo(place.path, f"wrong index: no frame {wanted[-1]} of {len(order)}")
        packets = order[wanted]
        for i, flags, size in zip(
            wanted, *(table[c][packets] for c in ("flags", "size")), strict=True
        ):
            if size == 0 or (flags & DAMAGED and self.strict):
                words = "does not decode" if size == 0 else "was damaged in the source"
                raise BadVideo(place.path, f"damaged: frame {i} {words}", lasting=False)
        needed, starts = _needed(table, packets)
        if place.codec == "h264" and "444" in place.pix_fmt and needed[0]:
            needed = np.insert(needed, 0, 0)  # which says the x264 build: see Frames
        numbers = {int(p): i for p, i in zip(packets, wanted, strict=True)}
        found = self._decode(place, table, needed, starts, numbers)
        missing = [i for i in wanted if i not in found]
        if missing:
            reason = f"damaged: frame {missing[0]} does not decode"
            raise BadVideo(place.path, reason, lasting=False)
        return [found[i] for i in wanted]

    def _table(self, place: Place) -> np.ndarray:
        folder = folder_of(place.path)
        if folder not in self._tables:
            path = here(folder) / TABLE
            try:
                self._tables[folder] = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as e:
                raise BadVideo(place.path, f"cannot be read: {path}: {e}") from None
        table = self._tables[folder][place.first : place.first + place.packets]
        ends = table["at"] + table["size"]
        held = table["size"] > 0
        inside = len(table) == place.packets and (table["at"][held] >= place.at).all()
        if not inside or (ends[held] > place.at + place.bytes).any():
            raise BadVideo(place.path, "wrong index: its packets are another video's")
        return table

    def _bytes(self, place: Place, begin: int, end: int) -> bytes:
        shard = os.path.dirname(place.path)
        try:
            if is_remote(shard):
                return remote.read(shard, begin, end)
            if shard not in self._shards:
                self._shards[shard] = os.open(shard, os.O_RDONLY)
                if len(self._shards) > _SHARDS:
                    os.close(self._shards.popitem(last=False)[1])
            self._shards.move_to_end(shard)
            data = os.pread(self._shards[shard], end - begin, begin)
        except FileNotFoundError:
            raise BadVideo(place.path, f"missing: no shard {shard}") from None
        except OSError as e:
            if shard in self._shards:  # opened anew the next time: it may be of a server that left
                os.close(self._shards.pop(shard))
            reason = f"cannot be read: {shard}: {e.strerror}"
            raise BadVideo(place.path, reason, lasting=False) from None
        if len(data) < end - begin:
            size = os.fstat(self._shards[shard]).st_size
            raise BadVideo(place.path, f"truncated: {shard} ends at byte {size}")
        return data

    def _decode(self, place, table, needed: np.ndarray, starts, numbers) -> dict[int, Any]:
        """Number -> frame, of the packets sent to a decoder; one read, of their span."""
        import av

        rows = table[needed]
        begin, end = int(rows["at"].min()), int((rows["at"] + rows["size"]).max())
        data = memoryview(self._bytes(place, begin, end))
        decoder = self._decoder(place)
        errors, _ = av.logging.get_last_error()
        found: dict[int, Any] = {}

        def take(frames):
            for frame in frames:
                if frame.pts in numbers and not (frame.is_corrupt and self.strict):
                    found[numbers[frame.pts]] = frame

        try:
            for k, (at, _, size, crc, _) in zip(needed.tolist(), rows.tolist(), strict=True):
                if k in starts:
                    # An open GOP's keyframe does not say that what came before is over.
                    take(decoder.decode(None))
                    decoder.flush_buffers()
                coded = data[at - begin : at - begin + size]
                if zlib.crc32(coded) != crc:
                    where = f"bytes {at} to {at + size} of {os.path.dirname(place.path)}"
                    raise BadVideo(place.path, f"damaged: {where} have changed", lasting=False)
                packet = av.Packet(bytes(coded))
                packet.pts = k
                take(decoder.decode(packet))
            take(decoder.decode(None))
        except av.error.FFmpegError as e:
            raise BadVideo(place.path, f"damaged: {e.strerror}", lasting=False) from None
        finally:
            decoder.flush_buffers()
        logged, message = av.logging.get_last_error()
        if self.strict and logged > errors and not any(m in message[2] for m in HARMLESS):
            raise BadVideo(place.path, f"damaged: {message[2].strip()}", lasting=False)
        return found

    def _decoder(self, place: Place) -> Any:
        """One for each set of parameters: told of new ones, FFmpeg's keeps the colours and the x264
        build of the file before wherever the next does not say its own."""
        key = (place.codec, place.setup)
        if key not in self._decoders:
            try:
                self._decoders[key] = open_decoder(place.codec, b64decode(place.setup))
            except ValueError as e:  # FFmpeg's too
                raise BadVideo(place.path, f"no decoder: {e}") from None
            if len(self._decoders) > _DECODERS:
                self._decoders.popitem(last=False)
        self._decoders.move_to_end(key)
        return self._decoders[key]


def open_decoder(codec: str, setup: bytes):
    import av

    # PyAV counts the errors that FFmpeg logs at any level but None; at this one it prints none.
    if av.logging.get_level() is None:
        av.logging.set_level(av.logging.PANIC)
    decoder = av.codec.CodecContext.create(codec, "r")
    decoder.thread_count = 1
    if codec == "h264":
        # Else FFmpeg guesses how far frames are out of order, and drops those it guessed wrong.
        decoder.options = {"strict": "1"}
    if setup:
        decoder.extradata = setup
    decoder.open()
    return decoder


def _needed(table: np.ndarray, packets: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """The packets to be decoded for these, rising: from the keyframe before each, without those
    that no other leans on; and those at which a run of them begins."""
    flags, pts = table["flags"], table["pts"]
    if (flags[packets] & KEY).all():
        return np.sort(packets), set()
    send = np.zeros(len(table), bool)
    keys = np.flatnonzero(flags & KEY)
    for p in packets:
        # One shown before a keyframe that it follows leans on an earlier one.
        before = keys[(keys <= p) & (pts[keys] <= pts[p])]
        send[before[-1] if len(before) else 0 : p + 1] = True
    starts = {int(k) for k in np.flatnonzero(send & ~np.roll(send, 1)) if k}
    send &= (flags & LEAF) == 0
    send[packets] = True
    return np.flatnonzero(send & (table["size"] > 0)), starts


def find_damage(folder: str | Path, rows: list) -> list[str]:
    """What is wrong with the shards of a pack: file, bytes and frame of each."""
    found = []
    table = np.load(here(folder) / TABLE, mmap_mode="r")
    for name, size in how_made(folder)["shards"].items():
        path = f"{folder}/{name}"
        held = _length(path)
        if held is None:
            found.append(f"{name}: missing")
            continue
        if held not in (size, -1):
            found.append(f"{name}: byte {min(held, size)}: {held} bytes, {size} when packed")
        with remote.opened(path) as f:
            end = 0
            for row in rows:
                if row.at < end or os.path.basename(os.path.dirname(row.path)) != name:
                    continue  # broken, another shard's, or one more shot of the video before
                found += _damage_before(f, name, end, row)
                found += _damage_of(f, name, row, table)
                end = row.at + row.bytes
    return found


def _damage_before(f, name: str, end: int, row) -> list[str]:
    """The head of a member of the tar, and what pads the one before it."""
    import tarfile

    f.seek(end)
    pad, head = f.read(row.at - 512 - end), f.read(512)
    with_sum = b""
    try:
        info = tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
        if (info.name, info.size) == (os.path.basename(row.path), row.bytes):
            with_sum = info.tobuf(tarfile.USTAR_FORMAT)
    except tarfile.HeaderError:
        pass
    if any(pad) or with_sum != head:
        return [f"{name}: bytes {end} to {row.at}: the tar's head of {os.path.basename(row.path)}"]
    return []


def _damage_of(f, name: str, row, table) -> list[str]:
    f.seek(row.at)
    data = f.read(row.bytes)
    if zlib.crc32(data) == row.crc and len(data) == row.bytes:
        return []
    found = []
    for k, (at, _, size, crc, _) in enumerate(table[row.first : row.first + row.packets].tolist()):
        if zlib.crc32(data[at - row.at : at - row.at + size]) != crc:
            where = f"bytes {at} to {at + size}"
            found.append(f"{name}: {where}: packet {k} of {os.path.basename(row.path)}")
    where = f"bytes {row.at} to {row.at + row.bytes}"
    return found or [f"{name}: {where}: {os.path.basename(row.path)}, outside of its packets"]
