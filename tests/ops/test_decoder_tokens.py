"""decoder_tokens: every backend against the fp64 reference, forward and gradients."""

import pytest
import torch
from op_checks import BACKENDS, DEVICE, DTYPES, check_op

import mae_fast
from mae_fast.masking import draw_ids
from mae_fast.ops import dispatch
from mae_fast.ops.decoder_tokens import decoder_tokens, decoder_tokens_ref

# batch, grid, mask ratio, width
SHAPES = {
    "one_element": (1, (1, 1, 2), 0.5, 1),
    "prime": (3, (1, 7, 5), 0.6, 13),
    "all_visible": (2, (2, 2, 2), 0.0, 8),
    # The interpreter takes a while.
    "decoder": (2, (1 if dispatch.interpreting() else 8, 14, 14), 0.9, 64),
    "many_clips": (19, (1, 2, 3), 0.5, 300),
}


def make(shape, dtype, cls=True, id_dtype=torch.int32):
    batch, grid, ratio, width = SHAPES[shape]
    ids = draw_ids("random", grid, ratio, seed=0, step=0, samples=torch.arange(batch))
    length, kept = sum(i.shape[1] for i in ids), ids[0].shape[1]
    sizes = [(batch, kept, width), (batch, width), (width,), (length, width)]
    values = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    if not cls:
        values[1] = None
    return [*values, *(i.to(id_dtype) for i in ids)]


def dout(args):
    visible, cls, *_, ids_mask = args
    tokens = (cls is not None) + visible.shape[1] + ids_mask.shape[1]
    return [torch.randn(visible.shape[0], tokens, visible.shape[2])]


@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no_cls"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoder_tokens_matches_fp64(backend, shape, dtype, cls):
    args = make(shape, DTYPES[dtype], cls)
    with mae_fast.backends(decoder_tokens=backend):
        check_op(decoder_tokens, decoder_tokens_ref, args, dout(args))


def test_decoder_tokens_takes_strided_input(backend):
    args = make("prime", torch.float32, id_dtype=torch.int64)
    batch, kept, width = args[0].shape
    args[0] = torch.randn(batch, kept + 1, width)[:, 1:].requires_grad_()  # after the cls token
    args[1] = torch.randn(width).expand(batch, -1).requires_grad_()
    args[3] = torch.randn(width, 35).t().requires_grad_()
    args[4] = args[4].t().contiguous().t()
    with mae_fast.backends(decoder_tokens=backend):
        check_op(
            decoder_tokens,
            decoder_tokens_ref,
            args,
            [dout(args)[0].transpose(0, 2).contiguous().transpose(0, 2)],
        )


def test_decoder_tokens_of_a_subset(backend):
    """Positions that no token has get no gradient, and one may stand twice."""
    args = make("prime", torch.float32)
    args[5] = args[5][:, :3].clone()
    args[5][:, 1] = args[5][:, 0]
    with mae_fast.backends(decoder_tokens=backend):
        check_op(decoder_tokens, decoder_tokens_ref, args, dout(args))


@pytest.mark.usefixtures("cpp")
def test_decoder_tokens_gives_the_same_bits_with_any_number_of_threads():
    args, threads, grads = make("decoder", torch.float32), torch.get_num_threads(), []
    gradient = dout(args)[0]
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        out = decoder_tokens(*args)
        grads.append(torch.autograd.grad(out, args[:4], gradient))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for g in grads[1:] for a, b in zip(grads[0], g, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the check would wait for the device")
@pytest.mark.parametrize("bad", [-1, 35, 2**31 - 1])
@pytest.mark.parametrize("which", [4, 5], ids=["ids_keep", "ids_mask"])
def test_decoder_tokens_refuses_an_id_out_of_range(backend, which, bad):
    args = make("prime", torch.float32)
    args[which] = args[which].clone()
    args[which][1, 2] = bad
    with mae_fast.backends(decoder_tokens=backend), pytest.raises(IndexError):
        decoder_tokens(*args)


@pytest.mark.skipif(BACKENDS != ["triton"], reason="the Triton kernels do not run here")
@pytest.mark.parametrize("bad", [-1, 35, 2**31 - 1])
def test_decoder_tokens_in_triton_gives_nan_for_an_id_out_of_range(bad):
    """Where nothing looked at the ids: the loss is not finite, and the step is skipped."""
    args = make("prime", torch.float32)
    args[5] = args[5].clone()
    args[5][1, 2] = bad
    dispatch.load_triton()
    out = torch.ops.mae_fast.decoder_tokens_fwd(*args)
    lost = out.isnan()
    assert lost[1, 1 + args[4].shape[1] + 2].all() and lost.sum() == out.shape[2]
    grads = torch.autograd.grad(out, args[:4], torch.ones_like(out))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_decoder_tokens_refuses_other_ids(dtype):
    args = make("prime", torch.float32)
    args[4] = args[4].to(dtype)
    with pytest.raises(ValueError, match=f"got {dtype}"):
        decoder_tokens(*args)


def test_decoder_tokens_refuses_shapes_and_devices(backend):
    args = make("prime", torch.float32)
    with pytest.raises(ValueError, match=r"ids_keep \[2, 14\]"):
        decoder_tokens(*args[:4], args[4][:2], args[5])
    meta = [a.to("meta") for a in args[:1]]
    with mae_fast.backends(decoder_tokens=backend), pytest.raises((RuntimeError, ValueError)):
        decoder_tokens(*meta, *args[1:])
