"""attention: every backend against the fp64 reference, forward and gradients."""

import pytest
import torch
from op_checks import BACKENDS, DTYPES, check_op

import mae_fast
from mae_fast.ops.attention import attention, attention_ref

# batch, queries, keys, heads, width of a head
SHAPES = {
    "one_element": (1, 1, 1, 1, 1),
    "one_key": (2, 5, 1, 2, 16),
    "one_query": (2, 1, 37, 2, 16),
    "odd": (2, 13, 29, 3, 24),
    "vit_b": (1, 157, 157, 2, 64),
    "vit_h": (1, 61, 61, 2, 80),
    "decoder": (1, 613, 613, 1, 32),
    "last_block": (1, 530, 613, 1, 32),
    "widest": (1, 33, 47, 1, 256),
    "no_queries": (1, 0, 3, 2, 8),
    "no_clips": (0, 3, 3, 2, 8),
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
    with mae_fast.backends(attention=backend):
        check_op(attention, attention_ref, args, [torch.randn(args[0].shape)])


def test_attention_takes_views_of_one_projection(backend):
    qkv = torch.randn(2, 41, 3, 2, 16)
    q, k, v = (t.requires_grad_() for t in qkv.unbind(2))
    q = q.detach()[:, 5:].requires_grad_()
    dout = [torch.randn(2, 2, 36, 16).transpose(1, 2)]
    with mae_fast.backends(attention=backend):
        check_op(attention, attention_ref, [q, k, v], dout)


def test_attention_of_great_scores(backend):
    """exp of the scores themselves would overflow; a score of 900 is right to 1e-4 at best."""
    q, k, v = (t.detach() for t in make("odd", torch.float32))
    q, k = q * 30, k * 30
    with mae_fast.backends(attention=backend):
        out = attention(q, k, v)
    exact = attention_ref(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3e-3)


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
    with pytest.raises(ValueError, match=r"v \[2, 28, 3, 24\]"):
        attention(q, k, v[:, :28])
    with pytest.raises(ValueError, match=r"q \[2, 13, 72\]"):
        attention(q.flatten(2), k, v)
    with pytest.raises(ValueError, match=r"k \[2, 29, 3, 23\]"):
        attention(q, k[..., :23], v[..., :23])
