"""The baselines against the golden figures, and mae_fast against the official model.

`OfficialMAE` is written from the specification and shares no code with mae_fast: where both agree
to 1e-9 on every gradient, every exact saving of the engine is exact.
"""

import dataclasses
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from mae_fast import MaskedAutoencoder
from mae_fast.bench.baselines import BASELINES, OFFICIAL, PEERS, OfficialMAE, normalise
from mae_fast.bench.baselines.transformers_videomae import VIDEOMAE_B
from mae_fast.bench.engines import config_of
from mae_fast.config import ModelConfig, TrainConfig, preset
from mae_fast.optim import clipped_step, make_optimizer

EAGER_RUNGS = [name for name, rung in OFFICIAL.items() if not rung.compiled]
QUICK = config_of("quick")


def relative_error(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """Greatest difference over the greatest value of `want`, or over `least` where that is more."""
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=least))


def assert_grads_agree(got: dict[str, Tensor], want: dict[str, Tensor], tol: float) -> None:
    """Every gradient to `tol` of its greatest value.

    A key's bias moves all scores of a query alike, so its true gradient is 0: both are held to
    `tol` of the weight's. One a million times smaller than the model's greatest is rounding of 0
    (q and k where the encoder sees one token) and held to `tol` of that size.
    """
    assert set(got) == set(want)
    least = 1e-6 * max(float(ref.abs().max()) for ref in want.values())
    for name, ref in want.items():
        if name.endswith("attn.k.bias"):
            scale = want[name.removesuffix("bias") + "weight"].abs().max().clamp(min=least)
            assert max(got[name].abs().max(), ref.abs().max()) <= tol * scale, name
        else:
            error = relative_error(got[name], ref, least)
            assert error <= tol, f"{name}: {error:.1e}"


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def check_golden(rung: str, golden: Any, grad_tol: float = 1e-4) -> nn.Module:
    ratio = golden.mask_ratio
    model = OFFICIAL[rung].build(golden.cfg, ratio).model
    model.load_state_dict(golden.state())
    loss, pred, mask = model(golden.float_video(), ratio, golden["noise"])
    loss.backward()
    assert torch.equal(mask, golden["mask"])
    assert relative_error(loss, golden["loss"]) <= 1e-5
    assert relative_error(pred, golden["pred"]) <= 1e-4
    prefix = "grad."
    want = {k.removeprefix(prefix): v for k, v in golden.tensors.items() if k.startswith(prefix)}
    assert_grads_agree(grads(model), want, grad_tol)
    return model


@pytest.mark.parametrize("rung", EAGER_RUNGS)
def test_official_matches_golden(rung: str, golden: Any) -> None:
    check_golden(rung, golden)


@pytest.mark.parametrize("golden", ["mae_st_tiny"], indirect=True)
def test_official_is_one_graph_to_compile(golden: Any) -> None:
    """The compiled rungs pay for no graph break; aot_eager traces as Inductor does, in seconds."""
    model = OFFICIAL["official_eager"].build(golden.cfg).model
    model.load_state_dict(golden.state())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, pred, _ = compiled(golden.float_video(), golden.mask_ratio, golden["noise"])
    assert relative_error(loss, golden["loss"]) <= 1e-5
    assert relative_error(pred, golden["pred"]) <= 1e-4


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs g++")
@pytest.mark.skipif(
    "MAE_FAST_SLOW_TESTS" not in os.environ,
    reason="compiling takes a minute: set MAE_FAST_SLOW_TESTS=1",
)
@pytest.mark.parametrize("rung", [name for name in OFFICIAL if name not in EAGER_RUNGS])
@pytest.mark.parametrize("golden", ["mae_st_tiny"], indirect=True)
def test_official_compile_matches_golden(rung: str, golden: Any) -> None:
    # 2e-3 admits Inductor's mean of the golden clip's 8 flat patches, one ulp off, which
    # norm_pix's division by sqrt(1e-6) makes 1e-3 of a target value; without any, 1e-4 below.
    model = check_golden(rung, golden, grad_tol=2e-3)
    model.zero_grad()
    eager = OfficialMAE(golden.cfg)
    eager.load_state_dict(model.state_dict())
    clips = normalise(torch.randint(0, 256, golden["video_u8"].shape, dtype=torch.uint8))
    for m in (model, eager):
        m(clips, golden.mask_ratio, golden["noise"])[0].backward()
    assert_grads_agree(grads(model), grads(eager), 1e-4)


# What random models take turns at.
POOLS = {
    "frames of a patch": (1, 2, 4),
    "time steps": (1, 2, 3, 5),
    "rows and columns": (3, 2, 5),
    "patch_size": (4, 6),
    "head": (8, 16, 20),
    "num_heads": (1, 2, 3),
    "decoder_head": (20, 8, 16),
    "decoder_num_heads": (2, 3, 1),
    "depth": (1, 2, 3),
    "decoder_depth": (1, 2, 3),
    "cls_embed": (True, False),
    "sep_pos_embed": (True, True, False, False),
    "norm_pix_loss": (True, False, True),
    "no_qkv_bias": (False, False, True),
    "predicted": ("steps", "all"),  # one frame a time step, or all
    "mlp_ratio": (4.0, 1.5),
    "in_chans": (3, 1),
    "ratio": (0.5, 0.75, 0.8, 0.9, 0.95),
    "clips": (1, 2, 3),
    "kind": ("uint8", "float"),
}


def random_configs(variant: str, count: int, seed: int) -> list[tuple[ModelConfig, dict]]:
    """`count` models that take every value of every pool, in seeded random company."""
    rng, configs = random.Random(seed), []
    columns = [rng.sample((pool * count)[:count], count) for pool in POOLS.values()]
    for row in zip(*columns, strict=True):
        one = dict(zip(POOLS, row, strict=True))
        u, t = one.pop("frames of a patch"), one.pop("time steps")
        run = {key: one.pop(key) for key in ("ratio", "clips", "kind")}
        every = one.pop("predicted") == "all" and variant == "mae_st"
        cfg = ModelConfig(
            variant=variant,
            img_size=one.pop("rows and columns") * one["patch_size"],
            num_frames=t * u,
            t_patch_size=u,
            pred_t_dim=t * u if every else t,
            embed_dim=one.pop("head") * one["num_heads"],
            decoder_embed_dim=one.pop("decoder_head") * one["decoder_num_heads"],
            **one,
        )
        run["ratio"] = min(run["ratio"], 1 - 1.5 / cfg.num_patches)  # leaves one token at least
        configs.append((cfg, run))
    return configs


RANDOM = [
    pytest.param(cfg, run, seed, id=f"{variant}-{seed}")
    for variant in ("mae_st", "slowfast")
    for seed, (cfg, run) in enumerate(random_configs(variant, 12, seed=len(variant)))
]


@pytest.mark.parametrize(("cfg", "run", "seed"), RANDOM)
def test_mae_fast_matches_official_fp64(cfg: ModelConfig, run: dict, seed: int) -> None:
    torch.manual_seed(seed)
    model = MaskedAutoencoder(cfg).double()
    with torch.no_grad():  # no parameter may stay 0 and hide what it does
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    official = OfficialMAE(cfg).double()
    official.load_state_dict(model.state_dict())
    shape = (run["clips"], cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    if run["kind"] == "uint8":
        video = torch.randint(0, 256, shape, dtype=torch.uint8)
        as_float = normalise(video, torch.float64)
    else:
        video = as_float = torch.randn(shape, dtype=torch.float64)
    noise = torch.rand(run["clips"], cfg.num_patches)

    want_loss, want_pred, want_mask = official(as_float, run["ratio"], noise)
    want_loss.backward()
    for full_pred in (True, False):
        model.zero_grad()
        loss, pred, mask = model(video, run["ratio"], noise=noise, full_pred=full_pred)
        loss.backward()
        assert torch.equal(mask, want_mask)
        assert relative_error(loss, want_loss) <= 1e-9
        assert_grads_agree(grads(model), grads(official), 1e-9)
        if full_pred:
            if cfg.variant == "slowfast":  # it predicts masked patches only
                pred = pred[mask.bool()].unflatten(0, (len(pred), -1))
            assert relative_error(pred, want_pred) <= 1e-9


@pytest.mark.parametrize("variant", ["mae_st", "slowfast"])
def test_official_has_the_same_parameters(variant: str) -> None:
    cfg = preset("vit_large", variant)
    with torch.device("meta"):
        models = MaskedAutoencoder(cfg), OfficialMAE(cfg)
    ours, official = ({k: v.shape for k, v in m.state_dict().items()} for m in models)
    assert ours == official
    if variant == "mae_st":
        assert len(official) == 467
        assert sum(p.numel() for p in models[1].parameters()) == 317_731_584


@pytest.fixture
def clips() -> tuple[Tensor, Tensor]:
    """(uint8 clips, noise) for QUICK."""
    g = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 3, 16, 64, 64), dtype=torch.uint8, generator=g)
    return clips, torch.rand(2, QUICK.num_patches, generator=g)


@pytest.mark.parametrize("rung", EAGER_RUNGS)
def test_step_trains_as_mae_fast_does(rung: str, clips: tuple[Tensor, Tensor]) -> None:
    video, noise = clips
    model, optimizer, step = OFFICIAL[rung].build(QUICK, mask_ratio=0.75)
    ours = MaskedAutoencoder(QUICK)
    ours.load_state_dict(model.state_dict())
    our_optimizer = make_optimizer(ours, TrainConfig())
    lr = 1e-3
    for group in optimizer.param_groups:
        group["lr"] = lr
    curve, our_curve = [], []
    for _ in range(10):
        curve.append(step(video, noise))
        loss = ours(video, 0.75, noise=noise)[0]
        loss.backward()
        clipped_step(our_optimizer, lr, clip=0.02)
        our_curve.append(loss.item())
    assert curve[-1] < 0.9 * curve[0]
    assert curve == pytest.approx(our_curve, rel=1e-5)


def test_step_takes_normalised_clips(clips: tuple[Tensor, Tensor]) -> None:
    video, noise = clips
    _, optimizer, step = OFFICIAL["official_eager"].build(QUICK, mask_ratio=0.75)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert step(video, noise) == step(normalise(video), noise)


def test_step_refuses_a_loss_that_is_not_finite(clips: tuple[Tensor, Tensor]) -> None:
    _, _, step = OFFICIAL["official_eager"].build(QUICK, mask_ratio=0.75)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        step(torch.full(clips[0].shape, torch.nan), clips[1])


def test_unknown_attention_and_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="attention must be eager or sdpa"):
        OfficialMAE(QUICK, attention="flash")
    with pytest.raises(ValueError, match="precision must be fp32 or bf16"):
        OFFICIAL["official_eager"].build(QUICK, precision="fp8")


def test_trap_18_the_ladder_of_baselines_is_named() -> None:
    assert all(name == baseline.name for name, baseline in BASELINES.items())
    assert list(OFFICIAL) == [
        "official_eager",
        "official_sdpa",
        "official_sdpa_fused_adamw",
        "official_compile",
        "official_sdpa_compile",
    ]


def test_videomae_trains_alike_eager_and_sdpa(clips: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("transformers", reason="the peer is transformers' VideoMAE")
    video, noise = clips
    cfg = dataclasses.replace(QUICK, pred_t_dim=16, cls_embed=False)
    curves = {}
    for name, peer in PEERS.items():
        torch.manual_seed(0)
        model, optimizer, step = peer.build(cfg, mask_ratio=0.75)
        assert model.config._attn_implementation == peer.attention
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        curves[name] = [step(video, noise) for _ in range(5)]
    assert curves["transformers_eager"] == pytest.approx(curves["transformers_sdpa"], rel=1e-5)
    assert curves["transformers_sdpa"][-1] < curves["transformers_sdpa"][0]


def test_videomae_b_is_transformers_default() -> None:
    pytest.importorskip("transformers", reason="the peer is transformers' VideoMAE")
    with torch.device("meta"):
        model = PEERS["transformers_sdpa"].build(VIDEOMAE_B, device="meta").model
    assert model.config.to_dict() == type(model.config)().to_dict()


def test_videomae_refuses_what_it_is_not() -> None:
    with pytest.raises(ValueError, match="VideoMAE needs pred_t_dim 16, got 8"):
        PEERS["transformers_sdpa"].build(preset("vit_base", cls_embed=False))


def test_videomae_without_transformers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        PEERS["transformers_eager"].build(VIDEOMAE_B)
