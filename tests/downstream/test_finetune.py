"""Fine-tuning on the loop of pretrain: recipes, rates, samples, resuming."""

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import by_hand
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tuned import MODEL, config

import mae_fast
from mae_fast import cli, metrics, train
from mae_fast.checkpoint import checkpoints, read, write_tensors
from mae_fast.classifier import ClassifierConfig, VideoClassifier, param_groups
from mae_fast.config import ModelConfig
from mae_fast.data import (
    VideoRow,
    read_index,
    write_index,
)
from mae_fast.data.pack import pack
from mae_fast.errors import ConfigError, DataError, Interrupted
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.adamw import clipped_adamw
from mae_fast.step import WARMUP, Step
from mae_fast.tasks import clips, score
from mae_fast.tasks.augment import smoothed, soft_cross_entropy
from mae_fast.tasks.classify import FinetuneRun, average, learning_rate, mask_ratio
from mae_fast.tasks.config import RECIPES, ClipsConfig, FinetuneConfig, from_dict
from mae_fast.tasks.finetune import finetune

ALONE = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
}


def test_the_defaults_that_help_shows_are_the_recipes():
    assert from_dict({"recipe": "mae_st_k400"}) == FinetuneConfig()


def test_want_of_timm_is_told_before_videos_are_judged(motions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.mixup", None)
    cfg = config(motions, tmp_path, augment={"mixup": 0.8}, data__val_index=str(motions.train))
    with pytest.raises(ConfigError, match="pip install timm"):
        finetune(cfg)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "videomae_ava"])
def test_views_follow_the_side_of_the_model(recipe):
    """A view of a smaller model is the whole of the frame's height, not a piece of it."""
    cfg = from_dict({"recipe": recipe, "model": {"img_size": 64}})
    assert (cfg.test.short_side or cfg.model.img_size) == 64


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "videomae_ava"])
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
    # The end is drawn below the number of frames.
    assert {int(clips.by_frames(rng, 66, 16, 4)[-1]) for _ in range(50)} == {63, 64}


@pytest.mark.parametrize("sampling", ["seconds", "frames", "uniform"])
def test_clips_of_a_video_have_the_same_frames_where_asked(motions, sampling):
    rows = read_index(motions.train)
    for same in (True, False):
        how = dict(sampling=sampling, sampling_rate=2, same_frames=same)
        cfg = ClipsConfig(repeat_aug=3, **how)
        made = clips.LabelledClips(rows, cfg, 4, 0, clips.classes_of(rows), "")
        found = made._indices(np.random.default_rng(0), 300, 30.0)
        assert len(found) == 3 and all(torch.equal(found[0], x) for x in found[1:]) == same
        if sampling == "frames":
            assert found[0][-1] - found[0][0] == 2 * 4 - 1
        elif sampling == "uniform":
            assert (found[0] // 75).tolist() == [0, 1, 2, 3]


def test_classes_are_sorted_or_in_the_order_of_a_file(motions, tmp_path):
    rows = read_index(motions.train)
    assert clips.classes_of(rows) == ("down", "left", "right", "up")
    numbers = ["0002", "002", "02", "2", "010", "10"]  # one order, whatever a set has
    assert clips.classes_of([VideoRow("a.mp4", label=n) for n in numbers]) == tuple(numbers)
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


def test_what_of_the_weights_did_not_fit_is_said(motions, tmp_path):
    """On the command line, where nobody has asked for more than warnings; once."""
    sizes = {k: v for k, v in MODEL.items() if k != "preset"} | {"img_size": 48}
    pretrained = MaskedAutoencoder(ModelConfig(**sizes, pred_t_dim=2))
    torch.save({"model": pretrained.state_dict()}, tmp_path / "mae.pth")
    cfg = config(motions, tmp_path / "run", init=str(tmp_path / "mae.pth"), train__steps=1)
    script = "import sys, pickle; from mae_fast.tasks.finetune import finetune; "
    script += "finetune(pickle.load(sys.stdin.buffer))"
    how = dict(input=pickle.dumps(cfg), capture_output=True, env=ALONE, check=True)
    said = [subprocess.run([sys.executable, "-c", script], **how).stderr for _ in range(2)]
    for words in (b"head: new", b"positions: interpolated, 2 x 6 x 6 to 2 x 4 x 4"):
        assert words in said[0] and words not in said[1]


def test_a_fine_tuned_head_is_gone_on_with(motions, tmp_path):
    """As official codes do, whose scale is for a new head; mae_st's alone is new after loading. The
    first rate is 0."""
    how = dict(train__steps=1, train__warmup_steps=1)
    for family in ("mae_st", "videomae"):
        first = config(motions, tmp_path / f"first {family}", classifier={"family": family}, **how)
        finetune(first)
        state, tensors = read(path := checkpoints(first.output)[-1])
        tensors["model.head.weight"].normal_()
        write_tensors(path, tensors, {"mae_fast": json.dumps(state)})
        then = dict(classifier={"family": family}, init=str(path), **how)
        finetune(config(motions, tmp_path / f"then {family}", **then))
        found = read(checkpoints(tmp_path / f"then {family}")[-1])[1]["model.head.weight"]
        assert torch.equal(found, tensors["model.head.weight"]) == (family == "videomae")
        assert (found.std() < 1e-4) == (family == "mae_st")


def test_a_killed_run_goes_on_to_the_same_bits(motions, tmp_path):
    """SIGKILL in the fourth step; the checkpoint is of the second."""
    changes = dict(train__steps=5, train__save_every=2, data__workers=1)
    whole = config(motions, tmp_path / "whole", **changes)
    finetune(whole)
    cut = config(motions, tmp_path / "cut", **changes)
    (tmp_path / "cut.pickle").write_bytes(pickle.dumps(cut))
    killed = """
import os, pickle, sys
from mae_fast.tasks.classify import FinetuneRun
from mae_fast.tasks.finetune import finetune
inputs = FinetuneRun._inputs
def last(self, batch):
    if self.step == 3:
        self.aside.wait()  # the second's checkpoint, which is written beside the third and fourth
        os.kill(os.getpid(), 9)
    return inputs(self, batch)
FinetuneRun._inputs = last
finetune(pickle.load(open(sys.argv[1], "rb")))
"""
    command = [sys.executable, "-c", killed, str(tmp_path / "cut.pickle")]
    run = subprocess.run(command, capture_output=True, text=True, env=ALONE)
    assert run.returncode == -9, run.stderr[-2000:]
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["checkpoint-00000002.safetensors"]
    finetune(cut)
    ends = [read(checkpoints(tmp_path / name)[-1])[1] for name in ("whole", "cut")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_two_processes_are_one_in_training_and_in_the_test(motions, tmp_path):
    """Two ranks draw what one draws in two micro-steps: erasing, drop path, dropout, masks. Nine
    videos are tested, one of rank 1's is broken: none twice, none left out."""
    rows = read_index(motions.val) + read_index(motions.train)[:1]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(Path(rows[3].path).read_bytes()[:1200])
    rows[3] = dataclasses.replace(rows[3], path=str(cut))
    write_index(rows, tmp_path / "test.jsonl")
    options = dict(index=str(tmp_path / "test.jsonl"), temporal=2, spatial=3)
    one = config(motions, tmp_path / "one", train__mask_ratio=0.5, train__accum_steps=2)
    finetune(one)
    score.test(one.output, **options)
    two = config(motions, tmp_path / "two", train__mask_ratio=0.5)
    (tmp_path / "case.pickle").write_bytes(pickle.dumps((two, options)))
    script = Path(by_hand.__file__).with_name("two_tuning_ranks.py")
    command = [sys.executable, str(script), str(tmp_path / "case.pickle")]
    run = subprocess.run(command, capture_output=True, text=True, env=ALONE, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]

    ends = [read(checkpoints(cfg.output)[-1])[1] for cfg in (one, two)]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-7, msg=name)
    losses = [
        [r["loss"] for r in metrics.read(Path(c.output) / "metrics.jsonl")] for c in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 4

    folders = [Path(cfg.output) / "test" for cfg in (one, two)]
    kept = [load_file(folder / "logits.safetensors") for folder in folders]
    assert kept[1]["logits"].shape == (9, 7, 4)
    assert kept[1]["logits"][3].isnan().all()
    assert int(kept[1]["logits"].isnan().all(dim=2).all(dim=1).sum()) == 1
    torch.testing.assert_close(kept[1]["logits"], kept[0]["logits"], equal_nan=True)
    assert torch.equal(kept[1]["labels"], kept[0]["labels"])
    said = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [s.pop("checkpoint") != "" for s in said] == [True, True] and said[0] == said[1]
    assert said[0]["videos"] == 9 and said[0]["bad_videos"] == 1
    bad = [json.loads((folder / "bad_videos.json").read_text()) for folder in folders]
    assert bad[0] == bad[1] and bad[0][0][0] == str(cut)


def test_a_pack_is_fine_tuned_and_tested_as_its_videos_are(motions, tmp_path):
    """Copied packets: the same pixels, so the same run to the bit."""
    indexes = {}
    for name in ("train", "val"):
        pack(str(getattr(motions, name)), output=str(tmp_path / name), copy=True, workers=1)
        indexes[name] = str(tmp_path / name)
    found = []
    for index in (dict(train=str(motions.train), val=str(motions.val)), indexes):
        out = tmp_path / f"run{len(found)}"
        cfg = config(motions, out, data__index=index["train"], data__val_index=index["val"])
        row = finetune(cfg)
        score.test(str(out))
        logits = load_file(out / "test" / "logits.safetensors")["logits"]
        found.append((row["loss"], row["val_loss"], logits))
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])


def trainer(graph, precision="fp32"):
    torch.manual_seed(0)
    sizes = {k: v for k, v in MODEL.items() if k != "preset"} | dict(pred_t_dim=2)
    cfg = ClassifierConfig(ModelConfig(**sizes), "mae_st", 4, drop_path=0.3, dropout=0.3)
    model = VideoClassifier(cfg).train()
    groups = param_groups(model, 0.05, 0.75)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    loss = lambda video, target: soft_cross_entropy(model(video), target)  # noqa: E731
    return Step(model, optimizer, loss, clip=1.0, precision=precision, graph=graph)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_as_graphs_is_the_eager_one_bit_for_bit(precision):
    """With drop path, dropout and rates by layer; the seed is set outside of the graph."""
    found = []
    for graph in (False, True):
        step, losses = trainer(graph, precision), []
        for i in range(WARMUP + 4):
            generator = torch.Generator().manual_seed(i)
            video = torch.randn(4, 3, 4, 32, 32, generator=generator)
            target = smoothed(torch.tensor([0, 1, 2, 3]), 4, 0.1)
            torch.manual_seed(i)
            step.micro(video, target)
            losses.append(torch.stack(step.update(1e-3 * (i + 1))))
        assert (step.end.graph is not None) if graph else (step.side is None)
        found.append((torch.stack(losses), list(step.model.parameters())))
    assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_bf16_is_near_fp32(motions, tmp_path):
    rows = [
        finetune(config(motions, tmp_path / p, train__precision=p, train__blr=1e-3))
        for p in ("fp32", "bf16")
    ]
    assert rows[1]["loss"] != rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=2e-2)
    tensors = read(checkpoints(tmp_path / "bf16")[-1])[1]
    assert {t.dtype for t in tensors.values()} == {torch.float32}  # weights and moments stay so


def test_averaged_weights_are_timms_and_are_tested(motions, tmp_path, capsys):
    """By hand from the checkpoints; the first rate is 0, so that the first holds the start."""
    changes = dict(train__save_every=1, train__keep=9, train__ema=0.7, train__blr=1.0,
                   data__val_index=str(motions.val))  # fmt: skip
    row = finetune(config(motions, tmp_path / "run", **changes))
    assert 0 <= row["val_ema_acc1"] <= 1
    steps = [read(p)[1] for p in checkpoints(tmp_path / "run")]
    names = [n[6:] for n in steps[0] if n.startswith("model.")]
    assert len(steps) == 4 and f"optim.ema.{names[0]}" in steps[0]
    for name in names:
        wanted = steps[0]["model." + name]
        for at in steps:
            wanted = 0.7 * wanted + 0.3 * at["model." + name]
            torch.testing.assert_close(at["optim.ema." + name], wanted, rtol=1e-5, atol=1e-6)
    _, _, model, _ = score.load_run(str(tmp_path / "run"), ema=True)
    assert torch.equal(model.head.weight, steps[-1]["optim.ema.head.weight"])
    assert not torch.equal(model.head.weight, steps[-1]["model.head.weight"])
    finetune(config(motions, tmp_path / "plain", train__steps=1))
    assert cli.main(["test", str(tmp_path / "plain"), "--ema", "--index", str(motions.val)]) == 73
    assert "no averaged weights" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_average_begins_with_a_step_that_is_skipped(backend):
    model = torch.nn.Linear(3, 2)
    params, optimizer = list(model.parameters()), torch.optim.AdamW(model.parameters(), fused=True)
    start = [p.detach().clone() for p in params]
    for first, grad in ((True, torch.inf), (False, 1.0)):
        for p in params:
            p.grad = torch.full_like(p, grad)
        with mae_fast.backends(adamw=backend):
            clipped_adamw(optimizer, 0.0)
        average(optimizer, params, 0.5, [p.clone() for p in start] if first else None)
    for p, before in zip(params, start, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], (before + p) / 2)
        assert optimizer.state[p]["step"] == 1 and not torch.equal(p, before)


def test_a_masked_run_says_that_it_has_no_graph(motions, tmp_path, caplog):
    finetune(config(motions, tmp_path / "run", train__mask_ratio=0.5, train__cuda_graph="on"))
    assert "masked steps differ in their tokens" in caplog.text


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


def test_a_video_known_to_be_broken_counts_as_wrong_while_it_trains_too(motions, tmp_path):
    rows = read_index(motions.val)
    rows[0] = dataclasses.replace(rows[0], error="not a video", frames=0)
    write_index(rows, tmp_path / "val.jsonl")
    changes = dict(train__steps=1, data__val_index=str(tmp_path / "val.jsonl"))
    row = finetune(config(motions, tmp_path / "run", **changes))
    score.test(str(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "test" / "results.json").read_text())
    assert 0 < row["val_acc1"] == results["top1_1x1"] and results["bad_videos"] == 1


def test_every_key_has_its_help_and_its_refusal(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--help"])
    assert "masked fine-tuning" in capsys.readouterr().out
    (tmp_path / "c.toml").write_text("[train]\nlayer_decy = 0.5\n")
    assert cli.main(["finetune", str(tmp_path / "c.toml")]) == 2
    assert "did you mean 'train.layer_decay'" in capsys.readouterr().err
    odd = {"train": {"batch_size": 1}, "data": {"repeat_aug": 1}}
    for off in ({}, {"mixup": 0.0}, {"cutmix": 0.0}):
        with pytest.raises(ConfigError, match="must be even"):
            from_dict(odd | {"augment": off})
    with pytest.raises(ConfigError, match=r"data\.span_seconds must be 0.*, got 2\.0"):
        from_dict({"data": {"span_seconds": 2.0}})
    with pytest.raises(ConfigError, match="1 or 2 with uniform"):
        from_dict({"data": {"sampling": "uniform"}})
    with pytest.raises(ConfigError, match=r"train\.shard must be none: .*, got 'full'"):
        from_dict({"train": {"shard": "full"}})
    assert FinetuneConfig().train.layer_decay == 0.75
    assert train.Pretraining._loss is not FinetuneRun._loss
