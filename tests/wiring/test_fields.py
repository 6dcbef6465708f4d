"""Every field of the configuration changes what it should and nothing else.

Runs are held, step by step, against by_hand.py. FIELDS has a case for each field: a field without
one fails.
"""

import dataclasses
from pathlib import Path

import by_hand
import pytest
import test_runs
from base_run import BATCH, MODEL, NOTHING, STEP, config, labelled, observed

from mae_fast.config import Config
from mae_fast.config_file import SECTIONS
from mae_fast.data import read_index
from mae_fast.errors import ConfigError
from mae_fast.train import pretrain

TOKENS = {"model.target": "tokens", "model.tokenizer": "toy_tokenizer:make"}

# field: (what is set, what of `observed` is then another). The run is held against by_hand too.
FIELDS = {
    "model.variant": ({"model.variant": "slowfast"}, MODEL),
    "model.img_size": ({"model.img_size": 24}, MODEL),
    "model.patch_size": ({"model.patch_size": 4}, MODEL),
    "model.num_frames": ({"model.num_frames": 2}, MODEL),
    "model.t_patch_size": ({"model.t_patch_size": 4}, MODEL),
    "model.pred_t_dim": ({"model.pred_t_dim": 4}, MODEL),
    "model.embed_dim": ({"model.embed_dim": 8}, MODEL),
    "model.depth": ({"model.depth": 2}, MODEL),
    "model.num_heads": ({"model.num_heads": 4}, STEP),
    "model.decoder_embed_dim": ({"model.decoder_embed_dim": 8}, MODEL),
    "model.decoder_depth": ({"model.decoder_depth": 2}, MODEL),
    "model.decoder_num_heads": ({"model.decoder_num_heads": 4}, STEP),
    "model.mlp_ratio": ({"model.mlp_ratio": 2.0}, MODEL),
    "model.norm_pix_loss": ({"model.norm_pix_loss": False}, STEP),
    "model.sep_pos_embed": ({"model.sep_pos_embed": False}, MODEL),
    "model.cls_embed": ({"model.cls_embed": False}, MODEL),
    "model.no_qkv_bias": ({"model.no_qkv_bias": True}, MODEL),
    "model.trunc_init": ({"model.trunc_init": True}, MODEL),
    "model.target": ({"model.target": "pixels_by_channel"}, STEP),
    "model.tokenizer": (TOKENS, MODEL),
    "model.vocabulary": (TOKENS | {"model.vocabulary": 40}, MODEL),
    "mask.strategy": ({"mask.strategy": "tube"}, STEP),
    "mask.ratio": ({"mask.ratio": 0.75}, STEP),
    "mask.decoder": ({"mask.decoder": "random"}, STEP),
    "mask.decoder_ratio": ({"mask.decoder": "random", "mask.decoder_ratio": 0.25}, STEP),
    "mask.per_clip": ({"mask.per_clip": 2}, STEP),
    "data.sampling_rate": ({"data.sampling_rate": 1}, STEP),
    "data.target_fps": ({"data.target_fps": 60.0}, STEP),
    "data.repeat_aug": ({"data.repeat_aug": 3}, STEP | {"clips"}),
    "data.span_seconds": ({"data.span_seconds": 0.4}, STEP),
    "data.short_side": ({"data.short_side": 20}, STEP),
    "data.crop_area": ({"data.crop_area": (0.2, 0.3)}, STEP),
    "data.crop_aspect": ({"data.crop_aspect": (1.5, 2.0)}, STEP),
    "data.flip": ({"data.flip": 1.0}, STEP),
    "data.decoder": ({"data.decoder": "pyav"}, NOTHING),
    # Of sound videos; tests/data/test_odd_videos.py has damaged ones.
    "data.strict": ({"data.strict": False}, NOTHING),
    "data.workers": ({"data.workers": 1}, NOTHING),
    "train.batch_size": ({"train.batch_size": 3}, BATCH),
    "train.accum_steps": ({"train.accum_steps": 3}, BATCH),
    "train.epochs": (
        {"train.steps": 0, "train.epochs": 1.8, "train.warmup_epochs": 8 / 7},
        {"lr", "end", "logged", "saved"},
    ),
    "train.warmup_epochs": (
        {"train.steps": 0, "train.epochs": 16.5 / 7, "train.warmup_epochs": 6 / 7},
        {"lr", "end"},
    ),
    "train.steps": ({"train.steps": 5}, {"lr", "end", "logged", "saved"}),
    "train.warmup_steps": ({"train.warmup_steps": 1}, {"lr", "end"}),
    "train.blr": ({"train.blr": 0.25}, {"lr", "end"}),
    "train.min_lr": ({"train.min_lr": 0.001}, {"lr", "end"}),
    "train.weight_decay": ({"train.weight_decay": 0.5}, {"end"}),
    "train.betas": ({"train.betas": (0.8, 0.9)}, {"m", "v", "end"}),
    "train.eps": ({"train.eps": 1e-2}, {"end"}),
    "train.clip_grad": ({"train.clip_grad": 0.01}, {"m", "v", "end"}),
    "train.ema_momentum": ({"model.target": "features", "train.ema_momentum": 0.7}, MODEL),
    "train.precision": ({"train.precision": "bf16"}, STEP),
    "train.device": ({"train.device": "auto"}, NOTHING),
    # Of one process; tests/test_sharded.py has two and four.
    "train.shard": ({"train.shard": "full"}, NOTHING),
    "train.give_up": ({"train.give_up": 99.0}, NOTHING),
    "train.cuda_graph": ({"train.cuda_graph": "off"}, NOTHING),
    "train.seed": ({"train.seed": 4}, MODEL),
    "train.log_every": ({"train.log_every": 3, "train.save_every": 99}, {"logged"}),
    "train.save_every": ({"train.save_every": 2}, {"saved", "start", "m", "v"}),
    "train.async_save": ({"train.async_save": False}, NOTHING),
    "train.keep": ({"train.keep": 2}, {"saved", "start", "m", "v"}),
}


# Fields that a comparison of two runs does not show: the test that holds them.
ELSEWHERE = {
    "output": "test_a_run_is_in_its_folder",
    "model.in_chans": "test_in_chans_is_the_model_s",
    "data.index": "test_another_index_is_another_run",
    "data.val_index": "test_held_out_videos_are_those_of_val_index",
    "data.max_bad_share": "test_max_bad_share_is_a_share_of_the_videos",
    "train.max_nonfinite": "test_non_finite_steps_count_on_after_a_resume",
    "train.tensorboard": "test_tensorboard_and_wandb_get_the_rows",
    "train.wandb": "test_tensorboard_and_wandb_get_the_rows",
    "train.backends": "test_backends_are_forced_for_the_run",
    "eval.probe": "test_probes_judge_a_run_and_change_nothing",
    "eval.train_index": "test_probes_judge_a_run_and_change_nothing",
    "eval.test_index": "test_probes_judge_a_run_and_change_nothing",
}
# What a resumed run may change: said here again, so that no field is freed by mistake.
FREE = {
    "output",
    "data.workers",
    "data.max_bad_share",
    "data.index",
    "data.val_index",
    "train.device",
    "train.shard",
    "train.give_up",
    "train.cuda_graph",
    "train.log_every",
    "train.save_every",
    "train.async_save",
    "train.keep",
    "train.max_nonfinite",
    "train.tensorboard",
    "train.wandb",
    "eval.probe",
    "eval.train_index",
    "eval.test_index",
}


def _fields(cls=Config, prefix=""):
    for f in dataclasses.fields(cls):
        if f.name in SECTIONS and not prefix:
            yield from _fields(SECTIONS[f.name], f.name + ".")
        else:
            yield prefix + f.name


def test_every_field_has_a_case():
    assert set(_fields()) == FIELDS.keys() | ELSEWHERE.keys()
    assert not FIELDS.keys() & ELSEWHERE.keys()
    assert all(callable(getattr(test_runs, test, None)) for test in ELSEWHERE.values())


@pytest.mark.parametrize("field", sorted(set(_fields()) - {"model.in_chans"}))
def test_on_resume_a_field_is_free_or_refused(field, base, index, tmp_path, caplog):
    """Of the base's last checkpoint: its run is over, so that nothing is computed."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint-00000004.safetensors", "metrics.jsonl", "config.json"):
        (folder / name).symlink_to(Path(base.output) / name)
    special = {
        "train.backends": {"layer_norm": "reference"},
        "data.max_bad_share": 0.5,
        "data.val_index": index,
        "train.max_nonfinite": 5,
        "train.tensorboard": True,
        "train.wandb": True,
        "train.epochs": 7.0,
        "train.warmup_epochs": 2.0,
        "train.save_every": 2,
        "train.log_every": 3,
        "eval.train_index": index,
        "eval.test_index": index,
    }
    changes = FIELDS.get(field, ({},))[0]
    if field == "eval.probe":
        changes = labelled(read_index(index), tmp_path) | {field: 1}
    if field in special:
        changes = {field: special[field]}
    cfg = config(index, folder, **changes)
    if field in FREE:
        assert pretrain(cfg) == by_hand.rows_of(base.output)[-1]
        assert "all 4 steps are done already" in caplog.text
        assert (folder / "config.json").is_symlink()  # what the run began with
    else:
        with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
            pretrain(cfg)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changes_what_it_should_and_nothing_else(field, base, index, rows, tmp_path):
    changes, wanted = FIELDS[field]
    cfg = config(index, tmp_path / "run", **changes)
    pretrain(cfg)
    before, got = observed(base.output), observed(cfg.output)
    if field == "train.log_every":  # the rows are others: test_a_row_is_of_the_steps_since_the_last
        assert (got["logged"], got["saved"]) == ([3, 4], [4]) and got["end"] == before["end"]
        return
    assert {key for key in got if got[key] != before[key]} == wanted
    if len(got["saved"]) == got["saved"][-1]:
        by_hand.check(cfg, rows)
