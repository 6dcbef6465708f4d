"""adamw: torch's fused step and the reference against the formula in fp64; scale and skip."""

import copy

import pytest
import torch

import mae_fast
from mae_fast.ops.adamw import adamw
from mae_fast.ops.dispatch import BackendError

SHAPES = [(1,), (7, 13), (3, 2, 5), (0,)]


def make(dtype=torch.float32, **options):
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in SHAPES]
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


@pytest.mark.parametrize("backend", ["torch", "reference"])
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


def test_adamw_backends_continue_each_others_state():
    grads = [[torch.randn(s) for s in SHAPES] for _ in range(4)]
    params, optimizer = make()
    other, other_optimizer = copy.deepcopy((params, optimizer))
    run(params, optimizer, grads, "torch")
    run(other, other_optimizer, grads[:2], "reference")
    run(other, other_optimizer, grads[2:], "torch")
    torch.testing.assert_close(params, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
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
