"""A labelled set told apart by motion alone: the same things, places and frames in every class.

A textured disc, cut out of one piece of footage, moves over a still picture cut out of another, at
a constant speed in one of four directions, and comes back in on the other side when it leaves. The
place where it is at any moment is uniform over the picture whatever its direction, so a single
frame says nothing about the class; turned back in time, a clip of one class is one of another.
A labelled scene (picture, disc, where it starts and how fast it is) has one clip of every class:
to know a scene again, which a model of few clips learns first, does not tell the class either.
"""

import itertools
from pathlib import Path

import av
import numpy as np

from mae_fast.data import VideoReader, VideoRow, probe, write_index
from mae_fast.errors import DataError

CLASSES = {"down": (1, 0), "left": (0, -1), "right": (0, 1), "up": (-1, 0)}  # rows, columns
SIDE, FRAMES, FPS = 32, 16, 15


def pictures(videos: list[str | Path], count: int) -> list[np.ndarray]:
    """`count` frames spread over each video, uint8 [H, W, 3], their short side twice SIDE."""
    found = []
    for path in videos:
        with VideoReader(path, "pyav") as reader:
            wanted = np.linspace(0, reader.num_frames - 1, count).astype(int)
            found += [f.numpy() for f in reader.read(wanted.tolist(), 2 * SIDE)]
    if not found:
        raise DataError("no footage to make a set from")
    return found


def clip(rng: np.random.Generator, label: str, places: list[np.ndarray], things: list[np.ndarray]):
    """One clip uint8 [FRAMES, SIDE, SIDE, 3] of a class."""
    place, thing = (_cut(rng, each[rng.integers(len(each))], SIDE) for each in (places, things))
    radius = rng.uniform(9, 12)
    at, speed = rng.uniform(0, SIDE, 2), rng.uniform(0.75, 1.5)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for t in range(FRAMES):
        centre = np.round(at + speed * t * np.array(CLASSES[label])).astype(int)
        # Distances on a torus; the texture goes along.
        dy, dx = (
            (grid - c + SIDE // 2) % SIDE - SIDE // 2
            for grid, c in zip((rows, columns), centre, strict=True)
        )
        inside = dy**2 + dx**2 < radius**2
        frame = place.copy()
        frame[inside] = thing[(dy + SIDE // 2)[inside], (dx + SIDE // 2)[inside]]
        frames[t] = frame
    return frames


def _cut(rng: np.random.Generator, picture: np.ndarray, side: int) -> np.ndarray:
    height, width = picture.shape[:2]
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    return picture[top : top + side, left : left + side]


def write_clip(
    path: Path, frames: np.ndarray, fps: int = FPS, gop: int = FRAMES, crf: int = 12
) -> None:
    """An H.264 file whose pixels are nearly those given, uint8 [T, H, W, 3]; a keyframe every `gop`
    frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        for k, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = k
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def make(
    folder: Path,
    name: str,
    count: int,
    pictures: list[np.ndarray],
    seed: int,
    labelled: bool,
    still: bool = False,
) -> Path:
    """Write `count` clips, as many of each class, and their index.

    labelled: with their labels, and scene by scene; without, each clip has a scene of its own.
    still: one frame of each, chosen at random, all the time. Returns the index. Places and things
    are of the same pictures; the test may share none with training.
    """
    rows = []
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i, label in zip(range(count), itertools.cycle(CLASSES)):
        path = folder / name / f"{i:05d}.mp4"
        scene = i // len(CLASSES) if labelled else i
        frames = clip(np.random.default_rng((seed, scene)), label, pictures, pictures)
        if still:
            at = np.random.default_rng((seed, i, 1)).integers(FRAMES)
            frames = np.stack([frames[at]] * FRAMES)
        write_clip(path, frames)
        rows.append(VideoRow(str(path.absolute()), label if labelled else None, **probe(path)))
    index = folder / f"{name}.jsonl"
    write_index(rows, index)
    return index
