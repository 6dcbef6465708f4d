"""Weights between families: names, what is carried exactly, what is lost and said."""

import json
import os
from importlib import import_module

import pytest
import stand_ins
import torch
import torch.nn.functional as F
from convertible import JOINT, MODELS, SIZE, ImageViT, family_of, make, ours, transformers_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mae_fast import MaskedAutoencoder, ModelConfig, cli, weights
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.forward import decode, encode
from mae_fast.masking import ids_from_noise
from mae_fast.weights import Report, Size, load_model, load_weights, translate
from mae_fast.weights.families import identify, read, strip
from mae_fast.weights.positions import sincos

BATCH, KEPT = 2, 9


def outputs(model: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(latent, pred) of the same clips under the same mask: latent without cls, tokens in order."""
    torch.manual_seed(3)
    clip = torch.randn(BATCH, 3, 8, 32, 32)
    noise = torch.rand(BATCH, 64, generator=torch.Generator().manual_seed(4))
    keep, hidden = ids_from_noise(noise, KEPT)
    keep, hidden = keep.sort(dim=1)[0], hidden.sort(dim=1)[0]
    mask = torch.ones(BATCH, 64, dtype=torch.bool).scatter(1, keep.long(), False)
    if isinstance(model, MaskedAutoencoder):
        latent = encode(model.params(), model.spec, clip, keep)
        pred = decode(model.params(), model.spec, latent, keep, hidden)
        return latent[:, -KEPT:], pred
    seen = []
    entry = getattr(model, "encoder_to_decoder", None) or model.decoder_embed
    hook = entry.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    if family_of(name) in ("slowfast", "mae_st"):
        # These draw their masks themselves, and the noise is the order of their tokens.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *size, **_: noise)
            ratio = 1 - (KEPT + 0.5) / 64
            if family_of(name) == "slowfast":
                model.cfg.AUG.MASK_RATIO = ratio
                pred = model([clip])[0][0].unflatten(0, (BATCH, -1))
            else:
                pred = model(clip, ratio)[1].gather(1, hidden.long()[..., None].expand(-1, -1, 384))
        order = noise.argsort(dim=1)[:, :KEPT].argsort(dim=1)
        latent = seen[0][:, -KEPT:]
        latent = latent.gather(1, order[..., None].expand_as(latent))
    else:
        args = (clip, mask) if family_of(name) == "videomae" else (clip.transpose(1, 2), mask)
        pred = model(*args)
        pred, latent = getattr(pred, "logits", pred), seen[0]
    hook.remove()
    return latent, pred


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() < 2e-6 * b.norm())


@pytest.mark.parametrize("name", MODELS)
def test_to_its_own_family_every_bit_stays(name):
    state = make(name).state_dict()
    assert identify(state) == family_of(name)
    again, report = translate(state, family_of(name))
    assert list(report.lost) == list(report.made) == []
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n], state[n]) for n in state)


ROUND_TRIPS = [
    ("mae_st-no_cls", "slowfast"),
    ("mae_st-no_biases", "slowfast"),
    ("slowfast-sep_decoder", "mae_st"),
    ("slowfast-no_cls", "mae_st"),
    ("videomae", "mae_st"),
    ("videomae", "slowfast"),
    ("videomae", "transformers"),
    ("videomae-no_biases", "mae_st"),
    ("transformers", "videomae"),
    ("transformers", "mae_st"),
    ("timm-vit", "mae_st"),
    ("timm-vit", "slowfast"),
    ("timm-vit-no_cls", "mae_st"),
]


@pytest.mark.parametrize(("name", "through"), ROUND_TRIPS)
def test_there_and_back_every_bit_is_the_same(name, through):
    state = make(name).state_dict()
    there, _ = translate(state, through, size=SIZE)
    assert identify(there) == through
    back, report = translate(there, family_of(name), size=Size(source_num_frames=8))
    dropped = {"decoder_cls_token"}  # mae_st's own, zero here, has no place in slowfast
    assert all(line.split(":")[0] in dropped for line in report.lost), report.lost
    assert state.keys() == back.keys()
    assert all(torch.equal(back[n], state[n]) for n in state)


SAME = [
    # (source, target, are the decoders' outputs the same too)
    ("videomae", lambda: ours(**JOINT), True),
    ("transformers", lambda: ours(**JOINT), True),
    ("videomae", "transformers", True),
    ("transformers", "videomae", True),
    ("videomae-no_biases", lambda: ours(**JOINT, no_qkv_bias=True), True),
    ("videomae", lambda: slowfast_no_cls(12), False),
    ("slowfast-no_cls", lambda: ours(**JOINT, decoder_embed_dim=64, decoder_num_heads=1), False),
    ("slowfast-sep_decoder", lambda: ours(decoder_embed_dim=64, decoder_num_heads=1), False),
    ("slowfast", lambda: ours(sep_pos_embed=False, decoder_embed_dim=64), False),
    ("mae_st-no_cls", lambda: slowfast_no_cls(12, True), False),
]


def slowfast_no_cls(width: int, sep: bool = False) -> nn.Module:
    return stand_ins.MaskMViT(
        cls=False,
        sep_pos_embed=sep,
        decoder_sep_pos_embed=sep,
        dims=(24, width),
        heads=(3, 2),
        time_stride_loss=False,
    )


@pytest.mark.parametrize(("name", "target", "whole"), SAME)
def test_a_converted_model_computes_the_same(name, target, whole):
    model = make(name)
    other = make(target, seed=1) if isinstance(target, str) else target().eval()
    to = target if isinstance(target, str) else identify(other.state_dict())
    state, _ = translate(model.state_dict(), to, size=SIZE)
    if "decoder_pred.weight" in state and not whole:  # frames predicted are the model's choice
        other.decoder_pred = nn.Linear(*reversed(state["decoder_pred.weight"].shape))
    if "pred_head.projections.0.weight" in state:
        rows, columns = state["pred_head.projections.0.weight"].shape
        other.pred_head.projections[0] = nn.Linear(columns, rows)
    other.load_state_dict(state)
    with torch.no_grad():
        (latent, pred), (want, want_pred) = outputs(other, to), outputs(model, name)
    assert close(latent, want)
    if whole:
        assert close(pred, want_pred)


def test_a_slowfast_file_is_loaded_by_our_slowfast_variant(tmp_path):
    model = make("slowfast")
    torch.save({"model_state": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pyth")
    cfg = dict(img_size=32, patch_size=8, num_frames=8, pred_t_dim=4, embed_dim=24, depth=2)
    cfg |= dict(num_heads=3, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=1)
    loaded = load_model(tmp_path / "checkpoint.pyth", ModelConfig(variant="slowfast", **cfg))
    with torch.no_grad():
        (latent, pred), (want, want_pred) = outputs(loaded, "ours"), outputs(model, "slowfast")
    assert close(latent, want) and close(pred, want_pred)
    again, report = translate(loaded.state_dict(), "slowfast")
    assert report.lost == report.made == []
    assert all(torch.equal(again[n], t) for n, t in model.state_dict().items())


def official_mae_st() -> nn.Module:
    from mae_fast.bench.baselines.official_repository import OfficialRepository

    path = os.environ["MAE_ST_REPOSITORY"]
    return OfficialRepository(path).build(ours().cfg).model


def official_videomae() -> nn.Module:
    model = import_module("test_videomae").official("videomae")
    # Made for 16 frames, always; the positions of the first 8 are those of 8.
    for part in (model, model.encoder):
        part.pos_embed = part.pos_embed[:, :64]
    return model


# The stand-in (or another family's model) whose weights each repository's own model takes.
REPOSITORIES = {
    "MAE_ST_REPOSITORY": ("mae_st", official_mae_st),
    "VIDEOMAE_REPOSITORY": ("transformers", official_videomae),
    "SLOWFAST_REPOSITORY": (
        "slowfast-sep_decoder",
        lambda: import_module("test_slowfast").official(decoder_sep_pos_embed=True),
    ),
}


@pytest.mark.parametrize("variable", REPOSITORIES)
def test_the_repositorys_own_model_computes_the_same(variable):
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    name, official = REPOSITORIES[variable]
    model, own = make(name), make(official, seed=1)
    family = identify(own.state_dict())
    there, _ = translate(model.state_dict(), "mae_st", size=SIZE)
    state, _ = translate(there, family, size=SIZE)
    own.load_state_dict(state)
    with torch.no_grad():
        for a, b in zip(outputs(own, family), outputs(model, name), strict=True):
            assert close(a, b)


def timm_model() -> nn.Module:
    timm = pytest.importorskip("timm")
    kind, sizes = timm.models.VisionTransformer, dict(embed_dim=24, depth=2, num_heads=3)
    return kind(img_size=32, patch_size=8, num_classes=0, **sizes)


@pytest.mark.parametrize("kind", [ImageViT, timm_model], ids=["stand_in", "timm"])
def test_an_image_model_sees_a_still_clip_as_its_image(kind):
    image, model = torch.randn(BATCH, 3, 32, 32), make(kind)
    state, report = translate(model.state_dict(), "mae_st", size=Size(num_frames=2, img_size=32))
    assert report.lost == []
    clip = image[:, :, None].repeat(1, 1, 2, 1, 1)
    with torch.no_grad():
        video = ours(num_frames=2, pred_t_dim=2)
        missing, extra = video.load_state_dict(state, strict=False)
        ids = torch.arange(16, dtype=torch.int32).expand(BATCH, -1)
        latent = encode(video.params(), video.spec, clip, ids)
        assert close(latent, getattr(model, "forward_features", model)(image))
    assert extra == [] and all("decoder" in n or n == "mask_token" for n in missing)


def test_a_video_encoder_becomes_an_image_model_and_says_what_time_it_lost():
    state, report = translate(make("mae_st").state_dict(), "timm-vit")
    ImageViT().load_state_dict(state)
    said = "\n".join(report.lost)
    assert "the decoder, 43 tensors: an image model has none" in said
    assert "summed over its 2 frames" in said and "mean over 4 time steps" in said


def test_what_videomae_cannot_hold_is_named():
    model = make("mae_st")
    state, report = translate(model.state_dict(), "videomae")
    stand_ins.VideoMAE().load_state_dict(state)
    assert [line.split(":")[0] for line in report.lost] == [
        "pos_embed",
        "decoder_pos_embed",
        "cls_token",
        "attn.k.bias of 4 blocks",
        "decoder_embed.bias",
    ]
    state, report = translate(ours(pred_t_dim=4).state_dict(), "transformers")
    assert "decoder.head.weight" not in state
    assert "decoder_pred: it predicts 192 values of a patch of 384" in report.lost[-1]
    _, report = translate(state, "mae_st", size=SIZE)
    assert report.lost == ["decoder_pred: not in the source: the target's own stays"]


def test_a_bias_of_k_is_dropped_without_a_trace_in_the_output():
    fixed, _ = translate(make("videomae").state_dict(), "mae_st", size=SIZE)
    model = ours(**JOINT)
    model.load_state_dict(fixed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("attn.k.bias"):
                p.normal_()
    state, report = translate(model.state_dict(), "videomae")
    assert len(report.lost) == 1 and "attn.k.bias of 4 blocks" in report.lost[0]
    other = stand_ins.VideoMAE().eval()
    other.load_state_dict(state)
    with torch.no_grad():
        for a, b in zip(outputs(other, "videomae"), outputs(model, "ours"), strict=True):
            assert close(a, b)


def test_decoders_cls_tokens_differ_and_that_is_said():
    _, report = translate(make("mae_st").state_dict(), "slowfast")
    assert report.lost[0].startswith("decoder_cls_token: slowfast's decoder takes the encoder's")
    state, report = translate(make("slowfast").state_dict(), "mae_st", size=SIZE)
    assert not state["decoder_cls_token"].any()
    assert any(line.startswith("decoder_cls_token: zero") for line in report.made)


@pytest.mark.parametrize(
    "wrapped", ["_orig_mod.", "module.", "module._orig_mod.", "model.", "backbone."]
)
def test_prefixes_of_wrappers_are_stripped(wrapped):
    state = make("mae_st").state_dict()
    again, _ = translate({wrapped + n: t for n, t in state.items()}, "mae_st")
    assert again.keys() == state.keys()


def test_prefixes_inside_of_names_are_stripped_but_two_names_never_become_one():
    inner = {"blocks.0._orig_mod.norm1.weight": torch.ones(1)}
    inner |= {"_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module.x": torch.ones(1)}
    assert list(strip(inner)) == ["blocks.0.norm1.weight", "blocks.1.x"]
    with pytest.raises(CheckpointError, match="two tensors are called norm"):
        strip({"module.norm": torch.ones(1), "norm": torch.ones(1)})


def test_encoders_alone_are_carried():
    model = make("transformers")
    state, _ = translate(model.videomae.state_dict(), "mae_st", size=SIZE)
    whole, report = translate(model.state_dict(), "mae_st", size=SIZE, encoder_only=True)
    assert state.keys() == whole.keys() and not any("decoder" in n for n in state)
    assert report.lost == ["the decoder, 36 tensors: left out as asked"]
    # A fine-tuned VideoMAE has no prefix, and a head.
    tuned = make("videomae").encoder.state_dict() | {"fc_norm.weight": torch.ones(24)}
    state, report = translate(tuned, "mae_st", size=SIZE)
    assert state.keys() == whole.keys()
    assert report.lost == ["fc_norm.weight: no part of a masked autoencoder of these families"]


def test_biases_of_old_transformers_are_read():
    state = make("transformers").state_dict()
    old = {
        n.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): t
        for n, t in state.items()
    }
    assert old.keys() != state.keys()
    again, report = translate(old, "transformers")
    assert report.lost == [] and all(torch.equal(again[n], state[n]) for n in state)


def test_fixed_positions_are_transformers_own_to_the_bit():
    pytest.importorskip("transformers")
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

    for length, dim in ((64, 24), (1568, 384), (7, 5)):
        assert torch.equal(sincos(length, dim), get_sinusoid_encoding_table(length, dim))


def test_fixed_positions_are_made_at_the_target_size():
    state, report = translate(make("videomae").state_dict(), "mae_st")
    assert torch.equal(state["pos_embed"], sincos(8 * 28 * 28, 24))
    assert report.made[0] == "pos_embed: the fixed sines and cosines of 8 x 28 x 28 (exact)"


def test_interpolation_of_separable_and_joint_tables_is_the_same():
    """Both interpolations weigh by sums of 1, so that of a sum is the sum of those."""
    apart = make("mae_st").state_dict()
    joint = dict(apart)
    for half in ("", "decoder_"):
        name = half + "pos_embed"
        spatial, temporal, cls = (joint.pop(name + x) for x in ("_spatial", "_temporal", "_class"))
        pos = (temporal[0, :, None] + spatial[0]).flatten(0, 1)[None]
        joint[name] = torch.cat([cls, pos], dim=1)
    size = Size(img_size=48, num_frames=12, source_num_frames=8)
    apart, report = translate(apart, "mae_st", size=size)
    joint, _ = translate(joint, "mae_st", size=size)
    ours(img_size=48, num_frames=12, pred_t_dim=12).load_state_dict(apart)
    ours(img_size=48, num_frames=12, pred_t_dim=12, sep_pos_embed=False).load_state_dict(joint)
    assert report.made[0] == "pos_embed: interpolated, 4 x 4 x 4 to 6 x 6 x 6"
    sums = apart["pos_embed_temporal"][0, :, None] + apart["pos_embed_spatial"][0]
    torch.testing.assert_close(joint["pos_embed"][0, 1:], sums.flatten(0, 1))
    assert torch.equal(joint["pos_embed"][:, :1], apart["pos_embed_class"])


def test_interpolation_is_bicubic_in_space_and_linear_in_time():
    state = make("mae_st").state_dict()
    ramp = torch.arange(4.0)[None, :, None].expand(1, 4, 24)
    state["pos_embed_temporal"] = ramp
    made, _ = translate(state, "mae_st", size=Size(img_size=48, num_frames=16))
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(made["pos_embed_temporal"][0, :, 0], expected)
    image = state["pos_embed_spatial"].view(1, 4, 4, 24).permute(0, 3, 1, 2)
    image = F.interpolate(image, (6, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(made["pos_embed_spatial"], image)


def test_a_joint_table_of_unknown_length_asks_for_its_frames():
    state = make("mae_st-joint").state_dict()
    with pytest.raises(ConfigError, match=r"8 positions .* --source-num-frames"):
        translate(state, "mae_st", size=Size(img_size=48))
    assert translate(state, "mae_st")[1].made == []


def test_a_changed_block_is_refused_by_name():
    state = make("videomae").state_dict()
    state["encoder.blocks.0.gamma_1"] = torch.ones(24)
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.0\.gamma_1"):
        translate(state, "mae_st")


def test_an_incomplete_model_is_refused_by_name():
    state = make("mae_st").state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc2\.bias"):
        translate(state, "slowfast")
    with pytest.raises(CheckpointError, match="no known family"):
        translate({"layer1.0.conv1.weight": torch.ones(1)}, "mae_st")
    with pytest.raises(CheckpointError, match="no weights of transformers' VideoMAE"):
        translate(make("mae_st").state_dict(), "mae_st", "transformers")


def test_names_and_table_are_one_mapping_in_both_directions():
    for name in MODELS:
        table, rest = read(make(name).state_dict(), family_of(name))
        assert rest == {} and "patch_embed.proj.weight" in table


# The command.


def test_convert_writes_what_transformers_loads(tmp_path, capsys):
    pytest.importorskip("transformers")
    from transformers import VideoMAEForPreTraining

    model = make("videomae")
    torch.save({"module": model.state_dict()}, tmp_path / "videomae.pth")
    expected = transformers_model()
    expected.config.save_pretrained(tmp_path / "hub")
    out = tmp_path / "hub" / "model.safetensors"
    said = cli.main(
        ["convert", str(tmp_path / "videomae.pth"), "--to", "transformers", "-o", str(out)]
    )
    assert said == 0
    loaded, info = VideoMAEForPreTraining.from_pretrained(
        tmp_path / "hub", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded.decoder.norm.eps = 1e-6
    with torch.no_grad():
        for a, b in zip(outputs(loaded, "transformers"), outputs(model, "videomae"), strict=True):
            assert close(a, b)
    lines = capsys.readouterr().out.splitlines()
    assert "(videomae) ->" in lines[0] and "layer_norm_eps" in lines[-1]


def test_convert_keeps_what_was_lost_in_the_file(tmp_path, capsys):
    torch.save({"model": make("mae_st").state_dict()}, tmp_path / "mae.pth")
    out = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "mae.pth"), "--to", "videomae", "-o", str(out)]) == 0
    with safe_open(out, "pt") as f:
        kept = json.loads(f.metadata()["mae_fast.convert"])
    assert kept["source"] == "mae_st" and kept["target"] == "videomae"
    printed = capsys.readouterr().out
    assert kept["lost"] and all(f"lost: {line}" in printed for line in kept["lost"])
    assert list(tmp_path.glob("*.tmp")) == []


def test_convert_takes_a_runs_checkpoint_and_says_its_heads(tmp_path, capsys):
    from mae_fast.checkpoint import save
    from mae_fast.config import Config
    from mae_fast.config_file import to_dict

    model = make("mae_st")
    state = {"config": to_dict(Config(model=model.cfg))}
    path = save(tmp_path, 7, model, torch.optim.SGD(model.parameters()), state, keep=1)
    out = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(path), "--to", "mae_st", "-o", str(out)]) == 0
    assert "heads: 3, and 2 in the decoder" in capsys.readouterr().out
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in load_file(out).items())


def test_convert_refuses_what_it_cannot_write(tmp_path, capsys):
    torch.save(make("mae_st").state_dict(), tmp_path / "mae.pth")
    command = ["convert", str(tmp_path / "mae.pth"), "--to", "mae_st", "-o"]
    assert cli.main([*command, str(tmp_path / "out.pth")]) == 2
    assert cli.main([*command, str(tmp_path / "mae.pth" / "out.safetensors")]) == 73
    assert "cannot write" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mae.pth"]


def test_convert_makes_the_folder_of_its_output(tmp_path):
    torch.save(make("mae_st").state_dict(), tmp_path / "mae.pth")
    out = tmp_path / "new" / "folder" / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "mae.pth"), "--to", "mae_st", "-o", str(out)]) == 0
    assert out.is_file()


def test_a_pickle_that_needs_more_is_refused_with_the_way_out(tmp_path):
    torch.save({"model": make("mae_st").state_dict(), "args": print}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"\(print\).*weights_only=False.*save_file"):
        load_model(tmp_path / "more.pth")


@pytest.mark.parametrize("key", ["model_state_dict", "net", "ema", "model_ema"])
def test_weights_are_found_under_the_key_that_a_script_gave_them(key, tmp_path):
    state = make("mae_st").state_dict()
    torch.save({key: state, "epoch": 3}, tmp_path / "run.pth")
    _, weights = load_weights(tmp_path / "run.pth")
    assert all(torch.equal(weights[name], t) for name, t in state.items())


def test_convert_asks_for_what_its_options_say(tmp_path, monkeypatch):
    asked, path, out = [], tmp_path / "mae.pth", str(tmp_path / "out.safetensors")
    torch.save(make("mae_st").state_dict(), path)

    def recorded(state, *how):
        asked.append(how)
        return state, Report("mae_st", how[0])

    monkeypatch.setattr(weights, "translate", recorded)
    options = "--from slowfast --img-size 64 --num-frames 8 --source-num-frames 32"
    options += " --t-patch-size 4 --encoder-only"
    for more in ([], options.split()):
        assert cli.main(["convert", str(path), "--to", "videomae", "-o", out, *more]) == 0
    assert asked == [
        ("videomae", "auto", Size(), False),
        ("videomae", "slowfast", Size(64, 8, 32, 4), True),
    ]
