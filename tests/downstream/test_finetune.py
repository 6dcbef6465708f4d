"""Fine-tuning on the loop of pretrain: recipes, rates, samples, resuming, tests of a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mae_fast import cli, train
from mae_fast.checkpoint import checkpoints, read
from mae_fast.config import ModelConfig
from mae_fast.data import read_index, write_index
from mae_fast.errors import ConfigError, DataError, Interrupted
from mae_fast.model import MaskedAutoencoder
from mae_fast.tasks import clips, score
from mae_fast.tasks.classify import FinetuneRun, finetune, learning_rate, mask_ratio
from mae_fast.tasks.config import RECIPES, FinetuneConfig, from_dict

MODEL = dict(preset="vit_tiny", img_size=32, patch_size=8, num_frames=4, embed_dim=24, depth=2,
             num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)  # fmt: skip


def config(motions, output, **changes):
    tree = {
        "output": str(output),
        "model": dict(MODEL),
        "classifier": {"drop_path": 0.2, "dropout": 0.1},
        "augment": {"mixup": 0.0, "cutmix": 0.0},
        "data": {"index": str(motions.train), "repeat_aug": 2, "flip": 0.0, "workers": 0,
                 "short_side": 0},
        "train": {"batch_size": 2, "steps": 4, "warmup_steps": 1, "log_every": 1, "blr": 0.05,
                  "device": "cpu"},
        "test": {"temporal": 2, "spatial": 3},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return from_dict(tree)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_by_name_is_whole(recipe):
    cfg = from_dict({"recipe": recipe})
    t, d = cfg.train, cfg.data
    assert t.warmup_epochs == 5 and t.weight_decay == 0.05 and t.betas == (0.9, 0.999)
    assert d.crop_area == (0.08, 1.0) and cfg.augment.erasing == 0.25
    assert (cfg.classifier.family == "videomae") == recipe.startswith("videomae")
    assert (d.flip == 0) == (recipe == "videomae_ssv2") == (d.sampling == "uniform")
    layer = {"slowfast_k400_b": 0.65, "slowfast_k400_h": 0.8}.get(recipe, 0.75)
    assert t.layer_decay == layer


@pytest.mark.parametrize(
    "recipe, videos_a_step, peak, floor",
    [
        # mae_st: blr x batch x repeat / 256; min_lr as it is.
        ("mae_st_k400", 256, 2.4e-3 * 2, 1e-6),
        # PySlowFast: BASE_LR and COSINE_END_LR are one node's, of 16 videos: here 16 nodes.
        ("slowfast_k400_b", 256, 6e-4 * 16, 1e-5 * 16),
        ("slowfast_k400_l", 256, 3e-4 * 16, 1e-5 * 16),
        ("slowfast_k400_h", 256, 3e-4 * 16, 1e-6 * 16),
        # VideoMAE: lr x videos / 256, num_sample not counted: 6 a GPU of 64.
        ("videomae_k400", 384, 5e-4 * 1.5, 1e-6 * 1.5),
        ("videomae_ssv2", 384, 5e-4 * 1.5, 1e-6 * 1.5),
    ],
)
def test_rates_are_the_official_codes(recipe, videos_a_step, peak, floor):
    cfg = from_dict({"recipe": recipe})
    world = videos_a_step // cfg.train.batch_size
    per_epoch = 20
    videos, epochs = per_epoch * videos_a_step, round(cfg.train.epochs)
    total, warmup = epochs * per_epoch, 5 * per_epoch
    if recipe.startswith("videomae"):  # utils.cosine_scheduler
        ramp = np.linspace(floor, peak, warmup)
        n = total - warmup
        falling = [floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * i / n)) for i in range(n)]
        wanted = [*ramp, *falling]
    else:  # lr_sched.adjust_learning_rate, lr_policy.get_lr_at_epoch
        start = 1e-8 * 16 if recipe.startswith("slowfast") else 0.0
        wanted = []
        for i in range(total):
            at = i / per_epoch
            half = math.cos(math.pi * (at - 5) / (epochs - 5))
            rising = start + (peak - start) * at / 5
            wanted.append(rising if at < 5 else floor + (peak - floor) * 0.5 * (1 + half))
    found = [learning_rate(cfg, i, total, videos, world) for i in range(total)]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-15)


def test_training_frames_lie_as_the_official_codes_draw_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = clips.by_frames(rng, 200, 16, 4)
        steps = found.diff()
        assert int(found[-1] - found[0]) == 63 and set(steps.tolist()) <= {4, 5}
        part = clips.uniform(rng, 170, 16)
        assert (part // 10 == torch.arange(16)).all()
    assert clips.by_frames(rng, 40, 16, 4).tolist() == [0, 4, 8, 13, 17, 22, 26, 31, 35, *[39] * 7]
    assert clips.uniform(rng, 9, 16).tolist() == [0] * 16


def test_views_are_the_official_codes():
    seconds = from_dict({"recipe": "mae_st_k400"}).data
    found = clips.views_in_time(seconds, 300, 30.0, 16, 10)
    # get_start_end_idx with use_offset: i * floor((300 - 64) / 9)
    assert [int(v[0]) for v in found] == [i * 26 for i in range(10)]
    assert int(found[0][-1]) == 63
    assert int(clips.views_in_time(seconds, 300, 30.0, 16, 1)[0][0]) == 118
    assert clips.views_in_space(seconds, 224, 299, 3) == [
        (0, 0, 224, 224), (0, 38, 224, 224), (0, 75, 224, 224),
    ]  # fmt: skip
    frames = from_dict({"recipe": "videomae_k400"}).data
    found = clips.views_in_time(frames, 300, 30.0, 16, 5)  # 75 frames in steps of 4
    assert [int(v[0]) // 4 for v in found] == [int(i * 59 / 4) for i in range(5)]
    assert clips.views_in_space(frames, 299, 224, 3)[1] == (37, 0, 224, 224)
    short = clips.views_in_time(frames, 30, 30.0, 16, 5)
    assert all(v.tolist() == [*range(0, 30, 4), *[28] * 8] for v in short)
    two = clips.views_in_time(from_dict({"recipe": "videomae_ssv2"}).data, 48, 12.0, 16, 2)
    assert two[0].tolist() == [3 * i for i in range(16)]
    assert two[1].tolist() == [3 * i + 1 for i in range(16)]


def test_classes_are_sorted_or_in_the_order_of_a_file(motions, tmp_path):
    rows = read_index(motions.train)
    assert clips.classes_of(rows) == ("down", "left", "right", "up")
    order = tmp_path / "labels.json"
    order.write_text(json.dumps({"[up]": "0", "left": "1", "down": "2", "right": "3"}))
    assert clips.classes_of(rows, str(order)) == ("up", "left", "down", "right")
    assert clips.numbers_of(rows, ("up", "left", "down", "right"))[0] == 2
    order.write_text(json.dumps({"up": 0, "left": 1}))
    with pytest.raises(DataError, match="has no class 'down' \\(2 such\\)"):
        clips.classes_of(rows, str(order))
    order.write_text("[]")
    with pytest.raises(DataError, match="not a file of classes"):
        clips.classes_of(rows, str(order))


def test_masked_fine_tuning_ends_with_everything():
    assert mask_ratio(0.5, 0, 100) == 0.5
    assert abs(mask_ratio(0.5, 50, 100) - 0.25) < 1e-12
    assert mask_ratio(0.5, 99, 100) < 1e-3


def test_fine_tuning_from_a_pretrained_run_resumed_is_the_same_to_the_bit(
    motions, tmp_path, monkeypatch
):
    pretrained = MaskedAutoencoder(ModelConfig(**{k: v for k, v in MODEL.items() if k != "preset"},
                                               pred_t_dim=2))  # fmt: skip
    torch.save({"model": pretrained.state_dict()}, tmp_path / "mae.pth")
    changes = dict(init=str(tmp_path / "mae.pth"), data__val_index=str(motions.val),
                   train__mask_ratio=0.5, train__accum_steps=2)  # fmt: skip
    row = finetune(config(motions, tmp_path / "whole", **changes))
    assert row["step"] == 4 and 0 <= row["val_acc1"] <= 1 and math.isfinite(row["val_loss"])

    inputs = FinetuneRun._inputs

    def told(self, batch):
        if self.step == 1:
            self.signals.told = 15
        return inputs(self, batch)

    monkeypatch.setattr(FinetuneRun, "_inputs", told)
    with pytest.raises(Interrupted, match="after step 1"):
        finetune(config(motions, tmp_path / "cut", **changes))
    monkeypatch.undo()
    (tmp_path / "mae.pth").unlink()  # it is not needed any more
    finetune(config(motions, tmp_path / "cut", **changes))
    whole, cut = (read(checkpoints(tmp_path / f)[-1])[1] for f in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[n], cut[n]) for n in whole)
    assert not torch.equal(whole["model.blocks.0.attn.q.weight"],
                           pretrained.blocks[0].attn.q.weight)  # fmt: skip


def test_a_run_with_other_labels_is_refused(motions, tmp_path):
    finetune(config(motions, tmp_path / "run", train__steps=1))
    rows = read_index(motions.train)
    other = [r.__class__(**vars(r) | {"label": rows[i - 1].label}) for i, r in enumerate(rows)]
    write_index(other, tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match="other labels"):
        finetune(config(motions, tmp_path / "run", data__index=str(tmp_path / "other.jsonl"),
                        train__steps=1))  # fmt: skip
    bare = [r.__class__(**vars(r) | {"label": None}) for r in rows]
    write_index(bare, tmp_path / "bare.jsonl")
    with pytest.raises(DataError, match="has no label"):
        finetune(config(motions, tmp_path / "bare", data__index=str(tmp_path / "bare.jsonl")))


def test_frozen_clips_are_memorised(motions, tmp_path):
    """The whole way learns: eight clips, told apart after a few steps."""
    rows = read_index(motions.train)[:8]
    write_index(rows, tmp_path / "few.jsonl")
    few = str(tmp_path / "few.jsonl")
    row = finetune(
        config(
            motions, tmp_path / "run", classifier={"drop_path": 0.0, "dropout": 0.0},
            augment=dict(mixup=0.0, cutmix=0.0, erasing=0.0, randaugment="", smoothing=0.0),
            data=dict(index=few, val_index=few, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0),
                      flip=0.0, workers=0, repeat_aug=1, sampling="uniform", short_side=0),
            test=dict(temporal=1, spatial=1),
            train=dict(batch_size=8, steps=60, warmup_steps=5, blr=0.3, device="cpu",
                       layer_decay=1.0, log_every=20, save_every=60),
        )
    )  # fmt: skip
    assert row["val_acc1"] >= 0.75, row


def test_test_counts_a_broken_video_as_wrong_and_keeps_logits(motions, tmp_path, capsys):
    finetune(config(motions, tmp_path / "run", train__steps=1, data__val_index=str(motions.val)))
    rows = read_index(motions.val)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(Path(rows[0].path).read_bytes()[:1200])
    write_index([rows[0].__class__(**vars(rows[0]) | {"path": str(cut)}), *rows[1:]],
                tmp_path / "val.jsonl")  # fmt: skip
    assert cli.main(["test", str(tmp_path / "run"), "--index", str(tmp_path / "val.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "bad video, counted as wrong" in said and "cut.mp4" in said
    folder = tmp_path / "run" / "test"
    results = json.loads((folder / "results.json").read_text())
    assert results["bad_videos"] == 1 and results["videos"] == 8 and results["views"] == "2 x 3"
    kept = load_file(folder / "logits.safetensors")
    assert kept["logits"].shape == (8, 7, 4) and kept["logits"][0].isnan().all()
    again = score.accuracies(kept["logits"], kept["labels"])
    assert all(results[key] == value for key, value in again.items())
    assert set(again) == {
        f"top{k}_{n}" for k in (1, 5) for n in ("softmax_mean", "logit_mean", "1x1")
    }
    assert (folder / "index.html").read_text().count("<td>") > 16
    assert again["top5_1x1"] <= 7 / 8
    assert cli.main(["test", str(tmp_path / "nothing.toml")]) == 2
    assert cli.main(["test", str(tmp_path)]) == 73


def test_accuracies_combine_views():
    logits = torch.tensor([
        # Softmax is fooled by one sure view less than logits are.
        [[9.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0], [1.0, 0.0]],
        [[torch.nan, 0.0]] * 5,
    ])  # fmt: skip
    found = score.accuracies(logits, torch.tensor([1, 0]))
    assert found["top1_softmax_mean"] == 0.5 and found["top1_logit_mean"] == 0.0
    assert found["top1_1x1"] == 0.0 and found["top5_1x1"] == 0.5
    table = score.confusion(logits[:, 0], torch.tensor([1, 0]))
    assert table.tolist() == [[0, 0], [1, 0]]


def test_every_key_has_its_help_and_its_refusal(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    assert "masked fine-tuning" in capsys.readouterr().out
    (tmp_path / "c.toml").write_text("[train]\nlayer_decy = 0.5\n")
    assert cli.main(["finetune", str(tmp_path / "c.toml")]) == 2
    assert "did you mean 'train.layer_decay'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="must be even"):
        from_dict({"train": {"batch_size": 1}, "data": {"repeat_aug": 1}})
    with pytest.raises(ConfigError, match="1 or 2 with uniform"):
        from_dict({"data": {"sampling": "uniform"}})
    assert FinetuneConfig().train.layer_decay == 0.75
    assert train.Run._loss is not FinetuneRun._loss
