"""The frames of a video file by their number, as PyAV decodes them, and which of them are damaged.

Opening a file lists its packets; where they are suspicious it is decoded once, and what comes out,
in its order, are its frames. See timeline for what the packets say, decode for the reader.
"""

import bisect
import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mae_fast.data import timeline
from mae_fast.data.container import BadVideo, open_video, refuse_if_cut
from mae_fast.data.timeline import Access, Scan, Timeline

# Packets after which a keyframe that comes out is one that went in after them.
_REORDER = 17
# Errors that FFmpeg logs for sound pictures: side information, and what a seek leaves behind.
HARMLESS = ("SEI", "mmco", "number of reference frames", "co located POCs", "buffering period")
# Keyframes from which a suspicious file is tried by random access.
_TRIED = 4


class Frames:
    """The frames of a file. access: how they are found, given or found out here. pts: timestamps
    in order of presentation; times: the same as seconds count, in the stream's time base; fps, on
    average; duration in seconds; plain: nothing about the packets is suspicious. Raises BadVideo.
    """

    def __init__(self, path: str, access: Access | None = None):
        self.path = path
        self._open()
        try:
            self._scan(access)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.container.close()

    def __len__(self) -> int:
        return self.access.frames

    @property
    def gop(self) -> int:
        """The most frames from one keyframe to the next; 0 where frames are not ordered."""
        if not self.access.ordered:
            return 0
        starts = [0, *(self._number[t] for t in self._keys), len(self)]
        return max(b - a for a, b in itertools.pairwise(starts))

    def keyframe(self, i: int) -> int:
        """Number of the keyframe from which frame i decodes; frames must be seekable."""
        key = bisect.bisect_right(self._keys, self.pts[i])
        return bisect.bisect_left(self.pts, self._keys[key - 1]) if key else 0

    def between(self, begin: float, end: float) -> dict:
        """start, frames, fps, duration of the frames shown from `begin` to `end` seconds."""
        base, span = self.stream.time_base, 0
        if self.access.ordered:
            # Half a unit: timestamps are rounded.
            first, last = (
                bisect.bisect_left(self.times, self.times[0] + seconds / float(base) - 0.5)
                for seconds in (begin, end)
            )
        else:
            first, last = (min(round(s * self.fps), len(self)) for s in (begin, end))
        frames = last - first
        if frames < 2:
            where = f"{begin:g} to {end:g} s lies outside the {self.duration:.1f} s video"
            raise BadVideo(self.path, f"segment: {where}")
        if self.access.ordered:
            span = (self.times[last - 1] - self.times[first]) * base
        fps = timeline.average_rate(frames, span, base, [self.fps])
        return {"start": first, "frames": frames, "fps": fps, "duration": frames / fps}

    def damaged(self) -> int:
        """How many frames FFmpeg flags as damaged, or were predicted from such; decodes all."""
        sound = sum(damage is None for _, _, damage in self.numbered(0))
        if sound == len(self):
            self.access = replace(self.access, whole=True)
        return len(self) - sound

    def numbered(self, first: int) -> Iterator[tuple[int, Any, str | None]]:
        """(number, frame, damage or None) of all frames, from `first` or an earlier one on."""
        if not self.access.ordered:
            yield from self._counted()
            return
        key = bisect.bisect_right(self._keys, self.pts[first])
        # A seek may land late (a table of decoding times), or on a picture that leans on earlier
        # ones (an open GOP), which spoils the first frames: then start from earlier.
        for start in [*reversed(self._keys[max(key - 2, 0) : key]), None]:
            if (yield from self._from_key(first, start)):
                return

    def _open(self) -> None:
        self.container, self.stream = open_video(self.path)

    def _scan(self, access: Access | None) -> None:
        """List the timestamps of frames and keyframes; refuse what is cut short or too short."""
        import av

        scan = Scan(self.stream, self.container.format.name)
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:  # 0 at the end
                    scan.add(packet)
        except OSError as e:
            raise self._unreadable(e) from None
        except av.error.FFmpegError as e:
            reason = f"truncated: reading stops after {scan.packets} frames ({e.strerror})"
            raise BadVideo(self.path, reason) from None
        refuse_if_cut(self.path, self.container, self.stream, scan.packets)
        found = scan.timeline()
        if not found.pts:
            raise BadVideo(self.path, "no frames: the stream is empty")
        self.plain = not found.doubts
        self._rank = {t: k for k, t in enumerate(found.order) if t is not None}
        self._key_times = [t for t, k in zip(found.pts, found.keys, strict=True) if k]
        # HEVC makes up what a lost keyframe held, and only warns.
        self._intra = set(self._key_times) if scan.codec == "hevc" else set()
        self._take(access or Access(len(found.pts)), found.times)
        if access is None and found.doubts:
            self._decode_all(found)
        if len(self) < 2:
            reason = "1 frame: a picture, not a video" if len(self) else "no frame decodes"
            raise BadVideo(self.path, reason)
        if self.access.ordered and len(self.pts) != len(self):
            reason = f"changed: {len(self.pts)} frames, {len(self)} when indexed"
            raise BadVideo(self.path, reason)
        self._clock(found)

    def _take(self, access: Access, times: list[int]) -> None:
        """Number the frames: `times` are the packets' timestamps in order of presentation."""
        hidden = timeline.read_ranges(access.hidden)
        self.access = access
        self.pts = [t for i, t in enumerate(times) if i not in hidden] if hidden else times
        self._number = {t: i for i, t in enumerate(self.pts)}
        self._keys = sorted(t for t in self._key_times if t in self._number)

    def _decode_all(self, found: Timeline) -> None:
        """Find out the access of a suspicious file: decode it once, then try some of its keyframes
        by a seek, and by counting packets from the start."""
        given, sums = [], []
        for frame in self._decoded(None):
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
            got = itertools.islice(self.numbered(first), key + 4)
            got = {i: _checksum(frame) for i, frame, _ in got if i in numbers}
            if any(got.get(i) != sums[i] for i in numbers):
                return False
        return True

    def _clock(self, found: Timeline) -> None:
        """times, fps and duration, by timestamps that rise: those of decoding where frames are not
        in the order of their own."""
        stream = self.stream
        times = self.pts if self.access.ordered else found.dts
        if not self.access.ordered or self.container.format.name in ("mpegts", "mpeg"):
            times = timeline.steps(times, 10 / stream.time_base)
        self.times = times
        span = (times[-1] - times[0]) * stream.time_base
        stated = [r for r in (stream.average_rate, stream.guessed_rate) if r]
        self.fps = timeline.average_rate(len(self), span, stream.time_base, stated)
        self.duration = len(self) / self.fps

    def _from_key(self, first: int, start: int | None):
        """The frames from the keyframe at timestamp `start` on; the whole file for None. Returns
        whether that was it: a seek that lands elsewhere or meets damage is given up."""
        number = self._number
        here = 0 if start is None else number[start]
        spoiled: list[tuple[int, float, int]] = []
        for frame in self._decoded(start):
            i = number.get(frame.pts)
            if i is None:
                continue
            if i > here and start is not None and here == number[start]:
                return False  # it lands late
            # Before the first frame: a recording that begins in mid-stream.
            lost = frame.is_corrupt or (frame.pts in self._intra and not frame.key_frame)
            for t in [*self._errors, *self.pts[here:i], *([frame.pts] if lost else [])]:
                if t is not None and t >= (self.pts[0] if start is None else start):
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
        for i, frame in enumerate(self._decoded(None)):
            if (self._errors and i) or frame.is_corrupt:
                damage, until = f"comes after damage at frame {i}", self._fed + _REORDER
            elif damage is not None and frame.key_frame and self._fed >= until:
                damage = None
            self._errors.clear()
            yield i, frame, damage

    def _decoded(self, start: int | None) -> Iterator[Any]:
        """Decoded frames in presentation order, from the keyframe at timestamp `start`, or of the
        whole file. Packets that do not decode are passed over: their frames will be missing. The
        timestamps of those that FFmpeg complains of are added to _errors."""
        import av

        self._errors: list[int] = []
        self._fed, last = 0, None
        try:
            if start is None or not self.access.seekable:
                self.container.close()
                self._open()
            else:
                self._show_first_packet()
                self.container.seek(start, stream=self.stream)
            passed = 0 if start is None or self.access.seekable else self._rank[start]
            for packet in itertools.islice(self.container.demux(self.stream), passed, None):
                # A packet that the container calls damaged may be whole, as where files are joined.
                failed, frames = False, ()
                errors, _ = av.logging.get_last_error()
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    failed = True
                last = last if packet.pts is None else packet.pts
                logged, message = av.logging.get_last_error()
                if failed or (logged > errors and not any(m in message[2] for m in HARMLESS)):
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
        context = self.stream.codec_context
        if context.name == "h264" and "444" in (context.pix_fmt or ""):
            self.container.seek(0, stream=self.stream)
            next(self.container.demux(self.stream)).decode()

    def _unreadable(self, error: OSError) -> BadVideo:
        return BadVideo(self.path, f"cannot be read: {error.strerror}", lasting=False)


def _checksum(frame) -> int:
    """Of the first plane, without what pads its rows."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, abs(plane.line_size))
    return zlib.crc32(np.ascontiguousarray(rows[:, : plane.width]))
