"""Of uncurated videos: where `mae-fast pack` cuts them into shots, and what it drops, and why.

What is judged is a small picture of each frame, in the pass that encodes it. A near-duplicate is
told by a difference hash (dHash, 64 bits) of three frames, at a quarter, half and three quarters.
"""

import itertools
from typing import Any

import numpy as np

from mae_fast.errors import ConfigError

OPTIONS = ("min_seconds", "static", "black", "near_duplicates", "shots")
KINDS = ("too short", "static", "black", "near-duplicate")  # as a reason begins
_CELL = 16  # pixels of a side of a cell of 8 x 9, of which the small picture is made
# Grey levels of 255. Of one picture with noise, coded at 64 x 48, a cell's mean moved by 3.0.
_STATIC, _BLACK = 5.0, 24.0
_LIT = 0.1  # the share of frames that a black video may have otherwise
_BITS = 19  # of 192, a tenth: two videos that have nothing in common differ in about half
_ONES = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)


def too_short(seconds: float, how: dict[str, Any]) -> str | None:
    least = how.get("min_seconds", 0)
    return f"too short: {seconds:.2f} s of {least:g}" if seconds < least else None


def check_shots() -> None:
    """Raises ConfigError where shots cannot be found here."""
    try:
        _detector()
    except ImportError as e:
        raise ConfigError(
            f"--shots needs PySceneDetect (pip install 'mae-fast[shots]'): {e}"
        ) from None


def _detector():
    import cv2
    import scenedetect

    cv2.setNumThreads(1)
    return scenedetect.ContentDetector()


class Look:
    """What is seen of one video's frames, in their order."""

    def __init__(self, how: dict[str, Any], fps: float):
        self.how, self.fps = how, fps
        self.numbers: list[int] = []
        self.grids: list[np.ndarray] = []
        self.cuts: set[int] = set()
        self.detector = _detector() if how.get("shots") else None

    def add(self, k: int, frame) -> None:
        """Frame k, PyAV's; one that was met before does not count again."""
        if self.numbers and k <= self.numbers[-1]:
            return
        from av.video.reformatter import Interpolation

        size = dict(width=9 * _CELL, height=8 * _CELL)
        small = frame.reformat(**size, format="bgr24", interpolation=Interpolation.AREA, threads=1)
        picture = small.to_ndarray()
        grey = picture @ np.array([0.114, 0.587, 0.299], np.float32)
        self.grids.append(grey.reshape(8, _CELL, 9, _CELL).mean((1, 3)))
        self.numbers.append(k)
        if self.detector:
            self._take(self.detector.process_frame(self._time(k), picture))

    def _time(self, k: int):
        from scenedetect import FrameTimecode

        return FrameTimecode(k, self.fps)

    def _take(self, cuts) -> None:
        self.cuts |= {cut.frame_num for cut in cuts}

    def pieces(self, times: list[float]) -> list[dict[str, Any]]:
        """The shots, or the whole video: start, frames, duration, fps, the reason to drop it or
        None, and its hash. times: seconds of each frame, and where the last one ends."""
        if self.detector and self.numbers:
            self._take(self.detector.post_process(self._time(self.numbers[-1])))
        n = len(times) - 1
        ends = [0, *sorted(c for c in self.cuts if 0 < c < n), n]
        return [self._piece(a, b, times[b] - times[a]) for a, b in itertools.pairwise(ends)]

    def _piece(self, a: int, b: int, seconds: float) -> dict[str, Any]:
        at = np.searchsorted(self.numbers, [a, b])
        grids = np.array(self.grids[at[0] : at[1]]).reshape(-1, 8, 9)
        piece = {"start": a, "frames": b - a, "duration": seconds, "fps": (b - a) / seconds}
        error = too_short(seconds, self.how)
        if not error and len(grids):
            error = self._black(grids) or self._static(grids)
        return {**piece, "error": error, "hash": dhash(grids).hex() if len(grids) else ""}

    def _black(self, grids: np.ndarray) -> str | None:
        lightest = float(np.quantile(grids.max((1, 2)), 1 - _LIT))
        if not self.how.get("black") or lightest > _BLACK:
            return None
        return f"black: no cell of nine frames in ten is lighter than {lightest:.0f} of 255"

    def _static(self, grids: np.ndarray) -> str | None:
        moved = float(np.ptp(grids, axis=0).max())
        if not self.how.get("static") or moved > _STATIC:
            return None
        return f"static: no cell moves by more than {moved:.1f} of 255"


def dhash(grids: np.ndarray) -> bytes:
    """24 bytes of [n, 8, 9] grey levels: where a cell is lighter than the one to its left, of three
    frames."""
    chosen = grids[[len(grids) * q // 4 for q in (1, 2, 3)]]
    return np.packbits(chosen[:, :, 1:] > chosen[:, :, :-1]).tobytes()


class Seen:
    """The hashes of what was kept so far, in the order of the index."""

    def __init__(self):
        self.names: list[str] = []
        self.hashes = np.zeros((1024, 12), np.uint16)

    def duplicate(self, name: str, code: str) -> str | None:
        """The reason to drop what has the hash `code` (hex); None, and it is kept in mind."""
        if not code:
            return None
        new, n = np.frombuffer(bytes.fromhex(code), np.uint16), len(self.names)
        apart = _ONES[self.hashes[:n] ^ new].sum(1)
        if n and apart.min() <= _BITS:
            first = int(apart.argmin())
            return f"near-duplicate: {apart[first]} of 192 bits from {self.names[first]}"
        if n == len(self.hashes):
            self.hashes = np.concatenate([self.hashes, np.zeros_like(self.hashes)])
        self.hashes[n] = new
        self.names.append(name)
        return None
