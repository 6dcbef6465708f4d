"""Videos with damaged packets, by hand: python tests/data/damage.py [--seed 0] [--mutants 320]

For each, the frames that come without a word, against those of the whole file: one that is under
20 dB from all of them is bad. "lenient" is data.strict = false, what FFmpeg gives; "strict"
refuses what FFmpeg flags as damaged and all that may be predicted from it.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import av
import numpy as np
import odd_videos

from mae_fast.data.container import BadVideo
from mae_fast.data.decode import VideoReader

VIDEOS = (
    *("h264.mp4", "h264.mkv", "h264.ts", "one_gop.mp4", "open_gop.mp4", "many_b.mkv"),
    *("hevc.mp4", "hevc.mkv", "mpeg2.mpg", "mpeg2.mkv", "mpeg4.avi", "mpeg4.mp4", "xvid.avi"),
    *("vp8.webm", "vp9.webm", "av1.mp4", "mjpeg.avi", "theora.ogv", "wmv2.wmv", "flv1.flv"),
)


def flip(data: bytearray, pos: int, size: int, rng) -> None:
    """One bit, behind the packet's head."""
    at = pos + size // 8 + int(rng.integers(size - size // 8))
    data[at] ^= 1 << int(rng.integers(8))


def zeros(data: bytearray, pos: int, size: int, rng) -> None:
    """The second half of a packet."""
    data[pos + size // 2 : pos + size] = bytes(size - size // 2)


def noise(data: bytearray, pos: int, size: int, rng) -> None:
    n = min(size, 64)
    at = pos + int(rng.integers(size - n + 1))
    data[at : at + n] = rng.bytes(n)


def hole(data: bytearray, pos: int, size: int, rng) -> None:
    """A sector that was never written, wherever it falls."""
    at = max(pos - 256, 0)
    data[at : at + 512] = bytes(len(data[at : at + 512]))


WAYS = (flip, zeros, noise, hole)


def packets(path: Path) -> list[tuple[int, int]]:
    """(position, bytes) of every packet with a known place."""
    with av.open(str(path)) as container:
        found = container.demux(container.streams.video[0])
        return [(p.pos, p.size) for p in found if p.size > 16 and p.pos is not None and p.pos >= 0]


def bad_frames(path: Path, clean: np.ndarray, strict: bool) -> tuple[int, int] | None:
    """How many frames were given, and how many of them are under 20 dB; None: it is refused."""
    given = bad = 0
    try:
        reader = VideoReader(path, strict=strict)
    except BadVideo:
        return None
    with reader:
        for i in range(0, min(reader.num_frames, len(clean)), 3):
            try:
                frame = reader.read([i])[0].numpy().astype(float)
            except BadVideo:
                continue
            given += 1
            bad += frame.shape != clean[0].shape or nearest(frame, clean, i) > 650.25
    return given, bad


def nearest(frame: np.ndarray, clean: np.ndarray, i: int) -> float:
    """Mean squared error to frame i, or to another one if a lost packet has moved the numbers."""
    own = np.square(frame - clean[i]).mean()
    return own if own < 100 else min(np.square(frame - c).mean() for c in clean)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=320)
    options = parser.parse_args()
    rng, folder, sums = np.random.default_rng(options.seed), Path(tempfile.mkdtemp()), {}
    for k in range(options.mutants):
        name, way = VIDEOS[k % len(VIDEOS)], WAYS[k // len(VIDEOS) % len(WAYS)]
        whole = odd_videos.make(name, folder)
        with VideoReader(whole) as reader:
            clean = reader.read(range(reader.num_frames)).numpy().astype(float)
        places = packets(whole)
        data = bytearray(whole.read_bytes())
        way(data, *places[int(rng.integers(len(places)))], rng)
        path = folder / f"damaged-{name}"
        path.write_bytes(data)
        found = [bad_frames(path, clean, strict) for strict in (False, True)]
        row = sums.setdefault(name.split(".")[0], Counter())
        row["mutants"] += 1
        for kind, outcome in zip(("lenient", "strict"), found, strict=True):
            if outcome is None:
                row[f"{kind} refused"] += 1
            else:
                row[f"{kind} given"] += outcome[0]
                row[f"{kind} bad"] += outcome[1]
                row[f"{kind} mutants"] += outcome[1] > 0
    shutil.rmtree(folder)
    columns = (
        "mutants",
        *(f"{k} {c}" for k in ("lenient", "strict") for c in ("given", "bad", "mutants")),
    )
    print(f"seed {options.seed}; every third frame is read; bad: under 20 dB", *columns, sep=" | ")
    for name, row in {**sums, "all": sum(sums.values(), Counter())}.items():
        print(name, *(row[c] for c in columns), sep=" | ")


if __name__ == "__main__":
    main()
