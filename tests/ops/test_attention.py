"""attention: every backend against the fp64 reference, forward and gradients."""

import re

import pytest
import torch
from op_checks import BACKENDS, DTYPES, check_op, gradients

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops import dispatch
from mae_fast.ops.attention import attention, attention_qkv, attention_ref

# batch, queries, keys, heads, width of a head
SHAPES = {
    "one_key": (2, 5, 1, 2, 16),
    "one_query": (2, 1, 37, 2, 16),
    "odd": (2, 13, 29, 3, 48),
    "whole_blocks": (1, 64, 128, 1, 32),
    "vit_b": (1, 157, 157, 2, 64),
    "vit_h": (1, 61, 61, 2, 80),
    "masked_part": (1, 33, 47, 1, 112),
    "wide": (1, 70, 33, 1, 128),
    "decoder": (1, 613, 613, 1, 32),
    "last_block": (1, 530, 613, 1, 32),
    "no_queries": (1, 0, 3, 2, 16),
    "no_clips": (0, 3, 3, 2, 16),
}
if BACKENDS == ["triton"]:
    if dispatch.interpreting():
        SHAPES |= {"decoder": (1, 217, 217, 1, 32), "last_block": (1, 150, 217, 1, 32)}
else:
    SHAPES |= {
        "one_element": (1, 1, 1, 1, 1),
        "odd_width": (2, 13, 29, 3, 23),
        "widest": (1, 33, 47, 1, 256),
    }


@pytest.fixture(params=BACKENDS if BACKENDS == ["triton"] else [*BACKENDS, "sdpa"])
def backend(request):
    if request.param == "cpp":
        request.getfixturevalue("cpp")
    return request.param


def make(shape, dtype):
    batch, queries, keys, heads, width = SHAPES[shape]
    sizes = [(batch, n, heads, width) for n in (queries, keys, keys)]
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_matches_fp64(backend, shape, dtype):
    args = make(shape, DTYPES[dtype])
    if backend == "triton" and dtype == "f32" and args[0].shape[-1] > 80:
        pytest.skip("declined: see test_attention_in_triton_declines")
    with mae_fast.backends(attention=backend):
        check_op(attention, attention_ref, args, [torch.randn(args[0].shape)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_takes_views_of_one_projection(backend, dtype):
    """And reads nothing beyond their ends, where the projection holds NaN."""
    qkv = torch.full((2, 70, 3, 2, 48), float("nan"), dtype=DTYPES[dtype])
    qkv[:, 3:44, :, :, :32] = torch.randn(2, 41, 3, 2, 32)
    q, k, v = (t[:, 3:44, :, :32].detach().requires_grad_() for t in qkv.unbind(2))
    q = q.detach()[:, 5:].requires_grad_()
    dout = [torch.randn(2, 2, 36, 32).transpose(1, 2)]
    with mae_fast.backends(attention=backend):
        check_op(attention, attention_ref, [q, k, v], dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 41, 3, 2, 32), (1, 70, 3, 3, 48), (1, 157, 3, 2, 64)])
def test_attention_of_one_tensor_has_one_gradient(backend, shape, dtype):
    """qkv [B, S, 3, H, d], also where it is a part of a larger one, and some queries are left out:
    these have a gradient of zeros."""
    batch, tokens, _, heads, width = shape
    for pad, first in ((0, 0), (16, 0), (0, 7)):
        qkv = torch.randn(batch, tokens, 3, heads, width + pad).to(DTYPES[dtype])
        qkv = qkv[..., :width].requires_grad_()

        def reference(qkv, first):
            q, k, v = qkv.unbind(2)
            return attention_ref(q[:, first:], k, v)

        dout = [torch.randn(batch, tokens - first, heads, width)]
        with mae_fast.backends(attention=backend):
            check_op(attention_qkv, reference, [qkv, first], dout)


@pytest.mark.parametrize(("shape", "first"), [((2, 5, 2, 4, 16), 0), ((2, 5, 3, 4, 16), 6)])
def test_attention_of_one_tensor_refuses_another(shape, first):
    with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
        attention_qkv(torch.zeros(shape), first)


@pytest.mark.skipif(BACKENDS != ["triton"], reason="of the Triton kernels")
def test_attention_reads_views_in_place(monkeypatch):
    from mae_fast.kernels import attention as kernels

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **sizes: read.extend(args[:4])

    for kernel in ("fwd", "bwd_dq", "bwd_dkv"):
        monkeypatch.setattr(kernels, f"_attention_{kernel}_kernel", Recorder())
    read = []
    q, k, v = torch.randn(2, 5, 3, 2, 16).unbind(2)
    out, lse = kernels.attention_fwd(q, k, v)
    dout = torch.randn(2, 2, 5, 16).transpose(1, 2)
    kernels.attention_bwd(dout, q, k, v, out, lse)
    assert [t.data_ptr() for t in read] == [
        t.data_ptr() for t in (q, k, v, out, dout, q, k, v, dout, q, k, v)
    ]


def test_attention_takes_a_gradient_of_one_value(backend):
    """The gradient of a sum is expanded: its last stride is 0."""
    args = make("odd", torch.float32)
    with mae_fast.backends(attention=backend):
        check_op(lambda *a: attention(*a).sum(), lambda *a: attention_ref(*a).sum(), args)


def test_attention_of_great_scores(backend):
    """exp of the scores themselves would overflow; a score of 900 is right to 1e-4 at best."""
    q, k, v = (t.detach() for t in make("odd", torch.float32))
    q, k = q * 30, k * 30
    with mae_fast.backends(attention=backend):
        out = attention(q, k, v)
    exact = attention_ref(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3e-3)


def test_attention_of_very_negative_scores(backend):
    """Where all are -173, e^(0 - lse) of a key past the end would be infinite."""
    if backend == "sdpa":
        pytest.skip("torch's own error there is seven times what the rule allows")
    q, k, v = make("odd", torch.float32)
    q, k = ((5 * sign + 0.1 * t.detach()).requires_grad_() for sign, t in ((1, q), (-1, k)))
    dout = [torch.randn(q.shape)]
    with mae_fast.backends(attention=backend):
        check_op(attention, attention_ref, [q, k, v], dout)


@pytest.mark.parametrize("operators", [b for b in BACKENDS if b != "reference"])
def test_attention_gives_the_logarithm_of_the_sum(operators, request):
    if operators == "cpp":
        request.getfixturevalue("cpp")
    assert operators != "triton" or dispatch.load_triton() is None
    q, k, v = (t.detach() for t in make("odd", torch.float32))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    lse = torch.ops.mae_fast.attention_fwd(q, k, v)[1]
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_attention_gives_the_same_bits_twice(backend):
    args = make("vit_h", torch.bfloat16)
    dout = torch.randn(args[0].shape, dtype=torch.bfloat16)
    with mae_fast.backends(attention=backend):
        first, second = (gradients(attention, args, [dout]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("cpp")
def test_attention_gives_the_same_bits_with_any_number_of_threads():
    args, threads, results = make("decoder", torch.float32), torch.get_num_threads(), []
    gradient = torch.randn(args[0].shape)
    with mae_fast.backends(attention="cpp"):
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = attention(*args)
            results.append([out, *torch.autograd.grad(out, args, gradient)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_attention_refuses_shapes():
    q, k, v = make("odd", torch.float32)
    with pytest.raises(ValueError, match=r"v \[2, 28, 3, 48\]"):
        attention(q, k, v[:, :28])
    with pytest.raises(ValueError, match=r"q \[2, 13, 144\]"):
        attention(q.flatten(2), k, v)
    with pytest.raises(ValueError, match=r"k \[2, 29, 3, 47\]"):
        attention(q, k[..., :47], v[..., :47])


@pytest.mark.skipif(BACKENDS != ["triton"], reason="of the Triton kernels")
@pytest.mark.parametrize(
    ("keys", "width", "dtypes", "reason"),
    [
        (3, 24, "f32 f32 f32", "head dim 24 is not a multiple of 16 up to 128"),
        (3, 144, "f32 f32 f32", "head dim 144 is not a multiple of 16 up to 128"),
        (3, 96, "f32 f32 f32", "head dim 96 in float32 does not fit the registers"),
        (0, 16, "f32 f32 f32", "there are no keys"),
        (3, 16, "f64 f64 f64", "dtype torch.float64 is none of"),
        (3, 16, "f32 bf16 f32", "q, k and v are torch.float32, torch.bfloat16 and torch.float32"),
    ],
    ids=["odd_width", "too_wide", "too_wide_for_f32", "no_keys", "f64", "mixed"],
)
def test_attention_in_triton_declines(keys, width, dtypes, reason):
    names = DTYPES | {"f64": torch.float64}
    sizes = zip((2, keys, keys), dtypes.split(), strict=True)
    args = [torch.randn(1, n, 1, width, dtype=names[dtype]) for n, dtype in sizes]
    with mae_fast.backends(attention="triton"), pytest.raises(BackendError, match=reason):
        attention(*args)
