"""The head on boxes against SlowFast's, and clips of other sizes than the encoder's own.

golden/slowfast_head.safetensors was recorded in fp64 from ResNetRoIHead of SlowFast's
models/head_helper.py (2 clips, 2 x 3 x 4 tokens of 16 values behind a cls token, patches of 4, 5
classes), behind the lines of MViT.forward that norm, drop cls and reshape; its ROIAlign is
detectron2's call of torchvision's. pos_at_3x6 is of VideoMAE-Action-Detection's interpolation.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mae_fast.classifier import ClassifierConfig
from mae_fast.config import ModelConfig
from mae_fast.errors import ConfigError
from mae_fast.tasks.ava import model as boxes_model
from mae_fast.tasks.ava.model import BoxClassifier, box_loss
from mae_fast.weights.positions import over_space

GOLDEN = load_file(Path(__file__).parent / "golden" / "slowfast_head.safetensors")


@pytest.fixture(autouse=True)
def torchvision():
    pytest.importorskip("torchvision", reason="the head on boxes needs torchvision (an extra)")


def tiny(family="mae_st", **changes):
    sizes = dict(img_size=16, patch_size=4, num_frames=4, pred_t_dim=2, embed_dim=16, depth=2)
    sizes |= dict(num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    cfg = ModelConfig(**sizes | changes)
    return BoxClassifier(ClassifierConfig(cfg, family, 5, pool="first"))


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_logits_and_gradients_are_slowfast_s(dtype, limit):
    g = {k: v.to(dtype) for k, v in GOLDEN.items()}
    net = tiny().to(dtype)
    with torch.no_grad():
        for name in ("norm.weight", "norm.bias", "head.weight", "head.bias"):
            net.get_parameter(name).copy_(g[name])
    tokens = g["tokens"].detach().clone().requires_grad_()
    logits = net.on_boxes(tokens, (2, 3, 4), g["boxes"])
    torch.testing.assert_close(logits.sigmoid(), g["prob"], rtol=limit, atol=limit)
    F.binary_cross_entropy_with_logits(logits, g["target"]).backward()
    found = {"tokens": tokens.grad} | {n: p.grad for n, p in net.named_parameters()}
    for name, grad in found.items():
        if f"grad.{name}" in g:
            torch.testing.assert_close(grad, g[f"grad.{name}"], rtol=limit, atol=limit)
    # Two clips, five boxes: the mean over boxes is 2 / 5 of the sum over the clips.
    mine = box_loss(logits, g["target"], 2) * 2 / 5
    torch.testing.assert_close(mine, g["loss"], rtol=limit, atol=limit)


def test_positions_are_interpolated_over_space_as_videomae_s():
    found = over_space(GOLDEN["pos"], (2, 3, 6))
    torch.testing.assert_close(found, GOLDEN["pos_at_3x6"], rtol=1e-12, atol=1e-12)
    net = tiny("videomae").double()
    t, h, w = net.cfg.model.grid
    here = net._at((t, 3, 6), uint8=False).pos
    table = net.fixed_pos[0].double().unflatten(0, (t, h * w))
    torch.testing.assert_close(here, over_space(table, (t, 3, 6)).flatten(0, 1))


@pytest.mark.parametrize("family", ["mae_st", "videomae"])
def test_a_clip_that_is_no_square_goes_through(family):
    net = tiny(family).eval()
    video, boxes = torch.randn(1, 3, 4, 12, 24), torch.tensor([[0, 2.0, 1.0, 20.0, 11.0]])
    logits = net(video, boxes)
    assert logits.shape == (1, 5) and logits.isfinite().all()
    # A square of the encoder's own size uses its own positions, to the bit.
    own = net._at(net.cfg.model.grid, uint8=False).pos
    assert own is not None and torch.equal(own, net.params().pos)
    with pytest.raises(ValueError, match="multiples of 4"):
        net(torch.randn(1, 3, 4, 10, 24), boxes)


def test_boxes_of_one_clip_do_not_see_the_other():
    net = tiny().eval()
    with torch.no_grad():
        net.head.weight.normal_()
    video = torch.randn(2, 3, 4, 16, 16)
    boxes = torch.tensor([[0, 1.0, 1, 9, 9], [1, 1, 1, 9, 9], [0, 4, 4, 16, 16]])
    both = net(video, boxes)
    alone = net(video[1:], torch.tensor([[0, 1.0, 1, 9, 9]]))
    torch.testing.assert_close(both[1:2], alone, rtol=1e-5, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3 and (both[0] - both[2]).abs().max() > 1e-3


def test_torchvision_is_asked_for_by_name_where_it_is_not(monkeypatch):
    import builtins

    own = builtins.__import__

    def without(name, *args):
        if name.startswith("torchvision"):
            raise ImportError("No module named 'torchvision'")
        return own(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="needs torchvision \\(pip install torchvision\\)"):
        boxes_model.roi_align()
