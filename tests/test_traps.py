"""Where a re-implementation of MAE-ST goes wrong without a sound: one test for each trap."""

import math

import pytest
import torch
from torch import nn

from mae_fast.config import ConfigError, ModelConfig, preset
from mae_fast.forward import targets
from mae_fast.masking import draw_ids, num_keep
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.masked_mse import masked_mse, norm_target, target_patches, unpatchify
from mae_fast.ops.patchify_gather import patchify_gather_ref


def _with(cfg: ModelConfig, **changes) -> ModelConfig:
    return ModelConfig(**{**cfg.__dict__, **changes})


@pytest.mark.parametrize(
    ("frames", "pred", "expected"),
    [
        (16, 8, (0, 2, 4, 6, 8, 10, 12, 15)),
        (8, 4, (0, 2, 4, 7)),
        (32, 16, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 31)),
        (16, 16, tuple(range(16))),
    ],
)
def test_trap_1_target_frames_end_with_the_last(frames, pred, expected):
    cfg = preset("vit_tiny", img_size=32, num_frames=frames, pred_t_dim=pred)
    assert cfg.target_frames == expected


def test_trap_1_target_frames_of_64_and_of_slowfast():
    assert preset("vit_tiny", num_frames=64).target_frames[-2:] == (60, 63)
    assert preset("vit_tiny", "slowfast").target_frames == (0, 2, 4, 6, 8, 10, 12, 14)


def test_trap_1_last_target_is_frame_15():
    cfg = preset("vit_tiny", img_size=32, norm_pix_loss=False)
    model = MaskedAutoencoder(cfg)
    video = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(1, 3, 16, 32, 32)
    ids = torch.arange(cfg.num_patches)[None]
    target = targets(model.spec, video, ids, torch.float32)
    assert target[0, -4:].unique().tolist() == [15.0]
    assert target[0, :4].unique().tolist() == [0.0]


def test_trap_2_patch_layouts():
    t, s, p = 4, 6, 3
    video = torch.arange(3.0 * t * s * s).view(1, 3, t, s, s)
    ids = torch.arange(2 * 2 * 2)[None]
    # Patch embedding order (c, u, p, q): equal to the convolution, token by token.
    conv = nn.Conv3d(3, 5, kernel_size=(2, p, p), stride=(2, p, p)).double()
    rows = patchify_gather_ref(video, ids, 2, p, 0.45, 0.225, torch.float64)
    ours = rows @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(ours, conv(video.double()).flatten(2).transpose(1, 2))
    # Target order (u, p, q, c), the channel fastest.
    target = target_patches(video, ids, tuple(range(t)), 2, p, 0.45, 0.225, torch.float32)
    for token in range(8):
        tt, r, c = token // 4, token // 2 % 2, token % 2
        cube = video[0, :, 2 * tt : 2 * tt + 2, p * r : p * r + p, p * c : p * c + p]
        assert torch.equal(target[0, token], cube.permute(1, 2, 3, 0).flatten())
    assert torch.equal(unpatchify(target, (2, 2, 2), p), video)


@pytest.mark.parametrize(
    ("patches", "counts"),
    [
        (16, {0.5: 784, 0.75: 392, 0.8: 313, 0.9: 156, 0.95: 78, 0.98: 31}),
        (14, {0.5: 1024, 0.75: 512, 0.8: 409, 0.9: 204, 0.95: 102, 0.98: 40}),
    ],
    ids=["patch16", "patch14"],
)
def test_trap_3_visible_counts(patches, counts):
    grid = preset("vit_huge", patch_size=patches).grid
    assert {r: num_keep("random", grid, r) for r in counts} == counts


def test_trap_4_noise_has_fp32_resolution():
    keep, mask = draw_ids("random", (8, 14, 14), 0.9, seed=0, step=0, samples=torch.arange(64))
    ids = torch.cat([keep, mask], 1).long()
    assert torch.equal(ids.sort(1).values, torch.arange(1568).expand(64, -1))


def test_trap_5_variance_is_unbiased_with_eps_inside():
    x = torch.randn(2, 3, 768, dtype=torch.float64)
    ours, mean, std = norm_target(x, "patch", chans=3)
    expected = (x - x.mean(-1, True)) / (x.var(-1, keepdim=True, unbiased=True) + 1e-6) ** 0.5
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    biased = (x - mean) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6) ** 0.5
    assert (ours / biased - 1).abs().median() > 6e-4
    torch.testing.assert_close(ours * std + mean, x)


def test_trap_5_flat_patch_has_target_zero_and_finite_gradients(tiny_cfg):
    model = MaskedAutoencoder(tiny_cfg)
    video = torch.full((1, 3, 8, 16, 16), 77, dtype=torch.uint8)
    loss, pred, _ = model(video, 0.75)
    loss.backward()
    torch.testing.assert_close(loss, pred.square().mean())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_trap_6_head_count_is_not_in_the_shapes(tiny_cfg):
    torch.manual_seed(0)
    a = MaskedAutoencoder(tiny_cfg)
    b = MaskedAutoencoder(_with(tiny_cfg, decoder_num_heads=4))
    b.load_state_dict(a.state_dict())  # loads without a word ...
    for p in a.decoder_blocks.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    b.load_state_dict(a.state_dict())
    video, noise = torch.randint(0, 256, (1, 3, 8, 16, 16), dtype=torch.uint8), torch.rand(1, 16)
    # ... and computes something else: so a checkpoint says its heads, and presets name them.
    assert a(video, 0.75, noise=noise)[0] != b(video, 0.75, noise=noise)[0]
    assert preset("vit_large").decoder_num_heads == 16
    assert preset("vit_large", "slowfast").decoder_num_heads == 8


def test_trap_7_decoder_has_its_own_cls(tiny_cfg):
    model = MaskedAutoencoder(tiny_cfg)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    assert model.decoder_cls_token.shape == (1, 1, 16)
    video = torch.randint(0, 256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    model(video, 0.75)[0].backward()
    assert model.decoder_cls_token.grad.abs().max() > 0
    assert model.cls_token.grad.abs().max() > 0  # through the encoder's attention only


def test_trap_7_slowfast_passes_the_encoder_cls_on():
    cfg = preset("vit_tiny", "slowfast", img_size=32, depth=1, decoder_depth=1)
    model = MaskedAutoencoder(cfg)
    assert "decoder_cls_token" not in model.state_dict()
    assert model.decoder_pos_embed.shape == (1, cfg.num_patches + 1, 192)


def test_trap_8_positions_are_time_major(tiny_cfg):
    model = MaskedAutoencoder(tiny_cfg)
    with torch.no_grad():
        model.pos_embed_spatial.zero_()
        model.pos_embed_temporal.copy_(torch.arange(4.0).view(1, 4, 1).expand(1, 4, 16))
    pos = model.params().pos[:, 0]
    assert pos.tolist() == [t for t in range(4) for _ in range(4)]


@pytest.mark.parametrize("variant", ["mae_st", "slowfast"])
def test_trap_9_initialisation(variant):
    torch.manual_seed(0)
    cfg = preset("vit_base", variant, depth=1, decoder_depth=1)
    state = MaskedAutoencoder(cfg).state_dict()
    std = {k: v.std().item() for k, v in state.items() if v.numel() > 1}
    top = {k: v.abs().max().item() for k, v in state.items()}
    for name in ("cls_token", "pos_embed_spatial", "pos_embed_temporal", "mask_token"):
        assert std[name] == pytest.approx(0.02, rel=0.12), name
    patch_bound = math.sqrt(1 / 1536)  # PyTorch's default for the convolution's bias
    assert 0.9 * patch_bound < top["patch_embed.proj.bias"] <= patch_bound
    q, fc1 = "blocks.0.attn.q.weight", "decoder_blocks.0.mlp.fc1.weight"
    if variant == "mae_st":
        assert top["decoder_cls_token"] == 0
        # q, k and v apart: fan 768 + 768, not the 768 + 3 * 768 of a fused projection.
        assert top[q] == pytest.approx(math.sqrt(6 / 1536), rel=1e-3)
        assert top[fc1] == pytest.approx(math.sqrt(6 / 2560), rel=1e-3)
        assert top["patch_embed.proj.weight"] == pytest.approx(math.sqrt(6 / 2304), rel=1e-3)
        assert top["blocks.0.attn.q.bias"] == top["decoder_pred.bias"] == 0
    else:
        assert std[q] == pytest.approx(0.02, rel=0.02)
        assert std["patch_embed.proj.weight"] == pytest.approx(0.02, rel=0.02)
        assert state["blocks.0.norm1.bias"].unique().tolist() == pytest.approx([0.02])
        assert state["blocks.0.attn.q.bias"].unique().tolist() == pytest.approx([0.02])
        assert top["decoder_blocks.0.attn.q.bias"] == top["norm.bias"] == 0


def test_trap_9_trunc_init():
    torch.manual_seed(0)
    cfg = preset("vit_base", depth=1, decoder_depth=1, trunc_init=True)
    state = MaskedAutoencoder(cfg).state_dict()
    assert state["blocks.0.mlp.fc1.weight"].std() == pytest.approx(0.02, rel=0.02)
    # std 1.0, cut at 2: the official code forgets to say 0.02 here.
    assert state["patch_embed.proj.weight"].std() == pytest.approx(0.88, rel=0.02)


def test_trap_9_initial_loss_of_random_input_is_the_official_one():
    torch.manual_seed(0)
    model = MaskedAutoencoder(preset("vit_base"))
    video = torch.randint(0, 256, (1, 3, 16, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        loss, _, _ = model(video)
    # 1.78 in the official code; 1.75 to 1.91 here over three seeds.
    assert loss.item() == pytest.approx(1.83, abs=0.12)


def test_trap_12_visible_patches_do_not_count(tiny_cfg):
    model = MaskedAutoencoder(tiny_cfg)
    video = torch.randint(0, 256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    loss, pred, mask = model(video, 0.75, full_pred=True)
    grad = torch.autograd.grad(loss, pred, retain_graph=True, allow_unused=True)[0]
    assert mask.sum(1).tolist() == [12.0, 12.0]
    assert grad is None or not grad[mask == 0].any()
    target = targets(model.spec, video, torch.arange(16).expand(2, -1), torch.float32)
    per_patch = (pred - norm_target(target, "patch", chans=3)[0]).square().mean(-1)
    torch.testing.assert_close(loss, (per_patch * mask).sum() / mask.sum())


def test_trap_13_the_mean_is_over_all_masked_values():
    pred, video = torch.randn(3, 5, 12), torch.randn(3, 3, 1, 4, 6)
    ids = torch.stack([torch.randperm(6)[:5] for _ in range(3)])
    mse = masked_mse(pred, video, ids, (0,), 1, 2, 0.45, 0.225, norm_pix="none")
    target = target_patches(video, ids, (0,), 1, 2, 0.45, 0.225, torch.float32)
    torch.testing.assert_close(mse, ((pred - target) ** 2).sum() / (3 * 5 * 12))


@pytest.mark.parametrize("heads", [1, 2, 5], ids=["d80", "d40", "d16"])
@pytest.mark.parametrize("side", [3, 4], ids=["odd_grid", "even_grid"])
def test_trap_14_block_against_formula(heads, side):
    torch.manual_seed(0)
    cfg = preset(
        "vit_tiny",
        img_size=8 * side,
        patch_size=8,
        num_frames=4,
        embed_dim=80,
        num_heads=heads,
        depth=1,
        decoder_depth=1,
    )
    model = MaskedAutoencoder(cfg).double()
    block = model.blocks[0]
    for p in block.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, side * side + 1, 80, dtype=torch.float64)

    def norm(v, layer):
        v = (v - v.mean(-1, True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return v * layer.weight + layer.bias

    a = block.attn
    h = norm(x, block.norm1)
    q, k, v = (f(h).view(2, -1, heads, 80 // heads).transpose(1, 2) for f in (a.q, a.k, a.v))
    w = (q @ k.transpose(-1, -2) * (80 // heads) ** -0.5).softmax(-1)
    y = x + a.proj((w @ v).transpose(1, 2).flatten(2))
    u = block.mlp.fc1(norm(y, block.norm2))
    y = y + block.mlp.fc2(0.5 * u * (1 + torch.erf(u / math.sqrt(2))))

    from mae_fast.forward import transformer_block

    ours = sum(transformer_block(x, None, block.params(), heads))
    torch.testing.assert_close(ours, y, rtol=1e-10, atol=1e-10)
    some = sum(transformer_block(x, None, block.params(), heads, first=4))
    torch.testing.assert_close(some, y[:, 4:], rtol=1e-10, atol=1e-10)


def test_trap_15_key_bias_has_no_gradient(tiny_cfg):
    model = MaskedAutoencoder(tiny_cfg).double()
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    video = torch.randn(2, 3, 8, 16, 16, dtype=torch.float64)
    model(video, 0.75)[0].backward()
    biases = [b.attn.k.bias.grad.abs().max() for b in (*model.blocks, *model.decoder_blocks)]
    assert max(biases) < 1e-15


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_size": 225}, ["225", "16"]),
        ({"num_frames": 15}, ["15", "2"]),
        ({"num_heads": 7}, ["1024", "7"]),
        ({"decoder_num_heads": 3}, ["512", "3"]),
        ({"pred_t_dim": 32}, ["32", "16"]),
        ({"pred_t_dim": 5}, ["5", "16"]),
        ({"patch_size": 0}, ["patch_size", "0"]),
        ({"variant": "slowfast", "pred_t_dim": 16}, ["8", "16"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_configuration_that_cannot_work_names_both_numbers(changes, words):
    with pytest.raises(ConfigError) as e:
        ModelConfig(**changes)
    assert all(w in str(e.value) for w in words), str(e.value)
