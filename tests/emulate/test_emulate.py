"""The CUDA kernels against the references: emulated, and on a GPU if there is one."""

import pytest
import torch
from op_checks import DTYPES, assert_as_good_as_torch

from mae_fast.ops.decoder_tokens import decoder_tokens_ref
from mae_fast.ops.masked_mse import masked_mse_ref
from mae_fast.ops.patchify_gather import patchify_gather_ref

NORM = (0.45, 0.225)
LAYOUTS = {
    "contiguous": lambda v: v,
    "decoded_frames": lambda v: v.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
    "a_crop": lambda v: torch.nn.functional.pad(v, (3, 5, 2, 1))[..., 2:-1, 3:-5],
    "odd_address": lambda v: torch.cat([v.new_zeros(7), v.flatten()])[7:].view(v.shape),
    "mirrored_axes": lambda v: v.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
    "a_still": lambda v: v[:, :, :1].expand_as(v),
}
# The clip, t_patch, patch, tokens kept of each clip.
SHAPES = {
    "vit": ((2, 3, 4, 32, 48), 2, 16, 5),
    "prime": ((2, 5, 6, 21, 14), 3, 7, 3),
    "eight": ((1, 3, 2, 16, 24), 1, 8, 9),
    "one_element": ((1, 1, 1, 1, 1), 1, 1, 1),
    "no_ids": ((2, 3, 2, 8, 8), 1, 4, 0),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def clip_and_ids(shape, layout="contiguous", id_dtype=torch.int32):
    size, t_patch, patch, kept = SHAPES[shape]
    video = LAYOUTS[layout](torch.randint(0, 256, size, dtype=torch.uint8))
    tokens = size[2] // t_patch * (size[3] // patch) * (size[4] // patch)
    ids = torch.stack([torch.randperm(tokens)[:kept] for _ in range(size[0])])
    return video, ids.to(id_dtype), t_patch, patch


def patchify(emulate, video, ids, t_patch, patch, norm, dtype):
    out = torch.empty(*ids.shape, video.shape[1] * t_patch * patch**2, dtype=dtype)
    code = {torch.float32: 3, torch.bfloat16: 4, torch.float16: 5}[dtype]
    return emulate("patchify_gather_fwd", [video, ids], [t_patch, patch, *norm, code], out)[0]


GATHERS = [
    *[("vit", layout, "bf16", torch.int64) for layout in LAYOUTS],
    *[("prime", layout, "f32", torch.int32) for layout in LAYOUTS],
    *[("eight", layout, "f16", torch.int32) for layout in ("a_crop", "decoded_frames")],
    ("one_element", "contiguous", "bf16", torch.int32),
    ("no_ids", "contiguous", "f32", torch.int32),
]


@pytest.mark.parametrize(("shape", "layout", "dtype", "ids"), GATHERS)
def test_patchify_gather_is_exact(emulate, shape, layout, dtype, ids):
    args = (*clip_and_ids(shape, layout, ids), NORM, DTYPES[dtype])
    want = patchify_gather_ref(*args[:4], *NORM, DTYPES[dtype])
    assert torch.equal(patchify(emulate, *args), want)


@pytest.mark.parametrize("norm", [NORM, (0, 1), (0.485, 0.229), (1 / 3, 7e-4), (-2.7, 31.9)])
def test_patchify_gather_divides_as_ieee(emulate, norm):
    """Every byte: a product with a reciprocal and one correction give the quotient's very bits."""
    args = (torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16), torch.zeros(1, 1).int())
    ours = patchify(emulate, *args, 1, 16, norm, torch.float32)
    assert torch.equal(ours, patchify_gather_ref(*args, 1, 16, *norm, torch.float32))


def masked_mse(emulate, pred, video, ids, frames, t_patch, patch, norm, need_grad=True):
    """The loss, and what is saved for backward."""
    unit = 1 if pred.dtype == torch.float16 or not pred.numel() else 2 / pred.numel()
    scalars = [t_patch, patch, *NORM, norm == "patch", unit, need_grad, *frames]
    outputs = [torch.empty(()), *[torch.empty(pred.shape, dtype=pred.dtype)] * need_grad]
    return emulate("masked_mse_fwd", [pred, video, ids], scalars, *outputs)


LOSSES = [
    *[("vit", layout, "bf16", "patch") for layout in LAYOUTS],
    *[("prime", layout, "f32", "patch") for layout in LAYOUTS],
    ("vit", "contiguous", "f32", "patch"),
    ("vit", "a_crop", "f16", "none"),
    ("eight", "decoded_frames", "f16", "patch"),
]


@pytest.mark.parametrize(("shape", "layout", "dtype", "norm"), LOSSES)
def test_masked_mse_matches_fp64(emulate, shape, layout, dtype, norm):
    video, ids, t_patch, patch = clip_and_ids(shape, layout)
    frames = list(range(video.shape[2]))[::-1]  # any order, and not their own numbers
    size = (*ids.shape, t_patch * patch**2 * video.shape[1])
    # A view of a larger one, as the predictions of masked tokens are.
    pred = torch.randn(size[0], size[1] + 1, size[2]).to(DTYPES[dtype])[:, 1:]
    rest = (video, ids, frames, t_patch, patch)
    loss, saved = masked_mse(emulate, pred, *rest, norm)
    grad = saved * (2 / pred.numel()) if dtype == "f16" else saved
    answers = []
    for p in (pred.clone(), pred.double()):
        p.requires_grad_()
        out = masked_mse_ref(p, *rest, *NORM, norm)
        answers.append([out.detach(), *torch.autograd.grad(out, p)])
    assert_as_good_as_torch([loss, grad], *answers)
    (alone,) = masked_mse(emulate, pred, *rest, norm, need_grad=False)
    assert torch.equal(alone, loss)


def test_masked_mse_of_nearly_flat_patches(emulate):
    """One byte is off by one, in the last place: the sums are integers, and nothing cancels."""
    video, ids, t_patch, patch = clip_and_ids("vit")
    video.fill_(200)[..., -1] = 201
    pred = torch.zeros(*ids.shape, 1536)
    args = (pred, video, ids, range(4), t_patch, patch)
    _, saved = masked_mse(emulate, *args, "patch")
    wide = pred.double().requires_grad_()
    masked_mse_ref(wide, *args[1:], *NORM, "patch").backward()
    torch.testing.assert_close(saved.double(), wide.grad, rtol=1e-6, atol=1e-12)


def test_masked_mse_of_nothing_is_nan(emulate):
    video, ids, t_patch, patch = clip_and_ids("no_ids")
    args = (torch.empty(2, 0, 48), video, ids, (0, 1), t_patch, patch)
    loss, saved = masked_mse(emulate, *args, "patch")
    assert loss.isnan() and saved.shape == (2, 0, 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 37, 4096])
def test_masked_mse_backward_is_exact(emulate, size, dtype):
    saved = torch.randn(size).to(DTYPES[dtype])
    (ours,) = emulate("masked_mse_bwd", [saved, torch.tensor(0.3)], [1.5], saved)
    factor = torch.tensor(0.3) * 1.5
    assert torch.equal(ours, (saved.float() * factor).to(saved.dtype))


def decoder_args(v, w, batch=2, kept=5, masked=8, length=13, width=24, cls=True):
    values = [torch.randn(batch, kept + 1, width)[:, 1:].to(DTYPES[v])]
    promoted = torch.promote_types(DTYPES[v], DTYPES[w])
    values.append(torch.randn(width).to(promoted).expand(batch, -1) if cls else None)
    values += [torch.randn(size).to(DTYPES[w]) for size in ((width,), (length, width))]
    ids = torch.stack([torch.randperm(length) for _ in range(batch)])
    return [*values, ids[:, :kept], ids[:, kept : kept + masked].int()]


def decoder_tokens(emulate, visible, cls, mask_token, pos, ids_keep, ids_mask):
    tokens = (cls is not None) + ids_keep.shape[1] + ids_mask.shape[1]
    dtype = torch.promote_types(visible.dtype, pos.dtype)
    out = torch.empty(visible.shape[0], tokens, visible.shape[2], dtype=dtype)
    tensors = [visible, mask_token, pos, ids_keep, ids_mask, *[cls] * (cls is not None)]
    return emulate("decoder_tokens_fwd", tensors, [], out)[0]


DECODERS = {
    "same_dtype": {"v": "bf16", "w": "bf16"},
    "autocast": {"v": "bf16", "w": "f32"},
    "f16": {"v": "f16", "w": "f16", "width": 264},
    "odd_width": {"v": "f32", "w": "f32", "width": 13},
    "no_cls": {"v": "f32", "w": "f32", "cls": False},
    "no_visible": {"v": "bf16", "w": "bf16", "kept": 0},
    "no_masked": {"v": "f32", "w": "f32", "masked": 0},
    "one_element": {"v": "f32", "w": "f32", "kept": 1, "masked": 0, "length": 1, "width": 1},
}


@pytest.mark.parametrize("case", DECODERS)
def test_decoder_tokens_is_exact(emulate, case):
    args = decoder_args(**DECODERS[case])
    assert torch.equal(decoder_tokens(emulate, *args), decoder_tokens_ref(*args))


def decoder_grads(emulate, dout, ids_keep, ids_mask, length):
    """(dmask_token, dpos)"""
    outputs = torch.empty(dout.shape[2]), torch.empty(length, dout.shape[2])
    return emulate("decoder_tokens_bwd", [dout, ids_keep, ids_mask], [length], *outputs)


GRADS = {
    "bf16": {"v": "bf16", "w": "bf16", "batch": 5, "width": 264},
    "f16": {"v": "f16", "w": "f16"},
    "f32": {"v": "f32", "w": "f32", "length": 21},
    "odd_width": {"v": "bf16", "w": "bf16", "width": 13},
    "no_cls": {"v": "f32", "w": "f32", "cls": False},
    "no_masked": {"v": "f32", "w": "f32", "masked": 0},
}


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("case", GRADS)
def test_decoder_tokens_backward_matches_fp64(emulate, case, twice):
    """Also where a clip holds a position more than once: visible and masked, or masked thrice."""
    visible, cls, mask_token, pos, *ids = decoder_args(**GRADS[case])
    if twice:
        ids[1][0, :3] = ids[0][0, 1]
    dout = torch.randn(len(visible), (cls is not None) + sum(i.shape[1] for i in ids), pos.shape[1])
    dout = dout.to(visible.dtype)
    answers = []
    for dtype in (torch.float32, torch.float64):
        leaves = [mask_token.to(dtype).requires_grad_(), pos.to(dtype).requires_grad_()]
        rest = [visible.to(dtype), None if cls is None else cls.to(dtype)]
        out = decoder_tokens_ref(*rest, *leaves, *ids)
        answers.append(torch.autograd.grad(out, leaves, dout.to(dtype)))
    assert_as_good_as_torch(decoder_grads(emulate, dout, *ids, len(pos)), *answers)


@pytest.mark.parametrize("bad", [-1, 2**31 - 1, -(2**31)])
def test_an_id_out_of_range_reads_nothing_and_gives_nan(emulate, bad):
    """Its row, or the loss; a gradient does not count it. The other rows are as they were."""
    video, ids, t_patch, patch = clip_and_ids("vit")
    ids[1, 2] = bad
    out = patchify(emulate, video, ids, t_patch, patch, NORM, torch.bfloat16)
    assert out[1, 2].isnan().all() and out.isnan().sum() == out.shape[2]
    pred = torch.randn(*ids.shape, out.shape[2])
    loss, saved = masked_mse(emulate, pred, video, ids, range(4), t_patch, patch, "patch")
    assert loss.isnan() and saved[1, 2].isnan().all() and saved.isnan().sum() == out.shape[2]
    args = decoder_args("f32", "f32")
    args[5][1, 2] = bad
    out = decoder_tokens(emulate, *args)
    assert out[1, 8].isnan().all() and out.isnan().sum() == out.shape[2]
    dout = torch.randn(out.shape)
    ours = decoder_grads(emulate, dout, *args[4:], 13)
    counted = [i.clone() for i in args[4:]]
    counted[1][1, 2], dout[1, 8] = 0, 0
    assert all(map(torch.equal, ours, decoder_grads(emulate, dout, *counted, 13)))


# What is planted in which file, and the op that must be seen to fail.
BARRIERS = {
    "pixels_before_they_are_there": ("masked_mse.cuh", "  __syncwarp();\n", "", "masked_mse_fwd"),
    "sum_of_a_block": (
        "masked_mse.cuh",
        "of_warp[warp] = error;\n  __syncthreads();",
        "of_warp[warp] = error;",
        "masked_mse_fwd",
    ),
    "sum_of_all": (
        "masked_mse.cuh",
        "threadIdx.x / kWarp] = sum;\n  __syncthreads();",
        "threadIdx.x / kWarp] = sum;",
        "masked_mse_fwd",
    ),
    "table_not_yet_empty": (
        "decoder_tokens.cuh",
        "last[l] = -1;\n  }\n  __syncthreads();",
        "last[l] = -1;\n  }",
        "decoder_tokens_bwd",
    ),
}
OVERRUNS = {
    "end_of_the_clip": (
        "patch.cuh",
        "if (word < clip.begin || word + (two ? 32 : 16) > clip.end)",
        "if (word < clip.begin)",
        "patchify_gather_fwd",
    ),
    "shared_memory_of_one_warp_less": (
        "patchify_gather.cuh",
        "kWarps * clip.shared_bytes()",
        "(kWarps - 1) * clip.shared_bytes()",
        "patchify_gather_fwd",
    ),
    "end_of_the_positions": (
        "decoder_tokens.cuh",
        "if (i >= 0 && valid)",
        "if (i >= 0)",
        "decoder_tokens_fwd",
    ),
}


def case_of(op):
    """The tensors and scalars of one run of an op."""
    video, ids, t_patch, patch = clip_and_ids("vit", "odd_address")
    if op == "patchify_gather_fwd":
        ids[-1, -1] = 11  # the last token
        return [video, ids], [t_patch, patch, *NORM, 4]
    if op == "masked_mse_fwd":
        return [torch.randn(2, 5, 1536), video, ids], [t_patch, patch, *NORM, 1, 1, 1, 0, 1, 2, 3]
    visible, cls, mask_token, pos, *ids = decoder_args("f32", "f32", length=13)
    if op == "decoder_tokens_fwd":
        ids[1][-1, -1] = 13
        return [visible, mask_token, pos, *ids, cls], []
    return [torch.randn(2, 14, 24), *ids], [13]


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_left_out_is_seen_as_a_race(planted, barrier):
    *change, op = BARRIERS[barrier]
    run = planted("thread", *change, op, *case_of(op))
    assert run.returncode == 66 and "data race" in run.stderr, run.stderr


@pytest.mark.parametrize("overrun", OVERRUNS)
def test_an_overrun_is_seen(planted, overrun):
    *change, op = OVERRUNS[overrun]
    run = planted("address", *change, op, *case_of(op))
    assert run.returncode == 1 and "ERROR: AddressSanitizer" in run.stderr, run.stderr


def test_a_barrier_that_some_threads_miss_is_an_error(planted):
    change = (
        "masked_mse.cuh",
        "  float error = 0;\n  if (row",
        "  if (row >= rows) return;\n  float error = 0;\n  if (row",
    )
    run = planted("plain", *change, "masked_mse_fwd", *case_of("masked_mse_fwd"))
    assert "a barrier that not every thread reaches" in run.stderr, run.stderr
