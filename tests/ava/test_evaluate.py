"""AVA's mAP against figures of the official evaluation.

golden/evaluation.json was recorded by running activitynet's get_ava_performance.py, and SlowFast's
run_evaluation around the same PascalDetectionEvaluator, on small random cases: boxes near the
truth's and elsewhere, with the labels of these or others; duplicates; scores of one digit; frames
without a box; excluded seconds; eighth columns; seven boxes about one place. Each case holds its
rows, and the mean and every class's AP. In `ties` no order of tied scores changes a figure; in
`ties_that_matter`, where numpy's sort decides, least and most have of equal scores the wrong ones
first and the right ones first.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mae_fast.tasks.ava.evaluate import Labelled, activitynet, average_precision, iou, papers

CASES = json.loads((Path(__file__).parent / "golden" / "evaluation.json").read_text())


def rows(values):
    return [Labelled(v[0], float(v[1]), tuple(v[2:6]), v[6], *v[7:]) for v in values]


def scored(case):
    """(activitynet's, the papers') of a case."""
    truth, found = rows(case["truth"]), rows(case["detections"])
    known = [Labelled(m, float(t), (0.0,) * 4, None) for m, t in case["known"]]
    excluded = {(m, f"{t:.6f}") for m, t in case["excluded"]}
    classes = case["classes"]
    return {
        "activitynet": activitynet(truth + known, found, classes),
        "papers": papers(truth, found, classes, excluded),
    }


@pytest.mark.parametrize("name", [n for n in CASES if n != "ties_that_matter"])
def test_figures_are_the_official_ones(name):
    case = CASES[name]
    for which, mine in scored(case).items():
        official = case[which]
        assert mine.mean_ap == pytest.approx(official["mean"], abs=1e-9)
        for label, ap in zip(case["classes"], official["ap"], strict=True):
            if ap is None:
                assert math.isnan(mine.ap[label]) and not mine.boxes[label]
            else:
                assert mine.ap[label] == pytest.approx(ap, abs=1e-9)
        counted = sum(r[6] in case["classes"] for r in case["truth"])
        assert sum(mine.boxes.values()) == counted or case["excluded"]


def test_ties_lie_within_what_their_orders_give():
    case = CASES["ties_that_matter"]
    for which, mine in scored(case).items():
        bounds = zip(case["classes"], case[which]["least"], case[which]["most"], strict=True)
        for label, least, most in bounds:
            assert least - 1e-9 <= mine.ap[label] <= most + 1e-9


def box(x, y=0.1, size=0.2):
    return x, y, x + size, y + size


def one(found, truth=((0.1, 1),), **how):
    truth = [Labelled("m", 902, box(x), c) for x, c in truth]
    found = [Labelled("m", t, box(x), c, s) for t, x, c, s in found]
    return papers(truth, found, {1, 2}, **how)


def test_a_box_is_found_once_and_the_classes_without_truth_do_not_count():
    twice = one([(902, 0.1, 1, 0.9), (902, 0.1, 1, 0.8)])
    assert twice.mean_ap == 1.0 and math.isnan(twice.ap[2]) and twice.boxes == {1: 1, 2: 0}
    # A false one that is surer halves it; so does one in a frame that the truth lacks.
    assert one([(902, 0.5, 1, 0.9), (902, 0.1, 1, 0.8)]).mean_ap == 0.5
    assert one([(903, 0.1, 1, 0.9), (902, 0.1, 1, 0.8)]).mean_ap == 0.5
    out = one([(903, 0.1, 1, 0.9), (902, 0.1, 1, 0.8)], excluded={("m", "903.000000")})
    assert out.mean_ap == 1.0
    assert one([]).mean_ap == 0.0
    assert math.isnan(one([(902, 0.1, 1, 0.9)], truth=()).mean_ap)


def test_activitynet_keeps_the_best_fifty_of_an_image_and_ignores_other_images():
    truth = [Labelled("m", 902, box(0.1), 1)]
    worse = [Labelled("m", 902, box(0.5), 2, 0.5 + k / 1000) for k in range(50)]
    right = Labelled("m", 902, box(0.1), 1, 0.4)
    assert activitynet(truth, [*worse, right], {1, 2}).mean_ap == 0.0
    assert activitynet(truth, [*worse[1:], right], {1, 2}).mean_ap == 1.0
    other = Labelled("m", 903, box(0.5), 1, 0.9)
    assert activitynet(truth, [other, right], {1, 2}).mean_ap == 1.0
    assert papers(truth, [*worse, right], {1, 2}).mean_ap == 1.0
    # Without this row the frame is unknown; with it, a false detection there counts.
    seen = Labelled("m", 903, box(0.5), None)
    assert activitynet([*truth, seen], [other, right], {1, 2}).mean_ap == 0.5


def test_the_threshold_is_reached_at_a_half():
    a = np.array([[0.0, 0.0, 1.0, 1.0]])
    half = np.array([[0.0, 0.0, 1.0, 0.5]])
    assert iou(a, half)[0, 0] == 0.5
    truth = [Labelled("m", 902, (0.0, 0.0, 1.0, 1.0), 1)]
    assert papers(truth, [Labelled("m", 902, (0.0, 0.0, 1.0, 0.5), 1, 0.3)], {1}).mean_ap == 1.0
    assert papers(truth, [Labelled("m", 902, (0.0, 0.0, 1.0, 0.499), 1, 0.3)], {1}).mean_ap == 0.0
    # A box turned inside out is none.
    assert papers(truth, [Labelled("m", 902, (1.0, 1.0, 0.0, 0.0), 1, 0.3)], {1}).mean_ap == 0.0


def test_average_precision_by_hand():
    # Precisions 1, 1/2, 2/3 at recalls 1/4, 1/4, 2/4; beyond it none.
    ap = average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), 4)
    assert ap == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
