"""The official optimizer: groups, learning rate, clipping, and steps that must not happen."""

import pytest
import torch

from mae_fast import MaskedAutoencoder, TrainConfig, preset
from mae_fast.optim import clipped_step, lr_at, make_optimizer, param_groups, peak_lr


def test_trap_9_tokens_and_positions_decay():
    with torch.device("meta"):
        model = MaskedAutoencoder(preset("vit_tiny", depth=1, decoder_depth=1))
    groups = param_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters()}
    rest, decay = ({names[id(p)] for p in g["params"]} for g in groups)
    assert [g["weight_decay"] for g in groups] == [0.0, 0.05]
    assert rest | decay == set(names.values()) and not rest & decay
    assert rest == {n for n in names.values() if n.endswith(".bias") or "norm" in n}
    tokens = {"cls_token", "decoder_cls_token", "mask_token", "patch_embed.proj.weight"}
    positions = {n for n in names.values() if "pos_embed" in n}
    assert len(positions) == 6 and tokens | positions < decay


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0), (0.5, 1.6e-4), (2.5, 8e-4), (5, 1.6e-3), (52.5, 8e-4), (100, 0)]
)
def test_trap_10_learning_rate_by_fractional_epoch(epoch, lr):
    assert lr_at(epoch, 100, 5, 1.6e-3) == pytest.approx(lr, abs=1e-12)


def test_trap_10_repeat_aug_is_not_in_the_rate():
    assert peak_lr(TrainConfig(batch_size=2, accum_steps=4), world=32) == 1.6e-3


@pytest.mark.parametrize("clip", [0.02, 1e6, 0.0], ids=["clips", "does_not_clip", "off"])
def test_trap_16_clipping_is_global_and_equal_to_torchs(clip):
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = make_optimizer(models[0], TrainConfig())
    theirs = torch.optim.AdamW(
        param_groups(models[1], 0.05), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=True
    )
    for _ in range(4):
        x = torch.randn(6, 7)
        norms = []
        for model in models:
            model(x).square().sum().backward()
        norms.append(clipped_step(ours, 1e-2, clip))
        params = list(models[1].parameters())
        norms.append(torch.nn.utils.clip_grad_norm_(params, clip or float("inf")))
        theirs.step()
        theirs.zero_grad()
        torch.testing.assert_close(norms[0], norms[1])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in models[0].parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(value):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(model, TrainConfig())
    model(torch.randn(2, 4)).sum().backward()
    clipped_step(optimizer, 1e-2, 0.02)

    def state():
        moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
        return [p.detach().clone() for p in model.parameters()] + moments

    before = state()
    model(torch.randn(2, 4)).sum().backward()
    model.weight.grad[1, 2] = value
    norm = clipped_step(optimizer, 1e-2, 0.02)
    assert not norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    model(torch.randn(2, 4)).sum().backward()
    clipped_step(optimizer, 1e-2, 0.02)
    assert not torch.equal(before[0], model.weight)


def test_the_rate_ends_at_its_floor_and_stays_there():
    rates = [lr_at(at, 6, 2, 1.0, 0.5) for at in range(9)]
    slope = [0.5 + 0.25 * (1 + x) for x in (1, 0.5**0.5, 0, -(0.5**0.5), -1)]
    assert rates == pytest.approx([0, 0.5, *slope, 0.5, 0.5], abs=1e-12)
    assert lr_at(0, 4, 0, 2.0) == 2.0 and lr_at(3, 3, 3, 2.0, 0.25) in (2.0, 0.25)


def test_what_is_frozen_is_not_in_the_optimizer():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    rest, decay = (g["params"] for g in param_groups(model, 0.1))
    assert decay == [] and [id(p) for p in rest] == [
        id(p) for p in (model[0].bias, model[1].weight, model[1].bias)
    ]


def test_the_optimizer_is_torch_s_fused_one_with_the_settings_given():
    cfg = TrainConfig(betas=(0.5, 0.75), eps=1e-3, weight_decay=0.25)
    model = torch.nn.Linear(3, 3)
    optimizer = make_optimizer(model, cfg)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.25]
    model(torch.ones(1, 3)).sum().backward()
    clipped_step(optimizer, 0.125, 1.0)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.75), 1e-3, 0.125)
        assert group["fused"] is True and group["capturable"] is False


def test_a_group_s_rate_is_its_scale_of_the_step_s():
    """Layer decay: AdamW's first step is of the rate."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    groups = [{"params": [params[0]], "lr_scale": 0.25}, {"params": [params[1]]}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    for p in params:
        p.grad = torch.ones(3)
    clipped_step(optimizer, 0.1, 0.0)
    for p, moved in zip(params, (0.025, 0.1), strict=True):
        torch.testing.assert_close(p.detach(), torch.full((3,), -moved))
