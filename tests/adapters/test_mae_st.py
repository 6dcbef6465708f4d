"""The official MAE-ST, accelerated: the same loss, prediction and gradients.

Against a model written from the specification, figures recorded from the official code, and the
official code itself where MAE_ST_REPOSITORY names a checkout of facebookresearch/mae_st.
"""

import os
import random
from functools import partial

import pytest
import torch
from foreign import MaskedAutoencoderViT, clips, make, relative, run, worst
from torch import nn

import mae_fast
from mae_fast.bench.baselines.official_repository import import_models
from mae_fast.config import ModelConfig

FP64 = 1e-10
REPOSITORY = os.environ.get("MAE_ST_REPOSITORY")
needs_repository = pytest.mark.skipif(
    REPOSITORY is None, reason="MAE_ST_REPOSITORY names no checkout of facebookresearch/mae_st"
)


def _configs(count: int, seed: int) -> list[ModelConfig]:
    """Random small models; every kind of cls, positions, target, biases and depth is among them."""
    rng = random.Random(seed)
    configs = []
    for i in range(count):
        u, t, side, p = rng.choice([1, 2, 3]), rng.choice([2, 3, 4]), rng.choice([2, 3, 5]), 7 + i
        heads, head, dec_heads, dec_head = (rng.choice(n) for n in ([1, 3], [5, 12, 20, 33]) * 2)
        configs.append(
            ModelConfig(
                img_size=side * p,
                patch_size=p,
                num_frames=t * u,
                t_patch_size=u,
                pred_t_dim=t * u if i % 3 == 1 else t,
                embed_dim=heads * head,
                num_heads=heads,
                depth=rng.choice([1, 2, 3]),
                decoder_embed_dim=dec_heads * dec_head,
                decoder_num_heads=dec_heads,
                decoder_depth=1 + i % 3,
                mlp_ratio=rng.choice([2.0, 3.7, 4.0]),
                norm_pix_loss=i % 2 == 0,
                cls_embed=i // 2 % 2 == 0,
                sep_pos_embed=i // 3 % 2 == 0,
                no_qkv_bias=i % 4 == 1,
            )
        )
    return configs


CONFIGS = [pytest.param(cfg, id=f"random_{i}") for i, cfg in enumerate(_configs(8, seed=5))]


def _official(cfg: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The official model file's own model, with the values of `make`."""
    names = "img_size patch_size in_chans embed_dim depth num_heads decoder_embed_dim"
    names += " decoder_depth decoder_num_heads mlp_ratio norm_pix_loss num_frames t_patch_size"
    names += " no_qkv_bias sep_pos_embed cls_embed pred_t_dim"
    settings = {name: getattr(cfg, name) for name in names.split()}
    norm = partial(nn.LayerNorm, eps=1e-6)
    model = import_models(REPOSITORY).MaskedAutoencoderViT(norm_layer=norm, **settings).to(dtype)
    model.load_state_dict(make(cfg, dtype).state_dict())
    return model


MAKERS = [
    pytest.param(make, id="from_specification"),
    pytest.param(_official, id="official_code", marks=needs_repository),
]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("cfg", CONFIGS)
def test_fp64(cfg, maker, record_property):
    model, video = maker(cfg, torch.float64), clips(cfg, 3, torch.float64)
    ratio = min(0.75, 1 - 1.5 / cfg.num_patches)
    before = run(model, video, ratio)
    differences = worst(run(mae_fast.accelerate(model), video, ratio), before)
    record_property("greatest relative differences, fp64", str(differences))
    assert max(differences.values()) < FP64, differences


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("cfg", CONFIGS)
def test_fp32(cfg, maker, record_property):
    model, video = maker(cfg, torch.float32), clips(cfg, 3)
    ratio = min(0.75, 1 - 1.5 / cfg.num_patches)
    exact = run(make(cfg).double(), video.double(), ratio)
    theirs = worst(run(model, video, ratio), exact)
    ours = worst(run(mae_fast.accelerate(model), video, ratio), exact)
    record_property("error against fp64: ours, theirs", f"{ours} {theirs}")
    assert all(ours[k] <= 2 * theirs[k] + 2e-6 for k in theirs), (ours, theirs)


def _golden_run(golden, monkeypatch):
    model = MaskedAutoencoderViT(golden.cfg)
    model.load_state_dict(golden.state())
    mae_fast.accelerate(model, mean=0.45, std=0.225)
    monkeypatch.setattr(torch, "rand", lambda *size, device: golden["noise"][: size[0]])
    return model


@pytest.mark.parametrize("pixels", ["uint8", "float"])
def test_golden_figures(golden, pixels, monkeypatch):
    model = _golden_run(golden, monkeypatch)
    video = golden["video_u8"] if pixels == "uint8" else golden.float_video()
    (loss, pred, mask), grads = run(model, video, golden.mask_ratio)
    assert torch.equal(mask, golden["mask"])
    assert abs(loss / golden["loss"] - 1) < 1e-5 and relative(pred, golden["pred"]) < 1e-5
    for name, grad in grads.items():
        if not name.endswith("attn.k.bias"):
            assert relative(grad, golden[f"grad.{name}"]) < 1e-4, name


@needs_repository
def test_the_prediction_can_be_put_back(tiny_cfg):
    # model.unpatchify reads what the last forward left in the model.
    model, video = _official(tiny_cfg, torch.float32), clips(tiny_cfg)
    torch.manual_seed(0)
    before = model.unpatchify(model(video)[1])
    del model.patch_info
    torch.manual_seed(0)
    after = model.unpatchify(mae_fast.accelerate(model)(video)[1])
    assert after.shape == before.shape and relative(after, before) < 1e-5


@pytest.mark.parametrize("maker", MAKERS)
def test_twenty_steps(tiny_cfg, maker, record_property):
    curves = []
    for line in (False, True):
        model = maker(tiny_cfg, torch.float32)
        if line:
            mae_fast.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        losses = []
        for step in range(20):
            torch.manual_seed(step)
            loss = model(torch.randn(clips(tiny_cfg).shape), mask_ratio=0.75)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    difference = float((curves[1] / curves[0] - 1).abs().max())
    record_property("greatest relative difference of 20 losses", f"{difference:.1e}")
    assert difference < 1e-4
