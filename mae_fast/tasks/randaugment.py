"""RandAugment of a clip: one draw for all frames, on uint8 [T, H, W, 3], equal to timm's operations
on PIL images to the bit.

`rand-m7-n4-mstd0.5-inc1`: n operations (2 unless said), each done with probability 0.5 and a
magnitude normal about m with deviation mstd within [0, 10]; inc1: a larger one always changes more.
What depends on a picture (its histogram) is taken frame by frame. Affine ones are bicubic.

Each operation is a few numbers (`planned`) for csrc/cpu/randaugment.h; `reference` is PIL itself, a
frame at a time, which stands in where the C++ kernels are not built.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from mae_fast.errors import ConfigError
from mae_fast.ops import dispatch

log = logging.getLogger("mae_fast")

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


def randaugment(rng: np.random.Generator, frames: Tensor, policy: str) -> Tensor:
    """The clip uint8 [T, H, W, 3] after one draw of the policy."""
    m, n, mstd = parse(policy)
    names = list(OPS)
    for choice in rng.integers(len(names), size=n):
        if rng.random() > 0.5:
            continue
        magnitude = min(max(rng.normal(m, mstd), 0.0), 10.0)
        sign = -1 if rng.random() > 0.5 else 1
        frames = apply(names[choice], frames, magnitude, sign)
    return frames


def apply(name: str, frames: Tensor, magnitude: float, sign: int = 1) -> Tensor:
    """One operation at a magnitude in [0, 10]; the sign of those that have two directions."""
    operation, numbers = OPS[name](magnitude / 10, sign, *frames.shape[1:3])
    return _kernel()(frames, operation, numbers)


@functools.cache
def _kernel() -> Callable[[Tensor, str, Sequence[float]], Tensor]:
    """The C++ one, or the reference where there is none."""
    if dispatch.load_cpp() is None and hasattr(torch.ops.mae_fast_clips, "randaugment"):
        return torch.ops.mae_fast_clips.randaugment
    log.warning("RandAugment is PIL's, a frame at a time: its C++ kernel is not built")
    return reference


def reference(frames: Tensor, operation: str, numbers: Sequence[float]) -> Tensor:
    """An operation as PIL does it. numbers: table, 256 values; brightness, contrast, color,
    sharpness, the factor; affine, the matrix; of autocontrast and equalize none."""
    made = (np.asarray(_of_image(Image.fromarray(f.numpy()), operation, numbers)) for f in frames)
    return torch.from_numpy(np.stack(list(made)))


def _of_image(image: Image.Image, operation: str, numbers: Sequence[float]) -> Image.Image:
    if operation == "table":
        return image.point([int(v) for v in numbers] * 3)
    if operation in ("autocontrast", "equalize"):
        return getattr(ImageOps, operation)(image)
    if operation == "affine":
        how = dict(resample=Image.Resampling.BICUBIC, fillcolor=FILL)
        return image.transform(image.size, Image.Transform.AFFINE, numbers, **how)
    return getattr(ImageEnhance, operation.capitalize())(image).enhance(numbers[0])


# What an operation of timm's is: (operation, numbers) by level in [0, 1], sign, height and width.
Planned = tuple[str, Sequence[float]]


def _table(change: Callable[[int, float], int]) -> Callable[..., Planned]:
    return lambda level, *_: ("table", [change(v, level) for v in range(256)])


def _alone(operation: str) -> Callable[..., Planned]:
    return lambda *_: (operation, ())


def _enhanced(operation: str) -> Callable[..., Planned]:
    return lambda level, sign, *_: (operation, (max(0.1, 1 + sign * level * 0.9),))


def _posterize(value: int, level: float) -> int:
    bits = 4 - int(level * 4)
    return value & (256 - 2 ** (8 - bits)) if bits else 0


def _solarize(value: int, level: float) -> int:
    return value if value < 256 - min(256, int(level * 256)) else 255 - value


def _solarize_add(value: int, level: float) -> int:
    return min(255, value + min(128, int(level * 110))) if value < 128 else value


def _rotate(level: float, sign: int, height: int, width: int) -> Planned:
    """About the middle, by at most 30 degrees, as Image.rotate has it: a whole turn is a copy."""
    angle = -math.radians(sign * (level * 30.0) % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    dx, dy = (a * -x + b * -y + 0.0 for a, b in ((cos, sin), (-sin, cos)))
    return "affine", (cos, sin, dx + x, -sin, cos, dy + y)


def _shear_x(level: float, sign: int, *_: int) -> Planned:
    return "affine", (1, sign * (level * 0.3), 0, 0, 1, 0)


def _shear_y(level: float, sign: int, *_: int) -> Planned:
    return "affine", (1, 0, 0, sign * (level * 0.3), 1, 0)


def _translate_x(level: float, sign: int, height: int, width: int) -> Planned:
    return "affine", (1, 0, sign * (level * 0.45) * width, 0, 1, 0)


def _translate_y(level: float, sign: int, height: int, width: int) -> Planned:
    return "affine", (1, 0, 0, 0, 1, sign * (level * 0.45) * height)


OPS: dict[str, Callable[[float, int, int, int], Planned]] = {
    "AutoContrast": _alone("autocontrast"),
    "Equalize": _alone("equalize"),
    "Invert": _table(lambda value, _: 255 - value),
    "Rotate": _rotate,
    "PosterizeIncreasing": _table(_posterize),
    "SolarizeIncreasing": _table(_solarize),
    "SolarizeAdd": _table(_solarize_add),
    "ColorIncreasing": _enhanced("color"),
    "ContrastIncreasing": _enhanced("contrast"),
    "BrightnessIncreasing": _enhanced("brightness"),
    "SharpnessIncreasing": _enhanced("sharpness"),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
