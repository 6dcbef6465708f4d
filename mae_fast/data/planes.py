"""What a decoder gives, as it is: Y, U and V of 8-bit 4:2:0, copied and not converted. All else
(other formats, frames to be turned or shrunk, odd heights, which FFmpeg converts otherwise) becomes
RGB here, once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae_fast.data.container import BadVideo
from mae_fast.data.sampling import shrink
from mae_fast.ops.source import RGB, Source, colours, frame_bytes

_FULL = {"yuv420p": False, "yuvj420p": True}  # formats kept as they are; whether always full range
_JPEG = 2  # color_range of frames


@dataclass
class Pictures:
    """n frames of a video: uint8 [n, bytes], each height x width; colours as in ops/source.py."""

    pixels: Tensor
    height: int
    width: int
    colours: tuple[int, ...] = RGB

    def source(self, clips: list[tuple[list[int], tuple[int, ...], bool]], size: int) -> Source:
        """Clips of these frames: of each its frames' rows, its box, and whether it is mirrored."""
        each, rows = self.pixels.shape[1], []
        for frames, box, flip in clips:
            begins = [row * each for row in frames]
            rows.append([self.height, self.width, *box, int(flip), *self.colours, *begins])
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return Source(self.pixels.view(-1), table, size)


def of_rgb(frames: Tensor) -> Pictures:
    """Of frames uint8 [n, H, W, 3]."""
    return Pictures(frames.reshape(len(frames), -1), *frames.shape[1:3])


def images(found: Pictures) -> Tensor:
    """uint8 [n, H, W, 3] of RGB pictures."""
    return found.pixels.view(-1, found.height, found.width, 3)


def in_order(found: Pictures, asked: list[int]) -> Tensor:
    """uint8 [n, H, W, 3] as `asked`, of RGB pictures of its numbers, each once and rising."""
    rows = {i: row for row, i in enumerate(sorted({*asked}))}
    wanted = [rows[i] for i in asked]
    return images(found) if wanted == [*range(len(rows))] else images(found)[wanted]


def stays(pix_fmt: str, height: int, width: int, short_side: int) -> bool:
    """Whether upright frames of this format and size are kept as planes."""
    small = not short_side or min(height, width) <= short_side
    return pix_fmt in _FULL and height % 2 == 0 and small


def pictures(
    path: str,
    frames: Iterable[tuple[int, Any, tuple[bool, int]]],
    n: int,
    short_side: int,
    planar: bool = True,
) -> Pictures | None:
    """n of PyAV's frames, each with its number and how it becomes upright (mirrored, turns).
    The first decides their size and colours; None where a later one has others. Not planar: RGB,
    and a later one is brought to the first's size. BadVideo where FFmpeg cannot convert it."""
    out, kind = np.empty((0, 0), np.uint8), None
    for k, (i, frame, turned) in enumerate(frames):
        found = _kind(frame, turned, short_side) if planar else None
        if k == 0:
            kind, size = found, (frame.height, frame.width)
            if kind:
                out = np.empty((n, frame_bytes(*size, True)), np.uint8)
        elif found != kind:
            return None
        if kind:
            _copy(frame, out[k])
            continue
        image = shrink(_rgb(path, i, frame, size, turned)[None], short_side)[0]
        if k == 0:
            shape = image.shape[:2]
            out = np.empty((n, image.numel()), np.uint8)
        out[k] = image.reshape(-1).numpy()
    if kind:
        return Pictures(torch.from_numpy(out), *kind)
    return Pictures(torch.from_numpy(out), *(shape if n else (0, 0)))


def _kind(frame, turned: tuple[bool, int], short_side: int) -> tuple | None:
    """(height, width, colours) of a frame that is kept as it is."""
    name = frame.format.name
    if turned != (False, 0) or not stays(name, frame.height, frame.width, short_side):
        return None
    found = colours(int(frame.colorspace), _FULL[name] or frame.color_range == _JPEG)
    return found and (frame.height, frame.width, found)


def _copy(frame, to: np.ndarray) -> None:
    at = 0
    for p in frame.planes:
        rows = np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)
        end = at + p.height * p.width
        to[at:end].reshape(p.height, p.width)[:] = rows[:, : p.width]
        at = end


def _rgb(path: str, i: int, frame, size: tuple[int, int], turned: tuple[bool, int]) -> Tensor:
    """A frame upright, uint8 [H, W, 3], by FFmpeg's conversion."""
    import av

    # threads: swscale would start one for each core.
    how = dict(format="rgb24", height=size[0], width=size[1], threads=1)
    try:
        image = torch.from_numpy(frame.to_ndarray(**how))
    except (av.error.FFmpegError, ValueError) as e:
        raise BadVideo(path, f"not convertible: frame {i} to RGB: {e}") from None
    mirrored, turns = turned
    return (image.flip(1) if mirrored else image).rot90(turns)
