"""AVA's mean average precision: PASCAL's, at an IoU of 0.5, over the classes of the label list.

Own code for what two official evaluations compute, which differ in four things:

                                  papers (SlowFast, AlphAction)   activitynet (get_ava_performance)
detections of an image            as they come                    best score first, at most 50
images that the truth lacks       false positives                 ignored
excluded timestamps               in neither side                 are none: they count
a column more than seven          not read of the truth           orders the truth's boxes

Where scores tie across images, both have the order of numpy's sort, and so has this.
"""

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MOST = 50  # detections of an image that activitynet keeps, of all classes together
Key = tuple[str, str]  # movie, second as "%.6f"


class Labelled(NamedTuple):
    """A box (x1, y1, x2, y2 in shares of the frame) with one class; of the truth score is 1, or
    what its eighth column says. class_id None: a frame that is known, without a box."""

    movie: str
    second: float
    box: tuple[float, float, float, float]
    class_id: int | None
    score: float = 1.0

    @property
    def key(self) -> Key:
        return self.movie, f"{self.second:.6f}"


@dataclass(frozen=True)
class Scores:
    """ap: class -> average precision, NaN of a class without a box in the truth; boxes: class ->
    how many of these it has; mean_ap: over the classes that have some."""

    ap: dict[int, float]
    boxes: dict[int, int]

    @property
    def mean_ap(self) -> float:
        found = [x for x in self.ap.values() if not np.isnan(x)]
        return float(np.mean(found)) if found else float("nan")


def papers(
    truth: Iterable[Labelled],
    detections: Iterable[Labelled],
    classes: Collection[int],
    excluded: Collection[Key] = (),
) -> Scores:
    """The mAP that SlowFast, AlphAction and VideoMAE print."""
    images = _by_image(truth, classes)
    found = _by_image(detections, classes)
    for key in excluded:
        images.pop(key, None)
        found.pop(key, None)
    return _evaluate(images, found, classes)


def activitynet(
    truth: Iterable[Labelled], detections: Iterable[Labelled], classes: Collection[int]
) -> Scores:
    """The mAP of the challenge's own evaluation."""
    truth = list(truth)
    known = {row.key for row in truth}
    images = {k: _best_first(rows) for k, rows in _by_image(truth, classes, order=True).items()}
    found = _by_image(detections, classes, most=MOST)
    found = {k: _best_first(rows) for k, rows in found.items() if k in known}
    return _evaluate(images, found, classes)


def _by_image(
    rows: Iterable[Labelled], classes: Collection[int], order: bool = False, most: int = 0
) -> dict[Key, list[tuple]]:
    """(score, class, y1, x1, y2, x2) of each image. order: as a heap has them, on whose order
    activitynet's depends where scores are the same; most: the best of them."""
    images: dict[Key, list[tuple]] = defaultdict(list)
    wanted = set(classes)
    for row in rows:
        if row.class_id not in wanted:
            continue
        x1, y1, x2, y2 = row.box
        entry, held = (row.score, row.class_id, y1, x1, y2, x2), images[row.key]
        if not (order or most):
            held.append(entry)
        elif not most or len(held) < most:
            heapq.heappush(held, entry)
        elif row.score > held[0][0]:
            heapq.heapreplace(held, entry)
    return images


def _best_first(entries: list[tuple]) -> list[tuple]:
    return sorted(entries, key=lambda entry: -entry[0])


def _evaluate(
    truth: dict[Key, list[tuple]], detections: dict[Key, list[tuple]], classes: Collection[int]
) -> Scores:
    boxes = dict.fromkeys(sorted(classes), 0)
    for entries in truth.values():
        for _, label, *_ in entries:
            boxes[label] += 1
    scores: dict[int, list[np.ndarray]] = defaultdict(list)
    right: dict[int, list[np.ndarray]] = defaultdict(list)
    nothing = np.empty((0, 6))
    for key, entries in detections.items():
        found = np.array(entries, dtype=float)
        found = found[(found[:, 2] < found[:, 4]) & (found[:, 3] < found[:, 5])]
        there = np.array(truth[key], dtype=float) if truth.get(key) else nothing
        for label in np.unique(found[:, 1]).astype(int).tolist():
            mine = found[found[:, 1] == label]
            scores[label].append(mine[:, 0])
            right[label].append(_match(mine[:, 2:], there[there[:, 1] == label][:, 2:]))
    ap = {}
    for label, count in boxes.items():
        if not count:
            ap[label] = float("nan")
        elif label not in scores:
            ap[label] = 0.0
        else:
            parts = (np.concatenate(each[label]) for each in (scores, right))
            ap[label] = average_precision(*parts, count)
    return Scores(ap, boxes)


def _match(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which detections of an image and class, in their order, are right: each belongs to the box
    that it overlaps most, the first of such, and a box is found once. Boxes are (y1, x1, y2, x2).
    """
    right = np.zeros(len(found), dtype=bool)
    if not len(truth):
        return right
    overlap = iou(found, truth)
    best = overlap.argmax(axis=1)
    taken = set()
    for i, j in enumerate(best.tolist()):
        if overlap[i, j] >= 0.5 and j not in taken:
            right[i] = True
            taken.add(j)
    return right


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of each of a [N, 4] with each of b [M, 4]: [N, M]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    height, width = np.moveaxis(np.maximum(high - low, 0.0), 2, 0)
    shared = height * width
    areas = [(t[:, 2] - t[:, 0]) * (t[:, 3] - t[:, 1]) for t in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None, :] - shared)


def average_precision(scores: np.ndarray, right: np.ndarray, boxes: int) -> float:
    """The area under precision against recall, each precision the greatest at its recall or above
    (VOCdevkit), of detections [N] of a class that has `boxes` boxes."""
    if not len(scores):
        return 0.0
    right = right[np.argsort(scores)[::-1]]
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    recall = hits / boxes
    best = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(recall, prepend=0.0)
    return float(np.sum((steps * best)[steps > 0]))
