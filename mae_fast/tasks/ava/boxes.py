"""Boxes float [P, 4], (x1, y1, x2, y2), through what happens to their frames.

Coordinates are of edges, not of pixels' centres: a frame W pixels wide ends at W, and its mirror
image takes x to W - x. (SlowFast's and AlphAction's flips are of pixel numbers, W - x - 1.)
"""

import numpy as np

Jitter = tuple[float, float, float, float]


def cropped(
    boxes: np.ndarray, crop: tuple[int, int, int, int], size: int, flip: bool
) -> np.ndarray:
    """Boxes in pixels of a frame, in those of its crop (top, left, height, width) that was resized
    to size x size and then mirrored if flip; cut at its edges, and empty where nothing is left."""
    top, left, height, width = crop
    scale = np.array([size / width, size / height] * 2)
    found = np.clip((boxes - np.array([left, top] * 2)) * scale, 0, size)
    return found[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [size, 0, size, 0] if flip else found


def alive(boxes: np.ndarray, least: float = 1.0) -> np.ndarray:
    """Which boxes are `least` pixels wide and high or more: bool [P]."""
    return (boxes[:, 2:] - boxes[:, :2] >= least).all(axis=1)


def jittered(rng: np.random.Generator, boxes: np.ndarray, by: Jitter, size: int) -> np.ndarray:
    """Each edge moved at random, as shares of the box's sides: by is (x outwards, x inwards, y
    outwards, y inwards) at most (AlphAction's random_aug). Stays in the frame, one pixel at least.
    """
    x_out, x_in, y_out, y_in = by
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    low = np.array([-x_out, -y_out, -x_in, -y_in])
    high = np.array([x_in, y_in, x_out, y_out])
    found = boxes + sides * rng.uniform(low, high, boxes.shape)
    first = np.clip(found[:, :2], 0, size - 1)
    return np.concatenate([first, np.clip(found[:, 2:], first + 1, size)], axis=1)


def extended(boxes: np.ndarray, by: tuple[float, float], height: float, width: float) -> np.ndarray:
    """Boxes wider and higher by these shares of their sides, cut at the frame's edges."""
    pad = (boxes[:, 2:] - boxes[:, :2]) * np.array(by) / 2
    found = boxes + np.concatenate([-pad, pad], axis=1)
    return np.clip(found, 0, np.array([width, height] * 2))


def square_crop(
    rng: np.random.Generator, height: int, width: int, size: int, short: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random square (top, left, side, side) of a frame that is resized to size x size: as if the
    frame's short side were brought to a random number within `short`, and size x size cut out."""
    side = min(round(size * min(height, width) / rng.uniform(*short)), height, width)
    side = max(side, 1)
    top = int(rng.integers(0, height - side, endpoint=True))
    left = int(rng.integers(0, width - side, endpoint=True))
    return top, left, side, side
