"""Which video, which frames and which box: pure numbers, as the official MAE-ST loader draws them.

An epoch is one permutation of the videos; where they have weights, of as many draws, in which a
video comes as often as its share says, rounded up or down. Draws are counted over the whole run, so
an epoch flows into the next and no batch is short.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """How often videos are drawn beside one another: float [n], above 0."""

    of: np.ndarray


# Two: the epoch being drawn, and around its end the next one.
@functools.lru_cache(maxsize=2)
def order(n: int, seed: int, epoch: int, weights: Weights | None = None) -> np.ndarray:
    """The order of the n videos in one epoch, int64 [n]: a permutation from (seed, epoch), of the
    videos or of as many draws of them by weight, evenly spaced from a random start."""
    rng = np.random.default_rng((seed, epoch))
    draws = rng.permutation(n)
    if weights is None:
        return draws
    ends = np.cumsum(weights.of)
    at = (draws + rng.random()) / n * ends[-1]
    return np.searchsorted(ends, at, side="right").clip(max=n - 1)


def draw(n: int, g: int, seed: int, weights: Weights | None = None) -> tuple[int, int]:
    """The epoch and the video of global draw g (0, 1, 2, ... over the whole run) of n videos."""
    epoch, position = divmod(g, n)
    return epoch, int(order(n, seed, epoch, weights)[position])


def weights_of(rows) -> Weights | None:
    """The weights of an index's rows; None where they are all the same."""
    of = np.array([r.weight for r in rows])
    return Weights(of) if len(set(of)) > 1 else None


def clip_indices(
    rng: np.random.Generator,
    num_frames_in_video: int,
    fps: float,
    num_frames: int,
    sampling_rate: int,
    target_fps: float,
    lo: float = 0.0,
    hi: float | None = None,
) -> Tensor:
    """Frame numbers of one random clip, int64 [num_frames], in [0, num_frames_in_video).

    A clip spans sampling_rate * num_frames frames at target_fps, converted to the video's fps, and
    lies within frames lo to hi (default: the whole video). At 30 fps, 16 frames and rate 4 the
    stride is 63 / 15 = 4.2: 4, 4, 4, 4, 5. Past the end the last frame repeats.
    """
    n = num_frames_in_video
    clip_sz = sampling_rate * num_frames / target_fps * fps
    start = rng.uniform(lo, max((n if hi is None else min(hi, n)) - clip_sz, lo))
    indices = torch.linspace(start, start + clip_sz - 1, num_frames, device="cpu")
    return indices.clamp(0, n - 1).long()


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) in pixels: a share of the picture within `area`,
    width / height log-uniform within `aspect`. Ten tries, then the largest centred box whose
    aspect is allowed (the rule of torchvision's RandomResizedCrop)."""
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h, endpoint=True))
            left = int(rng.integers(0, width - w, endpoint=True))
            return top, left, h, w
    w = min(width, max(1, round(height * aspect[1])))
    h = min(height, max(1, round(width / aspect[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def shrink(frames: Tensor, short_side: int) -> Tensor:
    """uint8 [T, H, W, 3] with its short side brought down to short_side pixels, antialiased.

    The long side is rounded down, as in the official code. Frames that are small enough, and any
    with short_side 0, come back as they are.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    if short_side == 0 or short <= short_side:
        return frames
    x = F.interpolate(
        frames.permute(0, 3, 1, 2),
        size=(height * short_side // short, width * short_side // short),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    return x.permute(0, 2, 3, 1).contiguous()
