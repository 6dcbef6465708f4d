"""The official sampling, as numbers; trap 11 of the official code's list."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mae_fast.data.sampling import Weights, clip_indices, crop_box, draw, order, shrink
from mae_fast.ops.crop_resize_patchify_gather import crop_resize


class Fixed:
    """A generator whose uniform draws are a given share of their range."""

    def __init__(self, *shares):
        self.shares = list(shares)

    def uniform(self, lo, hi):
        share = self.shares.pop(0) if len(self.shares) > 1 else self.shares[0]
        return lo + share * (hi - lo)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_trap_11_stride_is_4_4_4_4_5_at_30_fps():
    indices = clip_indices(Fixed(0.0), 300, 30.0, 16, 4, 30.0)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert indices.diff().tolist() == [4, 4, 4, 4, 5] * 3


@pytest.mark.parametrize("fps, last", [(15.0, 31), (25.0, 52), (60.0, 127)])
def test_span_follows_the_frame_rate(fps, last):
    """A clip covers the same time at every rate: clip_sz = 64 / 30 * fps frames."""
    indices = clip_indices(Fixed(0.0), 1000, fps, 16, 4, 30.0)
    assert indices[-1].item() == last
    starts = [clip_indices(rng(i), 1000, fps, 16, 4, 30.0)[0].item() for i in range(300)]
    assert min(starts) < 50 and 950 - 64 / 30 * fps < max(starts) <= 1000 - 64 / 30 * fps


def test_shorter_than_a_clip_repeats_the_last_frame():
    indices = clip_indices(rng(), 10, 30.0, 16, 4, 30.0)
    assert indices.tolist() == [0, 4, 8, *[9] * 13]


def test_window_holds_the_clip():
    for i in range(100):
        indices = clip_indices(rng(i), 1000, 30.0, 16, 4, 30.0, lo=200, hi=300)
        assert 200 <= indices[0] and indices[-1] < 300
    assert clip_indices(Fixed(0.0), 1000, 30.0, 16, 4, 30.0, lo=200, hi=210)[0] == 200


def test_crop_box_area_and_aspect():
    boxes = np.array([crop_box(rng(i), 256, 340, (0.5, 1.0), (0.75, 4 / 3)) for i in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 256).all() and (left + width <= 340).all()
    area, ratio = height * width / (256 * 340), width / height
    assert 0.49 < area.min() < 0.52 and 0.95 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.8 and 1.28 < ratio.max() < 1.35
    # Touches all four edges, so the place is uniform over all that fits.
    assert top.min() == left.min() == 0
    assert (top + height).max() == 256 and (left + width).max() == 340


def test_crop_reaches_every_place():
    places = {crop_box(rng(i), 10, 10, (0.81, 0.81), (1.0, 1.0)) for i in range(40)}
    assert places == {(top, left, 9, 9) for top in (0, 1) for left in (0, 1)}


def test_crop_aspect_is_log_uniform():
    """Where every draw fits, half of the boxes are wide and half are tall."""
    ratios = []
    for i in range(4000):
        _, _, h, w = crop_box(rng(i), 1000, 1000, (0.01, 0.02), (0.25, 4.0))
        ratios.append(w / h)
    assert np.mean(np.array(ratios) < 1) == pytest.approx(0.5, abs=0.03)
    assert np.mean(np.array(ratios) < 0.5) == pytest.approx(0.25, abs=0.03)


class Counting:
    """Counts the tries, none of which fits."""

    tries = 0

    def uniform(self, lo, hi):
        self.tries += 1
        return hi


def test_ten_tries_then_the_centre():
    source = Counting()
    assert crop_box(source, 100, 1000, (1.0, 1.0), (0.75, 4 / 3)) == (
        0,
        (1000 - 133) // 2,
        100,
        133,
    )
    assert source.tries == 20  # an area and an aspect each
    assert crop_box(Counting(), 1000, 100, (1.0, 1.0), (0.75, 4 / 3)) == (433, 0, 133, 100)
    assert crop_box(Counting(), 100, 100, (1.0, 1.0), (0.5, 2.0)) == (0, 0, 100, 100)


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
@pytest.mark.parametrize("box", [(3, 5, 20, 31), (0, 0, 48, 64), (10, 40, 9, 7)])
def test_trap_11_crop_resize_is_interpolate_of_the_normalised_crop(box, flip):
    frames = torch.randint(0, 256, (4, 48, 64, 3), dtype=torch.uint8)
    got = crop_resize(frames, box, flip, 16)
    top, left, height, width = box
    clip = (frames.float() / 255 - 0.45) / 0.225  # the official order: normalise, then crop
    cut = clip.permute(3, 0, 1, 2)[:, :, top : top + height, left : left + width]
    want = F.interpolate(cut, (16, 16), mode="bilinear", align_corners=False, antialias=False)
    if flip:
        want = want.flip(3)
    assert got.dtype == torch.float32 and got.shape == (3, 4, 16, 16)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_trap_11_one_box_for_all_frames():
    """A still video stays still."""
    frames = torch.randint(0, 256, (1, 48, 64, 3), dtype=torch.uint8).expand(5, -1, -1, -1)
    clip = crop_resize(frames, (3, 5, 20, 31), True, 16)
    assert (clip == clip[:, :1]).all()


def test_shrink():
    frames = torch.randint(0, 256, (2, 67, 101, 3), dtype=torch.uint8)
    assert shrink(frames, 0) is frames and shrink(frames, 67) is frames
    small = shrink(frames, 32)
    assert small.dtype == torch.uint8 and small.shape == (2, 32, 48, 3) and small.is_contiguous()
    float_way = F.interpolate(
        frames.permute(0, 3, 1, 2).float(), (32, 48), mode="bilinear", antialias=True
    )
    assert (small.permute(0, 3, 1, 2) - float_way).abs().max() <= 1
    assert shrink(frames.transpose(1, 2), 32).shape == (2, 48, 32, 3)


def test_each_video_once_an_epoch_and_epochs_flow_on():
    n, seed = 7, 3
    draws = [draw(n, g, seed) for g in range(4 * n)]
    for epoch in range(4):
        of_epoch = draws[epoch * n : (epoch + 1) * n]
        assert [e for e, _ in of_epoch] == [epoch] * n
        assert sorted(v for _, v in of_epoch) == list(range(n))
    assert len({tuple(order(n, seed, e)) for e in range(4)}) == 4
    assert tuple(order(n, seed, 0)) != tuple(order(n, seed + 1, 0))
    assert order(n, seed, 2).tolist() == np.random.default_rng((seed, 2)).permutation(n).tolist()


def test_weights_are_shares_of_an_epoch_s_draws():
    """8 videos, of which the first two are drawn four times as often as the others: one
    of weight w comes 8 w / 14 times an epoch, rounded up or down."""
    weights = Weights(np.array([4.0, 4, 1, 1, 1, 1, 1, 1]))
    counts = np.zeros(8)
    for epoch in range(700):
        drawn = np.bincount(order(8, 3, epoch, weights), minlength=8)
        share = 8 * weights.of / 14
        assert drawn.sum() == 8 and np.all(drawn >= share // 1) and np.all(drawn <= -(-share // 1))
        counts += drawn
    assert np.abs(counts / 700 - 8 * weights.of / 14).max() < 0.06
    assert len({tuple(order(8, 3, e, weights)) for e in range(9)}) == 9
    same = Weights(np.full(7, 0.3))
    assert order(7, 3, 5, same).tolist() == order(7, 3, 5).tolist()
    assert draw(8, 21, 3, weights) == (2, order(8, 3, 2, weights)[5])


def test_a_crop_of_a_picture_one_pixel_wide_has_a_pixel():
    """Where no box of the wanted aspect fits, and its nearest rounds to nothing."""
    rng = np.random.default_rng(0)
    assert crop_box(rng, 100, 1, (0.5, 1.0), (3.0, 4.0)) == (49, 0, 1, 1)
    assert crop_box(rng, 1, 100, (0.5, 1.0), (0.25, 1 / 3)) == (0, 49, 1, 1)
