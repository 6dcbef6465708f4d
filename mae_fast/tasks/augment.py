"""What changes a batch of labelled clips on its device: erasing, mixup and cutmix, soft targets.

Everything is a function of a numpy generator, so that a resumed run draws what it would have drawn.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mae_fast.errors import ConfigError


def erase(rng: np.random.Generator, video: Tensor, probability: float) -> None:
    """Random erasing in place, each clip of video [B, C, T, H, W] with the probability: one box for
    all frames, normal noise by the pixel. Box: 2% to a third of the area, aspect log-uniform within
    0.3 and 1 / 0.3, a hundred tries (random_erasing.py with cube, as all official codes call it).
    """
    height, width = video.shape[-2:]
    for clip in video:
        if rng.random() > probability:
            continue
        for _ in range(100):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                top, left = rng.integers(height - h, endpoint=True), rng.integers(width - w + 1)
                box = clip[..., top : top + h, left : left + w]
                generator = torch.Generator(video.device).manual_seed(int(rng.integers(2**62)))
                box.normal_(generator=generator)
                break


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets [B, classes]: 1 - smoothing at the label, and smoothing spread over all classes."""
    low = smoothing / classes
    target = torch.full((len(labels), classes), low, device=labels.device)
    return target.scatter_(1, labels[:, None], 1 - smoothing + low)


def timms_mixup() -> type:
    """timm's class. ConfigError without timm."""
    try:
        from timm.data.mixup import Mixup
    except ImportError as e:
        raise ConfigError(f"augment.mixup and cutmix are timm's (pip install timm): {e}") from e
    return Mixup


def mix(
    rng: np.random.Generator,
    video: Tensor,
    labels: Tensor,
    classes: int,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    switch: float,
    smoothing: float,
) -> Tensor:
    """timm's Mixup of a whole batch [B, C, T, H, W], in place, its boxes the same in all frames;
    returns the targets [B, classes]. B must be even. Needs timm; without mixup and cutmix it does
    not."""
    if not mixup and not cutmix:
        return smoothed(labels, classes, smoothing)
    names = dict(prob=probability, switch_prob=switch, label_smoothing=smoothing)
    mixed = timms_mixup()(mixup_alpha=mixup, cutmix_alpha=cutmix, num_classes=classes, **names)
    with _numpy_drawing(rng):
        # It knows images: frames are as channels to it.
        _, target = mixed(video.flatten(1, 2), labels)
    return target


@contextlib.contextmanager
def _numpy_drawing(rng: np.random.Generator) -> Iterator[None]:
    """numpy's global numbers, which timm draws, from a generator's; as they were afterwards."""
    before = np.random.get_state()
    np.random.seed(rng.integers(2**32, dtype=np.uint32))
    try:
        yield
    finally:
        np.random.set_state(before)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-mean over clips of sum target * log softmax, in fp32 under autocast (fp64 for double)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -(target * wide.log_softmax(dim=-1)).sum(dim=-1).mean()
