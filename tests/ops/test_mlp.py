"""mlp: the MLP with its GELU within the products, against fp64 and against the three ops."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import DEVICE, assert_as_good_as_torch, gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mae_fast
from mae_fast import forward
from mae_fast.errors import BackendError
from mae_fast.forward import Affine, Block, Norm, transformer_block
from mae_fast.ops import dispatch, measured
from mae_fast.ops.mlp import OP, measured_key, mlp, mlp_ref
from mae_fast.remade import keeping

SHAPES = {"one_row": ((1, 16), 48), "prime": ((7, 13), 11), "vit_b": ((2, 157, 96), 384)}
HALF = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture
def fused():
    """Where Triton's kernels run, in the interpreter too."""
    if dispatch.load_triton():
        pytest.skip(dispatch.load_triton())
    with mae_fast.backends(mlp="triton"):
        yield


def make(shape, dtype=torch.float32):
    size, hidden = SHAPES[shape]
    width = size[-1]
    tensors = (
        torch.randn(size),
        torch.randn(hidden, width) / width**0.5,
        torch.randn(hidden),
        torch.randn(width, hidden) / hidden**0.5,
        torch.randn(width),
    )
    return [t.to(dtype).requires_grad_() for t in tensors]


def autocast(dtype):
    return torch.autocast(DEVICE, dtype, enabled=dtype in HALF.values())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_mlp_matches_fp64(fused, shape, dtype):
    args, dout = make(shape), [torch.randn(SHAPES[shape][0])]
    exact = gradients(mlp_ref, [a.detach().double().requires_grad_() for a in args], dout)
    with autocast(HALF[dtype]):
        ours, plain = gradients(mlp, args, dout), gradients(mlp_ref, args, dout)
    assert_as_good_as_torch(ours, plain, exact)


def test_mlp_is_the_three_ops(fused):
    """Its output to the bit where the products are equal; gradients to a rounding: the activation's
    is not rounded before it is multiplied."""
    args, dout = make("vit_b"), [torch.randn(SHAPES["vit_b"][0])]
    with autocast(torch.bfloat16), mae_fast.backends(linear="half"):
        ours = gradients(mlp, args, dout)
        with mae_fast.backends(mlp="apart"):
            apart = gradients(mlp, args, dout)
    if DEVICE == "cpu":
        assert torch.equal(ours[0], apart[0])
    for o, a in zip(ours, apart, strict=True):
        assert o.dtype == a.dtype and (o - a).norm() <= 4e-3 * a.norm()


def test_what_is_not_kept_is_made_again(fused):
    """The same bits; and of what is kept, one tensor less."""
    args, dout, kept = make("vit_b"), [torch.randn(SHAPES["vit_b"][0])], {}

    def run(keep):
        sizes = kept.setdefault(keep, [])

        def pack(t):
            sizes.append(t.shape)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(torch.bfloat16):
            out = mlp(*args, keep=keep)
        return [out.detach(), *torch.autograd.grad(out, args, dout[0].to(out.dtype))]

    for made, again in zip(run(True), run(False), strict=True):
        assert torch.equal(made, again)
    hidden = torch.Size((2 * 157, 384))
    assert kept[True].count(hidden) == 2 and kept[False].count(hidden) == 1


@pytest.mark.parametrize("wanted", range(5))
def test_only_what_is_wanted_has_a_gradient(fused, wanted):
    args = make("prime")
    for i, a in enumerate(args):
        a.requires_grad_(i == wanted)
    with autocast(torch.bfloat16):
        mlp(*args).float().sum().backward()
        grad = args[wanted].grad
        everything = [a.detach().requires_grad_() for a in args]
        mlp(*everything).float().sum().backward()
    assert torch.equal(grad, everything[wanted].grad)
    assert [a.grad is None for a in args] == [i != wanted for i in range(5)]


def _block(width, hidden):
    def layer(out, into):
        return Affine(
            *(t.requires_grad_() for t in (torch.randn(out, into) / into**0.5, torch.randn(out)))
        )

    norms = (Norm(torch.ones(width), torch.zeros(width), 1e-6) for _ in range(2))
    first, second = norms
    square = [layer(width, width) for _ in range(4)]
    return Block(first, *square, second, layer(hidden, width), layer(width, hidden))


@pytest.mark.parametrize("again", [True, False])
def test_a_block_takes_it(fused, again):
    """With everything kept or made again, and what a whole block gives is the three ops' to
    roundings."""
    block, x = _block(32, 128), torch.randn(2, 21, 32, requires_grad=True)

    def run():
        with autocast(torch.bfloat16):
            with keeping(not again):
                x2, y = transformer_block(x, None, block, 2)
            out = x2.float() + y.float()
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.fc1, *block.fc2])]

    ours = run()
    with mae_fast.backends(mlp="apart"):
        apart = run()
    for o, a in zip(ours, apart, strict=True):
        assert (o - a).norm() <= 1e-2 * a.norm() and not torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_block_made_again_is_its_norms_and_activation(fused, keep, monkeypatch):
    """In backward: two norms, one for q, k and v and one for the MLP; within `keeping` none."""
    made, norm = [], forward.layer_norm
    monkeypatch.setattr(forward, "layer_norm", lambda *args: made.append(1) or norm(*args))
    x = torch.randn(2, 21, 32, requires_grad=True)
    with autocast(torch.bfloat16), keeping(keep):
        x2, y = transformer_block(x, None, _block(32, 128), 2)
    first = len(made)
    (x2.float() + y.float()).sum().backward()
    assert len(made) - first == (0 if keep else 2)


def test_it_is_off_until_it_was_measured(monkeypatch):
    """Also on a GPU, where it stands first as soon as a table says that it is faster."""
    fc1 = torch.empty(2048, 512)
    assert measured_key(fc1, torch.bfloat16, True) == "mlp512x2048-bfloat16-both"
    assert next(iter(OP.backends)) == "apart"
    rows = {"mlp512x2048-bfloat16-both": {"apart": 2.0, "triton": 1.5}}
    monkeypatch.setattr(measured, "measured", lambda: measured.orders(rows))
    monkeypatch.setattr(measured, "architecture", lambda: "90")
    assert next(iter(OP.by_table(measured_key(fc1, torch.bfloat16, True)))) == "triton"
    assert next(iter(OP.by_table(measured_key(fc1, torch.bfloat16, False)))) == "apart"

    def first(need, dtype=torch.bfloat16):
        monkeypatch.setattr(dispatch, "autocast_dtype", lambda device: dtype)  # torch asks a GPU
        with FakeTensorMode():
            x = torch.empty(2, 3, 512, device="cuda", requires_grad=need)
            return next(iter(OP.order(x, torch.empty(2048, 512, device="cuda"))))

    assert (first(True), first(False)) == ("triton", "apart")
    monkeypatch.setattr(OP.__class__, "by_table", lambda *args: pytest.fail("it was asked"))
    assert first(True, None) == "apart"  # without autocast there is nothing to look up
    monkeypatch.undo()
    taken = []
    monkeypatch.setattr(forward.MLP, "order", lambda *args: taken.append(1) or ["apart"])
    transformer_block(torch.randn(1, 3, 32), None, _block(32, 128), 2)
    assert taken  # a block asks


def test_its_operators_and_their_flop():
    """As autograd gives them, in fp64; 2 FLOP a multiply-add, as torch's counter sees them."""
    x, weight, bias, second, dout = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((6, 5), (7, 5), (7,), (4, 7), (6, 4))
    )
    if dispatch.interpreting() or DEVICE != "cpu":
        pytest.skip("of plain torch on a CPU")
    leaves = (x @ weight.t()).requires_grad_(), bias.requires_grad_()
    activation = F.gelu(sum(leaves))
    wanted = torch.autograd.grad(activation @ second.t(), leaves, dout)
    with FlopCounterMode(display=False) as counter:
        found = torch.ops.mae_fast.mlp_fwd(x, weight, bias)
    assert counter.get_total_flops() == 2 * 6 * 5 * 7
    for got, want in zip(found, (leaves[0], activation), strict=True):
        torch.testing.assert_close(got, want)
    with FlopCounterMode(display=False) as counter:
        found = torch.ops.mae_fast.mlp_bwd(dout, second, leaves[0].detach(), bias.detach())
    assert counter.get_total_flops() == 2 * 6 * 4 * 7
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", ["fp32", "no_autocast_bf16", "double"])
def test_it_stands_back(fused, case):
    dtype = {"fp32": torch.float32, "no_autocast_bf16": torch.bfloat16}.get(case, torch.float64)
    with pytest.raises(BackendError, match="mlp: triton was asked for, but there is no autocast"):
        mlp(*make("prime", dtype))


def test_nothing_is_left_to_the_others(fused):
    _, *others = make("prime")
    with autocast(torch.bfloat16), pytest.raises(BackendError, match="there are no values"):
        mlp(torch.empty(0, 13), *others)


def test_mlp_refuses_shapes():
    x, *others = make("prime")
    with pytest.raises(ValueError, match=r"mlp: x \[7, 13\], fc1 \[11, 13\] \+ \[11\] and fc2 "):
        mlp(x, *others[:2], torch.randn(13, 12), others[3])
    with pytest.raises(ValueError, match=r"do not fit"):
        mlp(torch.randn(7, 12), *others)
