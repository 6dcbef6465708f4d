"""layer_norm: every backend against the fp64 reference, forward and gradients."""

import pytest
import torch
from op_checks import BACKENDS, DTYPES, assert_rounded_once, check_op

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops.layer_norm import layer_norm, layer_norm_ref

SHAPES = {
    "one_row": (1, 3),
    "no_rows": (0, 8),
    "prime": (7, 13),
    "wide": (3, 1280),
    "vit_b": (2, 157, 768),
    "decoder": (1, 393, 512),
}
EPS = 1e-6


def make(shape, dtype):
    x = (torch.randn(shape) * 3 + 1).to(dtype).requires_grad_()
    weight = (torch.randn(shape[-1]) + 1).to(dtype).requires_grad_()
    bias = torch.randn(shape[-1]).to(dtype).requires_grad_()
    return [x, weight, bias, EPS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_matches_fp64(backend, shape, dtype):
    with mae_fast.backends(layer_norm=backend):
        dout = [torch.randn(SHAPES[shape])]
        check_op(layer_norm, layer_norm_ref, make(SHAPES[shape], DTYPES[dtype]), dout)


def test_layer_norm_takes_strided_input(backend):
    x = torch.randn(4, 9, 40)[:, ::2, 3:33].requires_grad_()
    weight, bias = torch.randn(60)[::2].requires_grad_(), torch.randn(30).requires_grad_()
    dout = [torch.randn(30, 5, 4).permute(2, 1, 0)]
    with mae_fast.backends(layer_norm=backend):
        check_op(layer_norm, layer_norm_ref, [x, weight, bias, EPS], dout)


@pytest.mark.parametrize("first", [0, 2])
def test_layer_norm_of_a_slice_of_tokens(backend, first):
    """As the last decoder block takes it; by Triton in place."""
    x = torch.randn(3, 9, 40)[:, first:].requires_grad_()
    args = [x, *make((1, 40), torch.float32)[1:]]
    with mae_fast.backends(layer_norm=backend):
        check_op(layer_norm, layer_norm_ref, args, [torch.randn(x.shape)])


def test_layer_norm_of_one_value_is_the_bias(backend):
    x, weight, bias = (torch.randn(5, 1), torch.randn(1), torch.randn(1))
    with mae_fast.backends(layer_norm=backend):
        assert torch.equal(layer_norm(x, weight, bias, EPS), bias.expand(5, 1))


def test_layer_norm_of_a_distant_mean(backend):
    """The variance of numbers around 3000 is lost by E[x^2] - E[x]^2 in fp32."""
    args = make((5, 64), torch.float32)
    args[0] = (args[0].detach() + 3000).requires_grad_()
    with mae_fast.backends(layer_norm=backend):
        check_op(layer_norm, layer_norm_ref, args, [torch.randn(5, 64)])


def test_layer_norm_keeps_bf16_beside_fp32_weights(backend):
    """What autocast gives it."""
    x, *rest = make((3, 24), torch.float32)
    with mae_fast.backends(layer_norm=backend):
        out = layer_norm(x.bfloat16(), *rest)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, layer_norm_ref(x.bfloat16(), *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", ["one_row", "no_rows", "prime", "vit_b"])
def test_layer_norm_is_rounded_once_to_the_dtype_asked_for(backend, shape, dtype):
    """The bits that a cast of its result has; its gradient comes in that dtype."""
    args = make(SHAPES[shape], torch.float32)
    dout = [torch.randn(SHAPES[shape]).to(dtype)]
    with mae_fast.backends(layer_norm=backend):
        assert_rounded_once(layer_norm(*args, dtype), layer_norm(*args))
        check_op(layer_norm, layer_norm_ref, [*args, dtype], dout)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="of the C++ kernels")
def test_layer_norm_in_cpp_declines_to_widen(cpp):
    x, *rest = make((3, 8), torch.float32)
    args = (x.bfloat16(), *rest, torch.float32)
    assert torch.equal(layer_norm(*args), layer_norm_ref(*args))
    with mae_fast.backends(layer_norm="cpp"), pytest.raises(BackendError, match="it gives no"):
        layer_norm(*args)


def test_layer_norm_refuses_shapes(backend):
    x, weight, bias, eps = make((3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"x \[3, 8\], weight \[7\]"):
        layer_norm(x, weight[:7], bias[:7], eps)
