"""The product by oneDNN: the same to rounding, any strides, and where it stands back."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import DEVICE

from mae_fast.ops import linear as module
from mae_fast.ops.linear import linear


@pytest.fixture(params=["onednn", "default"])
def form(request, monkeypatch):
    """The two ways, whatever the maker of this CPU."""
    if request.param == "onednn" and DEVICE != "cpu":
        pytest.skip("oneDNN is the CPU's")
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    reason = None if request.param == "onednn" else "not here"
    monkeypatch.setattr(module, "why_not_onednn", lambda: reason)
    return request.param


SHAPES = {
    "one_element": ((1, 1), 1),
    "prime": ((7, 13), 11),
    "vit_b_fc1": ((2, 157, 768), 3072),
    "decoder_proj": ((2, 31, 512), 512),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_matches_fp64(form, shape, bias):
    torch.manual_seed(0)
    size, out = SHAPES[shape]
    x, w, b = torch.randn(size), torch.randn(out, size[-1]), torch.randn(out)
    leaves = [t.requires_grad_() for t in ((x, w, b) if bias else (x, w))]
    gradient = torch.randn(*size[:-1], out)

    def run(function, dtype):
        args = [t.detach().to(dtype).requires_grad_() for t in leaves]
        y = function(*args, *([] if bias else [None]))
        return [y.detach(), *torch.autograd.grad(y, args, gradient.to(dtype))]

    exact, plain, ours = (
        run(F.linear, torch.float64),
        run(F.linear, torch.float32),
        run(linear, torch.float32),
    )
    for e, p, o in zip(exact, plain, ours, strict=True):
        floor = 1e-6 * e.abs().max()
        assert (o - e).norm() <= 2 * (p - e).norm() + floor * e.numel() ** 0.5
        assert o.shape == e.shape and o.dtype == torch.float32


def test_linear_takes_strided_input(form):
    x = torch.randn(5, 33, 40)[:, ::2, 3:23].requires_grad_()
    w = torch.randn(20, 17).t().requires_grad_()
    g = torch.randn(17, 17, 5).permute(2, 0, 1)
    ours = torch.autograd.grad(linear(x, w), (x, w), g)
    theirs = torch.autograd.grad(F.linear(x, w), (x, w), g)
    torch.testing.assert_close(linear(x, w), F.linear(x, w))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_linear_leaves_out_gradients_nobody_needs(form):
    x, w, b = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    linear(x, w, b).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(5, 4))


@pytest.mark.parametrize("case", ["fp64", "bf16", "autocast", "empty"])
def test_linear_stands_back(form, case, monkeypatch):
    def never(*args):
        raise AssertionError("oneDNN was called")

    monkeypatch.setattr(module._OneDNNLinear, "apply", never)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(case, torch.float32)
    x, w = torch.randn(0 if case == "empty" else 3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        torch.testing.assert_close(linear(x, w), F.linear(x, w))


def test_linear_compiles_without_a_break(form):
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((6, 8), (5, 8), (5,)))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    y = compiled(x, w, b)
    torch.testing.assert_close(y, F.linear(x, w, b))
    y.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(6, 8))


@pytest.mark.parametrize(
    "size", [(0, 3), (3, 0), (1, 1), (16, 48), (37, 50), (5, 1000), (157, 768)]
)
@pytest.mark.parametrize("step", [1, 3], ids=["whole", "every_third_row"])
def test_transposed_is_exact(cpp, size, step):
    x = torch.randn(size)[::step]
    out = torch.ops.mae_fast.transposed(x)
    assert out.is_contiguous() and torch.equal(out, x.t())


def test_transposed_of_other_strides_and_dtypes(cpp):
    x = torch.randn(33, 20)
    assert torch.equal(torch.ops.mae_fast.transposed(x.t()), x)
    torch.library.opcheck(torch.ops.mae_fast.transposed, (x,))
    for bad in (x.double(), x[None]):
        with pytest.raises(RuntimeError, match=r"must be float \[M, N\], got"):
            torch.ops.mae_fast.transposed(bad)


def test_linear_checks_shapes(form):
    with pytest.raises(RuntimeError):
        linear(torch.randn(3, 4), torch.randn(5, 6))
