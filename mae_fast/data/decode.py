"""Frames of a video file by their number, exactly, through PyAV or torchcodec.

Frame i is the i-th in order of presentation, whatever the frame rate does and however the codec
reorders. Opening a file lists its timestamps without decoding; reading seeks to what is wanted.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mae_fast.data import planes, timeline
from mae_fast.data.container import BadVideo
from mae_fast.data.frames import Frames
from mae_fast.data.packed import fetch_video
from mae_fast.data.planes import Pictures
from mae_fast.data.remote import is_remote
from mae_fast.data.sampling import shrink
from mae_fast.data.timeline import Access
from mae_fast.errors import ConfigError

# Frames decoded and thrown away rather than sought across: about what one seek costs.
_SEEK_GAP = 8
# Elsewhere (MPEG-TS, MPEG-PS) torchcodec 0.13 gave frame 10 for frame 0.
_TORCHCODEC = ("mp4", "matroska")
# torchcodec returns whole batches; this bounds the full-size frames held at one time.
_CHUNK = 16


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
        frames = reader._frames
        damaged = frames.damaged() if verify else -1
        context = frames.stream.codec_context
        facts = {
            "start": 0,
            "frames": len(frames),
            "fps": frames.fps,
            "duration": frames.duration,
            "width": width,
            "height": height,
            "codec": context.codec.canonical_name,
            "pix_fmt": context.pix_fmt or "unknown",
            "rotation": turns * 90,
            "mirrored": mirrored,
            "total": len(frames),
            "ordered": frames.access.ordered,
            "seekable": frames.access.seekable,
            "hidden": frames.access.hidden,
            "gop": frames.gop,
            "damaged": damaged,
        }
        # A file much longer than its segment is the whole video, otherwise it was cut out already.
        if segment and frames.duration > segment[1] - segment[0] + 1:
            facts |= frames.between(*segment)
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
        check_decoder(name)
        self.path, self.strict = os.fspath(path), strict
        if is_remote(self.path):
            self.path = fetch_video(self.path)
        self._frames = Frames(self.path, access)
        try:
            sure = not strict or self.access.whole
            # It reduces a reflection to half a turn.
            use = name == "torchcodec" and self._plain() and sure and not self._shape[2]
            self._torchcodec = self._open_torchcodec() if use else None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._frames.close()
        self._torchcodec = None

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    @property
    def fps(self) -> float:
        return self._frames.fps

    @property
    def duration(self) -> float:
        return self._frames.duration

    @property
    def access(self) -> Access:
        return self._frames.access

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
        asked = list(map(int, indices))
        if not asked:
            return torch.empty(0, self.height, self.width, 3, dtype=torch.uint8, device="cpu")
        return planes.in_order(self._pictures(sorted({*asked}), short_side, False), asked)

    def pictures(self, wanted: list[int], short_side: int = 0, planar: bool = True) -> Pictures:
        """The frames of these numbers, rising: as they were decoded where planes.py keeps them so;
        else, or not planar, RGB as `read` gives it. Raises as `read` does."""
        found = self._pictures(wanted, short_side, planar)
        return found or self._pictures(wanted, short_side, False)

    def _pictures(self, wanted: list[int], short_side: int, planar: bool) -> Pictures | None:
        for i in wanted:
            if not 0 <= i < self.num_frames:
                raise IndexError(f"frame {i} of {self.num_frames}: {self.path}")
        if self._torchcodec:
            frames = (shrink(f[None], short_side)[0] for _, f in self._read_torchcodec(wanted))
            return planes.of_rgb(torch.stack([*frames]))
        return planes.pictures(self.path, self._read_pyav(wanted), len(wanted), short_side, planar)

    @property
    def _shape(self) -> tuple[int, int, bool, int]:
        """Height and width as displayed, mirrored, quarter turns, of the first frame."""
        if not hasattr(self, "_first"):
            i, frame, _ = next(self._frames.numbered(0), (None, None, None))
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

    def _read_pyav(self, wanted: list[int]) -> Iterator[tuple[int, Any, tuple[bool, int]]]:
        """(number, PyAV's frame, mirrored and quarter turns) of sorted numbers."""
        for run in self._runs(wanted):
            for i, frame in self._decode(run):
                yield i, frame, self._orientation(frame)

    def _runs(self, wanted: list[int]) -> list[list[int]]:
        """Sorted frame numbers, cut where seeking costs less than decoding on."""
        runs = [wanted[:1]]
        for previous, i in itertools.pairwise(wanted):
            if self.access.seekable and self._frames.keyframe(i) - previous > _SEEK_GAP:
                runs.append([i])
            else:
                runs[-1].append(i)
        return runs if wanted else []

    def _decode(self, run: list[int]) -> Iterator[tuple[int, Any]]:
        """(number, frame) of one run of sorted numbers. BadVideo names one missing or damaged."""
        left = set(run)
        for i, frame, damage in self._frames.numbered(run[0]):
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

    def _plain(self) -> bool:
        """Whether torchcodec gives the frames that PyAV gives."""
        stream = self._frames.stream
        # Of more than 8 bits torchcodec 0.17 made colours up to 81 levels from ffmpeg's.
        eight = all(c.bits <= 8 for c in getattr(stream.codec_context.format, "components", ()))
        name = self._frames.container.format.name
        return self._frames.plain and eight and any(n in name for n in _TORCHCODEC)

    def _open_torchcodec(self):
        from torchcodec.decoders import VideoDecoder

        try:
            decoder = VideoDecoder(
                self.path,
                stream_index=self._frames.stream.index,
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
            base = float(self._frames.stream.time_base)
            if batch is None or any(
                abs(seconds - self._frames.pts[i] * base) > 1e-6
                for i, seconds in zip(chunk, batch.pts_seconds.tolist(), strict=True)
            ):
                found = planes.pictures(self.path, self._read_pyav(chunk), len(chunk), 0, False)
                yield from zip(chunk, planes.images(found), strict=True)
            else:
                yield from zip(chunk, batch.data, strict=True)


def check_decoder(name: str) -> None:
    """Raises ConfigError where a decoder cannot be used here."""
    if reason := _unusable(name):
        raise ConfigError(f"decoder {name}: {reason}")


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
