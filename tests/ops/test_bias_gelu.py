"""bias_gelu: every backend against the fp64 reference, forward and gradients."""

import pytest
import torch
from op_checks import DTYPES, check_op

import mae_fast
from mae_fast.ops.bias_gelu import bias_gelu, bias_gelu_ref

SHAPES = {"one_element": (1,), "no_rows": (0, 8), "prime": (7, 13), "vit_b": (1, 157, 3072)}


def make(shape, dtype):
    x, bias = torch.randn(shape) * 3, torch.randn(shape[-1])
    return [t.to(dtype).requires_grad_() for t in (x, bias)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_gelu_matches_fp64(backend, shape, dtype):
    with mae_fast.backends(bias_gelu=backend):
        args = make(SHAPES[shape], DTYPES[dtype])
        check_op(bias_gelu, bias_gelu_ref, args, [torch.randn(SHAPES[shape])])


def test_bias_gelu_takes_strided_input(backend):
    x = torch.randn(30, 5, 3).permute(2, 1, 0)[:, ::2].requires_grad_()
    bias = torch.randn(60)[::2].requires_grad_()
    with mae_fast.backends(bias_gelu=backend):
        check_op(bias_gelu, bias_gelu_ref, [x, bias], [torch.randn(30, 3, 3).transpose(0, 2)])


def test_bias_gelu_far_from_zero(backend):
    x = torch.tensor([-1e4, -40.0, -6.0, -1e-30, 0.0, 1e-30, 6.0, 40.0, 1e4])
    with mae_fast.backends(bias_gelu=backend):
        args = [x.requires_grad_(), torch.zeros(9)]
        check_op(bias_gelu, bias_gelu_ref, args, [torch.ones(9)])


def test_bias_gelu_keeps_bf16_beside_fp32_bias(backend):
    x, bias = torch.randn(3, 24).bfloat16(), torch.randn(24)
    with mae_fast.backends(bias_gelu=backend):
        out = bias_gelu(x, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, bias_gelu_ref(x, bias))


def test_bias_gelu_refuses_shapes():
    with pytest.raises(ValueError, match=r"x \[3, 8\] and bias \[7\]"):
        bias_gelu(torch.randn(3, 8), torch.randn(7))


def test_bias_gelu_in_fp32_is_torchs():
    """To 4e-7, as torch to 2e-7: between 1e-3 and 6, where few roundings hide
    an exponential or a reciprocal that is a little off."""
    x = torch.cat([s * torch.logspace(-3, 0.778, 4000) for s in (-1, 1)]).requires_grad_()
    with torch.no_grad():
        exact = x.double().requires_grad_()
    bias_gelu_ref(exact, torch.zeros(8000).double()).sum().backward()
    out = bias_gelu(x, torch.zeros(8000))
    out.sum().backward()
    wanted = bias_gelu_ref(exact, torch.zeros(8000).double())
    assert ((out - wanted).abs() <= 4e-7 * (1 + x.abs())).all()
    assert ((x.grad - exact.grad).abs() <= 6e-7).all()
