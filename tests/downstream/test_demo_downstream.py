"""The made set, and the demonstration on it, small."""

import json

import numpy as np
import pytest

from mae_fast import cli, demo_downstream, motion
from mae_fast.data import VideoReader, read_index


def test_no_frame_tells_the_class_and_a_clip_turned_back_is_another():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)]
    dark = [np.zeros((32, 32, 3), np.uint8)]
    found = {}
    for label in motion.CLASSES:
        centres = []
        for k in range(400):
            frames = motion.clip(np.random.default_rng(k), label, dark, noise)
            bright = frames[7].any(-1)
            angle = [2 * np.pi * i / motion.SIDE for i in np.nonzero(bright)]
            centres.append([np.exp(1j * a).mean() for a in angle])
        mean = np.abs(np.mean(centres, axis=0))
        assert (mean < 0.12).all(), (label, mean)  # anywhere, on the torus
        found[label] = frames
    shift = {}
    for label, frames in found.items():
        step = [
            np.angle(np.exp(2j * np.pi * (np.nonzero(f.any(-1))[axis] / motion.SIDE)).mean())
            for axis in (0, 1)
            for f in (frames[3], frames[4])
        ]
        shift[label] = [np.angle(np.exp(1j * (step[1] - step[0]))),
                        np.angle(np.exp(1j * (step[3] - step[2])))]  # fmt: skip
    assert shift["down"][0] > 0.1 > abs(shift["down"][1]) and shift["up"][0] < -0.1
    assert shift["right"][1] > 0.1 > abs(shift["right"][0]) and shift["left"][1] < -0.1


def test_demo_downstream_leaves_every_accuracy_and_a_page(folder, tmp_path, monkeypatch, capsys):
    for name, value in dict(UNLABELLED=12, PER_CLASS=4, TEST=8, TUNE_STEPS=2).items():
        monkeypatch.setattr(demo_downstream, name, value)
    monkeypatch.setattr(demo_downstream, "RATES", (0.1,))
    smaller = dict(embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1)
    monkeypatch.setattr(demo_downstream, "MODEL", demo_downstream.MODEL | smaller)
    pictures = motion.pictures
    sized = lambda p: np.kron(p, np.ones((2, 2, 1), np.uint8))  # noqa: E731
    monkeypatch.setattr(motion, "pictures", lambda v, n: [sized(p) for p in pictures(v, 2)])
    out = tmp_path / "demo"
    args = ["demo", "--downstream", "--videos", str(folder), "--output", str(out), "--steps", "2"]
    assert cli.main(args) == 0
    results = json.loads((out / "results.json").read_text())
    names = ("chance", "single_frame", "scratch", "pretrained", "knn", "linear", "attentive")
    assert all(0 <= results[name] <= 1 for name in names) and results["chance"] == 0.25
    page = (out / "index.html").read_text()
    assert page.count("<img") == 4 and "single frame" in page
    labels = [r.label for r in read_index(out / "set" / "choose.jsonl")]
    assert sorted(labels) == sorted(motion.CLASSES)
    assert {r.label for r in read_index(out / "set" / "unlabelled.jsonl")} == {None}
    capsys.readouterr()
    one = tmp_path / "one"
    one.mkdir()
    (one / "v.mp4").write_bytes((folder / "v0.mp4").read_bytes())
    args[3] = str(one)
    assert cli.main(args) == 65
    assert "two videos are needed" in capsys.readouterr().err


def test_every_class_has_each_scene_and_they_begin_alike(tmp_path):
    noise = [np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)]
    scenes = []
    for index in (motion.make(tmp_path, name, 8, noise, 3, True) for name in "ab"):
        clips = []
        for row in read_index(index):
            with VideoReader(row.path) as reader:
                clips.append(reader.read(range(motion.FRAMES)).int())
        for scene in (clips[:4], clips[4:]):
            assert all((c[0] - scene[0][0]).abs().max() < 24 for c in scene)
            assert all((c[8] - scene[0][8]).abs().max() > 100 for c in scene[1:])
        assert (clips[4][0] - clips[0][0]).abs().max() > 100
        scenes.append(clips[0])
    assert (scenes[0] - scenes[1]).abs().max() < 24  # a seed is a set, but for the encoder


@pytest.mark.parametrize("seed", [0])
def test_still_clips_do_not_move(tmp_path, seed):
    noise = [np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)]
    motion.make(tmp_path, "s", 4, noise, seed, True, still=True)
    with VideoReader(tmp_path / "s" / "00000.mp4") as reader:
        frames = reader.read(range(16)).int()
    assert (frames - frames[:1]).abs().max() < 24  # but for what the encoder loses
    assert [r.label for r in read_index(tmp_path / "s.jsonl")] == list(motion.CLASSES)
