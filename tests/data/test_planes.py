"""Planes as a decoder gives them, in our colours: FFmpeg's pictures."""

import platform

import av
import numpy as np
import pytest
import torch

from mae_fast.data import planes
from mae_fast.ops.source import PLANAR

X86 = platform.machine() in ("x86_64", "AMD64")
LEVELS = 0 if X86 else 4  # other processors have another of swscale's conversions
SIZES = [(48, 64), (256, 340), (256, 455), (66, 98), (20, 31), (2, 2), (4, 6)]


def frame(height, width, matrix=2, full=0, name="yuv420p", seed=0):
    """Random planes, 0 to 255; what lies between the rows of a plane is not of the picture."""
    made, random = av.VideoFrame(width, height, name), np.random.default_rng(seed)
    for plane in made.planes:
        plane.update(random.integers(0, 256, (plane.height, plane.line_size), dtype=np.uint8))
    made.colorspace, made.color_range = matrix, full
    return made


def ours(frames, short_side=0, turned=(False, 0)):
    each = [(i, f, turned) for i, f in enumerate(frames)]
    return planes.pictures("a.mp4", each, len(frames), short_side)


def rgb(found):
    box = (0, 0, found.height, found.width)
    return found.source([([*range(len(found.pixels))], box, False)], 8).rgb()[0]


def ffmpeg(frames):
    return np.stack([f.to_ndarray(format="rgb24", threads=1) for f in frames])


@pytest.mark.parametrize("full", [0, 1, 2], ids=["unsaid", "limited", "full"])
@pytest.mark.parametrize("matrix", [1, 2, 4, 5, 6, 7, 9], ids="matrix_{}".format)
def test_colours_are_ffmpeg_s(matrix, full):
    for name in ("yuv420p", "yuvj420p"):
        for size in SIZES:
            frames = [frame(*size, matrix, full, name, seed) for seed in range(2)]
            found = ours(frames)
            assert found.colours[0] == 1 and found.pixels.shape[1] < 3 * size[0] * size[1]
            off = np.abs(rgb(found).numpy().astype(int) - ffmpeg(frames))
            assert off.max() <= LEVELS, (name, size, off.max(), off.mean())


def test_what_is_no_plane_is_converted_once():
    """Other formats, odd heights, what is to be shrunk or turned: as FFmpeg converts it."""
    for made in (frame(67, 101), frame(13, 16), frame(48, 64, name="yuv444p")):
        found = ours([made])
        assert found.colours[0] == 0 and np.array_equal(rgb(found).numpy(), ffmpeg([made]))
    made = frame(48, 64)
    assert ours([made], short_side=48).colours[0] == 1
    shrunk = ours([made], short_side=24)
    assert (shrunk.height, shrunk.width, shrunk.colours[0]) == (24, 32, 0)
    turned = ours([made], turned=(True, 1))
    want = torch.from_numpy(ffmpeg([made])[0]).flip(1).rot90(1)
    assert turned.colours[0] == 0 and torch.equal(rgb(turned)[0], want)


@pytest.mark.parametrize("other", [(50, 64), (48, 64, 1), (48, 64, 2, 2)], ids=str)
def test_frames_that_change_on_the_way_are_no_planes(other):
    """Size, matrix or range: the reader converts them all, each as it says of itself."""
    assert ours([frame(48, 64), frame(*other)]) is None


def test_a_source_is_the_clip_that_was_asked_for():
    found = ours([frame(48, 64, seed=seed) for seed in range(3)])
    source = found.source([([2, 0, 0], (1, 2, 30, 40), True), ([1, 1, 2], (0, 0, 9, 9), False)], 8)
    assert source.table[:, :7].tolist() == [[48, 64, 1, 2, 30, 40, 1], [48, 64, 0, 0, 9, 9, 0]]
    assert source.table[:, PLANAR].tolist() == [1, 1]
    frames = rgb(found)
    assert torch.equal(source.rgb()[0], frames[[2, 0, 0]])
    assert torch.equal(source.rgb()[1], frames[[1, 1, 2]])
