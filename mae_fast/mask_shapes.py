"""The official masks that are thrown block by block, or run through cells, given random numbers.

`rng` has random.Random's `uniform` and `randint`, and is asked in the order of the official
generator: the same numbers give the same mask. Blocks are thrown on the host, until they fit.
Shapes are (t, h, w) in cells; hidden cells are True.
"""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int, int]
CELL = 2  # tokens on a side of PySlowFast's and VideoMAE V2's cells
_LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)  # BEiT's
# V-JEPA 2's two masks of a clip: blocks, and the share of the frame that each covers.
MULTIBLOCK = ((8, 0.15), (2, 0.7))
_MULTIBLOCK_ASPECT = 0.75, 1.5


class Numbers(Protocol):
    """random.Random, or whatever gives another's numbers."""

    def uniform(self, a: float, b: float) -> float: ...

    def randint(self, a: int, b: int) -> int: ...


def cube(window: Shape, masked: int, rng: Numbers) -> np.ndarray:
    """PySlowFast's MaskingGenerator3D: bool [t, h, w] with at most `masked` cells hidden.

    Boxes of 1 to t time steps and of a fifth to all of a frame's cells, each within what is still
    to hide. After 100 that do not fit it gives up: fewer are hidden then.
    """
    t, h, w = window
    hidden = np.zeros(window, dtype=bool)
    left = masked
    while left > 0:
        for _ in range(100):
            bh, bw = _sides(h * w // 5, h * w, rng)
            bt = rng.randint(1, t)
            if bh < h and bw < w:
                new = _throw(hidden, (bt, bh, bw), left, rng)
                if new:
                    break
        else:
            break
        left -= new
    return hidden


def tube_blocks(window: tuple[int, int], masked: int, rng: Numbers) -> np.ndarray:
    """PySlowFast's MaskingGenerator (BEiT's), which its loader repeats in time: bool [h, w] with at
    most `masked` cells hidden. It gives up after 10 blocks that do not fit."""
    h, w = window
    hidden = np.zeros((1, h, w), dtype=bool)
    left = masked
    while left > 0:
        for _ in range(10):
            bh, bw = _sides(masked // 5, left, rng)
            if bh < h and bw < w:
                new = _throw(hidden, (None, bh, bw), left, rng)
                if new:
                    break
        else:
            break
        left -= new
    return hidden[0]


def _sides(least: float, most: float, rng: Numbers) -> tuple[int, int]:
    """Height and width of a block of so many cells, of log-uniform aspect."""
    area, aspect = rng.uniform(least, most), math.exp(rng.uniform(*_LOG_ASPECT))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def _throw(hidden: np.ndarray, size: tuple, most: int, rng: Numbers) -> int:
    """Hide a block somewhere if it hides 1 to `most` new cells: how many it hid. A time of None is
    the only one there is, and takes no number."""
    t, h, w = hidden.shape
    bt, bh, bw = size
    top, left = rng.randint(0, h - bh), rng.randint(0, w - bw)
    front, bt = (0, 1) if bt is None else (rng.randint(0, t - bt), bt)
    box = hidden[front : front + bt, top : top + bh, left : left + bw]
    new = box.size - int(box.sum())
    if not 0 < new <= most:
        return 0
    box[:] = True
    return new


def multiblock_size(window: Shape, scale: float, rng: Numbers) -> Shape:
    """(t, h, w) of V-JEPA's blocks, the same in a whole batch: all of time, a share of the frame.

    Its three numbers are those of time, area and aspect, of which the first two have no say.
    """
    t, h, w = window
    rng.uniform(1.0, 1.0)
    area = int(h * w * rng.uniform(scale, scale))
    aspect = rng.uniform(*_MULTIBLOCK_ASPECT)
    bh, bw = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return t, min(bh, h), min(bw, w)


def multiblock(window: Shape, size: Shape, blocks: int, rng: Numbers) -> np.ndarray:
    """V-JEPA's mask of one clip: bool [t, h, w], `blocks` blocks of a size, anywhere. A mask that
    hides all is thrown again."""
    while True:
        hidden = np.zeros(window, dtype=bool)
        for _ in range(blocks):
            h, w = (rng.randint(0, n - b) for n, b in zip(window[1:], size[1:], strict=True))
            front = rng.randint(0, window[0] - size[0])
            hidden[front : front + size[0], h : h + size[1], w : w + size[2]] = True
        if not hidden.all():
            return hidden


def running_cell(window: Shape, masked: int, start: Tensor) -> Tensor:
    """VideoMAE V2's RunningCellMaskingGenerator: bool [B, t, h, w], `masked` of 4 tokens hidden in
    each cell, the next ones at each time step. start [B], of 0 to 3, is all that is random."""
    t, h, w = (torch.arange(n, device=start.device) for n in window)
    place = h[:, None] % CELL * CELL + w % CELL  # in its cell
    turn = place + t[:, None, None] + 1 + start[:, None, None, None]
    return turn % CELL**2 < masked
