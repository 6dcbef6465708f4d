"""masked_hog_mse: every backend against fp64, and HOG against the official operator's values."""

import math

import pytest
import torch
from op_checks import BACKENDS, DTYPES, GIVE_NAN, check_op

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.masking import draw_ids
from mae_fast.ops.masked_hog_mse import (
    BINS,
    hog,
    hog_patches,
    masked_hog_mse,
    masked_hog_mse_ref,
)

# batch, channels, frames of the clip, height, width, target frames, patch, masked
SHAPES = {
    "one_cell": (1, 1, 1, 8, 8, (0,), 8, 1.0),
    "odd_grid": (2, 3, 5, 24, 40, (0, 3, 4), 8, 0.6),
    "vit_b": (2, 3, 4, 32, 48, (0, 2), 16, 0.75),
    "nine_cells": (1, 2, 2, 48, 24, (1, 0), 24, 0.5),
    "nothing_masked": (2, 3, 2, 16, 16, (0,), 8, 0.0),
}
OFFICIAL = [
    [
        0.491521,
        0.425174,
        0.130156,
        0.193248,
        0.506166,
        0.261215,
        0.398183,
        0.175559,
        0.575263,
        0.301678,
        0.195838,
        0.470314,
    ],
    [
        0.586635,
        0.264447,
        0.558210,
        0.170699,
        0.603643,
        0.147277,
        0.357775,
        0.181955,
        0.673844,
        0.384017,
        0.671153,
        0.054051,
    ],
    [
        0.543480,
        0.227241,
        0.430594,
        0.256677,
        0.573440,
        0.213431,
        0.176862,
        0.209553,
        0.411228,
        0.451571,
        0.118780,
        0.328349,
    ],
    [
        0.628044,
        0.395790,
        0.499630,
        0.228722,
        0.528714,
        0.332597,
        0.397427,
        0.226137,
        0.383488,
        0.428095,
        0.380330,
        0.269728,
    ],
]
DATA = [s for s in SHAPES if s != "nothing_masked"]


def make(shape, dtype):
    batch, chans, t, h, w, frames, p, ratio = SHAPES[shape]
    video = torch.randint(0, 256, (batch, chans, t, h, w), dtype=torch.uint8)
    grid = (len(frames), h // p, w // p)
    if ratio == 1:
        ids = torch.zeros(batch, 1, dtype=torch.int32)
    else:
        _, ids = draw_ids("random", grid, ratio, seed=0, step=0, samples=torch.arange(batch))
    pred = torch.rand(*ids.shape, chans * BINS * (p // 8) ** 2).to(dtype).requires_grad_()
    return [pred, video, ids, frames, p, 0.225]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DATA)
def test_masked_hog_mse_matches_fp64(backend, shape, dtype):
    with mae_fast.backends(masked_hog_mse=backend):
        check_op(masked_hog_mse, masked_hog_mse_ref, make(shape, DTYPES[dtype]))


@pytest.mark.parametrize("pixels", ["f64", *DTYPES])
def test_masked_hog_mse_takes_normalised_clips(backend, pixels):
    if backend in GIVE_NAN and pixels == "f64":
        pytest.skip("triton leaves float64 to the reference")
    args = make("vit_b", torch.float32)
    args[1] = torch.randn(args[1].shape).to(DTYPES.get(pixels, torch.float64))
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    with mae_fast.backends(masked_hog_mse=backend):
        loss = masked_hog_mse(*args)
    torch.testing.assert_close(loss.double(), masked_hog_mse_ref(*exact), rtol=1e-5, atol=0)


LAYOUTS = {
    "channel_last": lambda v: v.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
    "crop": lambda v: torch.nn.functional.pad(v, (3, 5, 2, 1))[..., 2:-1, 3:-5],
    "mirrored": lambda v: v.transpose(3, 4).contiguous().transpose(3, 4),
    "one_clip_for_all": lambda v: v[:1].expand(v.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_hog_mse_reads_any_strides(backend, layout):
    """A crop's border is reflected, though there are pixels beyond it."""
    args = make("vit_b", torch.float32)
    args[1] = LAYOUTS[layout](args[1])
    args[0] = torch.rand(2, 130, 108)[:, -args[2].shape[1] :].requires_grad_()
    with mae_fast.backends(masked_hog_mse=backend):
        check_op(masked_hog_mse, masked_hog_mse_ref, args)


def test_bins_are_exact_for_every_gradient_of_bytes():
    """Compared with in fp32, as the kernels do, against the angle in fp64: all 2041 x 2041 of them,
    the nearest of which lies 9e-7 of a bin from an edge."""
    g = torch.arange(-1020, 1021, dtype=torch.float64)
    gx, gy = torch.meshgrid(g, g, indexing="ij")
    exact = (torch.atan2(gx, gy) / math.pi * BINS).floor().long() % BINS
    turn = (gx < 0) | ((gx == 0) & (gy < 0))
    x, y = (torch.where(turn, -v, v).float() for v in (gx, gy))
    found = torch.zeros_like(exact)
    for k in range(1, BINS):
        cos, sin = (f(k * math.pi / BINS) for f in (math.cos, math.sin))
        found += x * torch.tensor(cos).float() >= y * torch.tensor(sin).float()
    found[1020, 1020] = exact[1020, 1020] = 0
    assert torch.equal(found, exact)


@pytest.mark.parametrize(
    ("gx", "gy", "bin_"),
    [(0, 200, 0), (0, -200, 0), (200, 0, 4), (-200, 0, 4), (200, 200, 2), (-200, 200, 6)],
    ids=["down", "up", "left", "right", "diagonal", "other_diagonal"],
)
def test_gradients_fall_into_the_official_bins(backend, gx, gy, bin_):
    """atan2(gx, gy), its arguments the other way round than in textbooks; unsigned."""
    ramp = torch.arange(8.0)
    frame = 100 - gx / 8 * ramp[None, :] / 8 - gy / 8 * ramp[:, None] / 8
    clip = frame.expand(1, 1, 1, 8, 8).contiguous()
    expected = torch.zeros(9)
    inner = hog(frame[None, None].double(), 1.0, torch.float64)[0, 0, :, 0, 0]
    expected[bin_] = inner.max()
    assert inner.argmax() == bin_
    with mae_fast.backends(masked_hog_mse=backend):
        ids = torch.zeros(1, 1, dtype=torch.int32)
        loss = masked_hog_mse(inner.float().view(1, 1, 9), clip, ids, (0,), 8, 1.0)
    assert loss < 1e-12


def test_hog_is_the_official_operator_s(backend):
    """HOGLayerC(9, 8) of facebookresearch/SlowFast 287ec00 and _get_hog_label_3d, in fp32 on the
    normalised clip: recorded for a clip that a formula makes, every ninth value."""
    n = torch.arange(2 * 3 * 4 * 32 * 16, dtype=torch.int64)
    video = ((n * n * 7 + n * 131 + (n >> 7) * 29) % 251).to(torch.uint8).view(2, 3, 4, 32, 16)
    official = torch.tensor(OFFICIAL)
    ids = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
    ours = hog_patches(video, ids, (0, 2), 16, 0.225, torch.float64)
    picked = ours.flatten(0, 1)[:, ::9].float()
    torch.testing.assert_close(picked, official, rtol=2e-5, atol=2e-6)
    with mae_fast.backends(masked_hog_mse=backend):
        pred = ours.float().requires_grad_()
        loss = masked_hog_mse(pred, video, ids, (0, 2), 16, 0.225)
    assert loss < 1e-12


def test_a_flat_patch_has_no_histogram(backend):
    args = make("vit_b", torch.float32)
    args[1].fill_(77)
    with mae_fast.backends(masked_hog_mse=backend):
        loss = masked_hog_mse(*args)
    torch.testing.assert_close(loss, args[0].square().mean(), rtol=1e-6, atol=0)


def test_masked_hog_mse_of_nothing_is_nan(backend):
    args = make("nothing_masked", torch.float32)
    with mae_fast.backends(masked_hog_mse=backend):
        loss = masked_hog_mse(*args)
        loss.backward()
    assert loss.isnan() and args[0].grad.shape == (2, 0, 27)


def test_masked_hog_mse_gradient_survives_fp16(backend):
    args = make("odd_grid", torch.float16)
    with mae_fast.backends(masked_hog_mse=backend):
        (masked_hog_mse(*args) * 65536).backward()
    wide = [args[0].detach().double().requires_grad_(), *args[1:]]
    (masked_hog_mse_ref(*wide) * 65536).backward()
    assert (args[0].grad - wide[0].grad).norm() / wide[0].grad.norm() < 1e-3


@pytest.mark.parametrize("bad", [-1, 12, -(2**31)])
def test_masked_hog_mse_refuses_an_id_out_of_range(backend, bad):
    """On a GPU the host would have to wait for it: the loss is NaN, and so is the gradient."""
    args = make("vit_b", torch.float32)
    args[2] = args[2].clone()
    args[2][1, 3] = bad
    with mae_fast.backends(masked_hog_mse=backend):
        if backend in GIVE_NAN:
            loss = masked_hog_mse(*args)
            loss.backward()
            assert loss.isnan() and args[0].grad[1, 3].isnan().all()
            assert args[0].grad.isnan().sum() == args[0].shape[2]
        else:
            with pytest.raises(IndexError, match=str(bad)):
                masked_hog_mse(*args)


def test_masked_hog_mse_refuses(backend):
    pred, video, ids, frames, *rest = make("vit_b", torch.float32)
    with mae_fast.backends(masked_hog_mse=backend):
        with pytest.raises(ValueError, match=r"a patch of 16 pixels has 108 values"):
            masked_hog_mse(pred[..., :107], video, ids, frames, *rest)
        with pytest.raises(ValueError, match="multiple of 8, got 14"):
            masked_hog_mse(pred, video, ids, frames, 14, 0.225)
        with pytest.raises(ValueError, match=r"got torch\.float32"):
            masked_hog_mse(pred, video, ids.float(), frames, *rest)
        with pytest.raises(IndexError, match=r"\[0, 4\] of a clip of 4"):
            masked_hog_mse(pred, video, ids, (0, 4), *rest)
        with pytest.raises(ValueError, match="got pred on meta, video on"):
            masked_hog_mse(pred.to("meta"), video, ids, frames, *rest)


@pytest.mark.skipif("triton" not in BACKENDS, reason="the triton backend's own refusals")
def test_masked_hog_mse_leaves_what_triton_does_not_take_to_the_reference():
    pred, video, *rest = make("vit_b", torch.float32)
    with mae_fast.backends(masked_hog_mse="triton"):
        with pytest.raises(BackendError, match="do not compute in float64"):
            masked_hog_mse(pred.double(), video, *rest)
        with pytest.raises(BackendError, match="32 pixels a side at most, got 40"):
            masked_hog_mse(
                torch.zeros(1, 1, 225),
                torch.zeros(1, 1, 1, 40, 40).byte(),
                torch.zeros(1, 1).int(),
                (0,),
                40,
                0.225,
            )
