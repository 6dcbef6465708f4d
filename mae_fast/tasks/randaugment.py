"""RandAugment of a clip: one draw for all frames, on uint8 [T, H, W, 3], as timm's operations on
PIL images give it, to the bit.

`rand-m7-n4-mstd0.5-inc1`: n operations (2 unless said), each done with probability 0.5 and a
magnitude normal about m with deviation mstd within [0, 10]; inc1: a larger one always changes more.
What depends on a picture (its histogram) is taken frame by frame. Affine ones are PIL's, bicubic.
"""

import re
from collections.abc import Callable

import numpy as np

from mae_fast.errors import ConfigError

Frames = np.ndarray  # uint8 [T, H, W, 3]
FILL = (128, 128, 128)
_RAMP = np.arange(256)


def parse(text: str) -> tuple[float, int, float]:
    """(m, n, mstd) of a policy's name. Raises ConfigError for another kind of policy."""
    parts = dict(re.findall(r"-(mstd|inc|m|n)([0-9.]+)(?=-|$)", text))
    again = "rand" + "".join(f"-{k}{v}" for k, v in parts.items())
    try:
        found = float(parts["m"]), int(parts.get("n", 2)), float(parts.get("mstd", 0))
    except (KeyError, ValueError):
        found = None
    if found is None or again != text or parts.get("inc") != "1":
        raise ConfigError(f"augment.randaugment must be as rand-m7-n4-mstd0.5-inc1, got {text!r}")
    return found


def randaugment(rng: np.random.Generator, frames: Frames, policy: str) -> Frames:
    """The clip after one draw of the policy."""
    m, n, mstd = parse(policy)
    names = list(OPS)
    for choice in rng.integers(len(names), size=n):
        if rng.random() > 0.5:
            continue
        magnitude = min(max(rng.normal(m, mstd), 0.0), 10.0)
        sign = -1 if rng.random() > 0.5 else 1
        frames = apply(names[choice], frames, magnitude, sign)
    return frames


def apply(name: str, frames: Frames, magnitude: float, sign: int = 1) -> Frames:
    """One operation at a magnitude in [0, 10]; the sign of those that have two directions."""
    argument, function = OPS[name]
    return function(frames) if argument is None else function(frames, argument(magnitude, sign))


def _look_up(frames: Frames, table: np.ndarray) -> Frames:
    """table [256] for all, or [T, 3, 256] by frame and channel."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    if table.ndim == 1:
        return table[frames]
    return np.stack(
        [np.stack([t[c][f[..., c]] for c in range(3)], -1) for f, t in zip(frames, table)]  # noqa: B905
    )


def _histograms(frames: Frames) -> np.ndarray:
    """[T, 3, 256] counts."""
    return np.stack(
        [[np.bincount(f[..., c].ravel(), minlength=256) for c in range(3)] for f in frames]
    )


def auto_contrast(frames: Frames) -> Frames:
    tables = []
    for h in _histograms(frames).reshape(-1, 256):
        there = h.nonzero()[0]
        low, high = there[0], there[-1]
        scale = 255.0 / max(high - low, 1)
        stretched = (_RAMP * scale - low * scale).astype(int)
        tables.append(stretched if high > low else _RAMP)
    return _look_up(frames, np.stack(tables).reshape(-1, 3, 256))


def equalize(frames: Frames) -> Frames:
    tables = []
    for h in _histograms(frames).reshape(-1, 256):
        there = h[h > 0]
        step = int(there.sum() - there[-1]) // 255
        before = np.concatenate([[0], h.cumsum()[:-1]])
        tables.append((step // 2 + before) // step if len(there) > 1 and step else _RAMP)
    return _look_up(frames, np.stack(tables).reshape(-1, 3, 256))


def invert(frames: Frames) -> Frames:
    return 255 - frames


def posterize(frames: Frames, bits: int) -> Frames:
    return frames if bits >= 8 else _look_up(frames, _RAMP & ~(2 ** (8 - bits) - 1))


def solarize(frames: Frames, threshold: int) -> Frames:
    return _look_up(frames, np.where(threshold > _RAMP, _RAMP, 255 - _RAMP))


def solarize_add(frames: Frames, add: int) -> Frames:
    return _look_up(frames, np.where(_RAMP < 128, np.minimum(_RAMP + add, 255), _RAMP))


def _blend(flat: np.ndarray, frames: np.ndarray, factor: float) -> np.ndarray:
    """PIL's blend of uint8 in fp32, cut off at the ends and truncated."""
    flat, wide = flat.astype(np.float32), frames.astype(np.float32)
    return np.clip(flat + np.float32(factor) * (wide - flat), 0, 255).astype(np.uint8)


def _grey(frames: Frames) -> np.ndarray:
    weights = np.array([19595, 38470, 7471], np.uint32)
    return ((frames @ weights + 0x8000) >> 16).astype(np.uint8)  # [T, H, W]


def brightness(frames: Frames, factor: float) -> Frames:
    return _blend(np.zeros_like(_RAMP), _RAMP, factor)[frames]


def contrast(frames: Frames, factor: float) -> Frames:
    means = [int(g.mean(dtype=np.float64) + 0.5) for g in _grey(frames)]
    return np.stack(
        [_blend(np.full(256, m), _RAMP, factor)[f] for m, f in zip(means, frames, strict=True)]
    )


def color(frames: Frames, factor: float) -> Frames:
    return _blend(_grey(frames)[..., None], frames, factor)


def sharpness(frames: Frames, factor: float) -> Frames:
    """Away from PIL's SMOOTH: 1 1 1, 1 5 1, 1 1 1 over 13, with the border as it is."""
    wide, (_, height, width, _) = frames.astype(np.int32), frames.shape
    total = 4 * wide[:, 1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total = total + wide[:, row : height - 2 + row, column : width - 2 + column]
    smooth = frames.copy()
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(smooth, frames, factor)


def _affine(frames: Frames, change: Callable) -> Frames:
    """PIL's transform, frame by frame. `change(image, resample and fill)` -> image."""
    from PIL import Image

    how = dict(resample=Image.Resampling.BICUBIC, fillcolor=FILL)
    return np.stack([np.asarray(change(Image.fromarray(f), how)) for f in frames])


def _matrix(frames: Frames, *matrix: float) -> Frames:
    from PIL import Image

    kind = Image.Transform.AFFINE
    return _affine(frames, lambda image, how: image.transform(image.size, kind, matrix, **how))


def rotate(frames: Frames, degrees: float) -> Frames:
    return _affine(frames, lambda image, how: image.rotate(degrees, **how))


def shear_x(frames: Frames, factor: float) -> Frames:
    return _matrix(frames, 1, factor, 0, 0, 1, 0)


def shear_y(frames: Frames, factor: float) -> Frames:
    return _matrix(frames, 1, 0, 0, factor, 1, 0)


def translate_x(frames: Frames, share: float) -> Frames:
    return _matrix(frames, 1, 0, share * frames.shape[2], 0, 1, 0)


def translate_y(frames: Frames, share: float) -> Frames:
    return _matrix(frames, 1, 0, 0, 0, 1, share * frames.shape[1])


def _signed(most: float) -> Callable[[float, int], float]:
    return lambda magnitude, sign: sign * (magnitude / 10 * most)


def _enhance(magnitude: float, sign: int) -> float:
    return max(0.1, 1 + sign * (magnitude / 10 * 0.9))


# timm's names -> (argument from magnitude and sign, operation).
OPS = {
    "AutoContrast": (None, auto_contrast),
    "Equalize": (None, equalize),
    "Invert": (None, invert),
    "Rotate": (_signed(30.0), rotate),
    "PosterizeIncreasing": (lambda m, _: 4 - int(m / 10 * 4), posterize),
    "SolarizeIncreasing": (lambda m, _: 256 - min(256, int(m / 10 * 256)), solarize),
    "SolarizeAdd": (lambda m, _: min(128, int(m / 10 * 110)), solarize_add),
    "ColorIncreasing": (_enhance, color),
    "ContrastIncreasing": (_enhance, contrast),
    "BrightnessIncreasing": (_enhance, brightness),
    "SharpnessIncreasing": (_enhance, sharpness),
    "ShearX": (_signed(0.3), shear_x),
    "ShearY": (_signed(0.3), shear_y),
    "TranslateXRel": (_signed(0.45), translate_x),
    "TranslateYRel": (_signed(0.45), translate_y),
}
