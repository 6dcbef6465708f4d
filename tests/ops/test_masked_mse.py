"""masked_mse: every backend against the fp64 reference, forward and gradient."""

import pytest
import torch
from op_checks import BACKENDS, DTYPES, GIVE_NAN, check_op

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.masking import draw_ids
from mae_fast.ops import dispatch
from mae_fast.ops.masked_mse import NORM_PIX, OP, masked_mse, masked_mse_ref, norm_target

SIDE = 32 if dispatch.interpreting() else 64
# batch, channels, frames of the clip, height, width, target frames, patch in time, in space, masked
SHAPES = {
    "two_values": (1, 2, 1, 1, 1, (0,), 1, 1, 1.0),
    "prime": (3, 1, 5, 21, 14, (0, 3, 4), 1, 7, 0.6),
    "vit_b": (2, 3, 16, SIDE, SIDE, (0, 2, 4, 6, 8, 10, 12, 15), 1, 16, 0.9),
    "two_frames_a_token": (2, 3, 4, 16, 24, (0, 1, 2, 3), 2, 8, 0.5),
    "odd_patch_of_three_frames": (2, 5, 6, 14, 14, (5, 0, 1, 4, 2, 2), 3, 7, 0.5),
    "two_channels": (1, 2, 1, 6, 9, (0,), 1, 3, 0.5),
    "four_channels": (2, 4, 2, 10, 15, (1, 0), 2, 5, 0.5),
    "nothing_masked": (2, 3, 2, 8, 8, (0,), 1, 4, 0.0),
}
DATA = [s for s in SHAPES if s != "nothing_masked"]
NORMALISED = [norm for norm in NORM_PIX if norm != "none"]


def make(shape, dtype, norm="patch"):
    batch, chans, t, h, w, frames, u, p, ratio = SHAPES[shape]
    video = torch.randint(0, 256, (batch, chans, t, h, w), dtype=torch.uint8)
    grid = (len(frames) // u, h // p, w // p)
    if ratio == 1:
        ids = torch.zeros(batch, 1, dtype=torch.int32)
    else:
        _, ids = draw_ids("random", grid, ratio, seed=0, step=0, samples=torch.arange(batch))
    pred = torch.randn(*ids.shape, u * p * p * chans).to(dtype).requires_grad_()
    return [pred, video, ids, frames, u, p, 0.45, 0.225, norm]


@pytest.mark.parametrize("norm", NORM_PIX)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DATA)
def test_masked_mse_matches_fp64(backend, shape, dtype, norm):
    if (shape, norm) == ("two_values", "channel"):
        pytest.skip("one value has no variance: see test_masked_mse_of_one_value_a_channel_is_nan")
    with mae_fast.backends(masked_mse=backend):
        check_op(masked_mse, masked_mse_ref, make(shape, DTYPES[dtype], norm))


def test_norm_target_by_channel_is_videomae_s():
    """Values of a channel stand at a distance of C: var unbiased, eps outside the root."""
    x = torch.randn(2, 3, 4 * 5, dtype=torch.float64) * 1e-5
    ours, mean, std = norm_target(x, "channel", chans=5)
    cells = x.view(2, 3, 4, 5)
    expected = (cells - cells.mean(dim=-2, keepdim=True)) / (
        cells.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6
    )
    torch.testing.assert_close(ours, expected.flatten(2), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours * std + mean, x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("norm", NORMALISED)
@pytest.mark.parametrize("pixels", ["f64", *DTYPES])
def test_masked_mse_takes_normalised_clips(backend, pixels, norm):
    if backend in GIVE_NAN and pixels == "f64":
        pytest.skip("triton leaves float64 to the reference")
    pixels = DTYPES.get(pixels, torch.float64)
    args = make("vit_b", torch.float32, norm)
    args[1] = (args[1] / 255 - 0.45).to(pixels)
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    with mae_fast.backends(masked_mse=backend):
        loss = masked_mse(*args)
    torch.testing.assert_close(loss.double(), masked_mse_ref(*exact), rtol=1e-5, atol=0)


LAYOUTS = {
    "channel_last": lambda v: v.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
    "every_second_frame": lambda v: v.repeat_interleave(2, 2)[:, :, ::2],
    "crop": lambda v: torch.nn.functional.pad(v, (3, 5, 2, 1))[..., 2:-1, 3:-5],
    "mirrored": lambda v: v.transpose(3, 4).contiguous().transpose(3, 4),
    "one_clip_for_all": lambda v: v[:1].expand(v.shape),
}


@pytest.mark.parametrize("norm", NORMALISED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32], ids=["uint8", "f32"])
def test_masked_mse_reads_any_strides(backend, layout, pixels, norm):
    args = make("vit_b", torch.float32, norm)
    args[1] = LAYOUTS[layout](args[1] if pixels == torch.uint8 else args[1] / 255 - 0.45)
    assert args[1].shape == (2, 3, 16, SIDE, SIDE)
    args[0] = torch.randn(2, 130, 768)[:, -args[2].shape[1] :].requires_grad_()
    with mae_fast.backends(masked_mse=backend):
        check_op(masked_mse, masked_mse_ref, args)


@pytest.mark.parametrize("pixels", ["uint8", "f32"])
@pytest.mark.parametrize("norm", NORMALISED)
def test_masked_mse_of_a_flat_patch(backend, norm, pixels):
    """Its deviation is sqrt(1e-6), or 1e-6: a mean that is off by rounding would show a thousand-
    or a millionfold."""
    if (backend, norm) == ("reference", "channel"):
        pytest.skip("its fp32 sums are not exact")
    args = make("vit_b", torch.float32, norm)
    args[1].fill_(77)
    if pixels == "f32":
        args[1] = args[1] / 255
    with mae_fast.backends(masked_mse=backend):
        loss = masked_mse(*args)
        loss.backward()
    torch.testing.assert_close(loss, args[0].square().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(args[0].grad, 2 / args[0].numel() * args[0], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("pixels", ["uint8", "f32"])
def test_masked_mse_of_a_flat_channel(backend, pixels):
    """Beside channels that are not: its target alone is zero."""
    if backend == "reference":
        pytest.skip("its fp32 sums are not exact")
    args = make("vit_b", torch.float32, "channel")
    args[1][:, 1] = 3
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    if pixels == "f32":  # a float clip's own unit: eps stands beside another deviation
        args[1] = args[1] / 255
        exact[1], exact[6:8] = exact[1] / 255.0, [0.0, 1.0]
    with mae_fast.backends(masked_mse=backend):
        loss = masked_mse(*args)
    torch.testing.assert_close(loss.double(), masked_mse_ref(*exact), rtol=1e-6, atol=0)


def test_masked_mse_of_one_value_a_channel_is_nan(backend):
    """As torch's unbiased variance of one value, and the official code's."""
    args = make("two_values", torch.float32, "channel")
    with mae_fast.backends(masked_mse=backend):
        assert masked_mse(*args).isnan()


@pytest.mark.parametrize("norm", NORMALISED)
def test_masked_mse_of_an_almost_flat_patch(backend, norm):
    """One byte differs by one: of sums that are not exact integers, nothing would be left."""
    if backend == "reference":
        pytest.skip("its fp32 sums are not exact")
    args = make("vit_b", torch.float32, norm)
    args[1].fill_(255)[..., ::16, ::16] -= 1
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    with mae_fast.backends(masked_mse=backend):
        loss = masked_mse(*args)
    torch.testing.assert_close(loss.double(), masked_mse_ref(*exact), rtol=2e-6, atol=0)


def test_masked_mse_of_nothing_is_nan(backend):
    args = make("nothing_masked", torch.float32)
    with mae_fast.backends(masked_mse=backend):
        loss = masked_mse(*args)
        loss.backward()
    assert loss.isnan() and args[0].grad.shape == (2, 0, 48)


def test_masked_mse_gradient_survives_fp16(backend):
    """2 / (a million values) is less than fp16's smallest number: scaling comes last."""
    args = make("vit_b", torch.float16)
    with mae_fast.backends(masked_mse=backend):
        (masked_mse(*args) * 65536).backward()
    wide = make("vit_b", torch.float64)
    wide[:3] = args[0].detach().double().requires_grad_(), *args[1:3]
    (masked_mse_ref(*wide) * 65536).backward()
    error = (args[0].grad - wide[0].grad).norm() / wide[0].grad.norm()
    assert error < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_mse_gradient_can_be_asked_for_again(backend, dtype):
    """What forward saved is the gradient itself where the loss's own is 1; it stays as it was."""
    args = make("prime", DTYPES[dtype])
    with mae_fast.backends(masked_mse=backend):
        loss = masked_mse(*args)
        first, twice, again = (
            torch.autograd.grad(loss, args[0], loss.detach() * 0 + factor, retain_graph=True)[0]
            for factor in (1, 2, 1)
        )
    assert torch.equal(first, again)
    torch.testing.assert_close(twice, 2 * first)


def test_masked_mse_gradient_changed_in_place_is_no_second_answer(cpp):
    args = make("prime", torch.float32)
    with mae_fast.backends(masked_mse="cpp"):
        loss = masked_mse(*args)
    (first,) = torch.autograd.grad(loss, args[0], retain_graph=True)
    first.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, args[0])


def test_masked_mse_keeps_nothing_where_no_gradient_is_wanted(cpp):
    args = make("vit_b", torch.float32)
    with torch.no_grad(), mae_fast.backends(masked_mse="cpp"):
        loss = masked_mse(*args)
    torch.testing.assert_close(loss, masked_mse_ref(*args).detach())


@pytest.mark.parametrize("bad", [-1, 8 * (SIDE // 16) ** 2, -(2**31)])
def test_masked_mse_refuses_an_id_out_of_range(backend, bad):
    """On a GPU the host would have to wait for it: the loss is NaN, and so is the gradient."""
    args = make("vit_b", torch.float32)
    args[2] = args[2].clone()
    args[2][1, 3] = bad
    with mae_fast.backends(masked_mse=backend):
        if backend in GIVE_NAN:
            loss = masked_mse(*args)
            loss.backward()
            assert loss.isnan() and args[0].grad[1, 3].isnan().all()
            assert args[0].grad.isnan().sum() == args[0].shape[2]
        else:
            with pytest.raises(IndexError, match=str(bad)):
                masked_mse(*args)


def test_masked_mse_refuses(backend):
    pred, video, ids, *rest = make("vit_b", torch.float32)
    with mae_fast.backends(masked_mse=backend):
        with pytest.raises(ValueError, match=rf"pred \[2, {ids.shape[1]}, 767\]"):
            masked_mse(pred[..., :767], video, ids, *rest)
        with pytest.raises(ValueError, match=r"norm_pix .* got 'pixel'"):
            masked_mse(pred, video, ids, *rest[:-1], "pixel")
        with pytest.raises(ValueError, match=r"got torch\.float32"):
            masked_mse(pred, video, ids.float(), *rest)
        with pytest.raises(ValueError, match=rf"video \[1, 3, 16, {SIDE}, {SIDE}\]"):
            masked_mse(pred, video[:1], ids, *rest)
        with pytest.raises((RuntimeError, IndexError)):
            masked_mse(pred, video, ids, (0, 2, 4, 6, 8, 10, 12, 16), *rest[1:])
        with pytest.raises(ValueError, match="got pred on meta, video on"):
            masked_mse(pred.to("meta"), video, ids, *rest)


def test_masked_mse_by_channel_is_not_for_cuda():
    args = make("prime", torch.float32)[:3]
    assert OP.backends["cuda"](*args, "channel") == "it does not normalise by channel"
    assert "by channel" not in (OP.backends["cuda"](*args, "patch") or "")


@pytest.mark.skipif("triton" not in BACKENDS, reason="the triton backend's own refusals")
def test_masked_mse_leaves_what_triton_does_not_take_to_the_reference():
    pred, video, *rest = make("prime", torch.float32)
    with mae_fast.backends(masked_mse="triton"):
        with pytest.raises(BackendError, match="do not compute in float64"):
            masked_mse(pred.double(), video, *rest)
        with pytest.raises(BackendError, match="requires a gradient"):
            masked_mse(pred, video.float().requires_grad_(), *rest)
    video, ids = torch.zeros(1, 1, 1, 256, 256, dtype=torch.uint8), torch.zeros(1, 1).int()
    args = (torch.zeros(1, 1, 2**16), video, ids, (0,), 1, 256, 0.45, 0.225, "patch")
    with mae_fast.backends(masked_mse="triton"):
        with pytest.raises(BackendError, match="a patch has 65536 values, more than 32768"):
            masked_mse(*args)
    assert masked_mse(*args) == 0
