"""Frames of a video file by their number, exactly, through PyAV or torchcodec.

Frame i is the i-th in order of presentation, whatever the frame rate does and however the codec
reorders. Opening a file lists its timestamps without decoding; reading seeks to what is wanted.
"""

import bisect
import itertools
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mae_fast.data.sampling import shrink
from mae_fast.errors import ConfigError

# Frames decoded and thrown away rather than sought across: about what one seek costs.
_SEEK_GAP = 8
# Text that names other files; FFmpeg would open those.
_PLAYLISTS = ("concat", "hls", "dash", "imf")
# Elsewhere (MPEG-TS, MPEG-PS) torchcodec 0.13 gave frame 10 for frame 0.
_TORCHCODEC = ("mp4", "matroska")
# torchcodec returns whole batches; this bounds the full-size frames held at one time.
_CHUNK = 16


class BadVideo(Exception):
    """A file that cannot give the frames asked of it. `path`, and `reason` in one line, which
    begins with its kind: "truncated: 30 of 100 frames"."""

    def __init__(self, path, reason: str):
        super().__init__(os.fspath(path), reason)
        self.path, self.reason = os.fspath(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decoders() -> dict[str, str]:
    """Name of each decoder -> its version, or the reason why it cannot be used."""
    found = {}
    for name, module in (("pyav", "av"), ("torchcodec", "torchcodec")):
        reason = _unusable(name)
        found[name] = reason or __import__(module).__version__
    return found


def probe(path) -> dict:
    """Facts of a video: frames, fps, duration (s), width and height (as displayed), codec,
    pix_fmt, rotation (degrees counterclockwise). Lists the packets and decodes the first frame
    only. Raises BadVideo."""
    with VideoReader(path, "pyav") as reader:
        return {
            "frames": reader.num_frames,
            "fps": reader.fps,
            "duration": reader.duration,
            "width": reader.width,
            "height": reader.height,
            "codec": reader._stream.codec_context.codec.canonical_name,
            "pix_fmt": reader._stream.codec_context.pix_fmt or "unknown",
            "rotation": reader._shape[2],
        }


class VideoReader:
    """A video file as uint8 frames [H, W, 3], rotated for display. A context manager.

    num_frames, fps (average), duration (s); height and width decode one frame. Raises BadVideo
    when the file is not a usable video, ConfigError when the decoder named cannot run here.
    torchcodec reads MP4 and Matroska without edit lists; from others it was seen to give wrong
    frames, and PyAV reads those.
    """

    def __init__(self, path, decoder: str = "auto"):
        # auto is PyAV. Against torchcodec 0.13 (medians of 10, one thread): four clips of 16 from
        # 640x272 in 126 and 137 ms, one clip in 55 and 55; from 1280x720 230 and 307, 183 and 221.
        name = "pyav" if decoder == "auto" else decoder
        if reason := _unusable(name):
            raise ConfigError(f"decoder {name}: {reason}")
        self.path = os.fspath(path)
        self._open()
        try:
            self._scan()
            use = name == "torchcodec" and self._plain
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
            raise BadVideo(self.path, f"cannot be opened: {e.strerror}") from None
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

    def _scan(self) -> None:
        """List the timestamps of frames and keyframes; refuse what is cut short or too short."""
        import av

        stream, mp4 = self._stream, "mp4" in self._container.format.name
        # An MP4's index is its truth: edit lists may leave out frames that `frames` counts.
        stated = len(stream.index_entries) if mp4 else stream.frames
        total, pts, keys, end = 0, [], [], 0
        try:
            for packet in self._container.demux(stream):
                if packet.size == 0:  # the end
                    continue
                total += 1
                end = max(end, (packet.pts or 0) + (packet.duration or 0))
                if packet.is_keyframe:
                    keys.append(packet.pts)
                if not packet.is_discard:
                    pts.append(packet.pts)
        except av.error.FFmpegError as e:
            reason = f"truncated: reading stops after {total} frames ({e.strerror})"
            raise BadVideo(self.path, reason) from None
        if "DURATION" in stream.metadata and end:  # Matroska, WebM
            seconds = _seconds(stream.metadata["DURATION"])
            stated = max(stated, round(total * seconds / float(end * stream.time_base)))
        if stated - total > max(2, 0.01 * stated):
            raise BadVideo(self.path, f"truncated: {total} of {stated} frames")
        if len(pts) < 2:
            reason = "1 frame: a picture, not a video" if pts else "no frames: the stream is empty"
            raise BadVideo(self.path, reason)
        # AVI has no presentation times; FFmpeg's guesses are wrong where frames are reordered.
        guessed = self._container.format.name == "avi" and stream.codec_context.has_b_frames
        self._ordered = None not in pts and len(set(pts)) == len(pts) and not guessed
        self._pts = sorted(pts) if self._ordered else pts
        known = any(name in self._container.format.name for name in _TORCHCODEC)
        self._plain = self._ordered and known and len(pts) == total
        self._number = {t: i for i, t in enumerate(self._pts)}
        self._keys = sorted(k for k in keys if k is not None)
        self.num_frames = len(pts)
        self.fps = float(stream.average_rate or stream.guessed_rate or 30)
        span = (self._pts[-1] - self._pts[0]) * stream.time_base if self._ordered else 0
        self.duration = float(span) + 1 / self.fps if span else self.num_frames / self.fps

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Height and width as displayed, and rotation, of the first frame."""
        if not hasattr(self, "_first"):
            _, frame = next(self._decode([0]))
            turned = round(frame.rotation / 90) % 4
            height, width = frame.height, frame.width
            if turned % 2:
                height, width = width, height
            self._first = height, width, turned * 90
        return self._first

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
                yield i, image.rot90(round(frame.rotation / 90) % 4)

    def _runs(self, wanted: list[int]) -> list[list[int]]:
        """Sorted frame numbers, cut where seeking costs less than decoding on."""
        runs = [wanted[:1]]
        for previous, i in itertools.pairwise(wanted):
            if self._ordered and self._keyframe(i) - previous > _SEEK_GAP:
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
        for i, frame in self._numbered(run[0]):
            if i not in left:
                continue
            if frame.is_corrupt:
                raise BadVideo(self.path, f"damaged: frame {i} of {self.num_frames}")
            left.remove(i)
            yield i, frame
            if not left:
                return
        reason = f"damaged: frame {min(left)} of {self.num_frames} does not decode"
        raise BadVideo(self.path, reason)

    def _numbered(self, first: int) -> Iterator[tuple[int, Any]]:
        """(number, frame) of all frames, from `first` or an earlier one on."""
        if not self._ordered:
            yield from enumerate(self._frames(None))
            return
        key = bisect.bisect_right(self._keys, self._pts[first])
        # A seek may land late (a table of decoding times), or on a picture that leans on earlier
        # ones (an open GOP), which spoils the first frames: then start from earlier.
        for start in [*reversed(self._keys[max(key - 2, 0) : key]), None]:
            landed = start is None
            for frame in self._frames(start):
                i = self._number.get(frame.pts)
                if i is None:
                    continue
                landed = landed or i <= first
                if not landed or (frame.is_corrupt and i >= first and start is not None):
                    break
                yield i, frame
            else:
                if landed:
                    return

    def _frames(self, start: int | None) -> Iterator[Any]:
        """Decoded frames in presentation order, from the keyframe at timestamp `start`, or of the
        whole file. Packets that do not decode are passed over: their frames will be missing."""
        import av

        try:
            if start is None:
                self._container.close()
                self._open()
            else:
                self._show_first_packet()
                self._container.seek(start, stream=self._stream)
        except av.error.FFmpegError:  # a format that cannot seek
            return
        for packet in self._container.demux(self._stream):
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                continue

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
        if len(decoder) != self.num_frames:
            reason = f"torchcodec sees {len(decoder)} frames, PyAV {self.num_frames}"
            raise BadVideo(self.path, f"decoders disagree: {reason}")
        return decoder

    def _read_torchcodec(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        for chunk in (wanted[k : k + _CHUNK] for k in range(0, len(wanted), _CHUNK)):
            try:
                batch = self._torchcodec.get_frames_at(chunk)
            except RuntimeError as e:
                where = f"frames {chunk[0]} to {chunk[-1]} of {self.num_frames}"
                raise BadVideo(self.path, f"damaged: {where}: {_first_line(e)}") from None
            for i, frame, seconds in zip(chunk, batch.data, batch.pts_seconds, strict=True):
                # It gives a neighbour for a frame that is missing.
                if abs(seconds.item() - float(self._pts[i] * self._stream.time_base)) > 1e-6:
                    reason = f"damaged: frame {i} of {self.num_frames} does not decode"
                    raise BadVideo(self.path, reason)
                yield i, frame


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


def _seconds(clock: str) -> float:
    """Seconds of 'hh:mm:ss.fff'; 0 for anything else."""
    try:
        hours, minutes, seconds = map(float, clock.split(":"))
    except ValueError:
        return 0.0
    return hours * 3600 + minutes * 60 + seconds


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
