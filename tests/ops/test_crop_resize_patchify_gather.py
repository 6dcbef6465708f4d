"""crop_resize_patchify_gather: F.interpolate's pixels, of the wanted tokens only."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import BACKENDS, GIVE_NAN

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops.crop_resize_patchify_gather import (
    crop_resize_patchify_gather,
    crop_resize_patchify_gather_ref,
)

NORM = (0.45, 0.225)
# In normalised units, where pixels span 4.4: 4 to 8 roundings of numbers up to 2.5.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
WIDE = {"f32": torch.float32, "f64": torch.float64}
if BACKENDS == ["triton"]:
    del WIDE["f64"]  # which it leaves to the reference
# For each clip height, width and box; then size, t_patch, patch and the number of tokens.
SHAPES = {
    "one_pixel": ([(1, 1, (0, 0, 1, 1))], 1, 1, 1, 1),
    "one_pixel_box": ([(5, 7, (4, 6, 1, 1)), (5, 7, (0, 0, 1, 1))], 6, 2, 3, 3),
    "whole_frames": ([(17, 29, (0, 0, 17, 29)), (11, 5, (0, 0, 11, 5))], 14, 2, 7, 8),
    "enlarged": ([(9, 9, (2, 3, 5, 4)), (8, 30, (7, 0, 1, 30))], 35, 1, 5, 31),
    "reduced": ([(131, 97, (1, 2, 127, 89)), (64, 64, (0, 63, 64, 1))], 15, 2, 5, 9),
    "same_size": ([(20, 20, (4, 0, 16, 16))], 16, 2, 8, 7),
    "no_ids": ([(9, 9, (0, 0, 3, 3)), (7, 7, (0, 0, 3, 3))], 4, 2, 2, 0),
    "vit_b": ([(256, 340, (17, 31, 200, 263)), (256, 455, (0, 101, 97, 130))], 224, 2, 16, 40),
}


def make(shape, dtype=torch.float32, flips=(True, False), frames=4):
    clips, size, t_patch, patch, keep = SHAPES[shape]
    pixels = [torch.randint(0, 256, (frames, h, w, 3), dtype=torch.uint8) for h, w, _ in clips]
    boxes = torch.tensor([box for *_, box in clips], dtype=torch.int32)
    tokens = frames // t_patch * (size // patch) ** 2
    ids = torch.stack([torch.randperm(tokens)[:keep] for _ in clips])
    flips = torch.tensor(flips[: len(clips)])
    return [pixels, boxes, flips, ids, size, t_patch, patch, *NORM, dtype]


def interpolated(*args):
    """The reference, by the kernel that torch has for it. Where equal bits are asked for, a GPU's
    F.interpolate is made of many, for the sake of its backward, and rounds the pixels' places once
    more: up to 8e-6 at these sizes."""
    torch.use_deterministic_algorithms(False)
    want = crop_resize_patchify_gather_ref(*args)
    torch.use_deterministic_algorithms(True)
    return want


@pytest.mark.parametrize("channel_last", [False, True], ids=["channel_first", "channel_last"])
@pytest.mark.parametrize("flips", [(True, False), (False, True)], ids=["first", "second"])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", SHAPES)
def test_crop_resize_matches_interpolate(backend, shape, dtype, flips, channel_last):
    dtype = WIDE[dtype]
    args = [*make(shape, dtype, flips), channel_last]
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        ours = crop_resize_patchify_gather(*args)
    want = interpolated(*args)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_crop_resize_rounds_once(backend, dtype):
    args = make("vit_b")
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        wide, narrow = (crop_resize_patchify_gather(*args[:-1], d) for d in (args[-1], dtype))
    assert torch.equal(narrow, wide.to(dtype))


def test_crop_resize_is_the_official_expression(backend):
    """Normalise, cut, resize, mirror, and take slices: none of the op's own code."""
    frames, dtype = torch.randint(0, 256, (4, 30, 40, 3), dtype=torch.uint8), [*WIDE.values()][-1]
    box, flip, ids = torch.tensor([[3, 5, 20, 31]], dtype=torch.int32), True, [[21, 0]]
    clip = ((frames.double() / 255 - 0.45) / 0.225).permute(3, 0, 1, 2)[:, :, 3:23, 5:36]
    clip = F.interpolate(clip, (16, 16), mode="bilinear", align_corners=False).flip(3)
    args = ([frames], box, torch.tensor([flip]), torch.tensor(ids), 16, 2, 4, *NORM, dtype)
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        first, last = (crop_resize_patchify_gather(*args, order)[0] for order in (False, True))
    clip = clip.to(dtype)
    patch = clip[:, 2:4, 4:8, 4:8]  # token 21 = (1, 1, 1) of 2 x 4 x 4
    torch.testing.assert_close(first[0], patch.flatten())
    torch.testing.assert_close(last[0], patch.permute(1, 2, 3, 0).flatten())
    torch.testing.assert_close(first[1], clip[:, :2, :4, :4].flatten())


@pytest.mark.parametrize("layout", ["planar", "inside_a_larger_one", "a_still", "grey"])
def test_crop_resize_takes_any_strides(backend, layout):
    args = make("vit_b")
    change = {
        "planar": lambda f: f.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "inside_a_larger_one": lambda f: f.repeat(2, 1, 2, 2)[::2, :, : f.shape[2], ::2],
        "a_still": lambda f: f[:1].expand_as(f),
        "grey": lambda f: f[..., :1].expand_as(f),
    }[layout]
    args[0] = [change(f) for f in args[0]]
    args[1] = args[1].t().contiguous().t()
    args[2] = args[2].repeat_interleave(2)[::2]
    args[3] = args[3].int().t().contiguous().t()
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        ours = crop_resize_patchify_gather(*args)
    args[0] = [f.clone() for f in args[0]]
    torch.testing.assert_close(ours, interpolated(*args), rtol=0, atol=2e-6)


def test_crop_resize_leaves_numbers_on_another_device_to_the_reference(cpp):
    args = make("reduced")
    args[2] = args[2].to("meta")
    with mae_fast.backends(crop_resize_patchify_gather="cpp"):
        with pytest.raises(BackendError, match="on meta, not on the CPU"):
            crop_resize_patchify_gather(*args)


def _box(*box):
    return lambda b: torch.tensor([box, box], dtype=torch.int32)


def _third(value):
    return lambda ids: ids.index_fill(1, torch.tensor(2), value)


BAD = {
    "no_frames": (0, lambda f: [], ValueError, "no frames"),
    "frames_rank": (0, lambda f: [f[0], f[1][0]], ValueError, r"got torch.uint8 \[64, 64, 3\]"),
    "frames_dtype": (0, lambda f: [x.float() for x in f], ValueError, "got torch.float32"),
    "frames_planar": (0, lambda f: [x.transpose(1, 3) for x in f], ValueError, "must be uint8"),
    "frames_lengths": (0, lambda f: [f[0], f[1][:2]], ValueError, r"got torch.uint8 \[2, 64"),
    "boxes_shape": (1, lambda b: b[:1], ValueError, r"boxes \[1, 4\].* do not fit 2 clips"),
    "boxes_dtype": (1, lambda b: b.long(), ValueError, "torch.int64 and torch.bool"),
    "box_above": (1, _box(-1, 0, 9, 9), ValueError, r"box \(-1, 0, 9, 9\) is not within a frame"),
    "box_left": (1, _box(0, -3, 9, 9), ValueError, r"box \(0, -3, 9, 9\)"),
    "box_below": (1, _box(130, 0, 2, 9), ValueError, r"box \(130, 0, 2, 9\) .* frame of 131x97"),
    "box_right": (1, _box(0, 90, 9, 8), ValueError, r"box \(0, 90, 9, 8\)"),
    "box_second": (1, _box(0, 0, 131, 97), ValueError, r"\(0, 0, 131, 97\) .* frame of 64x64"),
    "box_of_nothing": (1, _box(0, 0, 0, 9), ValueError, r"box \(0, 0, 0, 9\)"),
    "box_of_less": (1, _box(9, 9, 9, -9), ValueError, r"box \(9, 9, 9, -9\)"),
    "box_huge": (1, _box(2**31 - 1, 0, 2**31 - 1, 9), ValueError, r"box \(2147483647, 0"),
    "flips_dtype": (2, lambda f: f.int(), ValueError, "torch.int32 and torch.int32"),
    "flips_shape": (2, lambda f: f[:1], ValueError, r"flips \[1\]"),
    "ids_batch": (3, lambda i: i[:1], ValueError, r"ids \[1, 9\]"),
    "ids_dtype": (3, lambda i: i.double(), ValueError, "got torch.float64"),
    "negative": (3, _third(-1), IndexError, "-1, outside"),
    "past_end": (3, _third(18), IndexError, r"18, outside \[0, 18\)"),
    "size": (4, lambda _: 16, ValueError, r"\(4, 16, 16\) cannot be cut into patches of 2x5x5"),
    "no_size": (4, lambda _: 0, ValueError, r"\(4, 0, 0\) cannot be cut"),
    "patch": (6, lambda _: 0, ValueError, "patches of 2x0x0"),
}


@pytest.mark.parametrize("case", BAD)
def test_crop_resize_refuses(backend, case):
    """On a GPU the host would have to wait for boxes and ids: NaN stands where they do not fit."""
    i, change, error, words = BAD[case]
    args = make("reduced")
    good, args[i] = args[i], change(args[i])
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        if backend in GIVE_NAN and (case.startswith("box_") or error is IndexError):
            ours = crop_resize_patchify_gather(*args)
            if i == 1:
                clips, sizes = args[1].cpu().tolist(), [f.shape[1:3] for f in args[0]]
                fits = [
                    min(b) >= 0 < min(b[2:]) and b[0] + b[2] <= h and b[1] + b[3] <= w
                    for b, (h, w) in zip(clips, sizes, strict=True)
                ]
                assert not all(fits)
                nan = ~torch.tensor(fits)[:, None].expand(args[3].shape)
                args[1] = torch.where(torch.tensor(fits)[:, None], args[1], good)
            else:
                nan, args[3] = (args[3] < 0) | (args[3] >= 18), good
            assert torch.equal(ours.isnan().all(-1), nan)
            assert torch.equal(ours[~nan], crop_resize_patchify_gather(*args)[~nan])
        else:
            with pytest.raises(error, match=words):
                crop_resize_patchify_gather(*args)


@pytest.mark.parametrize("case", BAD)
def test_crop_resize_kernel_refuses_by_itself(cpp, case):
    i, change, error, _ = BAD[case]
    args = make("reduced")
    args[i] = change(args[i])
    with pytest.raises((error, RuntimeError)):
        torch.ops.mae_fast.crop_resize_patchify_gather_fwd(*args, False)


def test_crop_resize_opcheck(cpp):
    args = [*make("reduced"), True]
    torch.library.opcheck(torch.ops.mae_fast.crop_resize_patchify_gather_fwd.default, args)


def test_crop_resize_compiles_without_a_break(backend):
    if backend == "reference":
        pytest.skip("the reference reads the boxes as numbers, which ends a graph")
    args = make("reduced")
    compiled = torch.compile(crop_resize_patchify_gather, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), crop_resize_patchify_gather(*args))


def test_frames_are_no_part_of_a_cuda_graph(monkeypatch):
    """Its table of addresses would be that of the first batch at every replay."""
    kernels = pytest.importorskip("mae_fast.kernels.crop_resize_patchify_gather")

    class OnAGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph would keep these frames"):
        kernels._table([OnAGpu()])
