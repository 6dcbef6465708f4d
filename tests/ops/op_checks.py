"""The backends that the ops' tests run, and their tolerance rule: against fp64, beside plain torch
in the same dtype.

Three runs cover the backends: a plain one, one with TRITON_INTERPRET=1 (Triton's kernels on CPU
tensors), and one with MAE_FAST_TEST_DEVICE=cuda on a machine with a GPU.
"""

import os

import torch

from mae_fast.ops import dispatch

DEVICE = os.environ.get("MAE_FAST_TEST_DEVICE", "cpu")
BACKENDS = ["cpp", "reference"] if DEVICE == "cpu" else ["triton"]
if dispatch.interpreting():
    BACKENDS = ["triton"]
# Backends that put NaN where an id does not fit: to refuse it, the host would wait for the device.
GIVE_NAN = ("triton", "cuda")

# What an error may be besides twice plain torch's, relative to the greatest norm among the exact
# output and gradients: some are exactly zero, and what is computed is the rounding of the others.
FLOOR = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def floor(t):
    """One number alone may be off by the whole rounding of an operand and its own, which plain
    torch's by chance is not: of many they average."""
    return max(FLOOR[t.dtype], torch.finfo(t.dtype).eps) if t.numel() == 1 else FLOOR[t.dtype]


def gradients(function, args, dout=None):
    """[output, gradient of each floating argument that requires one] of one call."""
    args = [a.detach().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in args]
    out = function(*args)
    outs = out if isinstance(out, tuple) else (out,)
    dout = [torch.ones_like(o) for o in outs] if dout is None else dout
    leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
    dout = [d.to(o.dtype) for d, o in zip(dout, outs, strict=True)]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, dout)]


def assert_as_good_as_torch(ours, plain, exact):
    """style.md's rule, for lists of tensors: at most twice the error of plain torch in the same
    dtype against the fp64 answer, plus a small floor."""
    greatest = max(e.norm() for e in exact)
    for i, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert (o.dtype, o.shape) == (p.dtype, p.shape), f"number {i}: {o.dtype} {o.shape}"
        assert o.isfinite().all(), f"number {i} holds what is not finite"
        error, allowed = (o - e).norm(), 2 * (p - e).norm() + floor(o) * greatest
        assert error <= allowed, f"number {i}: {error} > {allowed}"


def assert_rounded_once(narrow, wide):
    """That `narrow` is `wide` in its own dtype. On a GPU, where another kernel makes it and may add
    in another order, it is the rounding of a number within fp32's floor of it."""
    slack = 0 if DEVICE == "cpu" else FLOOR[torch.float32]
    low, high = ((wide + e).to(narrow.dtype) for e in (-slack, slack))
    assert ((low <= narrow) & (narrow <= high)).all()


def check_op(function, reference, args, dout=None):
    """Forward and every gradient of `function` against `reference` in fp64 and in args' dtype."""

    def widened(a):
        if isinstance(a, torch.dtype):
            return torch.float64
        if not torch.is_tensor(a) or not a.is_floating_point():
            return a
        return a.detach().double().requires_grad_(a.requires_grad)

    wide = list(map(widened, args))
    ours, plain = (gradients(f, args, dout) for f in (function, reference))
    assert_as_good_as_torch(ours, plain, gradients(reference, wide, dout))


def interpolated(*args, by):
    """A reference's pixels, by the kernel that torch has for them. Where equal bits are asked for,
    a GPU's F.interpolate is made of many, for the sake of its backward, and rounds the pixels'
    places once more: up to 8e-6 at these sizes."""
    torch.use_deterministic_algorithms(False)
    want = by(*args)
    torch.use_deterministic_algorithms(True)
    return want
