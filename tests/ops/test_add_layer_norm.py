"""add_layer_norm: every backend against the fp64 reference, forward and gradients."""

import pytest
import torch
from op_checks import BACKENDS, DTYPES, assert_rounded_once, check_op, gradients
from torch._subclasses.fake_tensor import FakeTensorMode

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops import dispatch
from mae_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_ref
from mae_fast.ops.linear import bias_grad, leave_sums

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


@pytest.mark.parametrize("used", ["both", "the_sum", "the_norm"])
@pytest.mark.parametrize("first", [1, 6, 7])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16_to_fp32"])
def test_add_layer_norm_of_which_some_tokens_go_on(backend, narrow, first, used):
    """The sum's gradient is of these alone; the norm is of all."""
    x, y, *rest = make((3, 7, 24), torch.float32)
    dtype = torch.bfloat16 if narrow else torch.float32
    args = [x, y.detach().to(dtype).requires_grad_(), *rest, dtype, first]
    keep = {"both": slice(None), "the_sum": slice(0, 1), "the_norm": slice(1, 2)}[used]
    if used == "the_sum":
        args[2:4] = (a.detach() for a in args[2:4])
    dout = [torch.randn(3, 7 - first, 24), torch.randn(3, 7, 24)][keep]
    with mae_fast.backends(add_layer_norm=backend):
        check_op(
            lambda *args: add_layer_norm(*args)[keep],
            lambda *args: add_layer_norm_ref(*args)[keep],
            args,
            dout,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 130), (3, 70, 768)], ids=str)
def test_the_sums_of_a_gradient_are_left_on_it(backend, shape, dtype):
    """In Triton, of all digits that it had; what is written into it since is summed again."""
    x, y, *rest = make(shape, torch.float32)
    y = y.detach().to(dtype).requires_grad_()
    with mae_fast.backends(add_layer_norm=backend):
        outs = add_layer_norm(x, y, *rest, dtype)
    dx, dy = torch.autograd.grad(outs, [x, y], [torch.randn_like(t) for t in outs])
    assert torch.equal(dy, dx.to(dtype))
    rows, exact = dy.flatten(0, -2), dx.double().flatten(0, -2).sum(0)
    assert ("_mae_fast_sums" in dy.__dict__) == (backend == "triton")
    sums = bias_grad(dy, torch.ones_like(rows) if backend == "triton" else rows)
    error = (sums - exact).norm() / dx.norm()
    assert sums.dtype == torch.float32 and error <= (4e-6 if backend == "triton" else 4e-3)
    for written in (False, True):
        leave_sums(dy, sums)
        if written:
            dy.mul_(2)
        again = bias_grad(dy, rows)
        assert (again is sums) == (not written)
        assert torch.equal(bias_grad(dy, rows), torch.ops.mae_fast.linear_sums(rows))


def test_the_operator_gives_sums_where_they_are_asked_for(backend):
    if backend == "reference":
        pytest.skip("of the kernels")
    assert dispatch.MACHINE[backend]() is None  # loads them, where no other test has
    total, dout, weight = torch.randn(3, 5, 40), torch.randn(3, 5, 40).bfloat16(), torch.randn(40)
    for first, sums in ((0, True), (2, True), (2, False)):
        saved = total, weight.bfloat16() if first else weight, total.mean(-1), 1 / total.std(-1)
        args = torch.randn(3, 5 - first, 40), dout, *saved, torch.bfloat16, first, sums
        dx, dy, *rest, of_dx = torch.ops.mae_fast.add_layer_norm_bwd(*args)
        with FakeTensorMode() as fake:
            shapes = [fake.from_tensor(a) if torch.is_tensor(a) else a for a in args]
            told = torch.ops.mae_fast.add_layer_norm_bwd(*shapes)
        for one, other in zip(told, (dx, dy, *rest, of_dx), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(dy, dx.bfloat16()) and of_dx.dtype == torch.float32
        assert of_dx.shape == ((40,) if sums else (0,))
        if sums:
            assert (of_dx - dx.double().sum((0, 1))).norm() <= 4e-6 * dx.norm()


def test_add_layer_norm_of_which_some_tokens_go_on_compiles_whole(cpp):
    args = [*make((3, 7, 24), torch.float32), None, 2]
    dout = [torch.randn(3, 5, 24), torch.randn(3, 7, 24)]
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    found, expected = (gradients(f, args, dout) for f in (compiled, add_layer_norm))
    torch.testing.assert_close(found, expected)


def test_a_gradient_of_the_sum_that_does_not_fit_is_refused(cpp):
    total, weight, rows = torch.ones(2, 5, 8), torch.ones(8), torch.ones(2, 5)
    for tokens, first in ((5, 2), (4, 0), (3, 6), (5, -1)):
        args = torch.ones(2, tokens, 8), total, total, weight, rows, rows, torch.float32, first
        with pytest.raises(RuntimeError, match=rf"of the sum from token {first} on"):
            torch.ops.mae_fast.add_layer_norm_bwd(*args, False)


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
