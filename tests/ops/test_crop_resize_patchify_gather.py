"""crop_resize_patchify_gather: F.interpolate's pixels, of the wanted tokens only, from frames as
decoded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_checks import BACKENDS, DEVICE, GIVE_NAN, interpolated

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops.crop_resize_patchify_gather import (
    crop_resize_patchify_gather,
    crop_resize_patchify_gather_ref,
    crop_resized,
    whole,
)
from mae_fast.ops.source import (
    BOX_HEIGHT,
    COLUMNS,
    FLIP,
    HEIGHT,
    LEFT,
    PLANAR,
    RGB,
    TOP,
    Source,
    colours,
    frame_bytes,
    of_rgb,
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
COLOURS = {
    "rgb": RGB,
    "bt601": colours(6, False),
    "bt601_full": colours(5, True),
    "bt709": colours(1, False),
    "bt709_full": colours(1, True),
}


def make(shape, dtype=torch.float32, flips=(True, False), frames=4, kind=("bt709", "rgb")):
    """The clips' frames lie last to first, and the last of each is its first once more."""
    clips, size, t_patch, patch, keep = SHAPES[shape]
    rows, at = [], 3
    for clip, (h, w, box) in reversed([*enumerate(clips)]):
        colour = COLOURS[kind[clip % len(kind)]]
        each = frame_bytes(h, w, bool(colour[0]))
        begins = [at + (frames - 2 - t) * each for t in range(frames - 1)]
        rows.insert(0, [h, w, *box, int(flips[clip]), *colour, *begins, begins[0]])
        at += (frames - 1) * each
    flat = torch.randint(0, 256, (at,), dtype=torch.uint8)
    tokens = frames // t_patch * (size // patch) ** 2
    ids = torch.stack([torch.randperm(tokens)[:keep] for _ in clips])
    source = Source(flat.to(DEVICE), torch.tensor(rows).to(DEVICE), size)
    return [source, ids.to(DEVICE), t_patch, patch, *NORM, dtype]


@pytest.mark.parametrize("channel_last", [False, True], ids=["channel_first", "channel_last"])
@pytest.mark.parametrize("flips", [(True, False), (False, True)], ids=["first", "second"])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", SHAPES)
def test_crop_resize_matches_interpolate(backend, shape, dtype, flips, channel_last):
    dtype = WIDE[dtype]
    kind = ("bt709", "rgb") if flips[0] else ("rgb", "bt601_full")
    args = [*make(shape, dtype, flips, kind=kind), channel_last]
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        ours = crop_resize_patchify_gather(*args)
    want = interpolated(*args, by=crop_resize_patchify_gather_ref)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", COLOURS)
def test_crop_resize_has_every_colour(backend, kind):
    """At the frames' own size a pixel is the reference's colour, and nothing else."""
    args = make("same_size", kind=(kind,))
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        ours = crop_resize_patchify_gather(*args)
    torch.testing.assert_close(
        ours, interpolated(*args, by=crop_resize_patchify_gather_ref), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_crop_resize_rounds_once(backend, dtype):
    args = make("enlarged")
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        wide, narrow = (crop_resize_patchify_gather(*args[:-1], d) for d in (args[-1], dtype))
    assert torch.equal(narrow, wide.to(dtype))


def test_crop_resize_is_the_official_expression(backend):
    """Normalise, cut, resize, mirror, and take slices: none of the op's own code."""
    frames, dtype = torch.randint(0, 256, (4, 30, 40, 3), dtype=torch.uint8), [*WIDE.values()][-1]
    box, flip, ids = torch.tensor([[3, 5, 20, 31]], dtype=torch.int32), True, [[21, 0]]
    clip = ((frames.double() / 255 - 0.45) / 0.225).permute(3, 0, 1, 2)[:, :, 3:23, 5:36]
    clip = F.interpolate(clip, (16, 16), mode="bilinear", align_corners=False).flip(3)
    source = of_rgb([frames], box, torch.tensor([flip]), 16)
    args = (source, torch.tensor(ids), 2, 4, *NORM, dtype)
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        first, last = (crop_resize_patchify_gather(*args, order)[0] for order in (False, True))
    clip = clip.to(dtype)
    patch = clip[:, 2:4, 4:8, 4:8]  # token 21 = (1, 1, 1) of 2 x 4 x 4
    torch.testing.assert_close(first[0], patch.flatten())
    torch.testing.assert_close(last[0], patch.permute(1, 2, 3, 0).flatten())
    torch.testing.assert_close(first[1], clip[:, :2, :4, :4].flatten())


def test_whole_clips_are_the_reference_s(backend):
    source, _, _, patch, *_ = make("reduced")
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        ours = whole(source, patch, *NORM)
    want = interpolated(source, torch.float32, by=crop_resized)
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-6)


def test_frames_are_those_asked_for(backend):
    """The target frames of a clip, by their places alone."""
    source, ids, *_ = make("reduced", frames=6)
    ids = ids[:, :4] % 9
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        ours = crop_resize_patchify_gather(
            source.of_frames((1, 4)), ids, 2, 5, *NORM, torch.float32
        )
    clip = interpolated(source, torch.float32, by=crop_resized)[:, :, [1, 4]]
    want = clip.unflatten(3, (3, 5)).unflatten(5, (3, 5)).permute(0, 3, 5, 1, 2, 4, 6)
    want = want.flatten(3).flatten(1, 2)[torch.arange(2)[:, None], ids]
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-6)
    with pytest.raises(IndexError, match=r"frames \[6\] of clips of 6"):
        source.of_frames((6,))


def test_colours_are_the_standard_s_within_ffmpeg_s_truncation():
    """Every Y, U and V, against BT.601 and BT.709 in fp64: FFmpeg drops what is below a level up to
    three times, and adds none."""
    for name, (matrix, kr, kb) in {
        "bt601": (6, 0.299, 0.114),
        "bt709": (1, 0.2126, 0.0722),
    }.items():
        for full in (False, True):
            y = np.arange(0, 256, 5)
            y, u, v = (a.astype(np.float64) for a in np.meshgrid(y, y, y, indexing="ij"))
            planes = [np.repeat(np.repeat(a.reshape(1, -1), 2, 0), 2, 1) for a in (y, u, v)]
            n = y.size
            flat = np.concatenate([planes[0].ravel(), u.ravel(), v.ravel()]).astype(np.uint8)
            row = [2, 2 * n, 0, 0, 2, 2 * n, 0, *colours(matrix, full), 0]
            got = Source(torch.from_numpy(flat), torch.tensor([row]), 2).rgb()[0][0, 0, ::2]
            scale, chroma, black = (1, 1, 0) if full else (255 / 219, 255 / 224, 16)
            luma, cb, cr = (y - black) * scale, (u - 128) * chroma, (v - 128) * chroma
            red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
            green = (luma - kr * red - kb * blue) / (1 - kr - kb)
            want = np.stack([red, green, blue], -1).reshape(-1, 3).clip(0, 255)
            off = want - got.numpy()
            assert -0.1 < off.min() and off.max() < 3, (name, full, off.min(), off.max())
            # A matrix or a range that is another's is further away than that.
            assert abs(off).mean() < 1.5, (name, full, abs(off).mean())


def test_crop_resize_takes_any_table(backend):
    """A slice of a larger one, ids of any strides, and a buffer with room at its end."""
    args = make("enlarged")
    want = interpolated(*args, by=crop_resize_patchify_gather_ref)
    source = args[0]
    table = torch.cat([source.table, source.table - 1], dim=1)[:, : source.table.shape[1]]
    flat = torch.cat([source.flat, source.flat[:99]])
    args[:2] = Source(flat, table, source.size), args[1].int().t().contiguous().t()
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        ours = crop_resize_patchify_gather(*args)
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-6)


def test_crop_resize_leaves_tables_on_another_device_to_nobody(cpp):
    args = make("reduced")
    args[0] = replace(args[0], table=args[0].table.to("meta"))
    with pytest.raises(ValueError, match=r"must be on one device, got .*table on meta"):
        crop_resize_patchify_gather(*args)
    args = [replace(args[0], flat=args[0].flat.to("meta")), args[1].to("meta"), *args[2:]]
    with mae_fast.backends(crop_resize_patchify_gather="cpp"):
        with pytest.raises(BackendError, match="on meta, not on the CPU"):
            crop_resize_patchify_gather(*args)


def _table(clip, **columns):
    def change(source):
        table = source.table.clone()
        for i, value in columns.items():
            table[clip, int(i[1:])] = value
        return replace(source, table=table)

    return change


def _box(clip, *box):
    return _table(clip, **{f"c{TOP + i}": value for i, value in enumerate(box)})


def _third(value):
    return lambda ids: ids.index_fill(1, torch.tensor(2, device=ids.device), value)


BAD = {
    "no_clips": (0, lambda s: replace(s, table=s.table[:0]), ValueError, "do not fit 0 clips"),
    "frames_rank": (0, lambda s: replace(s, flat=s.flat[None]), ValueError, "one contiguous"),
    "frames_dtype": (0, lambda s: replace(s, flat=s.flat.float()), ValueError, "torch.float32"),
    "frames_strides": (0, lambda s: replace(s, flat=s.flat[::2]), ValueError, "one contiguous"),
    "table_dtype": (0, lambda s: replace(s, table=s.table.int()), ValueError, "torch.int32"),
    "table_rank": (0, lambda s: replace(s, table=s.table[0]), ValueError, "must be int64"),
    "no_frames": (0, lambda s: replace(s, table=s.table[:, :COLUMNS]), ValueError, r"\[2, 14\]"),
    "box_above": (0, _box(0, -1, 0, 9, 9), ValueError, r"box \(-1, 0, 9, 9\) is not within"),
    "box_left": (0, _box(0, 0, -3, 9, 9), ValueError, r"box \(0, -3, 9, 9\)"),
    "box_below": (0, _box(0, 130, 0, 2, 9), ValueError, r"\(130, 0, 2, 9\) .* frame of 131x97"),
    "box_right": (0, _box(0, 0, 90, 9, 8), ValueError, r"box \(0, 90, 9, 8\)"),
    "box_second": (0, _box(1, 0, 0, 131, 97), ValueError, r"\(0, 0, 131, 97\) .* of 64x64"),
    "box_of_nothing": (0, _box(0, 0, 0, 0, 9), ValueError, r"box \(0, 0, 0, 9\)"),
    "box_of_less": (0, _box(0, 9, 9, 9, -9), ValueError, r"box \(9, 9, 9, -9\)"),
    "box_huge": (0, _box(0, 2**62, 0, 2**62, 9), ValueError, r"box \(4611686018427387904, 0"),
    "frame_before": (0, _table(0, c15=-1), ValueError, "bytes at .*-1"),
    "frame_past": (0, _table(1, c17=2**40), ValueError, "bytes at .*1099511627776"),
    "frame_larger": (0, _table(1, c0=300, c1=300), ValueError, "in a buffer of"),
    "ids_batch": (1, lambda i: i[:1], ValueError, r"ids \[1, 9\]"),
    "ids_dtype": (1, lambda i: i.double(), ValueError, "got torch.float64"),
    "negative": (1, _third(-1), IndexError, "-1, outside"),
    "past_end": (1, _third(18), IndexError, r"18, outside \[0, 18\)"),
    "size": (0, lambda s: replace(s, size=16), ValueError, r"\(4, 16, 16\) cannot be cut into"),
    "no_size": (0, lambda s: replace(s, size=0), ValueError, r"\(4, 0, 0\) cannot be cut"),
    "patch": (3, lambda _: 0, ValueError, "patches of 2x0x0"),
}
NUMBERS = [case for case in BAD if case.startswith(("box_", "frame_"))]  # on the device


@pytest.mark.parametrize("case", BAD)
def test_crop_resize_refuses(backend, case):
    """On a GPU the host would have to wait for the table and ids: NaN stands where they do not
    fit."""
    i, change, error, words = BAD[case]
    args = make("reduced", kind=("rgb", "bt601"))
    good, args[i] = args[i], change(args[i])
    with mae_fast.backends(crop_resize_patchify_gather=backend):
        if backend in GIVE_NAN and (case in NUMBERS or error is IndexError):
            ours = crop_resize_patchify_gather(*args)
            bad = ours.isnan().all(-1).cpu()
            if i == 1:
                assert torch.equal(bad, ((args[1] < 0) | (args[1] >= 18)).cpu())
            elif case in ("frame_before", "frame_past"):  # of one time step
                clip, step = (0, 0) if case == "frame_before" else (1, 1)
                want = torch.zeros_like(bad)
                want[clip] = args[1][clip].cpu() // 9 == step
                assert torch.equal(bad, want)
            else:
                clip = int(case in ("box_second", "frame_larger"))
                assert bad[clip].all() and not bad[1 - clip].any()
            args[i] = good
            keep = ~bad.to(ours.device)
            assert torch.equal(ours[keep], crop_resize_patchify_gather(*args)[keep])
        else:
            with pytest.raises(error, match=words):
                crop_resize_patchify_gather(*args)


@pytest.mark.parametrize("case", BAD)
def test_crop_resize_kernel_refuses_by_itself(cpp, case):
    i, change, error, _ = BAD[case]
    args = make("reduced", kind=("rgb", "bt601"))
    args[i] = change(args[i])
    (flat, table, size), rest = (args[0].flat, args[0].table, args[0].size), args[1:]
    with pytest.raises((error, RuntimeError)):
        torch.ops.mae_fast.crop_resize_patchify_gather_fwd(
            flat, table, rest[0], size, *rest[1:], False
        )


def test_crop_resize_compiles_without_a_break(backend):
    if backend == "reference":
        pytest.skip("the reference reads the table as numbers, which ends a graph")
    args = make("reduced")
    compiled = torch.compile(crop_resize_patchify_gather, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), crop_resize_patchify_gather(*args))


def test_columns_are_the_kernels():
    """csrc and kernels have the table's columns by their numbers."""
    assert (HEIGHT, TOP, LEFT, BOX_HEIGHT, FLIP, PLANAR, COLUMNS) == (0, 2, 3, 4, 6, 7, 14)
    kernels = pytest.importorskip("mae_fast.kernels.crop_resize_patchify_gather")
    assert kernels._NUMBERS == COLUMNS
