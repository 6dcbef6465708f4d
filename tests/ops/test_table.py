"""Every op of the engine, so that a new one cannot be forgotten: opcheck, gradcheck, compile,
autocast, functional_call, checkpointing; it has a test, a benchmark, a row in docs/results.md."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mae_fast
from mae_fast.bench.baselines.ops import OFFICIAL, TORCH
from mae_fast.ops import OPS
from mae_fast.ops.adamw import adamw
from mae_fast.ops.add_layer_norm import add_layer_norm
from mae_fast.ops.attention import attention
from mae_fast.ops.bias_gelu import bias_gelu
from mae_fast.ops.crop_resize_patchify_gather import crop_resize_patchify_gather
from mae_fast.ops.decoder_tokens import decoder_tokens
from mae_fast.ops.layer_norm import layer_norm
from mae_fast.ops.linear import linear
from mae_fast.ops.masked_hog_mse import masked_hog_mse
from mae_fast.ops.masked_mse import masked_mse
from mae_fast.ops.patch_embed import patch_embed
from mae_fast.ops.patchify_gather import patchify_gather
from mae_fast.ops.source import Source, colours
from mae_fast.ops.work import WORK

ROOT = Path(__file__).resolve().parent.parent.parent


def _values(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def _clip():
    return torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)


def _planes():
    """The frames of two clips, 5 x 9 and 6 x 8, and their table."""
    flat = torch.randint(0, 256, (4 * 75 + 4 * 72,), dtype=torch.uint8)
    rows = [
        [5, 9, 0, 0, 5, 7, 1, *colours(1, False), *(75 * t for t in range(4))],
        [6, 8, 1, 2, 3, 4, 0, *colours(6, True), *(300 + 72 * t for t in range(4))],
    ]
    return [flat, torch.tensor(rows)]


def _ids(*ids):
    return torch.tensor(ids, dtype=torch.int32)


def _hog_mse(pred, video, ids):
    return masked_hog_mse(pred, video, ids, (0, 2), 8, 0.225)


def _mse(pred, video, ids):
    return masked_mse(pred, video, ids, (0, 2), 1, 4, 0.45, 0.225, "patch")


def _embed(weight, bias, pos, video, ids):
    return patch_embed(video, ids, weight, bias, pos, 2, 4, 0.45, 0.225)


def _gather(video, ids):
    return patchify_gather(video, ids, 2, 4, 0.45, 0.225, torch.float32)


def _crop(flat, table, ids):
    source = Source(flat, table, 8)
    return crop_resize_patchify_gather(source, ids, 2, 4, 0.45, 0.225, torch.float32)


KEEP, MASK = _ids([3, 0], [1, 2]), _ids([1, 4, 2], [0, 4, 3])
# Public function, and its arguments: fp64 where floating, all of which take gradients.
CASES = {
    "add_layer_norm": (
        partial(add_layer_norm, eps=1e-6),
        [*_values((2, 3, 5), (2, 3, 5), (5,), (5,))],
    ),
    "attention": (attention, _values((2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4))),
    "bias_gelu": (bias_gelu, _values((3, 5), (5,))),
    "crop_resize_patchify_gather": (
        _crop,
        [*_planes(), _ids([3, 6], [1, 1])],
    ),
    "decoder_tokens": (decoder_tokens, [*_values((2, 2, 3), (2, 3), (3,), (5, 3)), KEEP, MASK]),
    "layer_norm": (partial(layer_norm, eps=1e-6), _values((2, 3, 5), (5,), (5,))),
    "linear": (linear, _values((2, 3, 5), (4, 5), (4,))),
    "masked_hog_mse": (_hog_mse, [*_values((2, 1, 27)), _clip(), _ids([0], [1])]),
    "masked_mse": (_mse, [*_values((2, 2, 48)), _clip(), _ids([0, 5], [7, 3])]),
    "patch_embed": (
        _embed,
        [*_values((5, 96), (5,), (8, 5)), _clip(), _ids([0, 5, 2], [7, 5, 0])],
    ),
    "patchify_gather": (_gather, [_clip(), _ids([0, 5], [7, 3])]),
}
# An op on an optimizer, not on tensors: torch's own operator does the work.
ON_OPTIMIZER = {"adamw": adamw}
# Ops that are torch's products or call its operators, and register nothing.
UNREGISTERED = {"adamw", "linear"}
# Ops on bytes, which have no gradient: what they give stands in its place.
NO_GRADIENT = {"crop_resize_patchify_gather", "patchify_gather"}


def _args(op, dtype=torch.float64):
    function, args = CASES[op]
    return function, [
        a.detach().clone().to(dtype).requires_grad_() if a.is_floating_point() else a for a in args
    ]


def _sum(out):
    return sum(o.double().square().sum() for o in (out if isinstance(out, tuple) else (out,)))


def _gradients(function, args):
    leaves = [a for a in args if a.requires_grad]
    if not leaves:
        return (function(*args),)
    return torch.autograd.grad(_sum(function(*args)), leaves)


@pytest.fixture(params=CASES)
def case(request, cpp):
    return request.param


def test_every_op_is_here():
    assert OPS.keys() == CASES.keys() | ON_OPTIMIZER.keys()


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_home(op):
    registered = {n.split("::")[1] for n in mae_fast.ops.dispatch.LIBRARY._op_defs}
    for path in (
        f"mae_fast/ops/{op}.py",
        f"tests/ops/test_{op}.py",
    ):
        assert (ROOT / path).exists(), path
    assert op == "adamw" or (op in WORK and op in TORCH | OFFICIAL)  # its least, what it replaces
    assert (f"{op}_fwd" in registered) == (op not in UNREGISTERED)
    assert f"| `{op}` |" in (ROOT / "docs/results.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_op_passes_opcheck(case, dtype):
    """Every registered operator that the public function and its backward call, as they call it."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "mae_fast":
                called.append((func, args))
            return func(*args, **(kwargs or {}))

    function, args = _args(case, dtype)
    with Recorder():
        _gradients(function, args)
    own = [func for func, _ in called if func.name().startswith(f"mae_fast::{case}_")]
    assert len(own) == (0 if case in UNREGISTERED else 1 if case in NO_GRADIENT else 2)
    for func, given in called:
        detached = [a.detach() if torch.is_tensor(a) else a for a in given]
        torch.library.opcheck(func, detached)
        if func.name().endswith("_fwd"):
            leaves = [
                a.detach().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
                for a in given
            ]
            torch.library.opcheck(func, leaves)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_op_passes_gradcheck(case, backend):
    if case in NO_GRADIENT:
        pytest.skip(f"{case} has no gradient")
    if backend not in OPS[case].backends:
        pytest.skip(f"{case} has no {backend} backend")
    with mae_fast.backends(**{case: backend}):
        torch.autograd.gradcheck(*_args(case))


def test_op_compiles_whole(case):
    function, args = _args(case, torch.float32)
    expected = _gradients(function, args)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_gradients(compiled, args), expected)


def test_op_works_under_autocast(case):
    function, args = _args(case, torch.float32)
    expected = _gradients(function, args)
    with torch.autocast("cpu", torch.bfloat16):
        got = _gradients(function, args)
    assert [g.dtype for g in got] == [torch.float32] * len(got)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0.1, atol=0.05 * float(e.abs().max()))


def test_op_works_under_functional_call(case):
    function, args = _args(case)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, a in enumerate(args):
                name = f"a{i}"
                if a.requires_grad:
                    self.register_parameter(name, torch.nn.Parameter(torch.zeros_like(a)))
                else:
                    self.register_buffer(name, a)

        def forward(self):
            return _sum(function(*(getattr(self, f"a{i}") for i in range(len(args)))))

    values = {f"a{i}": a for i, a in enumerate(args) if a.requires_grad}
    out = torch.func.functional_call(Module(), values, ())
    got = torch.autograd.grad(out, list(values.values())) if values else out
    expected = _gradients(function, args) if values else _sum(function(*args))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_hooks", "reentrant"])
def test_op_works_under_activation_checkpointing(case, reentrant):
    if case in NO_GRADIENT:
        pytest.skip(f"{case} has no gradient")
    function, args = _args(case)
    _sum(checkpoint(function, *args, use_reentrant=reentrant)).backward()
    got = [a.grad for a in args if a.requires_grad]
    torch.testing.assert_close(got, list(_gradients(function, args)))


def test_op_refuses_a_second_gradient(case):
    """The C++ kernels have none: zeros in its place would be a wrong answer."""
    if case in NO_GRADIENT | UNREGISTERED:
        pytest.skip(f"{case} has no backward of its own")
    function, args = _args(case)
    leaves = [a for a in args if a.requires_grad]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(_sum(function(*args)), leaves, create_graph=True)
