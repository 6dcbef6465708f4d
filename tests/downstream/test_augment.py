"""RandAugment against timm's operations on PIL images; erasing, mixing and targets."""

import math
import random

import numpy as np
import pytest
import torch

from mae_fast.errors import ConfigError
from mae_fast.ops import dispatch
from mae_fast.tasks import randaugment as ours
from mae_fast.tasks.augment import erase, mix, smoothed, soft_cross_entropy


@pytest.fixture(scope="module")
def frames():
    """A smooth picture, noise, one colour, two colours, a dark one, a sparse one."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:37, :53]
    smooth = np.stack([y * 5, x * 4, (x + y) * 2], -1).astype(np.uint8)
    noise = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    flat = np.full((37, 53, 3), 90, np.uint8)
    two = np.where((x > 20)[..., None], 30, 200).astype(np.uint8).repeat(3, -1)
    dark = rng.integers(40, 120, (37, 53, 3), dtype=np.uint8)
    sparse = np.where(rng.random((37, 53, 1)) < 0.99, np.uint8(0), noise)
    return torch.from_numpy(np.stack([smooth, noise, flat, two, dark, sparse]))


@pytest.fixture
def cpp():
    reason = dispatch.load_cpp()
    if reason:
        pytest.skip(reason)
    assert ours._kernel() is not ours.reference, "build the C++ kernels again: they are older"


@pytest.fixture(params=["cpp", "reference"])
def kernel(request, monkeypatch):
    """Each of the two that do the operations."""
    if request.param == "cpp":
        request.getfixturevalue("cpp")
    else:
        monkeypatch.setattr(ours, "_kernel", lambda: ours.reference)


@pytest.mark.parametrize("name", ours.OPS)
def test_operation_is_timms_on_pil_images_to_the_bit(name, frames, kernel, record_property):
    theirs = pytest.importorskip("timm.data.auto_augment")
    from PIL import Image

    worst = 0
    for magnitude in (0.0, 0.3, 2.0, 5.5, 6.6, 7.0, 9.1, 9.9):  # at 10 PIL refuses 0 bits
        for sign in (1, -1):
            random.random, kept = (lambda s=sign: 0.9 if s < 0 else 0.1), random.random
            try:
                level = theirs.LEVEL_TO_ARG[name]
                arguments = () if level is None else level(magnitude, {})
            finally:
                random.random = kept
            how = dict(fillcolor=ours.FILL, resample=Image.Resampling.BICUBIC)
            function = theirs.NAME_TO_OP[name]
            images = map(Image.fromarray, frames.numpy())
            wanted = np.stack([function(i, *arguments, **dict(how)) for i in images])
            found = ours.apply(name, frames, magnitude, sign)
            assert found.dtype == torch.uint8 and found.shape == frames.shape
            worst = max(worst, int((found.int() - torch.from_numpy(wanted)).abs().max()))
    record_property("levels", worst)
    assert worst == 0


def test_policy_is_one_draw_a_clip_of_timms_operations(frames):
    theirs = pytest.importorskip("timm.data.auto_augment")
    assert list(ours.OPS) == theirs._RAND_INCREASING_TRANSFORMS
    same = torch.stack([frames[0]] * 4)
    for seed in range(20):
        out = ours.randaugment(np.random.default_rng(seed), same, "rand-m7-n4-mstd0.5-inc1")
        assert (out == out[:1]).all()
    changed = [
        not torch.equal(
            ours.randaugment(np.random.default_rng(s), same, "rand-m7-mstd0.5-inc1"), same
        )
        for s in range(300)
    ]
    # Two operations, each with probability a half, of which a few change nothing here.
    assert 0.6 < np.mean(changed) < 0.8


def test_magnitudes_are_drawn_about_the_policy_s_and_in_either_direction(frames, monkeypatch):
    """Normal about m within [0, 10]; each of n operations with probability a half."""
    drawn, rng = [], np.random.default_rng(0)
    monkeypatch.setattr(ours, "apply", lambda name, frames, *how: drawn.append(how) or frames)
    for _ in range(500):
        ours.randaugment(rng, frames, "rand-m7-n4-mstd0.5-inc1")
    magnitudes, signs = np.array(drawn).T
    assert 930 < len(drawn) < 1070 and {*signs} == {-1, 1} and abs(signs.mean()) < 0.1
    assert abs(magnitudes.mean() - 7) < 0.05 and abs(magnitudes.std() - 0.5) < 0.04
    drawn.clear()
    for _ in range(100):
        ours.randaugment(rng, frames, "rand-m8-mstd8-inc1")
    assert {0.0, 10.0} < {magnitude for magnitude, _ in drawn} and len(drawn) < 130
    assert all(0 <= magnitude <= 10 for magnitude, _ in drawn)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (2, 5, 2), (1, 3, 3), (16, 7, 11)])
def test_operation_of_small_and_strided_clips_is_pils(shape, cpp):
    whole = torch.randint(0, 256, (*shape[:2], 2 * shape[2], 3), dtype=torch.uint8)
    for name in ours.OPS:
        for frames in (whole[:, :, ::2], whole[:, :, ::2].clone()):
            for magnitude in (1.3, 8.7):
                operation, numbers = ours.OPS[name](magnitude / 10, -1, *shape[1:])
                wanted = ours.reference(frames, operation, numbers)
                assert torch.equal(ours.apply(name, frames, magnitude, -1), wanted), name


def test_operation_refuses_what_is_no_clip(cpp):
    run, clip = ours._kernel(), torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    for frames, operation, numbers, said in (
        (clip.float(), "equalize", [], "frames must be uint8"),
        (clip[..., :2], "equalize", [], "frames must be uint8"),
        (clip[:0], "equalize", [], "frames must be uint8"),
        (clip, "equalise", [], "no operation equalise"),
        (clip, "affine", [1.0], "affine takes 6 numbers, got 1"),
        (clip, "table", [256.0] * 256, "a table holds bytes"),
        (clip, "table", [float("nan")] * 256, "a table holds bytes"),
    ):
        with pytest.raises(ValueError, match=said):
            run(frames, operation, numbers)
    # Far outside, and no place at all: grey, without a read.
    for far in (1e300, float("inf"), float("nan"), -1e300):
        assert (run(clip, "affine", [1, 0, far, 0, 1, 0]) == 128).all()


def test_policies_of_another_kind_are_refused():
    assert ours.parse("rand-m7-n4-mstd0.5-inc1") == (7.0, 4, 0.5)
    assert ours.parse("rand-m7-mstd0.5-inc1") == (7.0, 2, 0.5)
    for name in ("rand-m7-n4", "augmix-m3", "rand-m7-n4-mstd0.5-inc1-x1", "rand-inc1", ""):
        with pytest.raises(ConfigError, match=r"rand-m7-n4-mstd0\.5-inc1"):
            ours.parse(name)


def test_erasing_is_one_box_for_all_frames_with_noise_by_the_pixel():
    video = torch.full((200, 3, 2, 32, 32), 9.0)
    erase(np.random.default_rng(0), video, 0.25)
    erased = video != 9
    hit = erased.flatten(1).any(1)
    assert 0.15 < hit.float().mean() < 0.35
    assert (erased == erased[:, :1, :1]).all()  # the same box in all frames and channels
    share = erased[hit].float().mean(dim=(1, 2, 3, 4))
    assert share.min() > 0.015 and share.max() < 0.36
    values = video[erased]
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    again = torch.full((200, 3, 2, 32, 32), 9.0)
    erase(np.random.default_rng(0), again, 0.25)
    assert torch.equal(again, video)
    every = torch.full((400, 1, 1, 32, 32), 9.0)
    erase(np.random.default_rng(0), every, 1.0)
    high, wide = ((every != 9)[:, 0, 0].any(dim).sum(1) for dim in (2, 1))
    aspect = (high / wide).log()  # as often high as wide
    assert abs(aspect.mean()) < 0.1 and 1 < aspect.max() < 1.6 and -1.6 < aspect.min() < -1


def test_targets_and_loss_are_label_smoothing():
    labels = torch.tensor([2, 0])
    target = smoothed(labels, 4, 0.1)
    torch.testing.assert_close(target[0], torch.tensor([0.025, 0.025, 0.925, 0.025]))
    logits = torch.randn(2, 4)
    wanted = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, target), wanted)
    assert math.isclose(
        float(soft_cross_entropy(torch.zeros(2, 4), target)), math.log(4), rel_tol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "switch"),
    [((0.8, 0.0), 0.5), ((0.0, 1.0), 0.5), ((0.8, 1.0), 0.0), ((0.8, 1.0), 1.0)],
    ids=["mixup", "cutmix", "both_never_switched", "both_always_switched"],
)
def test_mixing_is_timms_and_the_same_in_all_frames(kind, switch):
    timm = pytest.importorskip("timm.data.mixup")
    video, labels = torch.randn(4, 3, 2, 8, 8), torch.tensor([0, 1, 2, 3])
    how = dict(mixup=kind[0], cutmix=kind[1], probability=1.0, switch=switch, smoothing=0.1)
    before = np.random.get_state()[1].copy()
    ours, target = video.clone(), None
    target = mix(np.random.default_rng(3), ours, labels, 5, **how)
    assert (np.random.get_state()[1] == before).all()  # nobody else's numbers are touched
    np.random.seed(np.random.default_rng(3).integers(2**32, dtype=np.uint32))
    mixer = timm.Mixup(*kind, switch_prob=switch, label_smoothing=0.1, num_classes=5)
    for t in range(2):
        np.random.seed(np.random.default_rng(3).integers(2**32, dtype=np.uint32))
        frame, wanted = mixer(video[:, :, t].clone(), labels)
        torch.testing.assert_close(ours[:, :, t], frame)
        torch.testing.assert_close(target, wanted)
    assert not torch.equal(ours, video)
    plain = mix(np.random.default_rng(3), ours, labels, 5, **how | dict(mixup=0.0, cutmix=0.0))
    torch.testing.assert_close(plain, smoothed(labels, 5, 0.1))
