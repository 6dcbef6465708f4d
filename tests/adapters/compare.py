"""A model's own forward and its fused one, side by side: outputs, gradients, curves."""

import copy
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from op_checks import assert_as_good_as_torch
from torch import Tensor, nn

import mae_fast

Run = Callable[[nn.Module], list[Tensor]]  # the loss, and what else the model gives


def scattered(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with values that no part of it can hide."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def results(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """Outputs and every gradient of one step, by name."""
    torch.manual_seed(3)  # some draw their mask
    model.zero_grad()
    outputs = run(model)
    outputs[0].backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def differences(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], least: float = 1e-6
) -> dict[str, float]:
    """|ours - theirs| / |theirs| by name. A gradient a million times smaller than the greatest is
    rounding of 0 (a key's bias), and held to that size: `least` of the greatest."""
    assert ours.keys() == theirs.keys()
    least *= max(float(t.norm()) for n, t in theirs.items() if not n.startswith("output"))
    found = {}
    for name, want in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (want.shape, want.dtype), name
        found[name] = float((ours[name] - want).norm() / want.norm().clamp_min(least))
    return found


def summary(found: dict[str, float]) -> str:
    """The greatest of the loss, of the other outputs and of the gradients."""
    loss, *others = ((n, d) for n, d in found.items() if n.startswith("output"))
    grads = ((n, d) for n, d in found.items() if not n.startswith("output"))
    name, worst = max(grads, key=lambda pair: pair[1])
    outputs = max((d for _, d in others), default=0.0)
    return f"loss {loss[1]:.1e}, outputs {outputs:.1e}, gradient of {name} {worst:.1e}"


def check(model: nn.Module, run: Run, record_property=None) -> None:
    """Loss, outputs and every gradient: to 1e-10 in fp64; in fp32 by the rule of style.md."""
    wide, fast = copy.deepcopy(model).double(), mae_fast.accelerate(copy.deepcopy(model))
    exact = results(wide, run)
    found = differences(results(mae_fast.accelerate(wide), run), exact)
    ours, plain = results(fast, run), results(model, run)
    if record_property:
        for dtype, by_name in (("fp64", found), ("fp32", differences(ours, plain))):
            record_property(f"greatest relative differences in {dtype}", summary(by_name))
    assert max(found.values()) <= 1e-10, summary(found)
    assert_as_good_as_torch(*(list(r.values()) for r in (ours, plain, exact)))


def check_curves(model: nn.Module, run: Callable[[nn.Module, int], Tensor]) -> None:
    """20 steps of AdamW, run(model, step) -> loss, with and without the one line."""
    curves = []
    for fused in (False, True):
        copied = copy.deepcopy(model).double()
        copied = mae_fast.accelerate(copied) if fused else copied
        optimizer = torch.optim.AdamW(copied.parameters(), lr=3e-3)
        losses = []
        for step in range(20):
            torch.manual_seed(step)
            loss = run(copied, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.9 * curves[0][0]  # it learns
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)


def repository(variable: str, module: str) -> ModuleType:
    """`module` of the checkout that an environment variable names; skips the test without one."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no checkout")
    before, loaded = list(sys.path), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except ImportError as e:
        pytest.skip(f"{module} of {folder} does not import: {e}")
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - loaded:  # two families have modules of one name
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]
