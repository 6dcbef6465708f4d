"""What a video's packets say of its frames, and what about them must not be believed unseen.

A container's timestamps and counts are hints. Where they hang together, frame i is the packet with
the i-th smallest timestamp; where they do not, the file is decoded once and the frames that come
out, in their order, are its frames. What was found is an Access, kept in the index.
"""

import bisect
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

# Formats without timestamps for every frame: FFmpeg makes them up, others after a seek.
_MADE_UP = ("mpeg", "mpegvideo", "h264", "hevc", "m4v", "h263", "h261", "vc1", "avs", "cavsvideo")
# Codecs whose packets may say "nothing changed", for which no frame comes out; in bytes.
_NOT_CODED = {"mpeg4": 20, "h263": 20, "flv1": 20, "msmpeg4v3": 20}
# More gaps than this are not listed: such a file is decoded from its start.
_HIDDEN = 64


@dataclass(frozen=True)
class Access:
    """How the frames of a file are found.

    frames: what a decoder gives from start to end. ordered: in the order of their timestamps, all
    different, so that a timestamp is a number. seekable: a seek gives the same timestamps and
    pictures; else packets are counted from the start of the file. hidden: the packets, in order of
    presentation, that give no frame ("0-3,17"). whole: all was decoded, and nothing was damaged.
    """

    frames: int
    ordered: bool = True
    seekable: bool = True
    hidden: str = ""
    whole: bool = False


@dataclass
class Timeline:
    """The packets of a file in decoding order: the timestamps of all, and of those that an edit
    list does not leave out, with which are keyframes. doubts: why they cannot be believed."""

    order: list[int | None]
    pts: list[int | None]
    dts: list[int | None]
    keys: list[bool]
    doubts: list[str]

    @property
    def times(self) -> list[int]:
        """The timestamps there are, each once, in order of presentation."""
        return sorted({t for t in self.pts if t is not None})


class Scan:
    """Takes the packets of a stream one by one; timeline() says what they amount to."""

    def __init__(self, stream, container: str):
        self.codec = stream.codec_context.codec.canonical_name
        self.stream, self.container = stream, container
        self.packets = self.discarded = self.corrupt = 0
        self.hidden = False
        self._smallest = _NOT_CODED.get(self.codec, 0)
        self._order, self._pts, self._dts, self._keys = [], [], [], []

    def add(self, packet) -> None:
        self.packets += 1
        self._order.append(packet.pts)
        if packet.is_discard:
            self.discarded += 1
            return
        self._pts.append(packet.pts)
        self._dts.append(packet.dts)
        self._keys.append(packet.is_keyframe)
        self.corrupt += packet.is_corrupt
        if packet.size < self._smallest or (self.codec in ("vp8", "vp9") and _not_shown(packet)):
            self.hidden = True

    def timeline(self) -> Timeline:
        context = self.stream.codec_context
        pts, dts, keys = self._pts, self._dts, self._keys
        doubts = [
            reason
            for reason, found in (
                ("packets without a timestamp", None in pts),
                ("timestamps given twice", len(set(pts)) != len(pts)),
                ("timestamps made up by FFmpeg", self.container in _MADE_UP),
                ("no times of presentation", self.container == "avi" and context.has_b_frames),
                ("times of decoding", len(pts) > 2 and context.has_b_frames and pts == dts),
                ("frames left out by an edit list", self.discarded),
                ("packets that the container calls damaged", self.corrupt),
                ("packets that are not shown", self.hidden),
                # Interlaced: a packet may be one field of a frame.
                ("fields", int(getattr(context, "field_order", 0) or 0) > 1),
                ("a start in mid-stream", not any(keys) or not keys[0]),
                ("a keyframe out of order", None not in pts and not _in_order(pts, keys)),
            )
            if found
        ]
        return Timeline(self._order, pts, dts, keys, doubts)


def _in_order(pts: list[int], keys: list[bool]) -> bool:
    """Whether every keyframe is shown after all that was decoded before it, and the first one
    before all that follows it: leading pictures at the start do not decode."""
    latest = None
    for t, key in zip(pts, keys, strict=True):
        if key and latest is not None and t <= latest:
            return False
        latest = t if latest is None else max(t, latest)
    return not pts or min(pts) == pts[0]


def _not_shown(packet) -> bool:
    """Whether a VP8 or VP9 packet holds no frame to be shown (RFC 6386, 9.1; VP9 draft, 6.2)."""
    data = memoryview(packet)
    first, last = data[0], data[-1]
    if packet.stream.codec_context.codec.canonical_name == "vp8":
        return not first >> 4 & 1
    if last >> 5 == 0b110 or first >> 4 & 0b11 == 0b11:  # a superframe; profile 3
        return False
    return not first >> 3 & 1 and not first >> 1 & 1


def access(given: list[int | None], timeline: Timeline) -> Access:
    """What the frames that came out, by their timestamps in order of decoding, amount to."""
    times = timeline.times
    rising = None not in given and all(a < b for a, b in itertools.pairwise(given))
    if rising and set(given) <= set(times):
        hidden = write_ranges(sorted(set(range(len(times))) - _ranks(given, times)))
        if hidden.count(",") < _HIDDEN:
            return Access(len(given), hidden=hidden)
    return Access(len(given), ordered=False, seekable=False)


def _ranks(given: list[int], times: list[int]) -> set[int]:
    return {bisect.bisect_left(times, t) for t in given}


def write_ranges(numbers: Iterable[int]) -> str:
    """Rising numbers as text: 0-3,17."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def read_ranges(text: str) -> set[int]:
    """The numbers of a text such as 0-3,17."""
    ends = [part.partition("-") for part in text.split(",") if part]
    return {n for a, _, b in ends for n in range(int(a), int(b or a) + 1)}


def average_rate(frames: int, span: Fraction, unit: Fraction, stated: Iterable) -> float:
    """Frames a second, `span` seconds lying between the first and the last. A stated rate is taken
    where it gives that span to the rounding of timestamps, one `unit`; the first where no span is
    known, or 30."""
    if frames < 2 or span <= 0:
        return float(next(iter(stated), 30))
    for rate in stated:
        if abs((frames - 1) / rate - span) <= 2 * unit:
            return float(rate)
    return float((frames - 1) / span)


def steps(given: list[int | None], most: float) -> list[int]:
    """Timestamps from 0 on that only rise: the usual step where one is missing, does not rise or
    jumps by more than `most`, as where streams were joined (ffmpeg's own rule, 10 s)."""
    rises = [b - a for a, b in itertools.pairwise(given) if None not in (a, b) and 0 < b - a < most]
    usual = sorted(rises)[len(rises) // 2] if rises else 0
    out = [0]
    for a, b in itertools.pairwise(given):
        known = None not in (a, b) and 0 < b - a < most
        out.append(out[-1] + (b - a if known else usual))
    return out


def claimed_bytes(path: str, container: str) -> int:
    """How long a file says it is: Matroska's segment, AVI's RIFF chunks. 0: it does not say."""
    with open(path, "rb") as f:
        if "matroska" in container:
            return _matroska_end(f.read(4096))
        end = 0
        while container == "avi":
            f.seek(end)
            head = f.read(8)
            size = int.from_bytes(head[4:], "little")
            if head[:4] != b"RIFF" or size == 0:
                return end
            end += 8 + size + size % 2
            if end >= os.fstat(f.fileno()).st_size:
                return end
    return 0


def _matroska_end(head: bytes) -> int:
    """End of the first segment, by EBML's sizes (RFC 8794); 0 if unknown."""
    position = 0
    for mark in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        if head[position : position + 4] != mark or len(head) < position + 12:
            return 0
        length = 9 - head[position + 4].bit_length()
        field = head[position + 4 : position + 4 + length]
        size = int.from_bytes(field, "big") & ((1 << 7 * length) - 1)
        if length > 8 or size == (1 << 7 * length) - 1:
            return 0
        position += 4 + length + size
    return position


def orientation(matrix: bytes) -> tuple[bool, int] | None:
    """(mirrored, quarter turns counterclockwise after that) of a display matrix of nine int32, as
    ffmpeg turns: the picture is flipped left to right if mirrored, then turned. None: it is turned
    by something else than quarters."""
    a, b, _, c, d, *_ = memoryview(matrix).cast("i")
    if not any((a, b, c, d)):
        return False, 0
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > 0.0175 * max(straight, crossed):  # ffmpeg allows one degree
        return None
    if straight > crossed:
        mirrored = (a < 0) != (d < 0)
        # A flip of rows is a flip of columns and half a turn.
        return mirrored, 2 if d < 0 else 0
    mirrored = (b < 0) == (c < 0)
    return mirrored, 1 if (b < 0) != mirrored else 3
