"""A run on a made set in AVA's format: draws, learning, resuming, two processes, the test."""

import csv
import functools
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
from mae_fast.data import BadVideo, VideoReader, build_index, read_index, write_index
from mae_fast.data.pack import write_pack
from mae_fast.errors import ConfigError, DataError, Interrupted
from mae_fast.tasks.ava import clips as ava_clips
from mae_fast.tasks.ava import made, page, score
from mae_fast.tasks.ava.clips import KeyframeClips, WholeFrames
from mae_fast.tasks.ava.evaluate import iou
from mae_fast.tasks.ava.files import LeftOut
from mae_fast.tasks.ava.model import BoxClassifier
from mae_fast.tasks.ava.run import AvaRun, load, training_keyframes
from mae_fast.tasks.config import RECIPES, from_dict, from_state
from mae_fast.tasks.finetune import finetune
from mae_fast.tasks.score import test as score_run

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
        ({"data": {"sampling": "frames"}}, "data.sampling must be seconds with task"),
        ({"data": {"crop_area": (0.5, 1.0)}}, "data.crop_area must be .0.08, 1.0. with task"),
        ({"data": {"crop_aspect": (1.0, 1.0)}}, "data.crop_aspect must be .* with task"),
        ({"test": {"temporal": 2}}, "test.temporal must be 1 with task"),
        ({"test": {"spatial": 3}}, "test.spatial must be 1 with task"),
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


@needs_torchvision
@pytest.mark.parametrize("name", ["val_csv", "val_detections", "excluded"])
def test_files_of_the_test_are_missed_before_training(small, tmp_path, name):
    with pytest.raises(DataError, match=f"ava.{name}: there is no gone.csv"):
        finetune(config(small, tmp_path / "run", **{f"ava__{name}": "gone.csv"}))
    assert not (tmp_path / "run").exists()


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


def test_a_file_begins_at_the_second_that_is_said(small):
    """Half a second later by the movie's clock, ten frames a second."""
    test = lambda cfg, left: score.TestSet.read(cfg, left).keyframes  # noqa: E731
    for keyframes in (training_keyframes, test):
        cfgs = (config(small, ava__begins_at=at) for at in (900.0, 900.5))
        first, later = (np.stack(keyframes(cfg, LeftOut()).indices) for cfg in cfgs)
        assert (first - later == 5).all()


def test_boxes_of_training_are_moved_by_what_is_asked(small):
    still, moved = (
        dataset(config(small, data__repeat_aug=1, ava__box_jitter=(by,) * 4))[1][0].labels
        for by in (0.0, 0.4)
    )
    assert not torch.equal(still[:, 1:5], moved[:, 1:5])
    assert torch.equal(still[:, 5:], moved[:, 5:])


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
    assert frames.reader.indices[0].tolist() == [16, 18, 20, 22]  # the third is the keyframe
    clips = [frames.reader.pixels(i, row.path, 32) for i, row in enumerate(test.keyframes.rows)]
    assert all(np.array_equal(frames.middle(i), clip[2]) for i, clip in enumerate(clips))
    assert not all(torch.equal(clip[1], clip[2]) for clip in clips)  # somebody walks
    truth = np.array([r.box for r in test.truth if r.key == ("movie-00", "902.000000")])
    assert len(truth) and picture.shape == (32, 48, 3)
    best = iou(shares, shares).shape
    assert best[0] == len(shares)
    # A picture no multiple of patches is filled up with the mean, to the right and below.
    video = frames.video(batch, 20, ((0.0,) * 3, (1.0,) * 3))
    assert (
        video.shape[3:] == (40, 60) and not video[..., 32:, :].any() and not video[..., 48:].any()
    )


@pytest.mark.parametrize("left", [True, False], ids=["somebody_is_left", "nobody_is"])
def test_boxes_of_a_mirrored_clip_are_mirrored(small, monkeypatch, left):
    """The same draws with and without; also where ten crops leave nobody, and the first person has
    one laid around him."""
    if not left:
        monkeypatch.setattr(ava_clips, "alive", lambda boxes: np.zeros(len(boxes), bool))
    plain, mirrored = (dataset(config(small, data__flip=flip))[1] for flip in (0.0, 1.0))
    for g in range(12):
        one, other = plain[g], mirrored[g]
        assert torch.equal(one.boxes, other.boxes) and other.flips.all() and not one.flips.any()
        wanted = one.labels.clone()
        wanted[:, [1, 3]] = 32 - one.labels[:, [3, 1]]
        torch.testing.assert_close(other.labels, wanted, rtol=0, atol=1e-9)
        assert (wanted[:, 1] < wanted[:, 3]).all() and (left or len(wanted) == 1)


def test_what_the_detector_is_not_sure_of_is_not_read(small):
    """Neither in training nor in the test; the second of an excluded timestamp in neither."""
    folder, ava = small
    alone = training_keyframes(config(small, ava__train_detections=""), LeftOut())
    assert training_keyframes(config(small, ava__score=1.0), LeftOut()).people == alone.people
    with open(ava.val_detections) as f:
        rows = [row for row in csv.reader(f) if row[1] != "0903"]
    sure = [row for row in rows if float(row[7]) >= 0.92]
    test = score.TestSet.read(config(small, ava__score=0.92), LeftOut())
    assert sum(map(len, test.keyframes.people)) == len(sure) < len(rows)
    (folder / "out.csv").write_text("movie-01,0904\n")
    found = training_keyframes(
        config(small, ava__train_excluded=str(folder / "out.csv")), LeftOut()
    )
    seconds = [(found.movie(i), found.seconds[i]) for i in range(len(found))]
    assert len(seconds) == 11 and ("movie-01", 904) not in seconds and ("movie-02", 904) in seconds


def test_scores_that_are_right_have_a_map_of_one(small):
    """Over the four classes of the list, without the excluded second; and each box counts once."""
    test = score.TestSet.read(config(small), LeftOut())
    assert set(test.names) == {1, 2, 3, 10} and len(test.excluded) == 1
    scores = [np.zeros((len(persons), 12), np.float32) for persons in test.keyframes.people]
    for i, persons in enumerate(test.keyframes.people):
        for row, person in zip(scores[i], persons, strict=True):
            for box, classes in page.truth_of(test, i):
                if iou(np.array([person.box]), np.array([box]))[0, 0] >= 0.5:
                    row[[c - 1 for c in classes]] = 1
    assert test.papers(scores).mean_ap == 1.0 > test.chance(3)
    assert replace(test, excluded=set()).papers(scores).mean_ap < 1.0
    rows = test.labelled(scores)
    assert len(set(rows)) == len(rows) == 4 * sum(map(len, test.keyframes.people))
    assert {row.class_id for row in rows} == {1, 2, 3, 10}


@needs_torchvision
def test_an_action_is_as_likely_as_its_person_where_asked(small):
    test, given = score.TestSet.read(config(small), LeftOut()), range(2)
    model = BoxClassifier(config(small).classifier_of(12))
    found = [
        score.scores_of(model, test, config(small, ava__times_detection=times), given)[0]
        for times in (False, True)
    ]
    for i, plain, times in zip(given, *found, strict=True):
        sure = np.array([[p.score] for p in test.keyframes.people[i]])
        np.testing.assert_allclose(times, plain * sure, rtol=1e-6)
        assert 0 < sure.min() < 1 and plain.min() > 0
    half, _ = score.scores_of(model, test, config(small, train__precision="bf16"), given)
    assert all(0 < abs(a - b).max() < 0.02 for a, b in zip(half, found[1], strict=True))


def test_seconds_between_are_in_neither_side_of_a_held_out_test(small):
    test = score.TestSet.read(config(small), LeftOut(), every=2)
    assert {*test.keyframes.seconds} == {902, 904, 906}
    assert {row.second for row in test.truth} <= {902.0, 904.0, 906.0}


def test_colours_are_shifted_either_way_by_what_is_asked(small, monkeypatch):
    cfg, drawn, rng = config(small, ava__color=(20.0, 0.1, 0.05)), [], np.random.default_rng(0)
    monkeypatch.setattr(ava_clips, "shift_color", lambda clip, *by: drawn.append(by) or clip)
    batch = dataset(cfg)[1][0]
    for _ in range(60):
        ava_clips.training_video(rng, batch, 32, cfg.ava, ((0.0,) * 3, (1.0,) * 3))
    shares = np.array(drawn) / cfg.ava.color
    assert (shares.min(0) > -1).all() and (shares.max(0) < 1).all()
    assert (shares.min(0) < -0.8).all() and (shares.max(0) > 0.8).all()


def test_pixels_are_normalised_as_the_recipe_says(small):
    family = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    mean, std = ava_clips.statistics(config(small).ava, family)
    assert (mean.flatten().tolist(), std.flatten().tolist()) == tuple(
        torch.tensor(t).tolist() for t in family
    )
    mean, std = ava_clips.statistics(config(small, ava__pixels="alphaction").ava, family)
    torch.testing.assert_close(255 * mean.flatten(), torch.tensor([122.7717, 115.9465, 102.9801]))
    torch.testing.assert_close(255 * std.flatten(), torch.full((3,), 57.375))


@needs_torchvision
@pytest.mark.parametrize("pooled", [True, False], ids=["of_pooled_features", "of_tokens"])
def test_a_norm_of_pooled_features_is_not_taken_for_one_of_tokens(small, monkeypatch, pooled):
    said = ["head: new", *["fc_norm: taken for norm"] * pooled]
    monkeypatch.setattr("mae_fast.tasks.ava.run.weights.load", lambda model, path: said)
    model = BoxClassifier(config(small).classifier_of(12))
    torch.nn.init.constant_(model.norm.weight, 2.0)
    assert load(model, "a.pth") == ["head: new", *["fc_norm: not used; norm: new"] * pooled]
    assert (model.norm.weight == (1 if pooled else 2)).all()


@needs_torchvision
def test_what_a_step_draws_is_of_the_seed(small, tmp_path, monkeypatch):
    """Of the same clips: colours, and the numbers of dropout and drop path."""
    drawn, inputs = [], AvaRun._inputs

    def of_seeds(self, batch):
        for seed in (1, 2):
            train = replace(self.cfg.train, seed=seed)
            self.cfg, self.micro = replace(self.cfg, train=train), 0
            video, *persons = inputs(self, batch)
            drawn.append((video, torch.get_rng_state()))
        return video, *persons

    monkeypatch.setattr(AvaRun, "_inputs", of_seeds)
    how = dict(steps=1, ava__val_every=0, ava__color=(20.0, 0.1, 0.1))
    finetune(config(small, tmp_path / "run", **how))
    assert not any(map(torch.equal, *drawn))


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


KILLED = """
import os, pickle, sys, unittest.mock
from mae_fast.tasks.ava.clips import WholeFrames
from mae_fast.tasks.ava.run import AvaRun
from mae_fast.tasks.finetune import finetune
from mae_fast.tasks.score import test

def killed(kind, name, call, work, *args):
    "In a process of its own, which dies by SIGKILL when kind.name is called for that time."
    if (child := os.fork()) == 0:
        own, calls = getattr(kind, name), []
        def last(*given):
            calls.append(1)
            if len(calls) == call:
                if kind is AvaRun:
                    given[0].aside.wait()  # what is written beside the steps
                os.kill(os.getpid(), 9)
            return own(*given)
        setattr(kind, name, last)
        work(*args)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    print(sorted(os.listdir(cfg.output)))

cfg = pickle.load(open(sys.argv[1], "rb"))
killed(AvaRun, "_inputs", 4, finetune, cfg)
finetune(cfg)
killed(WholeFrames, "video", 3, test, cfg.output)
test(cfg.output)
"""


@needs_torchvision
def test_a_run_and_a_test_that_are_killed_end_as_undisturbed_ones(small, tmp_path):
    """kill -9 in step 4 of 5, of which 2 are saved, and in the test after 2 of its 5 keyframes:
    every weight, moment and averaged weight, every score and the mAP are the same to the bit."""
    how = dict(classifier__drop_path=0.2, classifier__dropout=0.1, train__ema=0.7)
    how |= dict(ava__color=(20.0, 0.1, 0.1), ava__box_jitter=(0.2, 0.1, 0.1, 0.05))
    how |= dict(ava__val_every=0, train__save_every=2, steps=5)
    whole, cut = (config(small, tmp_path / name, **how) for name in ("whole", "cut"))
    (tmp_path / "cut.pickle").write_bytes(pickle.dumps(cut))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cut.pickle")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    after_training, after_test = run.stdout.splitlines()[0], run.stdout.split("]")[1]
    assert (
        "checkpoint-00000002.safetensors'" in after_training and "-00000004" not in after_training
    )
    assert "checkpoint-00000005" in after_test and "'test'" not in after_test
    finetune(whole)
    score_run(whole.output)
    ends = [read(checkpoints(tmp_path / name)[-1])[1] for name in ("whole", "cut")]
    assert ends[0].keys() == ends[1].keys() and any("optim.ema" in name for name in ends[0])
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    for name in ("detections.csv", "results.json"):
        one, other = ((tmp_path / f / "test" / name).read_text() for f in ("whole", "cut"))
        assert one == other.replace(str(tmp_path / "cut"), str(tmp_path / "whole"))


@needs_torchvision
def test_averaged_weights_are_judged_and_tested(small, tmp_path, capsys):
    """What the row says of them is what `test --ema` finds, and that they are not the last."""
    out = tmp_path / "run"
    row = finetune(config(small, out, train__ema=0.9, train__blr=3.0, ava__val_every=1))
    assert (
        f"held out mAP {row['val_map']:.1%} (averaged {row['val_ema_map']:.1%})"
        in capsys.readouterr().err
    )
    found = {}
    for ema in (False, True):
        assert cli.main(["test", str(out), *(["--ema"] if ema else [])]) == 0
        found[ema] = json.loads((out / "test" / "results.json").read_text())
    assert found[False]["mAP"] == row["val_map"] != row["val_ema_map"] == found[True]["mAP"]
    assert found[True]["weights"] == "averaged" and "weights" not in found[False]


@needs_torchvision
def test_a_movie_that_is_corrupted_in_its_middle_is_counted_and_listed(
    small, tmp_path, caplog, capsys
):
    """Bytes that went bad after the index: training takes another keyframe and lists the movie
    once, held-out and tested keyframes of it score 0 and are said in one line."""
    rows = []
    for row in read_index(small[0] / "set" / "i.jsonl"):
        data, to = bytearray(Path(row.path).read_bytes()), tmp_path / Path(row.path).name
        if to.stem != "movie-02":
            middle = len(data) // 2
            data[middle - 400 : middle + 800] = bytes(range(256)) * 4 + bytes(176)
        to.write_bytes(data)
        rows.append(replace(row, path=str(to)))
    write_index(rows, tmp_path / "i.jsonl")
    out = tmp_path / "run"
    how = dict(data__index=str(tmp_path / "i.jsonl"), data__max_bad_share=0.5, steps=6)
    row = finetune(config(small, out, ava__val_every=1, **how))
    assert row["bad_videos"] == 1
    listed = [json.loads(x) for x in (out / "bad_videos.jsonl").read_text().splitlines()]
    assert [Path(x["path"]).name for x in listed] == ["movie-01.mp4"]
    assert caplog.text.count("bad video, replaced by another") == 1
    held_out = [x for x in caplog.messages if x.startswith("held out: ")]
    assert cli.main(["test", str(out)]) == 0
    results = json.loads((out / "test" / "results.json").read_text())
    count = results["bad_clips"]
    assert 1 <= count < results["keyframes"] == 5 and results["mAP"] == row["val_map"]
    assert held_out and all(
        f"{count} clips that do not decode, their scores are 0: " in x for x in held_out
    )
    said = [x for x in capsys.readouterr().out.splitlines() if "do not decode" in x]
    assert len(said) == 1
    assert said[0].startswith(f"left out: {count} clips that do not decode, their scores are 0: ")
    left = json.loads((out / "test" / "left_out.json").read_text())
    assert len(left["lines"]) == count and all("movie-00.mp4 at second" in x for x in left["lines"])
    with open(out / "test" / "detections.csv") as f:
        scores = [float(x[7]) for x in csv.reader(f)]
    assert len(scores) == 4 * results["boxes"] and 0 < scores.count(0.0) < len(scores)


@needs_torchvision
def test_demo_ava_says_what_training_made_of_it(tmp_path, monkeypatch, capsys):
    from mae_fast import demo

    monkeypatch.setattr(demo, "fetch_footage", lambda folder: pytest.fail("it needs no footage"))
    for name, value in dict(TRAIN_MOVIES=1, TEST_MOVIES=1).items():
        monkeypatch.setattr(made, name, value)
    smaller = dict(embed_dim=24, depth=1, num_heads=2)
    monkeypatch.setattr(made, "MODEL", made.MODEL | smaller)
    monkeypatch.setattr(made, "make", functools.partial(made.make, seconds=4))
    monkeypatch.setattr(made, "build_index", functools.partial(build_index, workers=1))
    own = made.config
    fewer = lambda c: replace(c, data=replace(c.data, workers=0))  # noqa: E731
    monkeypatch.setattr(made, "config", lambda *given: fewer(own(*given)))
    out = tmp_path / "demo"
    assert cli.main(["demo", "--ava", "--output", str(out), "--steps", "2"]) == 0
    results = json.loads((out / "results.json").read_text())
    rows = [json.loads(x) for x in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    tested = json.loads((out / "test" / "results.json").read_text())
    assert results["mAP_before"] == rows[0]["val_map"] and rows[0]["step"] == 0
    assert results["mAP_after"] == tested["mAP"] == rows[-1]["val_map"]
    assert results["mAP_chance"] == tested["mAP_chance"] and results["steps"] == 2
    assert (out / "test" / "index.html").read_text().count("<figure") == 3  # of four, one excluded
    said = capsys.readouterr().out
    assert f"mAP_after: {results['mAP_after']:.1%}" in said
    assert said.splitlines()[-1] == str(out / "test" / "index.html")


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
    said = (tmp_path / "run" / "test" / "index.html").read_text()
    assert said.count("<figure") == 12 and "walk" in said and "left out" in said.lower()
    assert cli.main(["test", str(path), "--temporal", "3"]) == 2
    assert "not for AVA" in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot be read"):
        score.TestSet.read(replace(cfg, ava=replace(cfg.ava, val_csv="gone.csv")), LeftOut())
