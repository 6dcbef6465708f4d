"""No zeros are written for an output of an operator that has no gradient."""

import pytest
import torch
from op_checks import BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode

import mae_fast
from mae_fast.config import ModelConfig
from mae_fast.ops import OPS, dispatch

OURS = BACKENDS[0]
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


@pytest.fixture(autouse=True)
def loaded():
    reason = dispatch.MACHINE[OURS]()
    if reason:
        pytest.skip(reason)


def test_backward_fills_nothing():
    """Statistics, the log-sum-exp and the saved gradient of the loss have no gradient. What is left
    is torch's own: a slice of the positions, [1, 1, D]."""
    forced = {n: OURS for n, op in OPS.items() if OURS in op.backends and n != "adamw"}
    sizes = {"img_size": 16, "patch_size": 8, "num_frames": 8, "pred_t_dim": 4}
    widths = {"embed_dim": 32, "decoder_embed_dim": 32}  # heads of 16, the least that Triton takes
    parts = {"depth": 2, "num_heads": 2, "decoder_depth": 2, "decoder_num_heads": 2}
    model = mae_fast.MaskedAutoencoder(ModelConfig(**sizes, **widths, **parts))
    clips = torch.zeros(1, 3, 8, 16, 16, dtype=torch.uint8)
    with mae_fast.backends(**forced):
        loss, *_ = model(clips, 0.5)
        with Fills() as fills:
            loss.backward()
    assert fills.found == ["aten.zeros.default [1, 1, 32]"], fills.found


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
    x = torch.randn(4, 16, requires_grad=True)
    outs = getattr(torch.ops.mae_fast, operator)(*OUTPUTS[operator](x))
    NoGradient.apply(outs[0]).sum().backward()
    assert x.grad is None or not x.grad.any()
