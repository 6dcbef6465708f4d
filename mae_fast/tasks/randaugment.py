"""RandAugment of a clip: one draw for all frames, on uint8 [T, H, W, 3], equal to timm's operations
on PIL images to the bit.

`rand-m7-n4-mstd0.5-inc1`: n operations (2 unless said), each done with probability 0.5 and a
magnitude normal about m with deviation mstd within [0, 10]; inc1: a larger one always changes more.
What depends on a picture (its histogram) is taken frame by frame. Affine ones are bicubic. All but
the simplest are PIL's own, a frame at a time: numpy's were slower.
"""

import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mae_fast.errors import ConfigError

Frames = np.ndarray  # uint8 [T, H, W, 3]
FILL = (128, 128, 128)


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


def _each(frames: Frames, change: Callable[[Image.Image], Image.Image]) -> Frames:
    """The operation of every frame."""
    return np.stack([np.asarray(change(Image.fromarray(f))) for f in frames])


def _enhanced(kind: type) -> Callable[[Frames, float], Frames]:
    return lambda frames, factor: _each(frames, lambda image: kind(image).enhance(factor))


def _affine(frames: Frames, *matrix: float) -> Frames:
    how = dict(resample=Image.Resampling.BICUBIC, fillcolor=FILL)
    kind = Image.Transform.AFFINE
    return _each(frames, lambda image: image.transform(image.size, kind, matrix, **how))


def auto_contrast(frames: Frames) -> Frames:
    return _each(frames, ImageOps.autocontrast)


def equalize(frames: Frames) -> Frames:
    return _each(frames, ImageOps.equalize)


def invert(frames: Frames) -> Frames:
    return 255 - frames


def rotate(frames: Frames, degrees: float) -> Frames:
    how = dict(resample=Image.Resampling.BICUBIC, fillcolor=FILL)
    return _each(frames, lambda image: image.rotate(degrees, **how))


def posterize(frames: Frames, bits: int) -> Frames:
    return frames & np.uint8(256 - 2 ** (8 - bits)) if bits else np.zeros_like(frames)


def solarize(frames: Frames, threshold: int) -> Frames:
    return np.where(frames < threshold, frames, 255 - frames)


def solarize_add(frames: Frames, add: int) -> Frames:
    # Below 128 nothing overflows: add is at most 128.
    return np.where(frames < 128, frames + np.uint8(add), frames)


def shear_x(frames: Frames, factor: float) -> Frames:
    return _affine(frames, 1, factor, 0, 0, 1, 0)


def shear_y(frames: Frames, factor: float) -> Frames:
    return _affine(frames, 1, 0, 0, factor, 1, 0)


def translate_x(frames: Frames, share: float) -> Frames:
    return _affine(frames, 1, 0, share * frames.shape[2], 0, 1, 0)


def translate_y(frames: Frames, share: float) -> Frames:
    return _affine(frames, 1, 0, 0, 0, 1, share * frames.shape[1])


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
    "ColorIncreasing": (_enhance, _enhanced(ImageEnhance.Color)),
    "ContrastIncreasing": (_enhance, _enhanced(ImageEnhance.Contrast)),
    "BrightnessIncreasing": (_enhance, _enhanced(ImageEnhance.Brightness)),
    "SharpnessIncreasing": (_enhance, _enhanced(ImageEnhance.Sharpness)),
    "ShearX": (_signed(0.3), shear_x),
    "ShearY": (_signed(0.3), shear_y),
    "TranslateXRel": (_signed(0.45), translate_x),
    "TranslateYRel": (_signed(0.45), translate_y),
}
