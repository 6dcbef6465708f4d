"""Batches of a loader, and what tests compare them by."""

from mae_fast.config import DataConfig
from mae_fast.data.loader import make_loader


def config(**changes):
    return DataConfig(**{"workers": 0, "repeat_aug": 2, "sampling_rate": 2, **changes})


def load(rows, cfg=None, **changes):
    options = {"num_frames": 8, "batch_size": 2, "seed": 5, "steps": 4, **changes}
    return list(make_loader(rows, cfg or config(), **options))


def clips(batches):
    """Every clip as comparable values, in order."""
    return [
        (int(s), p, tuple(box), bool(flip), frames.numpy().tobytes())
        for b in batches
        for s, p, box, flip, frames in zip(
            b.samples, b.paths, b.boxes.tolist(), b.flips, b.frames, strict=True
        )
    ]


def numbers(video, frames):
    return [video.number(f) for f in frames]
