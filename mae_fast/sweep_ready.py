"""Sweeps that are ready by name, with what the paper says of each arm.

arXiv 2205.09113, ViT-L, K400, 800 effective epochs, top-1 after fine-tuning; its default is 84.4.
"M" marks a number that was not confirmed in the paper's text.
"""

from typing import Any, NamedTuple


class Arm(NamedTuple):
    """Overrides of the sweep's configuration, by section; `paper`: the paper's own result."""

    overrides: dict[str, dict[str, Any]]
    paper: str = ""


def _mask(strategy: str, ratio: float, paper: str) -> Arm:
    return Arm({"mask": {"strategy": strategy, "ratio": ratio}}, paper)


# Whose arms are the paper's 22.
PAPER = ("masks", "target", "crop", "repeats", "decoder_width", "decoder_depth")
READY: dict[str, dict[str, Arm]] = {
    "ratio": {
        "50%": _mask("random", 0.5, "worse"),
        "75%": _mask("random", 0.75, "worse"),
        "90%": _mask("random", 0.9, "84.4"),
        "95%": _mask("random", 0.95, "catches up with long training"),
    },
    "masks": {
        "random 90%": _mask("random", 0.9, "84.4"),
        "tube 90%": _mask("tube", 0.9, "83.5"),
        "frame 75%": _mask("frame", 0.75, "79.1"),
        "frame 87.5%": _mask("frame", 0.875, "75.4"),
        "cube 75%": _mask("cube", 0.75, "83.2"),
    },
    "decoder_width": {
        str(width): Arm({"model": {"decoder_embed_dim": width}}, paper)
        for width, paper in ((128, "80.8 M"), (256, "83.1 M"), (512, "84.4"), (1024, "83.7 M"))
    },
    "decoder_depth": {
        str(depth): Arm({"model": {"decoder_depth": depth}}, paper)
        for depth, paper in ((1, "83.2 M"), (2, "83.6 M"), (4, "84.4"), (8, "84.3 M"))
    },
    "target": {
        "pixels": Arm({"model": {"norm_pix_loss": False}}, "83.8"),
        "normalised pixels": Arm({"model": {"norm_pix_loss": True}}, "84.4"),
        "HOG": Arm({"model": {"target": "hog"}}, "84.0 M"),
    },
    "crop": {
        "centre": Arm({"data": {"crop_area": [1.0, 1.0], "crop_aspect": [1.0, 1.0]}}, "83.9 M"),
        "0.5 to 1": Arm({"data": {"crop_area": [0.5, 1.0]}}, "84.4"),
        "0.08 to 1": Arm({"data": {"crop_area": [0.08, 1.0]}}, "83.4 M"),
    },
    "repeats": {
        # The paper's 800 epochs of clips, however often a video is decoded.
        str(n): Arm({"data": {"repeat_aug": n}, "train": {"epochs": 800 / n}}, paper)
        for n, paper in ((1, "83.7 M"), (2, "84.3 M"), (4, "84.4"))
    },
}
