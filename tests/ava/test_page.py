"""The page of a test on AVA: whose label is drawn where, and which frames are the worst."""

from types import SimpleNamespace

import numpy as np

from mae_fast.tasks.ava.evaluate import Labelled
from mae_fast.tasks.ava.files import Person
from mae_fast.tasks.ava.page import FOUND, TRUE, draw, worst

NAMES = {1: "stand", 3: "sit", 4: "walk"}  # of 5 classes
LEFT, RIGHT = (0.1, 0.2, 0.3, 0.6), (0.6, 0.2, 0.9, 0.8)


def tested(*people):
    """A TestSet of seconds from 902 on, each with a true box at LEFT, who sits and walks, and does
    what does not count (2), and the given persons."""
    truth = [Labelled("m", 902.0 + i, LEFT, c, 1.0) for i in range(len(people)) for c in (3, 4, 2)]
    seconds = [902 + i for i in range(len(people))]
    found = SimpleNamespace(people=people, seconds=seconds, movie=lambda i: "m")
    by_key = {f"{s:.6f}": [r for r in truth if r.second == s] for s in seconds}
    by_key = {("m", key): rows for key, rows in by_key.items()}
    return SimpleNamespace(keyframes=found, names=NAMES, by_key=by_key)


def test_boxes_and_their_classes_are_drawn_where_they_are():
    test = tested([Person(LEFT), Person(RIGHT)])
    scores = [np.array([[0.1, 0.99, 0.7, 0.2, 0.98], [0.8, 0.0, 0.3, 0.4, 0.9]])]
    axis = draw(np.zeros((100, 200, 3), np.uint8), test, scores, 0).axes[0]
    boxes = [
        (p.get_edgecolor(), p.get_linestyle(), [*p.get_xy(), p.get_width(), p.get_height()])
        for p in axis.patches
    ]
    from matplotlib.colors import to_rgba

    wanted = [(TRUE, "-", LEFT), (FOUND, "--", LEFT), (FOUND, "--", RIGHT)]
    for (color, style, found), (name, line, (x1, y1, x2, y2)) in zip(boxes, wanted, strict=True):
        assert (color, style) == (to_rgba(name), line)
        np.testing.assert_allclose(found, [200 * x1, 100 * y1, 200 * (x2 - x1), 100 * (y2 - y1)])
    said = [(t.get_text(), t.get_position()) for t in axis.texts]
    # Class 2 and 5 are not among those that count, whatever their scores.
    assert [text for text, _ in said] == [
        "sit, walk",
        "sit 0.70\nwalk 0.20\nstand 0.10",
        "stand 0.80\nwalk 0.40\nsit 0.30",
    ]
    np.testing.assert_allclose([at for _, at in said], [(20, 20), (20, 60), (120, 80)])


def test_the_worst_are_those_with_the_surest_mistakes():
    test = tested([Person(LEFT)], [Person(LEFT)], [Person(RIGHT)], [Person(LEFT)])
    right = [0.1, 0.9, 0.9, 0.9, 0.9]
    lacks, stranger = [0.1, 0.0, 0.9, 0.35, 0.0], [0.05, 0.9, 0.2, 0.75, 0.9]
    scores = [np.array([row]) for row in (right, lacks, stranger, [0.5, 0, 0.9, 0.9, 0])]
    assert worst(test, scores) == [2, 1, 3, 0]  # by 0.75, 0.65, 0.5, 0.1
    assert worst(test, scores, 2) == [2, 1]
