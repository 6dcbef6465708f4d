"""The product by oneDNN, and several as one: the same to rounding, any strides, and where these
stand back."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import DEVICE, assert_as_good_as_torch

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops import dispatch
from mae_fast.ops import linear as module
from mae_fast.ops.linear import Copies, linear, linears


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
    "vit_b_fc1": ((2, 29, 768), 3072),
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


@pytest.fixture
def half():
    """The way of a GPU under autocast, which Triton's interpreter takes too, and of a CPU that
    multiplies tiles."""
    reason = dispatch.MACHINE["half"]()
    if reason:
        pytest.skip(reason)
    with mae_fast.backends(linear="half"):
        yield


HALF = [torch.bfloat16, torch.float16]
if DEVICE == "cpu" and not dispatch.interpreting():
    HALF.remove(torch.float16)  # tiles are of bf16: test_half_of_tiles_declines


def _autocast(dtype):
    return torch.autocast(DEVICE, dtype, enabled=dtype != torch.float64)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "one_element"])  # luck of one rounding
@pytest.mark.parametrize("biases", ["all", "none", "q_and_v"])
def test_layers_of_one_input_match_fp64(half, shape, dtype, biases):
    """Three layers as one product: outputs, and the gradients of x, of weights and of biases."""
    size, out = SHAPES[shape]
    x, gradient = torch.randn(size), torch.randn(*size[:-1], 3, out)
    weights = [torch.randn(out, size[-1]) / size[-1] ** 0.5 for _ in range(3)]
    there = {"all": (0, 1, 2), "none": (), "q_and_v": (0, 2)}[biases]
    leaves = [x, *weights, *(torch.randn(out) for _ in there)]

    def apart(x, layers):
        return torch.stack([F.linear(x, *layer) for layer in layers], dim=-2)

    def run(function, wide):
        args = [t.detach().to(wide).requires_grad_() for t in leaves]
        found = dict(zip(there, args[4:], strict=True))
        with _autocast(torch.float64 if wide == torch.float64 else dtype):
            y = function(args[0], [(w, found.get(i)) for i, w in enumerate(args[1:4])])
        return [y.detach(), *torch.autograd.grad(y, args, gradient.to(y.dtype))]

    exact, plain, ours = (
        run(apart, torch.float64),
        *(run(f, torch.float32) for f in (apart, linears)),
    )
    assert_as_good_as_torch(ours, plain, exact)


def test_one_layer_in_half_matches_a_product_of_its_own(half):
    """And its input may be in fp32, strided, or need no gradient."""
    x, w, b = torch.randn(5, 6, 16)[:, ::2], torch.randn(8, 16), torch.randn(8)
    for need in (True, False):
        leaves = [x.clone().requires_grad_(need), w.clone().requires_grad_(), b]
        with _autocast(torch.bfloat16):
            y = linear(*leaves)
            expected = F.linear(*leaves)
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.05)
        y.float().sum().backward()
        assert leaves[1].grad.dtype == torch.float32 and (leaves[0].grad is None) == (not need)
        total = x.bfloat16().float().sum((0, 1)).expand(8, 16)
        torch.testing.assert_close(leaves[1].grad, total, rtol=1e-5, atol=1e-5)


def test_a_bias_alone_has_its_gradient_in_half(half):
    """Where the weight is frozen."""
    x, w, b = torch.randn(5, 6, 16), torch.randn(8, 16), torch.randn(8, requires_grad=True)
    with _autocast(torch.bfloat16):
        y = linear(x, w, b)
    y.float().sum().backward()
    assert torch.equal(b.grad, torch.full((8,), 30.0))


@pytest.mark.parametrize("case", ["no_autocast", "bf16_weights", "other_sizes", "fp64"])
def test_layers_stay_apart(case):
    """Where one product is not asked for, or the layers are not of one size."""
    weights = [torch.randn(8, 16) for _ in range(3)]
    if case == "other_sizes":
        weights[1] = torch.randn(4, 16)
    if case == "bf16_weights":
        weights = [w.bfloat16() for w in weights]
    x = torch.randn(5, 16, dtype=torch.float64 if case == "fp64" else None)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=case != "no_autocast"):
        assert linears(x, [(w, None) for w in weights]) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 700), (3000, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_linear_sums(half, size, dtype):
    x = torch.randn(size).to(dtype)
    sums = torch.ops.mae_fast.linear_sums(x)
    assert sums.dtype == torch.float32
    assert_as_good_as_torch([sums], [x.float().sum(0)], [x.double().sum(0)])


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (2, 3, 50), (33, 191, 385), (157, 193, 383), (513, 400, 17), (1030, 20, 770)],
)
def test_linear_grads_of_tiles(cpp, sizes):
    """Sums in fp32 of products of bf16: rounded once, not twice. Around the blocks of a task, and
    of rows that lie apart; without tiles by plain products."""
    rows, out, inside = sizes
    g, x = torch.randn(rows, out + 3).bfloat16()[:, :out], torch.randn(rows, inside).bfloat16()
    dweight, dbias = torch.ops.mae_fast.linear_grads(g, x)
    exact = [g.double().t() @ x.double(), g.double().sum(0)]
    plain = [g.float().t() @ x.float(), g.float().sum(0)]
    assert_as_good_as_torch([dweight, dbias], plain, exact)


def test_linear_grads_refuses_what_does_not_fit(cpp):
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.mae_fast.linear_grads(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="gradient of BFloat16, input of Float"):
        torch.ops.mae_fast.linear_grads(torch.ones(3, 4).bfloat16(), torch.ones(3, 4))


def test_half_of_tiles_declines(amx):
    x, w = torch.randn(3, 16), torch.randn(8, 16)
    with mae_fast.backends(linear="half"):
        for how, reason in (
            (dict(dtype=torch.float16), "tiles are of bfloat16"),
            (dict(dtype=torch.bfloat16, enabled=False), "there is no autocast"),
        ):
            with torch.autocast("cpu", **how), pytest.raises(BackendError, match=reason):
                linear(x, w)
        with torch.autocast("cpu"), pytest.raises(BackendError, match="and the weight"):
            linear(x, w.bfloat16())


def test_copies_are_as_old_as_the_step(half):
    """Made together when a step begins: never older than that, whoever wrote the parameter."""
    weights = [torch.nn.Parameter(torch.randn(8, 16)) for _ in range(3)]
    bias = torch.nn.Parameter(torch.randn(8))
    layers = [(w, bias if i else None) for i, w in enumerate(weights)]
    x, copies = torch.randn(5, 16), Copies()
    changes = [
        lambda w: None,
        lambda w: w.data.mul_(2),
        lambda w: setattr(w, "data", torch.randn(8, 16)),
        lambda w: torch.optim.SGD([w], lr=1.0).step(),
    ]
    for change in changes:
        for w in (*weights, bias):
            w.grad = torch.ones_like(w)
        for w in weights:
            change(w)
        with torch.autocast(DEVICE, torch.bfloat16):
            expected = linears(x, layers), linear(x, weights[1], bias)
            with copies:
                got = linears(x, layers), linear(x, weights[1], bias)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        got[0].float().sum().backward()
    assert len(copies.known) == 4 and len(copies.pairs) == 7  # weights and biases, of each product
