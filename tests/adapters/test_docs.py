"""docs/adapters.md: its adapter fits its model, and explain prints what it says."""

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest
import torch

import mae_fast
from mae_fast import adapters

DOCS = Path(__file__).resolve().parents[2] / "docs/adapters.md"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The page's Python blocks as files under their names; loads one of them."""
    for name, text in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", DOCS.read_text(), re.DOTALL):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(adapters, "FAMILIES", dict(adapters.FAMILIES))
    yield importlib.import_module
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def _step(model, video, ids):
    model.zero_grad()
    loss = model(video, ids[:, :2], ids[:, 2:])
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def test_the_adapter_gives_the_same_loss_and_gradients(modules):
    modules("tiny_mae_adapter")
    torch.manual_seed(0)
    model = modules("tiny_mae").TinyMAE().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    video, ids = torch.randn(2, 3, 4, 16, 16).double(), torch.rand(2, 8).argsort(dim=1)
    theirs, their_grads = _step(model, video, ids)
    ours, our_grads = _step(mae_fast.accelerate(model), video, ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        # A key bias, one third of in_proj_bias, has no gradient but rounding.
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-8, atol=1e-12)


def test_the_page_trains(modules):
    assert torch.isfinite(modules("train").loss)


def test_what_explain_says_of_cross_attention_is_on_the_page(modules):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        modules("cross")
    (shown,) = re.findall(r"```text\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert said.getvalue() == shown


@pytest.mark.parametrize("part", ["dropout", "activation", "post_norm"])
def test_the_adapter_refuses_what_computes_otherwise(modules, part):
    modules("tiny_mae_adapter")
    model = modules("tiny_mae").TinyMAE()
    layer = model.encoder[1]
    if part == "dropout":
        layer.dropout1.p = 0.1
    elif part == "activation":
        layer.activation = torch.relu
    else:
        layer.norm_first = False
    with pytest.raises(mae_fast.errors.AccelerateError, match=r"encoder\.1"):
        mae_fast.accelerate(model)
