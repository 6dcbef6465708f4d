"""No zeros are written for an output of an operator that has no gradient."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mae_fast
from mae_fast.ops import OPS, dispatch

ZEROS = {"zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "full_like", "new_full"}


class Fills(TorchDispatchMode):
    """What is filled inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[1] in ZEROS:
            self.found.append(f"{function} {list(out.shape)}")
        return out


def test_backward_fills_nothing(tiny_cfg):
    """Statistics, the log-sum-exp and the saved gradient of the loss have no gradient. What is left
    is torch's own: a slice of the positions, [1, 1, D]."""
    ours = "triton" if dispatch.interpreting() else "cpp"
    reason = dispatch.MACHINE[ours]()
    if reason:
        pytest.skip(reason)
    forced = {n: ours for n, op in OPS.items() if ours in op.backends and n != "adamw"}
    widths = {"embed_dim": 32, "decoder_embed_dim": 32}  # heads of 16, the least that Triton takes
    tiny_cfg = dataclasses.replace(tiny_cfg, **widths)
    model = mae_fast.MaskedAutoencoder(tiny_cfg)
    clips = torch.zeros(1, 3, 8, 16, 16, dtype=torch.uint8)
    with mae_fast.backends(**forced):
        loss, *_ = model(clips, 0.5)
        with Fills() as fills:
            loss.backward()
    assert fills.found == [f"aten.zeros.default [1, 1, {tiny_cfg.embed_dim}]"], fills.found


OUTPUTS = {  # an operator with outputs that have no gradient -> its arguments
    "attention_fwd": lambda x: (x.view(1, 4, 1, 16),) * 3,
    "layer_norm_fwd": lambda x: (x, x[0], x[1], 1e-6, torch.float32),
    "add_layer_norm_fwd": lambda x: (x, x, x[0], x[1], 1e-6, torch.float32),
}


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return None


@pytest.mark.parametrize("operator", OUTPUTS)
def test_an_undefined_gradient_stays_so(operator):
    ours = "triton" if dispatch.interpreting() else "cpp"
    reason = dispatch.MACHINE[ours]()
    if reason:
        pytest.skip(reason)
    x = torch.randn(4, 16, requires_grad=True)
    outs = getattr(torch.ops.mae_fast, operator)(*OUTPUTS[operator](x))
    NoGradient.apply(outs[0]).sum().backward()
    assert x.grad is None or not x.grad.any()
