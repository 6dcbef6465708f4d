"""The page of a test on AVA: classes, and the frames with the surest mistakes, with their boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mae_fast import figures
from mae_fast.data import BadVideo
from mae_fast.page import Page, said
from mae_fast.tasks.ava.clips import WholeFrames
from mae_fast.tasks.ava.evaluate import iou
from mae_fast.tasks.config import FinetuneConfig

WORST, SHOWN, LISTED = 12, 3, 200
TRUE, FOUND = "#1a9850", "#e6550d"  # the page turns black and white into its own colours


def page(
    results: dict[str, Any], table: dict[str, dict], test, scores: Sequence[np.ndarray],
    cfg: FinetuneConfig, unused: list[str],
) -> Page:  # fmt: skip
    """The page of `results`, of `table` {class: its figures}, of a TestSet and its scores."""
    made = Page("AVA: what was tested", [f"mAP {results['mAP']:.2%} at 0.5 IoU, by the rule of the "
                "papers; chance on these boxes is "
                f"{results['mAP_chance']:.2%}."])  # fmt: skip
    made.section("Results")
    made.table(["what", "found"], [[k, said(v)] for k, v in results.items()])
    made.section("Classes", "A class without a box in the truth does not count.")
    rows = [
        [name, *(said(row[k]) for k in ("ap", "activitynet")), str(row["boxes"])]
        for name, row in table.items()
    ]
    made.table(["class", "AP", "AP, activitynet", "true boxes"], rows)
    made.section(
        "The surest mistakes",
        f"The middle frame of a clip. Solid: a true box and its classes; dashed: a box that was "
        f"tested, its {SHOWN} best classes and their scores.",
    )
    frames = WholeFrames(test.keyframes, cfg.data, cfg.model.num_frames, cfg.ava, 256)
    for number, i in enumerate(worst(test, scores)):
        try:
            picture = frames.middle(i)
        except BadVideo:
            continue
        name = f"{test.keyframes.movie(i)}, second {test.keyframes.seconds[i]}"
        made.figure(f"frame-{number}", draw(picture, test, scores, i), name)
    if unused:
        made.section("Left out", f"{len(unused)} in all; the first {LISTED}.")
        made.code("\n".join(unused[:LISTED]))
    return made


def truth_of(test, i: int) -> list[tuple[tuple, set[int]]]:
    """The true boxes of keyframe i, with the classes that count."""
    key, found = (test.keyframes.movie(i), f"{test.keyframes.seconds[i]:.6f}"), {}
    for row in test.by_key.get(key, ()):
        if row.class_id in test.names:
            found.setdefault(row.box, set()).add(row.class_id)
    return list(found.items())


def worst(test, scores: Sequence[np.ndarray], count: int = WORST) -> list[int]:
    """The keyframes with the surest mistakes: a class that a person lacks and has a high score, or
    has and a low one; his true box is the one that he overlaps most, by half at least."""
    wrong = []
    for i, persons in enumerate(test.keyframes.people):
        there = truth_of(test, i)
        overlap = iou(
            np.array([p.box for p in persons]), np.array([b for b, _ in there]).reshape(-1, 4)
        )
        most = 0.0
        for row, near in zip(scores[i], overlap, strict=True):
            best = int(near.argmax()) if len(near) else -1
            right = there[best][1] if best >= 0 and near[best] >= 0.5 else set()
            most = max([most, *(abs((c in right) - float(row[c - 1])) for c in test.names)])
        wrong.append(most)
    return np.argsort(-np.array(wrong), kind="stable")[:count].tolist()


def draw(picture: np.ndarray, test, scores: Sequence[np.ndarray], i: int):
    """A frame [H, W, 3] with the true boxes and those that were tested, as a figure."""
    from matplotlib.patches import Rectangle

    height, width = picture.shape[:2]
    figure, axis = figures.figure(7, 7 * height / width)
    axis.imshow(picture, interpolation="nearest", extent=(0, width, height, 0))  # edges
    axis.set_axis_off()
    how = dict(fontsize=8, color="#fffffe", clip_on=True)

    def box(corners, color: str, style: str, text: str, below: bool) -> None:
        x1, y1, x2, y2 = np.array(corners) * [width, height, width, height]
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, ls=style))
        at, side = (y2, "top") if below else (y1, "bottom")
        paper = dict(facecolor=color, edgecolor="none", pad=1, alpha=0.8)
        axis.text(x1, at, text, va=side, bbox=paper, **how)

    for corners, classes in truth_of(test, i):
        box(corners, TRUE, "-", ", ".join(test.names[c] for c in sorted(classes)), below=False)
    for person, row in zip(test.keyframes.people[i], scores[i], strict=True):
        best = sorted(test.names, key=lambda c: -row[c - 1])[:SHOWN]
        text = "\n".join(f"{test.names[c]} {row[c - 1]:.2f}" for c in best)
        box(person.box, FOUND, "--", text, below=True)
    return figure
