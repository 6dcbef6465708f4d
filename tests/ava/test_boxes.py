"""Boxes go where their pixels go."""

import numpy as np
import pytest
import torch

from mae_fast.ops.crop_resize_patchify_gather import crop_resize
from mae_fast.tasks.ava.boxes import alive, cropped, extended, jittered, square_crop
from mae_fast.tasks.ava.clips import shift_color


def lit(picture: torch.Tensor) -> list[int]:
    """x1, y1, x2, y2 of what is bright in a picture [H, W]."""
    rows, columns = (picture > 0.5).nonzero().T
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("flip", [False, True], ids=["as_it_is", "mirrored"])
def test_a_painted_box_is_where_it_is_said_to_be(flip):
    rng = np.random.default_rng(1)
    box = np.array([[30.0, 20.0, 54.0, 50.0]])
    frames = torch.zeros(1, 70, 110, 3, dtype=torch.uint8)
    frames[:, 20:50, 30:54] = 255
    seen = 0
    for _ in range(40):
        crop = square_crop(rng, 70, 110, 64, (64.0, 96.0))
        here = cropped(box, crop, 64, flip)
        if not alive(here, 4.0)[0]:
            continue
        seen += 1
        picture = crop_resize(frames, crop, flip, 64, 0.0, 1.0)[0, 0]
        np.testing.assert_allclose(here[0], lit(picture), atol=1.0)
    assert seen > 10


def test_the_crop_is_that_of_a_frame_brought_to_a_short_side():
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(200):
        top, left, height, width = square_crop(rng, 320, 500, 224, (256.0, 320.0))
        assert height == width and 0 <= top <= 320 - height and 0 <= left <= 500 - width
        sides.append(height)
    assert min(sides) == 224 and max(sides) == pytest.approx(224 * 320 / 256, abs=2)
    assert square_crop(rng, 256, 340, 224, (256.0, 256.0))[2] == 224
    assert square_crop(rng, 64, 64, 64, (64.0, 64.0)) == (0, 0, 64, 64)


def test_what_the_crop_leaves_out_has_no_area():
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0], [5.0, 5.0, 60.0, 60.0]])
    here = cropped(boxes, (20, 20, 64, 64), 64, False)
    assert alive(here).tolist() == [False, True, True]
    assert here[2].tolist() == [0, 0, 40, 40]


def test_edges_move_by_their_shares_and_stay_in_the_frame():
    rng = np.random.default_rng(0)
    boxes = np.array([[20.0, 20.0, 40.0, 60.0], [0.0, 0.0, 64.0, 64.0], [63.5, 0.0, 64.0, 0.2]])
    assert np.array_equal(jittered(rng, boxes[:1], (0.0,) * 4, 64), boxes[:1])
    found = np.stack([jittered(rng, boxes, (0.2, 0.1, 0.1, 0.05), 64) for _ in range(400)])
    moved = (found[:, 0] - boxes[0]) / np.array([20, 40, 20, 40])
    np.testing.assert_allclose(moved.min(0), [-0.2, -0.1, -0.1, -0.05], atol=0.01)
    np.testing.assert_allclose(moved.max(0), [0.1, 0.05, 0.2, 0.1], atol=0.01)
    assert found.min() >= 0 and found.max() <= 64
    assert (found[:, :, 2:] - found[:, :, :2]).min() >= 1 - 1e-9


def test_a_box_is_extended_by_half_on_each_side():
    found = extended(
        np.array([[20.0, 20.0, 40.0, 60.0], [0.0, 0.0, 10.0, 10.0]]), (0.1, 0.05), 64, 96
    )
    np.testing.assert_allclose(found, [[19, 19, 41, 61], [0, 0, 10.5, 10.25]])


def test_colours_shift_in_hsv():
    import colorsys

    clip = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    np.testing.assert_allclose(shift_color(clip, 0.0, 0.0, 0.0), clip, atol=1e-12)
    found = shift_color(clip, 20.0, 0.1, -0.1).flatten(1).T
    for before, after in zip(clip.flatten(1).T.tolist(), found.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        shifted = (h + 20 / 360) % 1, min(s + 0.1, 1), max(v - 0.1, 0)
        np.testing.assert_allclose(after, colorsys.hsv_to_rgb(*shifted), atol=1e-9)
