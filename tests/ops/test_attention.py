"""attention: every backend against the fp64 reference, forward and gradients."""

import os
import re
import subprocess
import sys

import pytest
import torch
from op_checks import BACKENDS, DEVICE, DTYPES, check_op, gradients

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops import OPS, dispatch
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
    import triton
    import triton.language as tl

    from mae_fast.kernels.attention import _exp2

    @triton.jit
    def _exp2_kernel(x_ptr, y_ptr, N: tl.constexpr, BY_FMA: tl.constexpr):
        at = tl.arange(0, N)[None, :]
        tl.store(y_ptr + at, _exp2(tl.load(x_ptr + at), N, BY_FMA))

    if dispatch.interpreting():
        SHAPES |= {"decoder": (1, 217, 217, 1, 32), "last_block": (1, 150, 217, 1, 32)}
else:
    SHAPES |= {
        "one_element": (1, 1, 1, 1, 1),
        "odd_width": (2, 13, 29, 3, 23),
        "widest": (1, 33, 47, 1, 256),
    }


def given(name, request):
    """A backend's name; skips a test where it is not there."""
    if name in ("amx", "cpp"):
        request.getfixturevalue(name)
    return name


@pytest.fixture(params=BACKENDS if BACKENDS == ["triton"] else [*BACKENDS, "amx", "sdpa"])
def backend(request):
    return given(request.param, request)


@pytest.fixture(params=["cpp", "amx"])
def compiled(request):
    """C++'s backends, and the dtype that both take."""
    return given(request.param, request)


def skip_declined(backend, *args):
    """What `amx` and `triton` decline, by tests of their own, is not asked of them."""
    reason = OPS["attention"].backends[backend](*args)
    if reason and backend in ("amx", "triton"):
        pytest.skip(f"{backend} declines: {reason}")


def dtype_of(backend):
    """fp32, or what a backend takes in its place."""
    return torch.bfloat16 if backend == "amx" else torch.float32


def make(shape, dtype):
    batch, queries, keys, heads, width = SHAPES[shape]
    sizes = [(batch, n, heads, width) for n in (queries, keys, keys)]
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_matches_fp64(backend, shape, dtype):
    args = make(shape, DTYPES[dtype])
    skip_declined(backend, *args)
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
    skip_declined(backend, q, k, v)
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
        skip_declined(backend, *qkv.unbind(2))
        with mae_fast.backends(attention=backend):
            check_op(attention_qkv, reference, [qkv, first], dout)


@pytest.mark.parametrize(("shape", "first"), [((2, 5, 2, 4, 16), 0), ((2, 5, 3, 4, 16), 6)])
def test_attention_of_one_tensor_refuses_another(shape, first):
    with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
        attention_qkv(torch.zeros(shape), first)


@pytest.mark.skipif(BACKENDS != ["triton"], reason="of the Triton kernels")
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("shape", ["vit_b", "last_block", "whole_blocks", "one_query", "one_key"])
def test_attention_with_exponentials_by_polynomial(shape, dtype, monkeypatch):
    """As many of eight as a candidate takes, and all. What is no number does not pass for one."""
    from mae_fast.kernels import configs

    tiles = [sizes["BY_FMA"] for sizes in configs.candidates()["attention_fwd"]["d32"][-2:]]
    args, pick = make(shape, DTYPES[dtype]), configs.pick
    exact, saved = {}, None
    for by_fma in (0, *tiles, 8):
        monkeypatch.setattr(
            configs,
            "pick",
            lambda kernel, shape, n=by_fma: (
                pick(kernel, shape) | ({} if "dkv" in kernel else {"BY_FMA": n})
            ),
        )
        check_op(attention, attention_ref, args, [torch.randn(args[0].shape)])
        with torch.no_grad():  # each kernel alone: backward's from the same forward
            forward = torch.ops.mae_fast.attention_fwd(*args)
            saved = saved or forward
            dq, *_ = torch.ops.mae_fast.attention_bwd(torch.ones_like(args[0]), *args, *saved)
        exact[by_fma] = forward[1], dq
        key = args[1].detach().clone()
        key[:, 0] = float("nan")
        broken = attention(args[0], key, args[2])
        assert not broken.isfinite().any()
    same_lse, same_dq = map(torch.equal, exact[0], exact[8])
    assert shape == "one_key" or not same_lse
    assert shape.startswith("one_") or not same_dq  # few values may round to the same


@pytest.mark.skipif(BACKENDS != ["triton"], reason="of the Triton kernels")
@pytest.mark.parametrize("by_fma", [1, 8])
def test_the_polynomial_is_2_to_the_x(by_fma):
    """In as many of every eight groups of eight columns; elsewhere the value has all its digits."""
    x = torch.cat([torch.tensor([-float("inf")]), torch.linspace(-125, 127, 2047)]).to(DEVICE)
    y = torch.empty_like(x)
    _exp2_kernel[(1,)](x, y, 2048, by_fma)
    exact = x[1:].double().exp2()
    error = ((y[1:] - exact) / exact).abs()
    taken = (torch.arange(2048, device=DEVICE) // 8 % 8 < by_fma)[1:]
    assert error.max() < 7.6e-5 and error[taken].median() > 1e-5
    assert (error[~taken] < 1e-6).all()
    assert 0 < y[0] < 2.4e-38


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
    args = make("odd", dtype_of(backend))
    with mae_fast.backends(attention=backend):
        check_op(lambda *a: attention(*a).sum(), lambda *a: attention_ref(*a).sum(), args)


@pytest.mark.parametrize("shape", ["odd", "vit_h"])
def test_attention_of_great_scores(backend, shape):
    """exp of the scores themselves would overflow; a score of 900 is right to 1e-4 at best."""
    q, k, v = (t.detach() for t in make(shape, dtype_of(backend)))
    args = [t.requires_grad_() for t in (q * 30, k * 30, v)]
    with mae_fast.backends(attention=backend):
        out, *grads = gradients(attention, args)
    exact = attention_ref(*(t.detach().double() for t in args))
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-2 if backend == "amx" else 3e-3)
    assert all(g.isfinite().all() for g in grads)


def test_attention_of_very_negative_scores(backend):
    """Where all are -173, e^(0 - lse) of a key past the end would be infinite."""
    if backend == "sdpa":
        pytest.skip("torch's own error there is seven times what the rule allows")
    if backend == "amx":
        pytest.skip("beside torch's own: test_attention_of_tiles_errs_no_more_than_sdpa")
    q, k, v = make("odd", torch.float32)
    q, k = ((5 * sign + 0.1 * t.detach()).requires_grad_() for sign, t in ((1, q), (-1, k)))
    dout = [torch.randn(q.shape)]
    with mae_fast.backends(attention=backend):
        check_op(attention, attention_ref, [q, k, v], dout)


@pytest.mark.parametrize("operators", [b for b in (*BACKENDS, "amx") if b != "reference"])
def test_attention_gives_the_logarithm_of_the_sum(operators, request):
    given(operators, request)
    assert operators != "triton" or dispatch.load_triton() is None
    q, k, v = (t.detach() for t in make("odd", dtype_of(operators)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    lse = torch.ops.mae_fast.attention_fwd(q, k, v, operators == "amx")[1]
    close = dict(rtol=0, atol=1e-5) if operators == "amx" else {}
    torch.testing.assert_close(lse, scores.logsumexp(-1), **close)


def test_attention_gives_the_same_bits_twice(backend):
    args = make("vit_h", torch.bfloat16)
    dout = torch.randn(args[0].shape, dtype=torch.bfloat16)
    with mae_fast.backends(attention=backend):
        first, second = (gradients(attention, args, [dout]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_attention_gives_the_same_bits_with_any_number_of_threads(compiled):
    args, threads, results = make("decoder", dtype_of(compiled)), torch.get_num_threads(), []
    gradient = torch.randn(args[0].shape, dtype=args[0].dtype)
    with mae_fast.backends(attention=compiled):
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = attention(*args)
            results.append([out, *torch.autograd.grad(out, args, gradient)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("tokens", [37, 300, 557])
def test_what_is_not_a_number_stays_in_its_head(compiled, tokens):
    """One thread computes all heads in one memory."""
    sizes = (2, tokens, 3, 16)
    args = [torch.randn(sizes).to(dtype_of(compiled)).requires_grad_() for _ in range(3)]
    poisoned = [t.detach().clone().requires_grad_() for t in args]
    for t in poisoned:
        t.data[0, tokens // 2, 0, 3] = float("nan")
    with mae_fast.backends(attention=compiled):
        clean, dirty = (gradients(attention, a) for a in (args, poisoned))
    for whole, some in zip(clean, dirty, strict=True):
        assert torch.equal(whole[1], some[1]) and torch.equal(whole[0, :, 1:], some[0, :, 1:])
        assert some[0, :, 0].isnan().any()


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("width", [16, 18, 30, 72, 80, 88, 126])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (2, 3), (15, 17), (33, 31), (97, 95), (192, 256), (193, 257), (300, 513), (5, 1025)],
)
def test_attention_of_tiles_of_any_size(queries, keys, width):
    """Around the blocks of each pass: their sizes depend on the lengths, and tails are zeros."""
    sizes = [(2, n, 2, width) for n in (queries, keys, keys)]
    args = [torch.randn(size).bfloat16().requires_grad_() for size in sizes]
    with mae_fast.backends(attention="amx"):
        check_op(attention, attention_ref, args, [torch.randn(sizes[0])])


def check_beside_sdpa(args):
    """Errors of tiles against fp64: those of torch's own in bf16, which rounds probabilities and
    their gradients as tiles do, and a tenth more at most."""
    dout = [torch.randn(args[0].shape)]
    wide = [t.detach().double().requires_grad_() for t in args]
    exact, errors = gradients(attention_ref, wide, dout), {}
    for backend in ("amx", "sdpa"):
        with mae_fast.backends(attention=backend):
            ours = gradients(attention, args, dout)
        errors[backend] = [float((o - e).norm()) for o, e in zip(ours, exact, strict=True)]
    for tiles, torchs in zip(errors["amx"], errors["sdpa"], strict=True):
        assert tiles <= 1.1 * torchs, errors


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_attention_of_tiles_where_scores_rise(scale):
    """From one block of keys to the next, slowly or far beyond the reference of the last."""
    q, k, v = (torch.randn(1, n, 1, 32) for n in (40, 1000, 1000))
    k = k + scale * torch.linspace(0, 1, 1000)[:, None, None] * q.mean(1, keepdim=True).sign()
    q = q + q.mean(1, keepdim=True).sign()
    check_beside_sdpa([t.bfloat16().requires_grad_() for t in (q, k, v)])


@pytest.mark.usefixtures("amx")
def test_attention_of_tiles_copies_what_lies_apart():
    """Pairs of values are read at once: rows that begin within a pair are copied first."""
    base = torch.randn(2, 41, 3, 67).bfloat16()
    wider = torch.randn(2, 41, 3, 65, 2).bfloat16()
    for view in (base[..., 1:49], base[..., :48], wider[..., :48, 1], base.flip(1)[..., :48]):
        args = [view.detach().requires_grad_() for _ in range(3)]
        with mae_fast.backends(attention="amx"):
            check_op(attention, attention_ref, args, [torch.randn(2, 41, 3, 48)])


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("far", [0.0, 5.0], ids=["normal", "very_negative_scores"])
@pytest.mark.parametrize(("tokens", "width"), [(157, 64), (301, 80), (613, 32), (1568, 64)])
def test_attention_of_tiles_errs_no_more_than_sdpa(tokens, width, far):
    q, k, v = (torch.randn(1, tokens, 1, width) for _ in range(3))
    if far:
        q, k = far + 0.1 * q, -far + 0.1 * k
    check_beside_sdpa([t.bfloat16().requires_grad_() for t in (q, k, v)])


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize(
    ("width", "dtypes", "reason"),
    [
        (14, "bf16 bf16 bf16", "head dim 14 is not even, from 16 to 128"),
        (33, "bf16 bf16 bf16", "head dim 33 is not even"),
        (130, "bf16 bf16 bf16", "head dim 130 is not even"),
        (32, "f32 f32 f32", "dtype torch.float32 is not bfloat16"),
        (32, "f16 f16 f16", "dtype torch.float16 is not bfloat16"),
        (32, "bf16 f32 bf16", "q, k and v are torch.bfloat16, torch.float32 and torch.bfloat16"),
    ],
)
def test_attention_of_tiles_declines(width, dtypes, reason):
    args = [torch.randn(1, 5, 1, width, dtype=DTYPES[name]) for name in dtypes.split()]
    with mae_fast.backends(attention="amx"), pytest.raises(BackendError, match=reason):
        attention(*args)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("joined", [False, True])
def test_attention_of_tiles_is_what_runs(joined):
    """In both directions: tiles round probabilities, vectors do not, so that the bits differ."""
    qkv, found = torch.randn(1, 70, 3, 2, 32).bfloat16(), {}
    args = [qkv.requires_grad_()] if joined else [t.requires_grad_() for t in qkv.unbind(2)]
    for backend in ("amx", "cpp"):
        with mae_fast.backends(attention=backend):
            out, *grads = gradients(attention_qkv if joined else attention, args)
        found[backend] = [out, *(grads[0].unbind(2) if joined else grads)]
    # The gradient of v is of probabilities alone: only backward's own way can tell it apart.
    assert not any(map(torch.equal, found["amx"], found["cpp"]))


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("off", ["in_forward", "in_backward"])
def test_attention_of_tiles_while_onednn_is_off(off):
    """torch's own switch, after the backend was chosen: vectors compute what tiles would."""
    args = make("odd", torch.bfloat16)
    dout = torch.randn(args[0].shape, dtype=torch.bfloat16)
    with mae_fast.backends(attention="amx"):
        wanted = gradients(attention, args, [dout])
        with torch.backends.mkldnn.flags(enabled=off != "in_forward"):
            out = attention(*args)
        with torch.backends.mkldnn.flags(enabled=off != "in_backward"):
            found = [out.detach(), *torch.autograd.grad(out, args, dout)]
    for w, f in zip(wanted, found, strict=True):
        torch.testing.assert_close(w, f, rtol=0.02, atol=0.02)


@pytest.mark.skipif(DEVICE != "cpu", reason="tiles are the CPU's")
@pytest.mark.parametrize("allowed", ["DEFAULT", "AVX512_CORE_BF16"])
def test_attention_of_tiles_asks_onednn(allowed):
    """What oneDNN may not use is not used, and says so; other ways compute it then."""
    code = (
        "import torch\n"
        "from mae_fast.ops import attention, dispatch, OPS\n"
        "x = torch.ones(1, 4, 1, 16).bfloat16()\n"
        "print(OPS['attention'].choose(x, x, x), dispatch.load_amx())\n"
    )
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": allowed}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    backend, reason = ran.stdout.strip().split(" ", 1)
    assert (backend == "amx") == (reason == "None"), ran.stderr
    if allowed != "DEFAULT" and dispatch.load_cpp() is None:
        assert backend == "cpp" and reason != "None"


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
