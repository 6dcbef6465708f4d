"""A run on a made set in AVA's format: draws, learning, resuming, two processes, the test."""

import csv
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import by_hand
import numpy as np
import pytest
import torch

from mae_fast import cli
from mae_fast.checkpoint import checkpoints, read
from mae_fast.config_file import to_dict
from mae_fast.data import BadVideo, VideoReader, build_index
from mae_fast.data.pack import write_pack
from mae_fast.errors import ConfigError, DataError, Interrupted
from mae_fast.tasks.ava import made, score
from mae_fast.tasks.ava.clips import KeyframeClips, WholeFrames
from mae_fast.tasks.ava.evaluate import iou
from mae_fast.tasks.ava.files import LeftOut
from mae_fast.tasks.ava.run import AvaRun, training_keyframes
from mae_fast.tasks.classify import finetune
from mae_fast.tasks.config import RECIPES, from_dict, from_state

SMALL = made.MODEL | dict(img_size=32, embed_dim=24, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set of a test movie and two others, of six seconds each, in a pack."""
    folder = tmp_path_factory.mktemp("ava")
    ava = made.make(folder / "set", movies=3, seconds=6)
    build_index([folder / "set" / "movies"], folder / "set" / "i.jsonl", progress=False, workers=1)
    how = {"short_side": 0, "crf": None, "gop": None, "copy": True, "shard": 1000}
    write_pack(folder / "set" / "i.jsonl", folder / "set" / "pack", how, 1)
    return folder, ava


def config(small, output="run", steps=4, **changes):
    folder, ava = small
    cfg = made.config(folder, ava, steps, seed=1)
    data = replace(cfg.data, workers=0, short_side=48)
    train = replace(cfg.train, batch_size=2, log_every=1, blr=0.02, save_every=99)
    cfg = replace(cfg, output=str(output), data=data, train=train,
                  model=replace(cfg.model, **SMALL), test=replace(cfg.test, short_side=48),
                  ava=replace(ava, short_sides=(32.0, 48.0)))  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        value = replace(getattr(cfg, section), **{name: value}) if name else value
        cfg = replace(cfg, **{section: value})
    return cfg


needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="the head on boxes needs torchvision (an extra)",
)


def dataset(cfg, index=None):
    found = training_keyframes(cfg, LeftOut())
    how = dict(keyframes=found, ava=cfg.ava, size=cfg.model.img_size)
    return found, KeyframeClips(found.rows, cfg.data, cfg.model.num_frames, 1, **how)


def test_the_recipe_is_videomae_s_published_one():
    cfg = from_dict({"task": "ava"})
    assert cfg == from_dict({"recipe": "videomae_ava"}) and "videomae_ava" in RECIPES
    t, a = cfg.train, cfg.ava
    assert (t.blr, t.epochs, t.warmup_epochs, t.batch_size, t.layer_decay) == (5e-4, 30, 5, 4, 0.75)
    assert (t.min_lr, t.warmup_lr, t.scale_min_lr, t.clip_grad) == (1e-6, 1e-6, True, 0.0)
    assert (cfg.classifier.drop_path, cfg.classifier.head_scale) == (0.2, 0.001)
    assert a.box_jitter == (0.2, 0.1, 0.1, 0.05) and a.box_extend == (0.1, 0.05)
    assert a.score == 0.8 and a.short_sides == (256, 256) and cfg.test.short_side == 256
    assert cfg.classifier_of(80).pool == "first" and from_state(to_dict(cfg)) == cfg
    state = to_dict(from_dict({"recipe": "videomae_k400"}))
    del state["task"], state["ava"]  # of a run of before
    assert from_state(state) == from_dict({"recipe": "videomae_k400"})


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"augment": {"mixup": 0.5}}, "augment.mixup must be off with task"),
        ({"train": {"mask_ratio": 0.5}}, "train.mask_ratio must be off with task"),
        (
            {"ava": {"short_sides": (200, 256)}},
            "ava.short_sides must be model.img_size 224 or",
        ),
        ({"ava": {"box_jitter": (0.5, 0, 0, 0)}}, "ava.box_jitter must be below 0.5"),
        ({"ava": {"trian_csv": "x"}}, "did you mean 'ava.train_csv'"),
    ],
)
def test_what_does_not_go_together_is_refused(tree, words):
    with pytest.raises(ConfigError, match=words):
        from_dict({"task": "ava"} | tree)


def test_a_clip_is_read_from_its_packets_alone(small, monkeypatch):
    """Of a movie in a pack no frame is decoded before its keyframe, or after the clip."""
    cfg = config(small)
    data = dataset(cfg)[1]
    decoded = []
    from mae_fast.data.packed import PackReader

    true = PackReader._decode

    def spy(self, place, table, needed, *rest):
        decoded.append(len(needed))
        return true(self, place, table, needed, *rest)

    monkeypatch.setattr(PackReader, "_decode", spy)
    monkeypatch.setattr(VideoReader, "__init__", lambda *a, **k: pytest.fail("a file was opened"))
    batch = data[0]
    # Clips of 4 frames, 2 apart, at 10 a second and a keyframe each second: 7 frames, and at most
    # 9 that lead to them, of a movie of 95.
    assert len(decoded) == 1 and decoded[0] <= 16 and len(batch.frames[0]) == 4


def test_a_file_and_a_folder_of_pictures_give_the_same_clip(small, tmp_path):
    folder = small[0]
    packed = dataset(config(small))[1][3]
    plain = dataset(config(small, data__index=str(folder / "set" / "i.jsonl")))[1][3]
    assert torch.equal(packed.frames[0], plain.frames[0])
    assert torch.equal(packed.labels, plain.labels) and torch.equal(packed.boxes, plain.boxes)
    from PIL import Image

    from mae_fast.data import read_index

    for row in read_index(folder / "set" / "i.jsonl"):
        to = tmp_path / Path(row.path).stem
        to.mkdir()
        with VideoReader(row.path) as reader:
            for k, frame in enumerate(reader.read(range(0, reader.num_frames))):
                for j in range(3):  # thirty a second of ten
                    Image.fromarray(frame.numpy()).save(
                        to / f"{to.name}_{3 * k + j + 1:06d}.jpg", quality=98, subsampling=0
                    )
    cfg = config(small, ava__frames=str(tmp_path), data__index="")
    drawn = dataset(cfg)[1][3]
    assert torch.equal(packed.labels, drawn.labels) and torch.equal(packed.boxes, drawn.boxes)
    assert (packed.frames[0].float() - drawn.frames[0].float()).abs().mean() < 4
    lost = next(tmp_path.glob("movie-01/*_000091.jpg"))
    lost.write_bytes(b"no picture")
    data = dataset(cfg)[1]
    with pytest.raises(BadVideo, match=lost.name):
        for i in range(len(data._paths)):
            data.pixels(i, os.fsdecode(data._paths[i]))


def test_persons_of_a_clip_are_those_of_its_second(small):
    """Every clip has somebody, and each row the number of its clip."""
    cfg = config(small, data__repeat_aug=2)
    found, data = dataset(cfg)
    assert len(found) == 12  # six seconds of two movies
    for g in range(12):
        batch = data[g]
        numbers = batch.labels[:, 0].long()
        assert set(numbers.tolist()) == {2 * g, 2 * g + 1} == set(batch.samples.tolist())
        boxes = batch.labels[:, 1:5]
        assert boxes.min() >= 0 and boxes.max() <= 32
        assert batch.labels[:, 5:].sum(dim=1).min() >= 1
    # Detections on a true box train beside it: more persons than in the truth alone.
    alone = training_keyframes(replace(cfg, ava=replace(cfg.ava, train_detections="")), LeftOut())
    assert sum(map(len, found.people)) > sum(map(len, alone.people))


def test_whole_frames_are_tested_with_boxes_that_fit_them(small):
    cfg = config(small)
    test = score.TestSet.read(cfg, LeftOut())
    assert len(test.keyframes) == 5 and test.detected  # of six one is excluded
    frames = WholeFrames(test.keyframes, cfg.data, 4, replace(cfg.ava, box_extend=(0.0, 0.0)), 32)
    batch = frames.batch(0)
    video = frames.video(batch, 8, ((0.0,) * 3, (1.0,) * 3))
    assert video.shape == (1, 3, 4, 32, 48) and video.max() <= 1
    shares = batch.labels.numpy() / [48, 32, 48, 32]
    np.testing.assert_allclose(shares, [p.box for p in test.keyframes.people[0]], atol=1e-12)
    # The keyframe's middle shows the persons where the truth has them.
    picture = frames.middle(0).astype(int)
    truth = np.array([r.box for r in test.truth if r.key == ("movie-00", "902.000000")])
    assert len(truth) and picture.shape == (32, 48, 3)
    best = iou(shares, shares).shape
    assert best[0] == len(shares)
    # A picture no multiple of patches is filled up with the mean, to the right and below.
    video = frames.video(batch, 20, ((0.0,) * 3, (1.0,) * 3))
    assert (
        video.shape[3:] == (40, 60) and not video[..., 32:, :].any() and not video[..., 48:].any()
    )


@needs_torchvision
def test_a_run_resumed_is_the_same_to_the_bit(small, tmp_path, monkeypatch):
    how = dict(ava__val_every=0, classifier__drop_path=0.2, classifier__dropout=0.1)
    color = dict(ava__color=(20.0, 0.1, 0.1), ava__box_jitter=(0.2, 0.1, 0.1, 0.05))
    finetune(config(small, tmp_path / "whole", **how | color))
    inputs = AvaRun._inputs

    def told(self, batch):
        if self.step == 1:
            self.signals.told = 15
        return inputs(self, batch)

    monkeypatch.setattr(AvaRun, "_inputs", told)
    with pytest.raises(Interrupted, match="after step 2"):
        finetune(config(small, tmp_path / "cut", **how | color))
    monkeypatch.undo()
    finetune(config(small, tmp_path / "cut", **how | color))
    (_, whole), (_, cut) = (read(checkpoints(tmp_path / f)[-1]) for f in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole)
    # Other boxes are another run.
    folder, _ = small
    rows = (folder / "set" / "train.csv").read_text().replace("0902,0.", "0902,0.0", 1)
    (tmp_path / "other.csv").write_text(rows)
    with pytest.raises(ConfigError, match="other labels"):
        finetune(config(small, tmp_path / "cut", **how | color,
                        ava__train_csv=str(tmp_path / "other.csv")))  # fmt: skip


@needs_torchvision
def test_two_processes_are_one(small, tmp_path):
    """Two of 2 clips each, whose persons are not equally many, make the step of one of 4; in the
    test each box is scored once."""
    how = dict(steps=3, ava__val_every=1)
    row = finetune(config(small, tmp_path / "one", train__batch_size=4, **how))
    two = config(small, tmp_path / "two", train__batch_size=2, **how)
    (tmp_path / "case.pickle").write_bytes(pickle.dumps((two, {})))
    script = Path(by_hand.__file__).with_name("two_tuning_ranks.py")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path.cwd())]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(script), str(tmp_path / "case.pickle")]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    (_, one), (_, both) = (read(checkpoints(tmp_path / f)[-1]) for f in ("one", "two"))
    for name in one:
        torch.testing.assert_close(both[name], one[name], rtol=1e-4, atol=1e-6, msg=name)
    results = json.loads((tmp_path / "two" / "test" / "results.json").read_text())
    assert results["mAP"] == pytest.approx(row["val_map"], abs=1e-6)
    with open(tmp_path / "two" / "test" / "detections.csv") as f:
        lines = [tuple(x[:7]) for x in csv.reader(f)]
    assert len(set(lines)) == len(lines) == results["boxes"] * 4


@needs_torchvision
def test_the_whole_way_from_the_command_line(small, tmp_path, capsys):
    """It learns a few frames by heart, and the test counts what is missing, and draws the worst."""
    ava = small[1]
    cfg = config(small, tmp_path / "run", steps=60, train__batch_size=4, train__log_every=20,
                 ava__val_csv=ava.train_csv, ava__val_detections=ava.train_detections,
                 ava__excluded="", ava__val_every=1, data__flip=0.0, train__blr=0.25,
                 train__warmup_steps=5)  # fmt: skip
    row = finetune(cfg)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["val_map"] > max(first["val_map"], 0.6), (first["val_map"], row["val_map"])
    text = Path(ava.train_csv).read_text() + "gone,0902,0.1,0.1,0.4,0.4,1,0\nbad row\n"
    (tmp_path / "val.csv").write_text(text)
    path = checkpoints(tmp_path / "run")[-1]
    from mae_fast.tasks.score import load_run

    _, cfg, model, _ = load_run(str(path))
    score.test(
        path, replace(cfg, ava=replace(cfg.ava, val_csv=str(tmp_path / "val.csv"))), model, ""
    )
    said = capsys.readouterr().out
    assert "left out: 1 bad rows: val.csv: line" in said
    found = json.loads((tmp_path / "run" / "test" / "results.json").read_text())
    assert found["mAP_of_movies_here"] > found["mAP"] > found["mAP_chance"]
    page = (tmp_path / "run" / "test" / "index.html").read_text()
    assert page.count("<figure") == 12 and "walk" in page and "left out" in page.lower()
    assert cli.main(["test", str(path), "--temporal", "3"]) == 2
    assert "not for AVA" in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot be read"):
        score.TestSet.read(replace(cfg, ava=replace(cfg.ava, val_csv="gone.csv")), LeftOut())
