"""A training step of a tiny model whose every op runs in Triton gives the official figures."""

import pytest
import torch
from cases import ON_TRITON
from sanitizer import sanitized

import mae_fast
from mae_fast.ops import OPS, dispatch
from mae_fast.weights import to_mae_st

if not dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1 runs it, in a process of its own", allow_module_level=True)

# The others feed a model, step its parameters, are another target's loss, or autocast's alone.
OUTSIDE = {"adamw", "crop_resize_patchify_gather", "linear", "masked_hog_mse", "patchify_gather"}
IN_FORWARD = set(ON_TRITON) - OUTSIDE


def test_golden_loss_and_gradients_with_every_op_in_triton(golden):
    model = golden.model()
    forced = {op: "triton" for op in IN_FORWARD}
    with mae_fast.backends(**forced), sanitized() as record:
        loss, _, mask = model(golden["video_u8"], golden.mask_ratio, noise=golden["noise"])
        loss.backward()
    launched = {launch.kernel for launch in record.launches}
    for op in IN_FORWARD:  # add_layer_norm's kernel is layer_norm's, with a sum
        assert any(op.removeprefix("add_") in kernel for kernel in launched), op
    assert (mask == golden["mask"]).all()
    assert abs(loss.item() / golden["loss"].item() - 1) < 1e-5
    for name, grad in to_mae_st(model, "grad").items():
        theirs = golden[f"grad.{name}"]
        if name.endswith("attn.k.bias"):  # its true value is 0
            assert grad.abs().max() < 1e-7
        else:
            assert (grad - theirs).norm() < 1e-4 * theirs.norm(), name


def test_a_step_in_bf16_errs_no_more_than_torchs(golden):
    """Of fp64, the loss and every gradient: with every op of autocast's in Triton too, beside
    plain torch under autocast."""

    def step(dtype, **backends):
        model = golden.model().to(dtype)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)
        video = golden["video_u8"]
        with mae_fast.backends(**backends), autocast:
            loss, *_ = model(video, golden.mask_ratio, noise=golden["noise"])
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}

    plain = dict.fromkeys(OPS, "reference")
    exact, torchs = step(torch.float64, **plain), step(torch.float32, **plain)
    fused = dict.fromkeys(IN_FORWARD, "triton") | {"linear": "half"}
    ours = step(torch.float32, **fused)
    greatest = max(float(e.norm()) for e in exact.values())
    errors = {
        name: [float((of[name] - e).norm()) for of in (ours, torchs)] for name, e in exact.items()
    }
    wrong = {n: e for n, e in errors.items() if e[0] > 1.25 * e[1] + 1e-4 * greatest}
    assert not wrong
    total = [sum(e[i] ** 2 for e in errors.values()) ** 0.5 for i in (0, 1)]
    assert total[0] <= total[1]


def test_every_op_of_the_forward_has_triton_kernels():
    assert OPS.keys() == set(ON_TRITON)
