"""add_layer_norm: every backend against the fp64 reference, forward and gradients."""

import pytest
import torch
from op_checks import BACKENDS, DTYPES, assert_rounded_once, check_op

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_ref

SHAPES = {"one_row": (1, 3), "no_rows": (0, 8), "prime": (7, 13), "vit_b": (2, 157, 768)}
EPS = 1e-6


def make(shape, dtype):
    x, y = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).to(dtype).requires_grad_() for _ in range(2))
    return [x, y, weight, bias, EPS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm_matches_fp64(backend, shape, dtype):
    dout = [torch.randn(SHAPES[shape]) for _ in range(2)]
    with mae_fast.backends(add_layer_norm=backend):
        check_op(add_layer_norm, add_layer_norm_ref, make(SHAPES[shape], DTYPES[dtype]), dout)


def test_add_layer_norm_takes_strided_input(backend):
    x = torch.randn(3, 9, 30)[:, 2:].requires_grad_()
    y = torch.randn(30, 7, 3).permute(2, 1, 0).requires_grad_()
    weight, bias = torch.randn(60)[::2].requires_grad_(), torch.randn(30).requires_grad_()
    dout = [torch.randn(30, 7, 3).permute(2, 1, 0), torch.randn(3, 7, 60)[..., ::2]]
    with mae_fast.backends(add_layer_norm=backend):
        check_op(add_layer_norm, add_layer_norm_ref, [x, y, weight, bias, EPS], dout)


@pytest.mark.parametrize("used", [0, 1], ids=["the_sum", "the_norm"])
def test_add_layer_norm_when_one_output_is_used(backend, used):
    def one(function):
        return lambda *args: function(*args)[used]

    args = make((5, 16), torch.float32)
    if used == 0:  # the norm's parameters have no part in the sum
        args[2:4] = (a.detach() for a in args[2:4])
    with mae_fast.backends(add_layer_norm=backend):
        check_op(one(add_layer_norm), one(add_layer_norm_ref), args, [torch.randn(5, 16)])


def test_add_layer_norm_adds_bf16_to_fp32_as_autocast_does(backend):
    x, y, *rest = make((3, 24), torch.float32)
    y = y.detach().bfloat16().requires_grad_()
    with mae_fast.backends(add_layer_norm=backend):
        total, out = add_layer_norm(x, y, *rest)
    assert total.dtype == out.dtype == torch.float32
    torch.testing.assert_close((total, out), add_layer_norm_ref(x, y, *rest))
    (total.sum() + out.square().sum()).backward()
    assert x.grad.dtype == torch.float32 and y.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.bfloat16(), y.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm_is_rounded_once_to_the_dtype_asked_for(backend, shape, dtype):
    """The sum stays in fp32; the norm has the bits of a cast, and its gradient that dtype."""
    x, y, *rest = make(SHAPES[shape], torch.float32)
    args = [x, y.detach().to(dtype).requires_grad_(), *rest]
    dout = [torch.randn(SHAPES[shape]), torch.randn(SHAPES[shape]).to(dtype)]
    with mae_fast.backends(add_layer_norm=backend):
        total, out = add_layer_norm(*args)
        rounded = add_layer_norm(*args, dtype)
        assert torch.equal(rounded[0], total)
        assert_rounded_once(rounded[1], out)
        check_op(add_layer_norm, add_layer_norm_ref, [*args, dtype], dout)


def test_add_layer_norm_refuses_shapes():
    x, y, weight, bias, eps = make((3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"y \[2, 8\]"):
        add_layer_norm(x, y[:2], weight, bias, eps)


@pytest.mark.skipif(BACKENDS != ["triton"], reason="the Triton kernels do not run here")
def test_add_layer_norm_in_triton_declines_what_it_does_not_take():
    args = make((3, 8), torch.float64)
    with mae_fast.backends(add_layer_norm="triton"):
        with pytest.raises(BackendError, match="a tensor is float64"):
            add_layer_norm(*args)
        with pytest.raises(BackendError, match="a row has 9000 values"):
            add_layer_norm(*make((1, 9000), torch.float32))
