"""Frames of a video file by their number, exactly, through PyAV or torchcodec.

Frame i is the i-th in order of presentation, whatever the frame rate does and however the codec
reorders. Opening a file lists its timestamps without decoding; reading seeks to what is wanted.
"""

import bisect
import errno
import itertools
import math
import os
import stat
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_fast.data import timeline
from mae_fast.data.sampling import shrink
from mae_fast.data.timeline import Access, Scan
from mae_fast.errors import ConfigError

# Frames decoded and thrown away rather than sought across: about what one seek costs.
_SEEK_GAP = 8
# Text that names other files; FFmpeg would open those.
_PLAYLISTS = ("concat", "hls", "dash", "imf")
# Elsewhere (MPEG-TS, MPEG-PS) torchcodec 0.13 gave frame 10 for frame 0.
_TORCHCODEC = ("mp4", "matroska")
# Packets after which a keyframe that comes out is one that went in after them.
_REORDER = 17
# Errors that FFmpeg logs for sound pictures: side information, and what a seek leaves behind.
_HARMLESS = ("SEI", "mmco", "number of reference frames", "co located POCs", "buffering period")
# Keyframes from which a suspicious file is tried by random access.
_TRIED = 4
# torchcodec returns whole batches; this bounds the full-size frames held at one time.
_CHUNK = 16


class BadVideo(Exception):
    """A file that cannot give the frames asked of it. `path`, and `reason` in one line, which
    begins with its kind: "truncated: 30 of 100 frames". lasting: other frames of it, or another
    try, would fail as well."""

    def __init__(self, path, reason: str, lasting: bool = True):
        super().__init__(os.fspath(path), reason, lasting)
        self.path, self.reason, self.lasting = os.fspath(path), reason, lasting

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decoders() -> dict[str, str]:
    """Name of each decoder -> its version, or the reason why it cannot be used."""
    found = {}
    for name, module in (("pyav", "av"), ("torchcodec", "torchcodec")):
        reason = _unusable(name)
        found[name] = reason or __import__(module).__version__
    return found


def probe(path, segment: tuple[float, float] | None = None, verify: bool = False) -> dict:
    """Facts of a video, as an index keeps them: see VideoRow. Lists the packets and decodes the
    first frame; all frames where the packets are suspicious, or with verify. A segment (begin, end
    in seconds from the first frame) of a longer file gives its own start, frames, fps and duration.
    Raises BadVideo."""
    with VideoReader(path, "pyav") as reader:
        height, width, mirrored, turns = reader._shape
        damaged = reader._damaged() if verify else -1
        facts = {
            "start": 0,
            "frames": reader.num_frames,
            "fps": reader.fps,
            "duration": reader.duration,
            "width": width,
            "height": height,
            "codec": reader._stream.codec_context.codec.canonical_name,
            "pix_fmt": reader._stream.codec_context.pix_fmt or "unknown",
            "rotation": turns * 90,
            "mirrored": mirrored,
            "total": reader.num_frames,
            "ordered": reader.access.ordered,
            "seekable": reader.access.seekable,
            "hidden": reader.access.hidden,
            "gop": reader.gop,
            "damaged": damaged,
        }
        # A file much longer than its segment is the whole video, otherwise it was cut out already.
        if segment and reader.duration > segment[1] - segment[0] + 1:
            facts |= reader._segment(*segment)
        return facts


class VideoReader:
    """A video file as uint8 frames [H, W, 3], upright. A context manager.

    num_frames, fps (average), duration (s), access (how frames are found, given or found out at
    opening); height and width decode one frame. strict: a frame that FFmpeg flags as damaged, and
    every frame that may be predicted from it, is refused. Raises BadVideo when the file is not a
    usable video, ConfigError when the decoder named cannot run here. torchcodec reads MP4 and
    Matroska of 8 bits whose packets are plain, without edit lists and reflections, and says nothing
    of damage: with strict, only files that were decoded whole at `index`. PyAV reads the others.
    """

    def __init__(
        self, path, decoder: str = "auto", access: Access | None = None, strict: bool = True
    ):
        # auto is PyAV. Against torchcodec 0.13 (medians of 10, one thread): four clips of 16 from
        # 640x272 in 126 and 137 ms, one clip in 55 and 55; from 1280x720 230 and 307, 183 and 221.
        name = "pyav" if decoder == "auto" else decoder
        if reason := _unusable(name):
            raise ConfigError(f"decoder {name}: {reason}")
        self.path, self.strict = os.fspath(path), strict
        self._open()
        try:
            self._scan(access)
            sure = not strict or self.access.whole
            # It reduces a reflection to half a turn.
            use = name == "torchcodec" and self._plain and sure and not self._shape[2]
            self._torchcodec = self._open_torchcodec() if use else None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()
        self._torchcodec = None

    @property
    def height(self) -> int:
        return self._shape[0]

    @property
    def width(self) -> int:
        return self._shape[1]

    def read(self, indices: Iterable[int], short_side: int = 0) -> Tensor:
        """The frames of these numbers, in any order and repeated or not: uint8 [n, H, W, 3].

        Each is decoded once, in one sweep forward, and shrunk to short_side pixels if larger (0:
        never). IndexError outside [0, num_frames); BadVideo names a frame that does not decode.
        """
        rows = defaultdict(list)
        for row, i in enumerate(map(int, indices)):
            if not 0 <= i < self.num_frames:
                raise IndexError(f"frame {i} of {self.num_frames}: {self.path}")
            rows[i].append(row)
        out = None
        frames = self._read_torchcodec if self._torchcodec else self._read_pyav
        for i, frame in frames(sorted(rows)):
            frame = shrink(frame[None], short_side)[0]
            if out is None:
                count = sum(map(len, rows.values()))
                out = torch.empty(count, *frame.shape, dtype=torch.uint8, device="cpu")
            for row in rows[i]:
                out[row] = frame
        if out is None:
            return torch.empty(0, self.height, self.width, 3, dtype=torch.uint8, device="cpu")
        return out

    def _open(self) -> None:
        import av

        # PyAV counts the errors that FFmpeg logs at any level but None; at this one it prints none.
        if av.logging.get_level() is None:
            av.logging.set_level(av.logging.PANIC)

        try:
            status = os.stat(self.path)
            if not stat.S_ISREG(status.st_mode):
                raise BadVideo(self.path, "not a regular file")
            if status.st_size == 0:
                raise BadVideo(self.path, "empty: 0 bytes")
            # The prefix and the list keep a name or a playlist from opening anything else.
            self._container = av.open(
                f"file:{self.path}",
                mode="r",
                options={"protocol_whitelist": "file"},
                metadata_errors="replace",
            )
        except FileNotFoundError:
            raise BadVideo(self.path, "missing: no such file") from None
        except OSError as e:
            lasting = e.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP)
            raise BadVideo(self.path, f"cannot be opened: {e.strerror}", lasting) from None
        except av.error.FFmpegError as e:
            raise BadVideo(self.path, _why_not_opened(self.path, e)) from None
        try:
            self._stream = self._picture_stream()
            self._stream.codec_context.thread_count = 1
        except BaseException:
            self._container.close()
            raise

    def _picture_stream(self):
        import av

        if self._container.format.name in _PLAYLISTS:
            raise BadVideo(self.path, f"not a video: a {self._container.format.name} playlist")
        videos = self._container.streams.video
        moving = [s for s in videos if not s.disposition & av.stream.Disposition.attached_pic]
        if not moving:
            other = "only a cover picture" if videos else "no video stream"
            kinds = ", ".join(sorted({s.type for s in self._container.streams if s not in videos}))
            raise BadVideo(self.path, f"no video: {other}" + (f" ({kinds})" if kinds else ""))
        best = self._container.streams.best("video")
        stream = best if best in moving else moving[0]
        if stream.codec_context is None:
            raise BadVideo(self.path, "unknown codec: FFmpeg has no decoder for it")
        return stream

    def _scan(self, access: Access | None) -> None:
        """List the timestamps of frames and keyframes; refuse what is cut short or too short."""
        import av

        stream, name = self._stream, self._container.format.name
        scan = Scan(stream, name)
        try:
            for packet in self._container.demux(stream):
                if packet.size:  # 0 at the end
                    scan.add(packet)
        except OSError as e:
            raise self._unreadable(e) from None
        except av.error.FFmpegError as e:
            reason = f"truncated: reading stops after {scan.packets} frames ({e.strerror})"
            raise BadVideo(self.path, reason) from None
        self._refuse_if_cut(scan.packets)
        found = scan.timeline()
        if not found.pts:
            raise BadVideo(self.path, "no frames: the stream is empty")
        # Of more than 8 bits torchcodec 0.17 made colours up to 81 levels from ffmpeg's.
        eight = all(c.bits <= 8 for c in getattr(stream.codec_context.format, "components", ()))
        self._plain = not found.doubts and eight and any(n in name for n in _TORCHCODEC)
        self._rank = {t: k for k, t in enumerate(found.order) if t is not None}
        self._key_times = [t for t, k in zip(found.pts, found.keys, strict=True) if k]
        # HEVC makes up what a lost keyframe held, and only warns.
        self._intra = set(self._key_times) if scan.codec == "hevc" else set()
        self._take(access or Access(len(found.pts)), found.times)
        if access is None and found.doubts:
            self._decode_all(found)
        if self.num_frames < 2:
            reason = "1 frame: a picture, not a video" if self.num_frames else "no frame decodes"
            raise BadVideo(self.path, reason)
        if self.access.ordered and len(self._pts) != self.num_frames:
            reason = f"changed: {len(self._pts)} frames, {self.num_frames} when indexed"
            raise BadVideo(self.path, reason)
        # Unordered: timestamps of decoding rise.
        stream = self._stream  # the file may have been opened again
        times = self._pts if self.access.ordered else found.dts
        if not self.access.ordered or name in ("mpegts", "mpeg"):
            times = timeline.steps(times, 10 / stream.time_base)
        self._times = times
        span = (times[-1] - times[0]) * stream.time_base
        stated = [r for r in (stream.average_rate, stream.guessed_rate) if r]
        self.fps = timeline.average_rate(self.num_frames, span, stream.time_base, stated)
        self.duration = self.num_frames / self.fps

    def _take(self, access: Access, times: list[int]) -> None:
        """Number the frames: `times` are the packets' timestamps in order of presentation."""
        hidden = timeline.read_ranges(access.hidden)
        self.access, self.num_frames = access, access.frames
        self._pts = [t for i, t in enumerate(times) if i not in hidden] if hidden else times
        self._number = {t: i for i, t in enumerate(self._pts)}
        self._keys = sorted(t for t in self._key_times if t in self._number)

    def _decode_all(self, found) -> None:
        """Find out the access of a suspicious file: decode it once, then try some of its keyframes
        by a seek, and by counting packets from the start."""
        given, sums = [], []
        for frame in self._frames(None):
            given.append(frame.pts)
            sums.append(_checksum(frame))
        access = timeline.access(given, found)
        if access.ordered:
            self._take(access, found.times)
            tried = [self._number[t] for t in self._keys][1:]
            tried = {*tried[:: math.ceil(len(tried) / _TRIED) or 1], *tried[-1:]}
            for seekable in (True, False):
                self._take(replace(access, seekable=seekable), found.times)
                if all(self._agrees(i, sums) for i in tried):
                    return
            access = replace(access, ordered=False, seekable=False, hidden="")
        self._take(access, found.times)

    def _agrees(self, key: int, sums: list[int]) -> bool:
        """Whether the keyframe of this number, what follows and what leads up to it are the same
        pictures by random access."""
        for first in (key, max(key - 2, 0)):
            numbers = range(first, min(first + 4, len(sums)))
            got = itertools.islice(self._numbered(first), key + 4)
            got = {i: _checksum(frame) for i, frame, _ in got if i in numbers}
            if any(got.get(i) != sums[i] for i in numbers):
                return False
        return True

    def _refuse_if_cut(self, packets: int) -> None:
        """A file shorter than it says itself is truncated; counts in its tags prove nothing."""
        stream, size = self._stream, os.path.getsize(self.path)
        stated = packets
        if "mp4" in self._container.format.name:
            entries = stream.index_entries
            if len(entries) > packets and max(e.pos + e.size for e in entries) > size:
                stated = len(entries)
        elif claimed := timeline.claimed_bytes(self.path, self._container.format.name):
            stated = round(packets * claimed / size)
        if stated - packets > max(2, 0.01 * stated):
            raise BadVideo(self.path, f"truncated: {packets} of {stated} frames")

    def _unreadable(self, error: OSError) -> BadVideo:
        return BadVideo(self.path, f"cannot be read: {error.strerror}", lasting=False)

    @property
    def gop(self) -> int:
        """The most frames from one keyframe to the next; 0 where frames are not ordered."""
        if not self.access.ordered:
            return 0
        starts = [0, *(self._number[t] for t in self._keys), self.num_frames]
        return max(b - a for a, b in itertools.pairwise(starts))

    def _segment(self, begin: float, end: float) -> dict:
        """start, frames, fps, duration of the frames shown from `begin` to `end` seconds."""
        base, span = self._stream.time_base, 0
        if self.access.ordered:
            # Half a unit: timestamps are rounded.
            first, last = (
                bisect.bisect_left(self._times, self._times[0] + seconds / float(base) - 0.5)
                for seconds in (begin, end)
            )
        else:
            first, last = (min(round(s * self.fps), self.num_frames) for s in (begin, end))
        frames = last - first
        if frames < 2:
            where = f"{begin:g} to {end:g} s lies outside the {self.duration:.1f} s video"
            raise BadVideo(self.path, f"segment: {where}")
        if self.access.ordered:
            span = (self._times[last - 1] - self._times[first]) * base
        fps = timeline.average_rate(frames, span, base, [self.fps])
        return {"start": first, "frames": frames, "fps": fps, "duration": frames / fps}

    def _damaged(self) -> int:
        """How many frames FFmpeg flags as damaged, or were predicted from such; decodes all."""
        sound = sum(damage is None for _, _, damage in self._numbered(0))
        if sound == self.num_frames:
            self.access = replace(self.access, whole=True)
        return self.num_frames - sound

    @property
    def _shape(self) -> tuple[int, int, bool, int]:
        """Height and width as displayed, mirrored, quarter turns, of the first frame."""
        if not hasattr(self, "_first"):
            i, frame, _ = next(self._numbered(0), (None, None, None))
            if i is None:
                raise BadVideo(self.path, f"damaged: no frame of {self.num_frames} decodes")
            mirrored, turns = self._orientation(frame)
            height, width = frame.height, frame.width
            if turns % 2:
                height, width = width, height
            self._first = height, width, mirrored, turns
        return self._first

    def _orientation(self, frame) -> tuple[bool, int]:
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return False, 0
        found = timeline.orientation(bytes(matrix))
        if found is None:
            reason = f"turned by {frame.rotation} degrees: only quarter turns can be shown upright"
            raise BadVideo(self.path, reason)
        return found

    def _read_pyav(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        import av

        size = {}
        for run in self._runs(wanted):
            for i, frame in self._decode(run):
                # A stream may change its size on the way; the first frame read decides.
                size = size or {"width": frame.width, "height": frame.height}
                # threads: swscale would start one for each core.
                try:
                    image = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1, **size))
                except (av.error.FFmpegError, ValueError) as e:
                    raise BadVideo(self.path, f"not convertible: frame {i} to RGB: {e}") from None
                mirrored, turns = self._orientation(frame)
                yield i, (image.flip(1) if mirrored else image).rot90(turns)

    def _runs(self, wanted: list[int]) -> list[list[int]]:
        """Sorted frame numbers, cut where seeking costs less than decoding on."""
        runs = [wanted[:1]]
        for previous, i in itertools.pairwise(wanted):
            if self.access.seekable and self._keyframe(i) - previous > _SEEK_GAP:
                runs.append([i])
            else:
                runs[-1].append(i)
        return runs if wanted else []

    def _keyframe(self, i: int) -> int:
        """Number of the keyframe from which frame i decodes."""
        key = bisect.bisect_right(self._keys, self._pts[i])
        return bisect.bisect_left(self._pts, self._keys[key - 1]) if key else 0

    def _decode(self, run: list[int]) -> Iterator[tuple[int, Any]]:
        """(number, frame) of one run of sorted numbers. BadVideo names one missing or damaged."""
        left = set(run)
        for i, frame, damage in self._numbered(run[0]):
            if i not in left:
                continue
            if frame.is_corrupt or (damage is not None and self.strict):
                self._refuse(i, damage)
            left.remove(i)
            yield i, frame
            if not left:
                return
        self._refuse(min(left), "does not decode")

    def _refuse(self, i: int, damage: str | None):
        reason = f"damaged: frame {i} of {self.num_frames} {damage or ''}".rstrip()
        raise BadVideo(self.path, reason, lasting=False)

    def _numbered(self, first: int) -> Iterator[tuple[int, Any, str | None]]:
        """(number, frame, damage or None) of all frames, from `first` or an earlier one on."""
        if not self.access.ordered:
            yield from self._counted()
            return
        key = bisect.bisect_right(self._keys, self._pts[first])
        # A seek may land late (a table of decoding times), or on a picture that leans on earlier
        # ones (an open GOP), which spoils the first frames: then start from earlier.
        for start in [*reversed(self._keys[max(key - 2, 0) : key]), None]:
            if (yield from self._from_key(first, start)):
                return

    def _from_key(self, first: int, start: int | None):
        """The frames from the keyframe at timestamp `start` on; the whole file for None. Returns
        whether that was it: a seek that lands elsewhere or meets damage is given up."""
        number = self._number
        here = 0 if start is None else number[start]
        spoiled: list[tuple[int, float, int]] = []
        for frame in self._frames(start):
            i = number.get(frame.pts)
            if i is None:
                continue
            if i > here and start is not None and here == number[start]:
                return False  # it lands late
            # Before the first frame: a recording that begins in mid-stream.
            lost = frame.is_corrupt or (frame.pts in self._intra and not frame.key_frame)
            for t in [*self._errors, *self._pts[here:i], *([frame.pts] if lost else [])]:
                if t is not None and t >= (self._pts[0] if start is None else start):
                    spoiled.append(self._spoils(t))
            self._errors.clear()
            if i < here:  # a picture that leads up to the keyframe
                continue
            here = i + 1
            damage = None
            if spoiled:
                damage = self._damage(frame.pts, spoiled)
                if damage is not None and i >= first and start is not None:
                    return False
            yield i, frame, damage
        return start is None or here > first

    def _spoils(self, t: int) -> tuple[int, float, int]:
        """What damage at timestamp t may have reached: frames decoded from there on, and shown
        before the next keyframe decoded after it."""
        rank = self._rank.get(t, 0)
        later = (k for k in self._key_times if self._rank.get(k, -1) > rank)
        return rank, next(later, math.inf), t

    def _damage(self, pts: int, spoiled: list[tuple[int, float, int]]) -> str | None:
        rank = self._rank[pts]
        for origin, end, t in spoiled:
            if rank >= origin and pts < end:
                i = self._number.get(t)
                return "" if t == pts or i is None else f"leans on frame {i}, which is damaged"
        return None

    def _counted(self) -> Iterator[tuple[int, Any, str | None]]:
        """All frames as they come; after an error all, up to a keyframe that went in later."""
        damage, until = None, 0
        for i, frame in enumerate(self._frames(None)):
            if (self._errors and i) or frame.is_corrupt:
                damage, until = f"comes after damage at frame {i}", self._fed + _REORDER
            elif damage is not None and frame.key_frame and self._fed >= until:
                damage = None
            self._errors.clear()
            yield i, frame, damage

    def _frames(self, start: int | None) -> Iterator[Any]:
        """Decoded frames in presentation order, from the keyframe at timestamp `start`, or of the
        whole file. Packets that do not decode are passed over: their frames will be missing. The
        timestamps of those that FFmpeg complains of are added to _errors."""
        import av

        self._errors: list[int] = []
        self._fed, last = 0, None
        try:
            if start is None or not self.access.seekable:
                self._container.close()
                self._open()
            else:
                self._show_first_packet()
                self._container.seek(start, stream=self._stream)
            passed = 0 if start is None or self.access.seekable else self._rank[start]
            for packet in itertools.islice(self._container.demux(self._stream), passed, None):
                # A packet that the container calls damaged may be whole, as where files are joined.
                failed, frames = False, ()
                errors, _ = av.logging.get_last_error()
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    failed = True
                last = last if packet.pts is None else packet.pts
                logged, message = av.logging.get_last_error()
                if failed or (logged > errors and not any(m in message[2] for m in _HARMLESS)):
                    self._errors.append(last)
                self._fed += 1
                yield from frames
        except OSError as e:
            raise self._unreadable(e) from None
        except av.error.FFmpegError:  # a format that cannot seek
            return

    def _show_first_packet(self) -> None:
        """Let FFmpeg see which x264 made the file: old builds erred in 4:4:4, the decoder mends it
        by the build's number, and that stands in the first packet only."""
        context = self._stream.codec_context
        if context.name == "h264" and "444" in (context.pix_fmt or ""):
            self._container.seek(0, stream=self._stream)
            next(self._container.demux(self._stream)).decode()

    def _open_torchcodec(self):
        from torchcodec.decoders import VideoDecoder

        try:
            decoder = VideoDecoder(
                self.path,
                stream_index=self._stream.index,
                dimension_order="NHWC",
                num_ffmpeg_threads=1,
                seek_mode="exact",
            )
        except (RuntimeError, ValueError) as e:
            raise BadVideo(self.path, f"torchcodec cannot open it: {_first_line(e)}") from None
        # Where the two disagree, PyAV reads.
        return decoder if len(decoder) == self.num_frames else None

    def _read_torchcodec(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        for k in range(0, len(wanted), _CHUNK):
            chunk = wanted[k : k + _CHUNK]
            try:
                batch = self._torchcodec.get_frames_at(chunk)
            except RuntimeError:
                batch = None
            # It gives a neighbour for a frame that is missing. PyAV tells what is so.
            base = float(self._stream.time_base)
            if batch is None or any(
                abs(seconds - self._pts[i] * base) > 1e-6
                for i, seconds in zip(chunk, batch.pts_seconds.tolist(), strict=True)
            ):
                yield from self._read_pyav(chunk)
            else:
                yield from zip(chunk, batch.data, strict=True)


def _unusable(name: str) -> str | None:
    """Why a decoder cannot be used here, or None."""
    try:
        if name == "pyav":
            import av  # noqa: F401
        elif name == "torchcodec":
            import torchcodec.decoders  # noqa: F401
        else:
            return "unknown (known: auto, pyav, torchcodec)"
    except ModuleNotFoundError as e:
        return f"not installed ({e.name})"
    except (ImportError, OSError, RuntimeError) as e:
        return f"does not load: {_first_line(e)}"
    return None


def _why_not_opened(path: str, error: Exception) -> str:
    try:
        with open(path, "rb") as f:
            head = f.read(512)
    except OSError as e:
        return f"cannot be opened: {e.strerror}"
    for name, mark in (("MP4", b"ftyp"), ("AVI", b"AVI LIST"), ("Matroska", b"matroska")):
        if mark in head[:64]:
            return f"truncated: begins as {name}, but its header or index is missing or damaged"
    if all(c >= 32 or c in b"\t\n\r" for c in head):
        return "not a video: the file holds text"
    return f"not a video: {error.strerror}"


def _checksum(frame) -> int:
    """Of the first plane, without what pads its rows."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, abs(plane.line_size))
    return zlib.crc32(np.ascontiguousarray(rows[:, : plane.width]))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
