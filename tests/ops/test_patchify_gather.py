"""patchify_gather: every backend gives the reference's very bits, whatever the clip's layout."""

import pytest
import torch
from op_checks import BACKENDS, DTYPES, GIVE_NAN

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops.patchify_gather import patchify_gather, patchify_gather_ref

NORM = (0.45, 0.225)
# The clip, t_patch, patch and the number of tokens.
SHAPES = {
    "one_element": ((1, 1, 1, 1, 1), 1, 1, 1),
    "prime": ((3, 5, 6, 21, 14), 3, 7, 5),
    "vit_b_of_64_pixels": ((2, 3, 16, 64, 64), 2, 16, 13),
    "no_ids": ((2, 3, 4, 8, 8), 2, 4, 0),
    "no_clips": ((0, 3, 4, 8, 8), 2, 4, 2),
}
LAYOUTS = {
    "contiguous": lambda v: v,
    "channel_last": lambda v: v.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
    "mirrored_axes": lambda v: v.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
    "inside_a_larger_one": lambda v: v.repeat(1, 1, 2, 2, 3)[:, :, ::2, 1 : 1 + v.shape[3], ::3],
    "a_still": lambda v: v[:, :, :1].expand_as(v),
    "one_clip_for_all": lambda v: v[:1].expand_as(v),
}
WIDE = DTYPES if BACKENDS == ["triton"] else {**DTYPES, "f64": torch.float64}


def make(shape, dtype=torch.uint8):
    size, t_patch, patch, keep = SHAPES[shape]
    video = torch.randint(0, 256, size, dtype=torch.uint8)
    video = video if dtype == torch.uint8 else torch.randn(size).to(dtype)
    tokens = size[2] // t_patch * (size[3] // patch) * (size[4] // patch)
    ids = torch.stack([torch.randperm(tokens)[:keep] for _ in range(max(size[0], 1))])[: size[0]]
    return [video, ids, t_patch, patch, *NORM]


def expected(*args):
    """The reference on a CPU: on a GPU torch multiplies by 1 / std, and is off by a rounding."""
    return patchify_gather_ref(*(a.cpu() if torch.is_tensor(a) else a for a in args))


@pytest.mark.parametrize("out", WIDE)
@pytest.mark.parametrize("clip", ["uint8", *WIDE])
@pytest.mark.parametrize("shape", SHAPES)
def test_patchify_gather_is_exact(backend, shape, clip, out):
    args = [*make(shape, WIDE.get(clip, torch.uint8)), WIDE[out]]
    with mae_fast.backends(patchify_gather=backend):
        ours = patchify_gather(*args)
    want = expected(*args)
    assert ours.dtype == WIDE[out] and ours.shape == want.shape
    assert torch.equal(ours.cpu(), want)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("clip", ["uint8", "f32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_patchify_gather_takes_any_strides(backend, layout, clip, ids_dtype):
    video, ids, *rest = make("vit_b_of_64_pixels", WIDE.get(clip, torch.uint8))
    video, ids = LAYOUTS[layout](video), ids.t().contiguous().t().to(ids_dtype)
    with mae_fast.backends(patchify_gather=backend):
        ours = patchify_gather(video, ids, *rest, torch.float32)
    assert torch.equal(ours.cpu(), expected(video.clone(), ids, *rest, torch.float32))


def test_patchify_gather_is_the_patch_itself(backend):
    """Token (t, r, c) against a slice of the normalised clip; a token twice is a token twice."""
    video, _, *rest = make("vit_b_of_64_pixels")
    ids = torch.tensor([[127, 0, 37, 37]] * 2)  # 37 = (2, 1, 1) of 8 x 4 x 4
    with mae_fast.backends(patchify_gather=backend):
        ours = patchify_gather(video, ids, *rest, torch.float32).cpu()
    clip = (video.cpu().float() / 255 - 0.45) / 0.225
    assert torch.equal(ours[1, 2], clip[1, :, 4:6, 16:32, 16:32].flatten())
    assert torch.equal(ours[0, 0], clip[0, :, 14:, 48:, 48:].flatten())
    assert torch.equal(ours[:, 2], ours[:, 3])


@pytest.mark.parametrize("norm", [NORM, (0.0, 1.0), (0.485, 0.229), (0.406, 1 / 3), (0.1, 0.7)])
def test_patchify_gather_rounds_once(backend, norm):
    """Each of the 256 bytes is plain torch's number, and in bf16 and f16 that, rounded."""
    video = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16)
    args = (video, torch.zeros(1, 1, dtype=torch.int64), 1, 16, *norm)
    exact = expected(*args, torch.float32)
    with mae_fast.backends(patchify_gather=backend):
        for dtype in DTYPES.values():
            assert torch.equal(patchify_gather(*args, dtype).cpu(), exact.to(dtype))


@pytest.mark.skipif("triton" not in BACKENDS, reason="other backends raise IndexError")
@pytest.mark.parametrize("bad", [-1, 128, 2**31 - 1, -(2**63), 2**62])
def test_patchify_gather_of_no_token_is_nan(bad):
    """A host that asked would wait for the device: nothing is read, and the row is poisoned."""
    video, ids, *rest = make("vit_b_of_64_pixels")
    ids = ids if abs(bad) >= 2**31 else ids.int()
    ids[1, 3] = bad
    with mae_fast.backends(patchify_gather="triton"):
        ours = patchify_gather(video, ids, *rest, torch.bfloat16)
    assert ours[1, 3].isnan().all()
    ids[1, 3], ours[1, 3] = 0, 0
    want = expected(video, ids, *rest, torch.bfloat16)
    want[1, 3] = 0
    assert torch.equal(ours.cpu(), want)


@pytest.mark.skipif("triton" not in BACKENDS, reason="the triton backend's own refusals")
def test_patchify_gather_leaves_float64_to_the_reference():
    args = [*make("prime"), torch.float64]
    with mae_fast.backends(patchify_gather="triton"):
        with pytest.raises(BackendError, match="do not compute in float64"):
            patchify_gather(*args)
    assert torch.equal(patchify_gather(*args), patchify_gather_ref(*args))


def test_patchify_gather_gradient_of_a_float_clip(cpp):
    video, ids, *rest = make("prime", torch.float64)
    video.requires_grad_()
    args = (ids, *rest, torch.float64)
    with mae_fast.backends(patchify_gather="cpp"):
        with pytest.raises(BackendError, match="requires a gradient"):
            patchify_gather(video, *args)
    assert torch.autograd.gradcheck(lambda v: patchify_gather(v, *args), video, fast_mode=True)


def _third(value):
    return lambda ids: ids.index_fill(1, torch.tensor(3), value)


BAD = {
    "rank": ({"video": lambda v: v[0]}, ValueError, r"video \[3, 16, 64, 64\] must be"),
    "ids_rank": ({"ids": lambda i: i[:, 0]}, ValueError, r"ids must be .* got torch.int64 \[2\]"),
    "ids_batch": ({"ids": lambda i: i[:1]}, ValueError, r"ids \[1, 13\] \[B, K\]"),
    "ids_int16": ({"ids": lambda i: i.short()}, ValueError, "got torch.int16"),
    "ids_float": ({"ids": lambda i: i.float()}, ValueError, "got torch.float32"),
    "negative": ({"ids": _third(-2)}, IndexError, "hold.* -2, outside"),
    "past_end": ({"ids": _third(128)}, IndexError, "128, outside"),
    "huge": ({"ids": lambda i: i.fill_(2**62)}, IndexError, rf"{2**62}, outside \[0, 128\)"),
    "no_frames": ({"video": lambda v: v[:, :, :0]}, ValueError, r"\(0, 64, 64\) cannot be cut"),
    "no_pixels": ({"video": lambda v: v[..., :0]}, ValueError, r"\(16, 64, 0\) cannot be cut"),
    "width": ({"video": lambda v: v[..., 1:]}, ValueError, r"\(16, 64, 63\) cannot be cut"),
    "t_patch": ({"t_patch": lambda _: 0}, ValueError, "patches of 0x16x16"),
    "patch": ({"patch": lambda _: -16}, ValueError, "patches of 2x-16x-16"),
    "meta_ids": ({"ids": lambda i: i.to("meta")}, ValueError, "on .*, ids on meta"),
    "too_large": ({"ids": lambda i: i[:, :1].expand(-1, 2**58)}, RuntimeError, "."),
}


@pytest.mark.parametrize("case", BAD)
def test_patchify_gather_refuses(backend, case):
    changes, error, words = BAD[case]
    if backend in GIVE_NAN and error is IndexError:
        pytest.skip("triton gives NaN: test_patchify_gather_of_no_token_is_nan")
    names = ("video", "ids", "t_patch", "patch", "mean", "std", "dtype")
    args = dict(zip(names, [*make("vit_b_of_64_pixels"), torch.float32], strict=True))
    for name, change in changes.items():
        args[name] = change(args[name])
    with mae_fast.backends(patchify_gather=backend), pytest.raises(error, match=words):
        patchify_gather(**args)


@pytest.mark.parametrize("case", sorted(BAD.keys() - {"meta_ids"}))
def test_patchify_gather_kernel_refuses_by_itself(cpp, case):
    changes, error, _ = BAD[case]
    error = RuntimeError if case.startswith("ids_") and case != "ids_batch" else error
    args = [*make("vit_b_of_64_pixels"), torch.float32]
    for name, change in changes.items():
        i = ("video", "ids", "t_patch", "patch").index(name)
        args[i] = change(args[i])
    with pytest.raises(error):
        torch.ops.mae_fast.patchify_gather_fwd(*args)


def test_patchify_gather_leaves_integer_clips_to_the_reference(cpp):
    video, *rest = make("prime")
    with mae_fast.backends(patchify_gather="cpp"):
        with pytest.raises(BackendError, match=r"dtype torch\.int32 is none"):
            patchify_gather(video.int(), *rest, torch.float32)
    ours = patchify_gather(video.int(), *rest, torch.float32)
    assert torch.equal(ours, patchify_gather(video.float(), *rest, torch.float32))


@pytest.mark.parametrize("clip", ["uint8", "f32"])
def test_patchify_gather_opcheck(cpp, clip):
    args = [*make("prime", WIDE.get(clip, torch.uint8)), torch.float16]
    torch.library.opcheck(torch.ops.mae_fast.patchify_gather_fwd.default, args)


def test_patchify_gather_compiles_without_a_break(backend):
    args = [*make("prime"), torch.float32]
    with mae_fast.backends(patchify_gather=backend):
        compiled = torch.compile(patchify_gather, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*args).cpu(), expected(*args))
