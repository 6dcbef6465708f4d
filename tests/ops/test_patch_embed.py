"""patch_embed: every backend against the fp64 reference, forward and gradients."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import BACKENDS, DEVICE, DTYPES, check_op, gradients

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops.patch_embed import patch_embed, patch_embed_ref

NORM = (0.45, 0.225)
# What the product is computed in where it is to be as exact as can be.
WIDEST = torch.float32 if BACKENDS == ["triton"] else torch.float64
# The clip, t_patch, patch, the number of tokens and the width.
SHAPES = {
    "one_element": ((1, 1, 1, 1, 1), 1, 1, 1, 1),
    "prime": ((3, 5, 6, 21, 14), 3, 7, 5, 13),
    "vit_b_of_64_pixels": ((2, 3, 16, 64, 64), 2, 16, 13, 768),
    "no_ids": ((2, 3, 4, 8, 8), 2, 4, 0, 6),
}


def make(shape, dtype=torch.float32, bias=True, clip=torch.uint8):
    size, t_patch, patch, keep, width = SHAPES[shape]
    video = torch.randint(0, 256, size, dtype=torch.uint8)
    video = video if clip == torch.uint8 else torch.randn(size).to(clip)
    tokens = size[2] // t_patch * (size[3] // patch) * (size[4] // patch)
    ids = torch.stack([torch.randperm(tokens)[:keep] for _ in range(size[0])])
    values = size[1] * t_patch * patch * patch
    weight = (torch.randn(width, values) / values**0.5).to(dtype).requires_grad_()
    b = torch.randn(width).to(dtype).requires_grad_() if bias else None
    pos = torch.randn(tokens, width).to(dtype).requires_grad_()
    return [video, ids, weight, b, pos, t_patch, patch, *NORM]


def dout(args):
    return [torch.randn(*args[1].shape, args[2].shape[0])]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_patch_embed_matches_fp64(backend, shape, dtype, bias):
    args = make(shape, DTYPES[dtype], bias)
    with mae_fast.backends(patch_embed=backend):
        check_op(patch_embed, patch_embed_ref, args, dout(args))


def test_patch_embed_is_the_convolution(backend):
    """The official expression: conv3d over all tokens, positions, then the wanted ones."""
    video, ids, weight, bias, pos, t_patch, patch, *_ = args = make("prime", WIDEST)
    weight, bias, pos = (x.detach().double().requires_grad_() for x in (weight, bias, pos))
    kernel = weight.view(-1, video.shape[1], t_patch, patch, patch)
    clip = (video.double() / 255 - 0.45) / 0.225
    x = F.conv3d(clip, kernel, bias, stride=(t_patch, patch, patch)).flatten(2).transpose(1, 2)
    x = (x + pos).gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
    gradient = dout(args)[0].double()
    with mae_fast.backends(patch_embed=backend):
        ours = gradients(patch_embed, args, [gradient])
    exact = [x, *torch.autograd.grad(x, (weight, bias, pos), gradient)]
    tolerance = 2e-5 if WIDEST == torch.float32 else 1e-7
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want.to(WIDEST), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clip", ["float", "channel_last", "a_still"])
def test_patch_embed_takes_strided_input(backend, clip):
    args = make("prime", clip=torch.float32 if clip == "float" else torch.uint8)
    video, ids, weight, bias, pos, *_ = args
    if clip == "channel_last":
        args[0] = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    elif clip == "a_still":
        args[0] = video[:, :, :1].expand_as(video)
    args[1] = ids.t().contiguous().t().int()
    args[2] = weight.detach().t().contiguous().t().requires_grad_()
    args[3] = bias.detach().repeat(2, 1).t().contiguous()[:, 1].requires_grad_()
    args[4] = pos.detach()[:1].expand_as(pos).requires_grad_()
    gradient = [torch.randn(13, 5, 3).permute(2, 1, 0)]
    with mae_fast.backends(patch_embed=backend):
        check_op(patch_embed, patch_embed_ref, args, gradient)


@pytest.mark.parametrize("wanted", ["weight", "bias", "pos", "none"])
def test_patch_embed_leaves_out_gradients_nobody_needs(backend, wanted):
    args = make("prime")
    for name, i in (("weight", 2), ("bias", 3), ("pos", 4)):
        args[i] = args[i].detach().requires_grad_(name == wanted)
    with mae_fast.backends(patch_embed=backend):
        if wanted == "none":
            assert not patch_embed(*args).requires_grad
        else:
            check_op(patch_embed, patch_embed_ref, args, dout(args))


def test_patch_embed_of_a_token_twice(backend):
    args = make("prime")
    args[1] = args[1][:, :1].expand(-1, 5)
    with mae_fast.backends(patch_embed=backend):
        check_op(patch_embed, patch_embed_ref, args, dout(args))


def test_patch_embed_bias_of_many_tokens(cpp):
    """One fp32 sum over 40,000 tokens of one sign would be off in the fourth digit."""
    video = torch.zeros(1, 1, 200, 200, 1, dtype=torch.uint8)
    ids = torch.arange(40_000)[None]
    values = [torch.zeros(3, 1), torch.zeros(3), torch.zeros(40_000, 3)]
    args = [video, ids, *(v.requires_grad_() for v in values), 1, 1, *NORM]
    gradient = torch.rand(1, 40_000, 3) + 1
    _, _, dbias, _ = gradients(patch_embed, args, [gradient])
    torch.testing.assert_close(dbias, gradient.double().sum((0, 1)).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", ["prime", "vit_b_of_64_pixels"])
def test_patch_embed_gives_the_same_bits_with_any_number_of_threads(cpp, shape):
    args, threads, grads = make(shape), torch.get_num_threads(), []
    args[4] = args[4].detach().requires_grad_()
    gradient = dout(args)[0]
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        grads.append(torch.autograd.grad(patch_embed(*args), args[3:5], gradient))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for g in grads[1:] for a, b in zip(grads[0], g, strict=True))


def test_patch_embed_saves_the_clip_and_the_ids_only(cpp):
    args, saved = make("vit_b_of_64_pixels"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        patch_embed(*args)
    assert [t.data_ptr() for t in saved] == [args[0].data_ptr(), args[1].data_ptr()]


@pytest.mark.parametrize("pos", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_patch_embed_of_mixed_dtypes(backend, weight, pos):
    args = make("prime", DTYPES[weight])
    args[4] = args[4].detach().to(DTYPES[pos]).requires_grad_()
    with mae_fast.backends(patch_embed=backend):
        check_op(patch_embed, patch_embed_ref, args, dout(args))


def test_patch_embed_under_autocast(backend):
    """A bf16 product beside fp32 positions, as torch's linear gives it, and fp32 gradients."""
    args = make("vit_b_of_64_pixels")
    gradient = dout(args)

    def autocast(function):
        with torch.autocast(DEVICE, torch.bfloat16), mae_fast.backends(patch_embed=backend):
            return gradients(function, args, gradient)

    exact = gradients(patch_embed_ref, args, gradient)
    for ours, plain, e in zip(autocast(patch_embed), autocast(patch_embed_ref), exact, strict=True):
        assert ours.dtype == plain.dtype == torch.float32
        assert (ours - e).norm() <= 2 * (plain - e).norm() + 1e-6 * e.norm()
    out = autocast(patch_embed)[0]
    assert (out - exact[0]).norm() > 1e-4 * exact[0].norm(), "the product was not in bf16"


def test_patch_embed_gradient_of_a_float_clip(cpp):
    args = make("prime", torch.float64, clip=torch.float64)
    args[0].requires_grad_()
    with mae_fast.backends(patch_embed="cpp"):
        with pytest.raises(BackendError, match="requires a gradient"):
            patch_embed(*args)
    assert torch.autograd.gradcheck(patch_embed, args, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_patch_embed_opcheck(cpp, bias):
    args = make("prime", bias=bias)
    torch.library.opcheck(torch.ops.mae_fast.patch_embed_fwd.default, args)
    numbers = (12, 3, 7, *NORM, torch.float32, torch.float32)
    for needs in ((True, True), (False, False), (True, False)):
        given = (dout(args)[0], *args[:2], *numbers, *needs)
        torch.library.opcheck(torch.ops.mae_fast.patch_embed_bwd.default, given)


BAD = {
    "rank": (0, lambda v: v[0], ValueError, r"video \[3, 16, 64, 64\] must be"),
    "width": (0, lambda v: v[..., 1:], ValueError, r"\(16, 64, 63\) cannot be cut"),
    "ids_batch": (1, lambda i: i[:1], ValueError, r"ids \[1, 13\]"),
    "ids_dtype": (1, lambda i: i.short(), ValueError, "got torch.int16"),
    "negative": (1, lambda i: i - 128, IndexError, r"outside \[0, 128\)"),
    "past_end": (1, lambda i: i + 128, IndexError, r"outside \[0, 128\)"),
    "meta_ids": (1, lambda i: i.to("meta"), ValueError, "one device, got .* ids on meta"),
    "weight": (2, lambda w: w[:, 1:], ValueError, r"\[768, 1535\].* do not fit 128 tokens of 1536"),
    "weight_rank": (2, lambda w: w.view(768, 3, 2, 16, 16), ValueError, "do not fit 128 tokens"),
    "weight_int": (2, lambda w: w.detach().int(), ValueError, "weight is torch.int32"),
    "meta_weight": (2, lambda w: w.to("meta"), ValueError, "weight on meta, bias on "),
    "bias": (3, lambda b: b[1:], ValueError, r"\[767\]"),
    "bias_dtype": (3, lambda b: b.double(), ValueError, "float32 and bias torch.float64"),
    "pos": (4, lambda p: p[1:], ValueError, r"\[127, 768\]"),
    "patch": (6, lambda _: 0, ValueError, "patches of 2x0x0"),
}


@pytest.mark.parametrize("case", BAD)
def test_patch_embed_refuses(case):
    i, change, error, words = BAD[case]
    if BACKENDS == ["triton"] and error is IndexError:
        pytest.skip("triton gives NaN: test_patch_embed_of_no_token_is_nan")
    args = make("vit_b_of_64_pixels")
    args[i] = change(args[i])
    with pytest.raises(error, match=words):
        patch_embed(*args)


@pytest.mark.skipif("triton" not in BACKENDS, reason="other backends raise IndexError")
@pytest.mark.parametrize("bad", [-1, 12, 2**31 - 1, -(2**31)])
def test_patch_embed_of_no_token_is_nan(bad):
    """A host that asked would wait for the device. The row is poisoned, and has no share in the
    gradients of weight and pos."""
    args = make("prime")
    args[1] = args[1].int()
    args[1][1, 3] = bad
    gradient = dout(args)[0]
    with mae_fast.backends(patch_embed="triton"):
        out, dweight, _, dpos = gradients(patch_embed, args, [gradient])
    assert out[1, 3].isnan().all() and out.isnan().sum() == out.shape[2]
    args[1][1, 3], gradient[1, 3] = 0, 0
    _, want_dweight, _, want_dpos = gradients(patch_embed_ref, args, [gradient])
    torch.testing.assert_close(dweight, want_dweight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dpos, want_dpos)


@pytest.mark.skipif("triton" not in BACKENDS, reason="the triton backend's own refusals")
def test_patch_embed_leaves_float64_to_the_reference():
    args = make("prime", torch.float64)
    with mae_fast.backends(patch_embed="triton"):
        with pytest.raises(BackendError, match="do not compute in float64"):
            patch_embed(*args)
    assert torch.equal(patch_embed(*args), patch_embed_ref(*args))


def test_patch_embed_twice_gives_the_same_bits(backend):
    args = make("vit_b_of_64_pixels", torch.bfloat16)
    gradient = dout(args)
    with mae_fast.backends(patch_embed=backend):
        first, second = (gradients(patch_embed, args, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the reference's own index would abort")
def test_patch_embed_refuses_on_the_reference():
    args = make("vit_b_of_64_pixels")
    with mae_fast.backends(patch_embed="reference"), pytest.raises(IndexError, match="hold -"):
        patch_embed(args[0], args[1] - 128, *args[2:])


def test_patch_embed_kernels_refuse_by_themselves(cpp):
    ops, x = torch.ops.mae_fast, torch.zeros(2, 3, 4)
    with pytest.raises(IndexError, match=r"hold.* 9, outside"):
        ops.patch_embed_add_pos(x, torch.full((2, 3), 9), torch.zeros(9, 4))
    with pytest.raises(IndexError, match=r"hold.* -1, outside"):
        ops.patch_embed_grads(x, torch.full((2, 3), -1), 9, x.dtype, x.dtype, True)
    for out, pos in ((x, torch.zeros(9, 5)), (x[..., ::2], torch.zeros(9, 2)), (x[0], x[0])):
        with pytest.raises(RuntimeError, match="do not fit"):
            ops.patch_embed_add_pos(out, torch.zeros(2, 3, dtype=torch.int64), pos)
    for ids in (torch.zeros(2, 4), torch.zeros(3, 3), torch.zeros(6)):
        with pytest.raises(RuntimeError, match="patch_embed: gradient"):
            ops.patch_embed_grads(x, ids.long(), 9, x.dtype, x.dtype, True)


def test_patch_embed_compiles_without_a_break(backend):
    args = make("prime")
    with mae_fast.backends(patch_embed=backend):
        compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager")
        gradient = dout(args)
        got, want = (gradients(f, args, gradient) for f in (compiled, patch_embed))
    torch.testing.assert_close(got, want)
