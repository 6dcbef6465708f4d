"""The classifier against figures recorded from the five official codes, in fp64 and fp32."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mae_fast.classifier import (
    FAMILIES,
    ClassifierConfig,
    DropPath,
    VideoClassifier,
    init_head,
    param_groups,
)
from mae_fast.config import ModelConfig
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.weights import classifier as into
from mae_fast.weights import translate
from mae_fast.weights.families import read

GOLDEN = Path(__file__).parent / "golden"
CODES = ("mae_st", "slowfast", "videomae", "videomae_v2", "transformers")
LIMITS = {torch.float64: 1e-10, torch.float32: 2e-5}


def family_of(code):
    return "videomae" if code == "videomae_v2" else code


def tiny(code="mae_st", drop_path=0.0, **changes):
    sizes = dict(img_size=16, patch_size=4, num_frames=4, pred_t_dim=2, embed_dim=16, depth=2)
    sizes |= dict(num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    cfg = ModelConfig(**sizes | changes.pop("model", {}))
    how = dict(model=cfg, family=family_of(code), num_classes=5, drop_path=drop_path)
    return VideoClassifier(ClassifierConfig(**how | changes))


class Golden:
    def __init__(self, code):
        with safe_open(GOLDEN / f"{code}.safetensors", "pt") as f:
            self.metadata = f.metadata()
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}

    def __getitem__(self, key):
        return self.tensors[key]

    def state(self, what="state."):
        return {k[len(what) :]: v for k, v in self.tensors.items() if k.startswith(what)}

    def model(self, code, tmp_path, **changes):
        save_file(self.state(), tmp_path / "official.safetensors")
        model = tiny(code, **changes)
        return model, into.load(model, tmp_path / "official.safetensors")


@pytest.fixture(params=CODES)
def code(request):
    return request.param


@pytest.fixture
def golden(code):
    return Golden(code)


def relative(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def soft_loss(logits, target):
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def normalised(model, video):
    mean, std = (torch.tensor(t).double().view(3, 1, 1, 1) for t in model.family.pixels)
    return (video.double() / 255 - mean) / std


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp64", "fp32"])
def test_official_logits_loss_and_every_gradient(golden, code, dtype, tmp_path, record_property):
    model, said = golden.model(code, tmp_path)
    assert not [line for line in said if "left as" in line or "new" in line]
    model.to(dtype)
    logits = model(normalised(model, golden["video_u8"]).to(dtype))
    loss = soft_loss(logits, golden["target"].to(dtype))
    loss.backward()
    limit = LIMITS[dtype]
    assert relative(logits, golden["logits"]) < limit
    assert abs(float(loss.detach() / golden["loss"]) - 1) < limit
    theirs, rest = read(golden.state("grad."), family_of(code))
    assert not rest
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert set(theirs) - set(grads) <= {f"blocks.{i}.attn.k.bias" for i in range(2)}
    assert set(grads) <= set(theirs)
    found = {n: relative(g, theirs[n]) for n, g in grads.items() if not n.endswith("k.bias")}
    worst = max(found, key=found.get)
    record_property("worst", f"{code} {dtype}: {worst} {found[worst]:.1e}")
    assert found[worst] < limit, worst


def test_official_uint8_clip_is_the_normalised_one(golden, code, tmp_path):
    model, _ = golden.model(code, tmp_path)
    # A byte is multiplied by 1/255 in fp32.
    assert relative(model.double()(golden["video_u8"]), golden["logits"]) < 1e-6


def test_official_drop_path_draws_the_same_numbers(golden, code, tmp_path):
    if code in ("transformers", "slowfast"):
        pytest.skip("transformers has no drop path; PySlowFast draws uniform numbers for it")
    model, _ = golden.model(code, tmp_path, drop_path=0.3)
    torch.manual_seed(7)
    logits = model.double().train()(normalised(model, golden["video_u8"]))
    assert relative(logits, golden["drop_path_logits"]) < 1e-10
    assert relative(golden["logits"], golden["drop_path_logits"]) > 1e-2


def test_official_parameter_groups_with_their_rates(golden, code, tmp_path):
    theirs = json.loads(golden.metadata["groups"])
    if theirs is None:
        pytest.skip("transformers has no layer decay")
    model, _ = golden.model(code, tmp_path)
    names = {p: n for n, p in model.named_parameters()}
    ours = {
        names[p]: [group["lr_scale"], group["weight_decay"]]
        for group in param_groups(model, 0.05, 0.75)
        for p in group["params"]
    }
    # One fused product stands in their table for our q, k and v.
    theirs = {n: torch.tensor(v) for n, v in theirs.items()}
    spread = {}
    for name, value in theirs.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith("attn.qkv"):
            spread |= {f"{stem[:-3]}{x}.{kind}": value for x in "qkv"}
        elif kind in ("q_bias", "v_bias"):
            spread[f"{stem}.{kind[0]}.bias"] = value
        else:
            spread[name.replace("head.projection", "head")] = value
    assert set(ours) == set(spread)
    for name, value in spread.items():
        torch.testing.assert_close(torch.tensor(ours[name]), value, rtol=1e-12, atol=0)


def test_visible_tokens_only_are_encoded_and_pooled():
    model = tiny().double()
    video = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
    everything = torch.arange(32, dtype=torch.int32).expand(2, -1)
    torch.testing.assert_close(model(video, everything.flip(1)), model(video))
    some = model(video, everything[:, :5].contiguous())
    video[:, :, :, -4:, -4:] += 1  # a patch that nobody sees
    torch.testing.assert_close(model(video, everything[:, :5].contiguous()), some)
    assert model.tokens(video, everything[:, :5].contiguous()).shape == (2, 6, 16)


def test_first_token_pooling_is_the_norm_and_then_the_cls_token():
    model = tiny(pool="first").double()
    video = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
    wanted = model.head(model.norm(model.tokens(video))[:, 0])
    torch.testing.assert_close(model(video), wanted)


def test_pooling_without_a_cls_token_is_each_official_codes():
    """mae_st leaves the first token out, whatever it is; PySlowFast's "first" is a mean."""
    video = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
    bare = dict(model=dict(cls_embed=False))
    model = tiny("mae_st", **bare).double()
    wanted = model.head(model.norm(model.tokens(video)[:, 1:].mean(1)))
    torch.testing.assert_close(model(video), wanted)
    model = tiny("slowfast", **bare).double()
    wanted = model.head(model.norm(model.tokens(video).mean(1)))
    torch.testing.assert_close(model(video), wanted)
    model = tiny("slowfast", pool="first", **bare).double()
    wanted = model.head(model.norm(model.tokens(video)).mean(1))
    torch.testing.assert_close(model(video), wanted)


@pytest.mark.parametrize("source", ["videomae", "transformers"])
def test_a_classifier_that_pools_otherwise_is_refused(source, tmp_path):
    """Its weights would fit, and mean something else."""
    state, file = Golden(source).state(), tmp_path / "w.safetensors"
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r'takes the mean of the patches: give .*"mean"'):
        into.load(tiny(source, pool="first"), file)
    norm = "videomae.layernorm" if source == "transformers" else "norm"
    save_file({n.replace("fc_norm", norm): t for n, t in state.items()}, file)
    with pytest.raises(CheckpointError, match=r'takes the first token: give .*"first"'):
        into.load(tiny(source), file)
    into.load(tiny(source, pool="first"), file)
    into.load(tiny(source, num_classes=9), file)  # of which the encoder alone is taken


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 3, 2, dtype=torch.float64))
    assert (out == out[:, :1, :1]).all() and set(out.unique().tolist()) == {0.0, 4 / 3}
    assert abs(float(out.mean()) - 1) < 0.05
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize("family", FAMILIES)
def test_scratch_has_the_official_statistics(family):
    torch.manual_seed(0)
    model = tiny(family, model=dict(embed_dim=64, num_heads=4))
    std = {n: float(p.detach().std()) for n, p in model.named_parameters()}
    weight = "blocks.0.mlp.fc1.weight"
    if family == "mae_st":
        assert std["pos_embed_spatial"] == 0 == std["cls_token"]
        assert abs(std[weight] - (1 / 3) ** 0.5 / 8) < 2e-3  # torch's default: U(-1/8, 1/8)
        init_head(model, 0.001)
        assert float(model.head.weight.detach().abs().max()) < 1e-4
    else:
        assert abs(std[weight] - 0.02) < 1e-3
        before = model.head.weight.detach().clone()
        init_head(model, 0.001)
        torch.testing.assert_close(model.head.weight, before * 0.001)
    if family == "slowfast":
        assert (model.blocks[0].norm1.bias == 0.02).all()
        assert abs(std["pos_embed_spatial"] - 0.02) < 2e-3
        torch.testing.assert_close(model.head.bias, torch.full((5,), 2e-5))


@pytest.mark.parametrize("source", ["videomae", "transformers"])
def test_fine_tuned_videomae_is_transformers_and_back(source, tmp_path):
    golden = Golden(source)
    other = "transformers" if source == "videomae" else "videomae"
    there, report = translate(golden.state(), other)
    assert any("fc_norm" in line for line in report.made)
    back, _ = translate(there, source)
    for name, value in golden.state().items():
        if name.endswith("key.bias"):
            continue  # VideoMAE's keys have none: a softmax ignores it
        assert torch.equal(back[name], value), name
    if other == "transformers":
        transformers = pytest.importorskip("transformers")
        config = transformers.VideoMAEConfig(
            image_size=16, patch_size=4, num_frames=4, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=64, num_labels=5, use_mean_pooling=True,
            layer_norm_eps=1e-6,
        )  # fmt: skip
        model = transformers.VideoMAEForVideoClassification(config).double()
        model.fc_norm.eps = 1e-6
        result = model.load_state_dict(there, strict=False)
        assert not result.unexpected_keys
        assert all(n.endswith("key.bias") for n in result.missing_keys)
        for layer in model.videomae.encoder.layer:
            if layer.attention.attention.key.bias is not None:
                layer.attention.attention.key.bias.data.zero_()
        x = normalised(tiny("videomae"), golden["video_u8"]).transpose(1, 2)
        assert relative(model.eval()(x).logits, golden["logits"]) < 1e-10


def test_separable_positions_are_interpolated_in_time_and_space(tmp_path):
    small = tiny()
    torch.nn.init.normal_(small.pos_embed_spatial)
    torch.nn.init.normal_(small.pos_embed_temporal)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    large = tiny(model=dict(img_size=32, num_frames=8, pred_t_dim=4))
    said = into.load(large, tmp_path / "small.safetensors")
    assert "positions: interpolated, 2 x 4 x 4 to 4 x 8 x 8" in said
    old = small.pos_embed_temporal[0]
    wanted = torch.stack([old[0], 0.75 * old[0] + 0.25 * old[1], 0.25 * old[0] + 0.75 * old[1]])
    torch.testing.assert_close(large.pos_embed_temporal[0, :3], wanted)
    assert torch.equal(large.cls_token, small.cls_token)


def test_separable_positions_without_a_cls_token_fit_a_joint_table_with_one(tmp_path):
    small = tiny(model=dict(cls_embed=False))
    torch.nn.init.normal_(small.pos_embed_spatial)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    joint = tiny(model=dict(sep_pos_embed=False))
    assert "cls_token: not in the file, left as it was" in into.load(
        joint, tmp_path / "small.safetensors"
    )
    positions = torch.cat([torch.zeros(1, 1, 16), small._pos()[0][None]], dim=1)
    assert torch.equal(joint.pos_embed, positions)


@pytest.mark.parametrize("name", ["blocks.1.gamma_1", "blocks.0.attn.scale", "blocks.0.norm1.bias"])
def test_an_encoder_that_computes_something_else_is_refused(name, tmp_path):
    """V2's ViT-g has blocks of cosine attention; whole numbers are of a quantised model."""
    state = tiny("videomae").state_dict()
    state[name] = torch.ones(16, dtype=torch.int8 if name in state else torch.float32)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=name):
        into.load(tiny("videomae"), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=name):
        translate(state, "mae_st")


def test_head_of_other_classes_and_a_decoder_are_listed(tmp_path, tiny_cfg):
    save_file(Golden("mae_st").state(), tmp_path / "w.safetensors")
    model = tiny(num_classes=7)
    head = model.head.weight.detach().clone()
    assert "head: 5 classes there, 7 here: left as it was" in into.load(
        model, tmp_path / "w.safetensors"
    )
    assert torch.equal(model.head.weight, head)
    from mae_fast.model import MaskedAutoencoder

    pretrained = MaskedAutoencoder(copy.deepcopy(tiny_cfg))
    save_file(pretrained.state_dict(), tmp_path / "p.safetensors")
    model = VideoClassifier(ClassifierConfig(model=tiny_cfg, num_classes=3))
    said = into.load(model, tmp_path / "p.safetensors")
    assert "head: new" in said and any("decoder" in line for line in said)
    assert torch.equal(model.norm.weight, pretrained.norm.weight)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, pretrained.blocks[1].mlp.fc2.weight)


def test_weights_of_other_sizes_are_refused_in_one_line(tmp_path):
    save_file(Golden("mae_st").state(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"patch_embed.proj.weight .* for "):
        into.load(tiny(model=dict(t_patch_size=4, pred_t_dim=1)), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"left over: blocks.1"):
        into.load(tiny(model=dict(depth=1)), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="drop_path"):
        ClassifierConfig(model=tiny().cfg.model, drop_path=1.5)
