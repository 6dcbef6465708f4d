"""What `pack` drops of uncurated videos, counted and listed each, and where it cuts them."""

import dataclasses
import importlib.util
import os
import shutil

import numpy as np
import pytest
from in_process import answers, in_process

from mae_fast import cli
from mae_fast.config import DataConfig
from mae_fast.data import build_index, filters, make_loader, read_index, write_index
from mae_fast.data.pack import _Work, check_pack, write_pack
from mae_fast.data.packed import PackReader, Place
from mae_fast.errors import ConfigError, DataError

HOW = {"short_side": 40, "crf": 20, "gop": 1, "copy": False, "shard": 2}
COPY = {**HOW, "short_side": 0, "crf": None, "gop": None, "copy": True}
ALL = {"min_seconds": 0.5, "static": True, "black": True, "near_duplicates": True}
NOISE = np.random.default_rng(0).integers(-6, 7, (64, 72, 96, 3))


def scene(seed: int, moves: float = 1.0, light: float = 1.0):
    """A picture of blocks that slides by a pixel a frame, and noise that is another each frame."""
    blocks = np.random.default_rng(seed).integers(0, 226, (6, 40, 3))

    def make(k: int, height: int, width: int) -> np.ndarray:
        x = (np.arange(width) * 64 // width + int(k * moves)) // 8 % 40
        picture = blocks[(np.arange(height) * 6 // height)[:, None], x[None]] * light
        picture = picture + NOISE[k % 64, :height, :width] * min(light * 2, 1)
        return np.clip(picture, 0, 255).astype(np.uint8)

    return make


def scenes(k: int, height: int, width: int) -> np.ndarray:
    """Three of 30 frames each, the second of one picture."""
    return [scene(5), scene(6, moves=0), scene(7)][k // 30](k, height, width)


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    with in_process():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory, video):
    root = tmp_path_factory.mktemp("filters")
    (root / "v").mkdir()
    large = dict(width=96, height=72, options={"crf": "30"})
    black = [scene(4, light=0.03), scene(4)]
    for name, n, make, how in (
        ("a_moving", 40, scene(1), {}),
        ("b_static", 40, scene(2, moves=0), {}),
        ("c_black", 40, lambda k, *size: black[k < 2](k, *size), {}),
        ("d_short", 10, scene(3), {}),
        ("e_again", 40, scene(1), large),
        ("f_other", 40, scene(8), {}),
    ):
        video.write(root / "v" / f"{name}.mp4", n, make=make, **how)
    (root / "v" / "g_broken.mp4").write_text("no video")
    video.write(root / "scenes.mp4", 90, make=scenes)
    build_index([root / "v"], root / "i.jsonl", workers=1, progress=False)
    build_index([root / "scenes.mp4"], root / "scenes.jsonl", workers=1, progress=False)
    return root


def names(pack, broken=False) -> dict[str, str | None]:
    rows = read_index(pack, broken=broken)
    return {os.path.basename(r.source or r.path)[0]: r.error for r in rows}


def place(row) -> Place:
    return Place(row.path, row.at, row.bytes, row.first, row.packets, row.codec, row.setup)


@pytest.mark.parametrize("how", [HOW, COPY], ids=["pack", "copy"])
@pytest.mark.parametrize(
    ("asked", "dropped"),
    [
        ({}, {}),
        ({"min_seconds": 0.5}, {"d": "too short: 0.40 s of 0.5"}),
        ({"static": True}, {"b": "static: no cell moves by more than "}),
        ({"black": True}, {"c": "black: no cell of nine frames in ten is lighter than "}),
        ({"near_duplicates": True}, {"e": "near-duplicate: "}),
        (ALL, dict.fromkeys("bcde", "")),
    ],
    ids=["none", "short", "static", "black", "duplicate", "all"],
)
def test_each_filter_drops_its_own_and_says_so(root, tmp_path, how, asked, dropped):
    said = write_pack(root / "i.jsonl", tmp_path / "p", {**how, **asked}, 1)
    found = names(tmp_path / "p", broken=True)
    assert list(found) == list("abcdefg") and found["g"] == "not a video: the file holds text"
    out = {name: error for name, error in found.items() if error and name != "g"}
    assert out.keys() == dropped.keys()
    assert all(out[name].startswith(words) for name, words in dropped.items()), out
    assert f"{6 - len(dropped)} videos" in said and "; 1 broken (1 not a video)" in said
    for name, error in out.items():
        [line] = [line for line in said.split("\n") if f"/{name}_" in line.split(": ")[0]]
        assert line.endswith(": " + error)
        assert f"1 {error.split(':')[0]}" in said.split("\n")[0]
    assert (f"; {len(out)} dropped (" in said) == bool(out)
    assert "sound" in check_pack(tmp_path / "p")
    if "e" in out and len(out) == 1:
        assert f"bits from {root}/v/a_moving.mp4, frame 0 on" in out["e"]


def test_what_is_kept_is_as_without_filters(root, tmp_path):
    """Nor is anything in how.json that was not asked for: packs of before are gone on with."""
    write_pack(root / "i.jsonl", tmp_path / "p", HOW, 1)
    write_pack(root / "i.jsonl", tmp_path / "q", {**HOW, **ALL}, 1)
    every = {os.path.basename(r.source): r for r in read_index(tmp_path / "p")}
    for row in read_index(tmp_path / "q"):
        other = every[os.path.basename(row.source)]
        assert (row.crc, row.start, row.frames) == (other.crc, other.start, other.frames)
        assert PackReader().read(place(row), [3]).equal(PackReader().read(place(other), [3]))
    said = write_pack(root / "i.jsonl", tmp_path / "q", {**HOW, **ALL}, 1)
    assert said.endswith("done already")
    with pytest.raises(ConfigError, match="holds another pack"):
        write_pack(root / "i.jsonl", tmp_path / "q", {**HOW, **ALL, "min_seconds": 1.0}, 1)


def test_the_first_of_two_is_kept_however_they_come_and_after_a_kill(root, tmp_path, monkeypatch):
    how = {**HOW, "shard": 1, "near_duplicates": True}
    write_pack(root / "i.jsonl", tmp_path / "p", how, 1)

    def backwards(tasks, *rest):
        return answers(list(tasks)[::-1], *rest)

    with monkeypatch.context() as patch:
        patch.setattr("mae_fast.data.pack.answers", backwards)
        write_pack(root / "i.jsonl", tmp_path / "q", how, 1)
    write = _Work.write_shard

    def killed(self, shard, errors):
        if shard == 2:
            raise KeyboardInterrupt
        write(self, shard, errors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Work, "write_shard", killed)
        write_pack(root / "i.jsonl", tmp_path / "r", how, 1)
    assert (tmp_path / "r" / "shard-00001.tar").exists()
    write_pack(root / "i.jsonl", tmp_path / "r", how, 1)
    for other in "qr":
        held = sorted(p.name for p in (tmp_path / other).iterdir())
        assert held == sorted(p.name for p in (tmp_path / "p").iterdir())
        for name in held:
            same = (tmp_path / other / name).read_bytes() == (tmp_path / "p" / name).read_bytes()
            assert same, name


def test_nothing_that_is_left_is_one_line_with_the_reasons(root, tmp_path):
    with pytest.raises(
        DataError, match=r"no video could be packed; 1 broken .*; 6 dropped \(6 too"
    ):
        write_pack(root / "i.jsonl", tmp_path / "p", {**HOW, "min_seconds": 9}, 1)
    assert not list((tmp_path / "p").iterdir())


def test_noise_is_not_motion_and_a_small_thing_that_moves_is(video):
    look = filters.Look({"static": True}, 25.0)
    grids = np.full((40, 8, 9), 100.0) + np.random.default_rng(0).normal(0, 0.4, (40, 8, 9))
    assert look._static(grids).startswith("static: no cell moves by more than 2.")
    # Of a cell's 256 pixels 64 become 40 levels lighter: a 300th of the picture.
    grids[20:, 3, 4] += 10
    assert look._static(grids) is None


def test_a_piece_is_judged_by_its_own_frames_and_has_its_own_rate():
    look = filters.Look({"static": True}, 25.0)
    look.numbers = list(range(20))
    look.grids = [np.full((8, 9), 100.0 + 10 * max(0, k - 9)) for k in range(20)]
    still, moves = look._piece(0, 10, 0.5), look._piece(10, 20, 0.4)
    assert still["error"].startswith("static: no cell moves by more than 0.0")
    assert moves["error"] is None and (still["fps"], moves["fps"]) == (20.0, 25.0)
    assert (moves["start"], moves["frames"], moves["duration"]) == (10, 10, 0.4)


def test_black_is_dark_in_nine_frames_of_ten():
    look = filters.Look({"black": True}, 25.0)
    for lit, black in ((3, True), (6, False), (30, False)):
        grids = np.full((40, 8, 9), 10.0)
        grids[:lit, 0, 0] = 200.0
        assert bool(look._black(grids)) == black, lit


def test_a_hash_is_of_three_frames_apart():
    grids = np.tile(np.arange(9.0), (8, 8, 1))
    changed = []
    for k in range(8):
        other = grids.copy()
        other[k] = other[k, :, ::-1]
        changed.append(filters.dhash(other) != filters.dhash(grids))
    assert [k for k in range(8) if changed[k]] == [2, 4, 6]


def test_hashes_of_hundreds_of_thousands_are_compared_at_once():
    rng, seen = np.random.default_rng(0), filters.Seen()
    codes = [rng.bytes(24).hex() for _ in range(3000)]
    assert not any(seen.duplicate(str(i), code) for i, code in enumerate(codes))
    assert len(seen.names) == 3000
    bits = np.frombuffer(bytes.fromhex(codes[2500]), np.uint8).copy()
    bits[:19] ^= 1
    assert seen.duplicate("x", bits.tobytes().hex()) == "near-duplicate: 19 of 192 bits from 2500"
    bits[19] ^= 1
    assert seen.duplicate("y", bits.tobytes().hex()) is None


needs_scenes = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("scenedetect", "cv2"))),
    reason="PySceneDetect is not installed (pip install 'mae-fast[shots]')",
)


@needs_scenes
@pytest.mark.parametrize("how", [HOW, COPY], ids=["pack", "copy"])
def test_shots_are_cut_where_a_scene_begins_and_drawn_from_by_themselves(root, tmp_path, how):
    said = write_pack(root / "scenes.jsonl", tmp_path / "p", {**how, "shots": True}, 1)
    rows = read_index(tmp_path / "p")
    assert [(r.start, r.frames) for r in rows] == [(0, 30), (30, 30), (60, 30)]
    assert "3 shots" in said and [r.duration for r in rows] == pytest.approx([1.2] * 3)
    assert [r.fps for r in rows] == pytest.approx([25.0] * 3)
    assert len({r.path for r in rows}) == 1 and "sound" in check_pack(tmp_path / "p")
    cfg = DataConfig(workers=0, repeat_aug=1, sampling_rate=2, short_side=how["short_side"])
    whole = PackReader().read(place(rows[0]), range(90))
    for i, row in enumerate(rows):
        [batch] = make_loader([row], cfg, num_frames=8, batch_size=1, seed=i, steps=1)
        [clip] = batch.frames
        at = [next(k for k in range(90) if whole[k].equal(f)) for f in clip]
        assert row.start <= min(at) and max(at) < row.start + 30, (i, at)


@needs_scenes
@pytest.mark.parametrize(
    ("how", "starts"), [(HOW, [0, 30]), (COPY, [30, 60])], ids=["pack", "copy"]
)
def test_shots_of_a_segment(root, tmp_path, how, starts):
    """Its own file begins at its first frame; a copy is of the whole file."""
    [row] = read_index(root / "scenes.jsonl")
    write_index([dataclasses.replace(row, start=30, frames=60)], tmp_path / "i.jsonl")
    write_pack(tmp_path / "i.jsonl", tmp_path / "p", {**how, "shots": True}, 1)
    assert [(r.start, r.frames) for r in read_index(tmp_path / "p")] == [(s, 30) for s in starts]


@needs_scenes
def test_a_shot_is_filtered_by_itself(root, tmp_path):
    asked = {"shots": True, "static": True, "min_seconds": 0.5}
    said = write_pack(root / "scenes.jsonl", tmp_path / "p", {**HOW, **asked}, 1)
    rows = read_index(tmp_path / "p", broken=True)
    assert [(r.start, r.frames, bool(r.error)) for r in rows] == [
        (30, 30, True),
        (0, 30, False),
        (60, 30, False),
    ]
    assert "2 shots, " in said and "; 1 dropped (1 static)" in said
    assert f"\n  {root}/scenes.mp4, frame 30 on: static: no cell" in said


def test_shots_want_a_library_and_say_which(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "scenedetect", None)
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert cli.main(["pack", str(root / "i.jsonl"), "-o", str(tmp_path / "p"), "--shots"]) == 2
    assert "--shots needs PySceneDetect (pip install 'mae-fast[shots]')" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    shutil.rmtree(tmp_path / "p", ignore_errors=True)
    given = ["--min-seconds", "0.5", "--static", "--black", "--near-duplicates", "--workers", "1"]
    command = ["pack", str(root / "i.jsonl"), "-o", str(tmp_path / "p"), "--short-side", "40"]
    assert cli.main([*command, *given]) == 0
    assert "4 dropped (" in capsys.readouterr().out and set(names(tmp_path / "p")) == {"a", "f"}
