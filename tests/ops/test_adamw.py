"""adamw: torch's fused step, Triton's and the reference against the formula in fp64; clipping,
scale and skip; bf16 copies."""

import copy
import gc
import weakref

import pytest
import torch
from op_checks import BACKENDS, DEVICE

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops import adamw as home
from mae_fast.ops import dispatch
from mae_fast.ops.adamw import adamw, clipped_adamw

STEPS = ["torch", "reference", *(["triton"] if BACKENDS == ["triton"] else [])]
on_triton = pytest.mark.skipif(BACKENDS != ["triton"], reason="the Triton kernels do not run here")
SHAPES = [(1,), (7, 13), (3, 2, 5), (0,)]
# More than a chunk of 8192, one, and less; multiples of 8 values and not.
LARGE = [(130, 128), (8192,), (91, 91), (40,)]


def make(shapes=SHAPES, dtype=torch.float32, **options):
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3, "lr": 0.2}]
    options = {"fused": True, **options}
    return params, torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-3, **options)


def run(params, optimizer, grads, backend, skips=()):
    for t, step in enumerate(grads):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()  # torch's step scales it in place
        with mae_fast.backends(adamw=backend):
            adamw(optimizer, torch.tensor(4.0), torch.tensor(float(t in skips)))
    return params


@pytest.mark.parametrize("backend", STEPS)
def test_adamw_matches_fp64(backend):
    grads = [[torch.randn(s) for s in SHAPES] for _ in range(5)]
    params, optimizer = make()
    exact = copy.deepcopy(params)
    for p in exact:
        p.data = p.data.double()
    m, v = ([torch.zeros_like(p.data) for p in exact] for _ in range(2))
    for t, step in enumerate(grads, start=1):
        for i, (p, g) in enumerate(zip(exact, step, strict=True)):
            lr, decay = (0.1, 0.01) if i < 2 else (0.2, 0.3)
            g = g.double() / 4
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            scaled = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.95**t)).sqrt() + 1e-3)
            p.data = p.data * (1 - lr * decay) - lr * scaled
    for ours, e in zip(run(params, optimizer, grads, backend), exact, strict=True):
        torch.testing.assert_close(ours.double(), e, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", STEPS[1:])
def test_adamw_backends_continue_each_others_state(backend):
    grads = [[torch.randn(s) for s in SHAPES] for _ in range(6)]
    params, optimizer = make()
    other, other_optimizer = copy.deepcopy((params, optimizer))
    run(params, optimizer, grads, "torch")
    run(other, other_optimizer, grads[:2], backend)
    run(other, other_optimizer, grads[2:4], "torch")
    run(other, other_optimizer, grads[4:], backend)
    torch.testing.assert_close(params, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", STEPS)
def test_adamw_skips(backend):
    grads = [[torch.randn(s) for s in SHAPES] for _ in range(3)]
    grads[1] = [torch.full(s, float("nan")) for s in SHAPES]
    params, optimizer = make()
    other, other_optimizer = copy.deepcopy((params, optimizer))
    run(params, optimizer, grads, backend, skips=(1,))
    run(other, other_optimizer, [grads[0], grads[2]], backend)
    torch.testing.assert_close(params, other, rtol=0, atol=0)


def test_adamw_refuses_torchs_step_without_fused():
    params, optimizer = make(fused=False)
    with pytest.raises(BackendError, match="without fused=True"):
        run(params, optimizer, [[torch.ones(s) for s in SHAPES]], "torch")
    before = [p.clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    adamw(optimizer, torch.tensor(1.0), torch.tensor(0.0))
    assert not torch.equal(params[1], before[1])


def clipped_steps(backend, params, optimizer, grads, clip=3.0, copies=None):
    """The norms of clipped steps, and then the parameters and all state."""
    norms = []
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        with mae_fast.backends(adamw=backend):
            norms.append(clipped_adamw(optimizer, clip, copies))
    state = [t.clone() for p in params for t in optimizer.state[p].values()]
    return torch.stack(norms), [p.detach().clone() for p in params], state


@pytest.mark.parametrize("clip", [3.0, 0.0], ids=["clipped", "not_clipped"])
@pytest.mark.parametrize("backend", STEPS[1:])
def test_clipped_adamw_is_torchs_over_20_steps(backend, clip):
    grads = [[torch.randn(s) for s in LARGE] for _ in range(20)]
    args = make(LARGE)
    copied = copy.deepcopy(args)
    ours = clipped_steps(backend, *args, grads, clip)
    theirs = clipped_steps("torch", *copied, grads, clip)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", STEPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_clipped_adamw_changes_nothing_where_the_norm_is_not_finite(backend, value):
    grads = [[torch.randn(s) for s in SHAPES] for _ in range(2)]
    args = make()
    _, *before = clipped_steps(backend, *args, grads[:1])
    grads[1][1][3, 4] = value
    norms, *after = clipped_steps(backend, *args, grads[1:])
    assert not norms.isfinite().any()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", STEPS)
def test_adamw_writes_bf16_copies(backend):
    params, optimizer = make(LARGE)
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in params[:3]}
    clipped_steps(backend, params, optimizer, [[torch.randn(s) for s in LARGE]], copies=copies)
    assert all(torch.equal(c, p.bfloat16()) for p, c in copies.items())
    with pytest.raises(ValueError, match=r"a parameter \[40\] must be contiguous and bfloat16"):
        adamw(optimizer, torch.tensor(1.0), torch.tensor(0.0), {params[3]: torch.empty(40)})


@on_triton
def test_adamw_in_triton_takes_what_lies_at_odd_addresses_and_lr_on_the_device():
    grads = [[torch.randn(40) for _ in range(2)] for _ in range(3)]
    flat = torch.randn(81)
    found = []
    for backend in ("triton", "torch"):
        values = flat.clone()
        params = [torch.nn.Parameter(values[1:41]), torch.nn.Parameter(values[41:])]
        optimizer = torch.optim.AdamW(params, lr=torch.tensor(0.1), fused=True)
        found.append(clipped_steps(backend, params, optimizer, grads))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@on_triton
def test_adamw_in_triton_gives_the_same_bits_twice_and_keeps_its_table():
    grads = [[torch.randn(s) for s in LARGE] for _ in range(3)]
    args = make(LARGE)
    found = [clipped_steps("triton", *copy.deepcopy(args), grads) for _ in range(2)]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    params, optimizer = args
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g
    tables = set()
    for _ in range(3):
        with mae_fast.backends(adamw="triton"):
            clipped_adamw(optimizer, 1.0)
        tables.add(home._tables[optimizer].present)
    assert len(tables) == 1
    params[0].grad = params[0].grad.clone()
    clipped_steps("triton", params, optimizer, grads[:1])
    assert home._tables[optimizer].present not in tables


@pytest.mark.skipif(not dispatch.interpreting(), reason="the sanitizer watches the interpreter")
def test_adamw_in_triton_moves_34_bytes_a_parameter():
    """The gradients' 4 for the norm; 16 in and 12 out for the step, and 2 for the copy."""
    from sanitizer import sanitized

    params, optimizer = make(LARGE)
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in params}
    grads = [torch.randn(s) for s in LARGE]
    clipped_steps("triton", params, optimizer, [grads], copies=copies)  # makes the state
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    reached = [t for p in params for t in (p.grad, *optimizer.state[p].values(), copies[p])]
    with mae_fast.backends(adamw="triton"), sanitized(extra=[*params, *reached]) as record:
        clipped_adamw(optimizer, 1.0, copies)
    least = 34 * sum(p.numel() for p in params)
    assert least <= record.moved < 1.05 * least
    assert [launch.kernel for launch in record.launches] == [
        "_grad_norm_kernel",
        "_clip_kernel",
        "_advance_kernel",
        "_advance_kernel",
        "_adamw_step_kernel",
    ]


@on_triton
def test_adamw_in_triton_declines_what_it_does_not_take():
    for options, reason in (
        ({"amsgrad": True}, "it has no amsgrad"),
        ({"dtype": torch.float64}, "float64"),
    ):
        params, optimizer = make(**options)
        grads = [[torch.ones_like(p) for p in params]]
        with pytest.raises(BackendError, match=reason):
            clipped_steps("triton", params, optimizer, grads)
    params, optimizer = make()
    with pytest.raises(BackendError, match=r"\[7, 13\] with strides \(1, 7\)"):
        grads = [torch.ones(s) for s in SHAPES]
        grads[1] = torch.ones(13, 7).t()
        clipped_steps("triton", params, optimizer, [grads])


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_clipped_adamw_in_a_cuda_graph(backend):
    params, optimizer = make(LARGE, capturable=True)
    copied = copy.deepcopy((params, optimizer))
    grads = [torch.randn(s) for s in LARGE]
    clipped_steps(backend, params, optimizer, [grads])
    graph = torch.cuda.CUDAGraph()
    with mae_fast.backends(adamw=backend), torch.cuda.graph(graph):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()  # in the graph's own memory: another table
        clipped_adamw(optimizer, 3.0)
    for _ in range(3):
        graph.replay()
    clipped_steps(backend, *copied, [grads] * 4)
    torch.testing.assert_close(params, copied[0], rtol=0, atol=0)


class _Capture:
    """Whether a stand-in for a CUDA graph is being captured."""

    on = False


@pytest.fixture
def capture(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: _Capture.on)
    yield _Capture
    _Capture.on = False


def tables(optimizer, grads):
    """The table of a step with these gradients."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = grads.pop(0)
    return home._table(optimizer, {})


@pytest.mark.skipif(DEVICE != "cpu", reason="its stand-in for a capture is a CPU's")
def test_what_a_cuda_graph_reads_of_adamw_stays(capture):
    """Neither tables made in a capture, nor the one that was there before, are let go while it
    lasts, and afterwards as long as the optimizer: the graph copies their pinned memory again."""
    _, optimizer = make(LARGE)
    fresh = [[torch.ones(s) for s in LARGE] for _ in range(5)]  # each elsewhere
    before = weakref.ref(tables(optimizer, fresh[0][:]))
    capture.on = True
    made = [weakref.ref(tables(optimizer, grads[:])) for grads in fresh[1:3]]
    gc.collect()
    assert before() is not None, "pinned memory is let go in a capture"
    capture.on = False
    for grads in fresh[3:]:
        tables(optimizer, grads[:])
    gc.collect()
    assert all(table() is not None for table in made)
    assert before() is None, "a table that nothing reads is kept"
    del optimizer
    gc.collect()
    assert all(table() is None for table in made)


@pytest.mark.skipif(DEVICE != "cpu", reason="its stand-in for a capture is a CPU's")
def test_adamw_uses_no_memory_of_a_cuda_graph_outside_of_it(capture):
    """What is copied in a capture is not there until the graph's first replay."""
    _, optimizer = make(LARGE)
    grads, others = ([torch.ones(s) for s in LARGE] for _ in range(2))
    capture.on = True
    inside = tables(optimizer, grads[:])
    capture.on = False
    for step in (grads, others):
        outside = tables(optimizer, step[:])
        for name in ("rows", "chunks", "numbers"):
            theirs, ours = getattr(inside, name), getattr(outside, name)
            assert ours.data_ptr() != theirs.data_ptr(), name


@pytest.mark.skipif(DEVICE != "cpu", reason="its stand-in for a capture is a CPU's")
def test_a_cuda_graph_takes_the_table_that_fits(capture):
    _, optimizer = make(LARGE)
    grads, others = ([torch.ones(s) for s in LARGE] for _ in range(2))
    before = weakref.ref(tables(optimizer, grads[:]))
    capture.on = True
    assert tables(optimizer, grads[:]) is before()
    capture.on = False
    tables(optimizer, others[:])
    gc.collect()
    assert before() is not None
