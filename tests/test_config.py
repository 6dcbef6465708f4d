"""The configuration as numbers: defaults, presets, what follows from them, and what is refused."""

import dataclasses
import json
from typing import get_args

import pytest

from mae_fast import config, config_file
from mae_fast.config import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig, preset
from mae_fast.config_file import config_from_dict, load_config, model_from_dict, to_dict
from mae_fast.errors import ConfigError

SMALL = dict(
    img_size=32, patch_size=8, num_frames=8, embed_dim=48, num_heads=3, depth=1, decoder_depth=1
)
# The official recipe (PRETRAIN.md) and the paper's ViT-L; nothing else is a default.
DEFAULTS = {
    "model": dict(
        variant="mae_st",
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_frames=16,
        t_patch_size=2,
        pred_t_dim=8,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        decoder_embed_dim=512,
        decoder_depth=4,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_pix_loss=True,
        sep_pos_embed=True,
        cls_embed=True,
        no_qkv_bias=False,
        trunc_init=False,
    ),
    "mask": dict(strategy="random", ratio=0.9),
    "data": dict(
        index="",
        val_index="",
        sampling_rate=4,
        target_fps=30.0,
        repeat_aug=4,
        span_seconds=0.0,
        short_side=256,
        crop_area=(0.5, 1.0),
        crop_aspect=(0.75, 1.3333),
        flip=0.5,
        decoder="auto",
        strict=True,
        workers=2,
        max_bad_share=0.05,
    ),
    "train": dict(
        batch_size=2,
        accum_steps=1,
        epochs=100.0,
        warmup_epochs=5.0,
        steps=0,
        warmup_steps=0,
        blr=1.6e-3,
        min_lr=0.0,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        eps=1e-8,
        clip_grad=0.02,
        precision="fp32",
        device="auto",
        cuda_graph="auto",
        seed=0,
        log_every=20,
        save_every=1000,
        keep=3,
        max_nonfinite=10,
        tensorboard=False,
        wandb=False,
        backends={},
    ),
    "eval": dict(probe=0, train_index="", test_index=""),
}
CLASSES = {"model": ModelConfig, "mask": MaskConfig, "data": DataConfig, "train": TrainConfig}
CLASSES["eval"] = config.EvalConfig


def test_defaults_are_the_official_recipe(monkeypatch):
    whole = to_dict(Config())
    assert whole.pop("output") == "runs/pretrain" and whole.keys() == DEFAULTS.keys()
    for name, wanted in DEFAULTS.items():
        assert {key: whole[name][key] for key in wanted} == wanted
    recipe = to_dict(config_from_dict({"recipe": "mae_st"}))
    assert recipe == {**to_dict(Config()), "model": to_dict(preset("vit_large"))}
    # Each of the recipe's values arrives, whatever the defaults are.
    for section, values in config_file.RECIPES["mae_st"].items():
        assert {key: DEFAULTS[section][key] for key in values} == values
        for key in values:
            monkeypatch.setitem(config_file.RECIPES["mae_st"][section], key, "marked")
            with pytest.raises(ConfigError, match=f"{section}.{key} must .*'marked'"):
                config_from_dict({})
            monkeypatch.undo()


@pytest.mark.parametrize("cls", [Config, *CLASSES.values()])
def test_a_configuration_is_frozen_and_compares_by_value(cls):
    made = cls()
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, "other")
    assert made == cls() and made is not cls()


@pytest.mark.parametrize(
    ("name", "variant", "wanted"),
    [  # width, depth, heads, patch; decoder's width, heads
        ("vit_tiny", "mae_st", (192, 12, 3, 16, 192, 6)),
        ("vit_small", "mae_st", (384, 12, 6, 16, 256, 8)),
        ("vit_base", "mae_st", (768, 12, 12, 16, 512, 16)),
        ("vit_large", "mae_st", (1024, 24, 16, 16, 512, 16)),
        ("vit_huge", "mae_st", (1280, 32, 16, 14, 512, 16)),
        ("vit_giant", "mae_st", (1792, 52, 28, 14, 512, 16)),
        ("vit_tiny", "slowfast", (192, 12, 3, 16, 192, 3)),
        ("vit_base", "slowfast", (768, 12, 12, 16, 512, 8)),
        ("vit_huge", "slowfast", (1280, 32, 16, 16, 512, 8)),
    ],
)
def test_presets(name, variant, wanted):
    m = preset(name, variant)
    decoder = (m.decoder_embed_dim, m.decoder_num_heads)
    assert (m.embed_dim, m.depth, m.num_heads, m.patch_size, *decoder) == wanted
    assert m.variant == variant and m.pred_t_dim == 8 and m.decoder_depth == 4
    assert [name[4:] for name in config.PRESETS] == "tiny small base large huge giant".split()


def test_a_preset_s_other_fields_follow_a_change():
    m = preset("vit_base", decoder_embed_dim=96)
    assert (m.decoder_embed_dim, m.decoder_num_heads) == (96, 3)
    assert preset("vit_tiny", decoder_embed_dim=16).decoder_num_heads == 1  # never none
    assert preset("vit_tiny", num_frames=8).pred_t_dim == 4
    assert preset("vit_tiny", t_patch_size=4).pred_t_dim == 4
    assert preset("vit_tiny", pred_t_dim=16).pred_t_dim == 16
    assert preset("vit_tiny", "slowfast", patch_size=8).patch_size == 8
    assert preset("vit_huge").patch_size == 14  # and the table is as it was
    assert preset("vit_base", decoder_num_heads=4).decoder_num_heads == 4
    for wrong, words in (
        (("vit_bass",), r"unknown model 'vit_bass'; did you mean 'vit_base'.*vit_tiny"),
        (("vit_base", "slow_fast"), r"model.variant must be mae_st or slowfast, got 'slow_fast'"),
    ):
        with pytest.raises(ConfigError, match=words):
            preset(*wrong)
    with pytest.raises(ConfigError, match=r"ModelConfig 'dept'; did you mean 'depth'.*img_size"):
        preset("vit_base", dept=3)


@pytest.mark.parametrize(
    ("changes", "grid", "patches", "frames", "u", "values"),
    [
        ({}, (4, 4, 4), 64, (0, 2, 4, 7), 1, 192),
        ({"pred_t_dim": 8}, (4, 4, 4), 64, tuple(range(8)), 2, 384),
        ({"t_patch_size": 4}, (2, 4, 4), 32, (0, 2, 4, 7), 2, 384),
        ({"variant": "slowfast"}, (4, 4, 4), 64, (0, 2, 4, 6), 1, 192),
        ({"patch_size": 16, "in_chans": 1}, (4, 2, 2), 16, (0, 2, 4, 7), 1, 256),
        ({"img_size": 40}, (4, 5, 5), 100, (0, 2, 4, 7), 1, 192),
    ],
    ids=["plain", "all_frames", "long_tubes", "slowfast", "grey", "larger"],
)
def test_what_follows_from_the_sizes(changes, grid, patches, frames, u, values):
    m = ModelConfig(**{**SMALL, "pred_t_dim": 4, **changes})
    assert m.grid == grid and m.num_patches == patches
    assert m.target_frames == frames and m.pred_t_patch_size == u and m.pred_dim == values


_TINY = {**SMALL, "pred_t_dim": 4}
ALLOWED = {  # at the edge of what is allowed
    "model": [
        {"patch_size": 1, "img_size": 1},
        {"in_chans": 1},
        {"num_frames": 1, "t_patch_size": 1, "pred_t_dim": 1},
        {"pred_t_dim": 8},
        {"depth": 1},
        {"decoder_depth": 1},
        {"embed_dim": 3, "num_heads": 3},
        {"decoder_embed_dim": 1, "decoder_num_heads": 1},
    ],
    "mask": [{"ratio": 0.0}, {"ratio": 0.999}],
    "data": [
        {"sampling_rate": 1},
        {"target_fps": 0.5},
        {"repeat_aug": 1},
        {"span_seconds": 0.0},
        {"short_side": 0},
        {"workers": 0},
        {"flip": 0.0},
        {"flip": 1.0},
        {"max_bad_share": 0.0},
        {"max_bad_share": 1.0},
        {"crop_area": (0.01, 0.01)},
        {"crop_area": (1.0, 1.0)},
        {"crop_aspect": (0.01, 0.01)},
        {"crop_aspect": (2.0, 3.0)},
    ],
    "train": [
        {"batch_size": 1, "accum_steps": 1, "log_every": 1, "save_every": 1, "keep": 1},
        {"blr": 1e-9},
        {"steps": 1, "warmup_steps": 1},
        {"steps": 1, "epochs": 1.0, "warmup_epochs": 5.0},
        {"epochs": 0.5, "warmup_epochs": 0.5},
        {"epochs": 0.5, "warmup_epochs": 0.0, "warmup_steps": 9},
        {"min_lr": 0.0, "weight_decay": 0.0, "clip_grad": 0.0, "max_nonfinite": 0, "seed": 0},
    ],
}
REFUSED = {  # just beyond it: the field that the message names, and the value
    "model": [
        ("img_size", 0),
        ("patch_size", 0),
        ("patch_size", 5),
        ("in_chans", 0),
        ("num_frames", 0),
        ("num_frames", 7),
        ("t_patch_size", 0),
        ("t_patch_size", 3),
        ("pred_t_dim", 0),
        ("pred_t_dim", 3),
        ("pred_t_dim", 16),
        ("depth", 0),
        ("decoder_depth", 0),
        ("embed_dim", 0),
        ("embed_dim", 49),
        ("num_heads", 0),
        ("num_heads", 5),
        ("decoder_embed_dim", 0),
        ("decoder_embed_dim", 511),
        ("decoder_num_heads", 0),
        ("decoder_num_heads", 7),
    ],
    "mask": [("ratio", 1.0), ("ratio", -0.01)],
    "data": [
        ("sampling_rate", 0),
        ("target_fps", 0.0),
        ("repeat_aug", 0),
        ("span_seconds", -0.1),
        ("short_side", -1),
        ("workers", -1),
        ("flip", -0.01),
        ("flip", 1.01),
        ("max_bad_share", -0.01),
        ("max_bad_share", 1.01),
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.5, 1.01)),
        ("crop_area", (0.6, 0.5)),
        ("crop_aspect", (0.0, 1.0)),
        ("crop_aspect", (1.1, 1.0)),
    ],
    "train": [
        ("batch_size", 0),
        ("accum_steps", 0),
        ("log_every", 0),
        ("save_every", 0),
        ("keep", 0),
        ("blr", 0.0),
        ("steps", -1),
        ("warmup_steps", -1),
        ("warmup_epochs", -0.1),
        ("warmup_epochs", 100.1),
        ("epochs", 0.0),
        ("min_lr", -1e-9),
        ("weight_decay", -0.1),
        ("clip_grad", -0.1),
        ("max_nonfinite", -1),
        ("seed", -1),
    ],
}


@pytest.mark.parametrize("section", ALLOWED)
def test_values_at_the_edge_are_taken(section):
    for changes in ALLOWED[section]:
        made = CLASSES[section](**{**(_TINY if section == "model" else {}), **changes})
        assert {k: getattr(made, k) for k in changes} == changes


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [(section, *pair) for section, pairs in REFUSED.items() for pair in pairs],
    ids=lambda x: str(x),
)
def test_values_beyond_the_edge_are_refused_by_name(section, name, value):
    values = {**(_TINY if section == "model" else {}), name: value}
    with pytest.raises(ConfigError, match=name) as caught:
        CLASSES[section](**values)
    words = str(value) if not isinstance(value, float) else f"{value:g}"
    shown = [words, str(value), str(list(value) if isinstance(value, tuple) else value)]
    assert any(w in str(caught.value) for w in shown)


def test_slowfast_predicts_one_frame_a_step():
    with pytest.raises(ConfigError, match=r"pred_t_dim must be 4, got 8"):
        ModelConfig(**{**_TINY, "variant": "slowfast", "pred_t_dim": 8})
    with pytest.raises(ConfigError, match=r"warmup_steps 3 .*2"):
        TrainConfig(steps=2, warmup_steps=3)


def test_a_file_s_values_arrive_in_their_kinds(tmp_path):
    (tmp_path / "c.toml").write_text(
        """
        output = "there"
        [model]
        preset = "vit_tiny"
        variant = "slowfast"
        depth = 2
        [mask]
        ratio = 0.5
        [data]
        crop_area = [0.25, 1]
        [train]
        blr = 1
        betas = [0.5, 0.75]
        backends = {attention = "sdpa"}
        """
    )
    cfg = load_config(tmp_path / "c.toml")
    assert cfg.output == "there" and cfg.model == preset("vit_tiny", "slowfast", depth=2)
    assert cfg.mask.ratio == 0.5 and type(MaskConfig(ratio=0).ratio) is float
    assert cfg.data.crop_area == (0.25, 1.0) and type(cfg.data.crop_area[1]) is float
    assert cfg.train.betas == (0.5, 0.75) and cfg.train.backends == {"attention": "sdpa"}
    assert type(cfg.train.blr) is float and cfg.train.weight_decay == 0.05
    assert config_from_dict({}).model == preset("vit_large")
    tree = {"data": {"flip": 0.25}, "model": {"preset": "vit_base"}}
    again = json.loads(json.dumps(tree))
    config_from_dict(tree)
    assert tree == again  # the caller's tables are left alone
    assert model_from_dict(to_dict(cfg.model)) == cfg.model
    assert model_from_dict({**_TINY, "depth": 3}).depth == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe = 'mae_str'", r"unknown recipe 'mae_str'; did you mean 'mae_st'"),
        ("otput = 'x'", r"unknown key 'otput'; did you mean 'output'"),
        ("[train]\nbach_size = 2", r"'train.bach_size'; did you mean 'train.batch_size'"),
        ("[data]\nindeks = 'x'", r"'data.indeks'; did you mean 'data.index'"),
        ("[mask]\nratios = 1.0", r"'mask.ratios'; did you mean 'mask.ratio'"),
        ("[model]\ndept = 2", r"'model.dept'; did you mean 'model.depth'"),
        ("[model]\npreset = 'vit_hug'", r"unknown model 'vit_hug'; did you mean 'vit_huge'"),
        ("[train]\nbatch_size = 2.5", r"train.batch_size .*int.*2.5"),
        ("[train]\nbatch_size = true", r"train.batch_size .*int.*(True|true)"),
        ("[train]\nblr = true", r"train.blr .*(True|true)"),
        ("[train]\nblr = 'high'", r"train.blr .*'high'"),
        ("[train]\ncuda_graph = 1", r"train.cuda_graph .*auto.*on.*off.*1"),
        ("[train]\nprecision = 'fp16'", r"train.precision .*fp32.*bf16.*'fp16'"),
        ("[train]\nbetas = [0.9]", r"train.betas .*2.*\[0.9\]"),
        ("[train]\nbetas = 0.9", r"train.betas .*0.9"),
        ("[train]\nbetas = [0.9, 'x']", r"train.betas.*'x'"),
        ("[train]\nbackends = {attention = 1}", r"train.backends.*1"),
        ("[train]\nbackends = 'sdpa'", r"train.backends.*sdpa"),
        ("output = 3", r"output .*str.*3"),
        ("[train]\nkeep = 0", r"train.keep .*positive.*0"),
        ("x =", r"c\.toml"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_and_the_value(tmp_path, text, words):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(tmp_path / "c.toml")
    assert str(caught.value).startswith(str(tmp_path / "c.toml"))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: No such file"):
        load_config(tmp_path / "gone.toml")


def test_an_unknown_name_far_from_all_has_no_guess():
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"qqqq": 1})
    assert "did you mean" not in str(caught.value) and "known: output, model" in str(caught.value)


def test_choices_are_those_of_the_documents():
    kinds = {f.name: f.type for f in dataclasses.fields(TrainConfig)}
    assert get_args(kinds["precision"]) == ("fp32", "bf16")
    assert get_args(kinds["device"]) == ("auto", "cpu", "cuda")
    assert get_args(config.Variant) == ("mae_st", "slowfast")
    strategies = (
        "random tube tube_ties tube_blocks per_frame frame block cube multiblock running_cell"
    )
    assert get_args(config.MaskStrategy) == tuple(strategies.split())
