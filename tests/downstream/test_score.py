"""Tests of a run: views, what counts as wrong, accuracies, the page."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tuned import config

from mae_fast import cli
from mae_fast.config_file import to_dict
from mae_fast.data import (
    BadVideo,
    ClipDataset,
    VideoReader,
    VideoRow,
    read_index,
    write_index,
)
from mae_fast.errors import ConfigError, WriteError
from mae_fast.tasks import clips, score
from mae_fast.tasks.config import ClipsConfig, FinetuneConfig, from_dict
from mae_fast.tasks.finetune import finetune


def test_a_folder_that_cannot_be_written_is_told_before_the_test(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    run = tmp_path / "checkpoint", FinetuneConfig(), None, ("a",)
    monkeypatch.setattr(score, "load_run", lambda *args: run)
    with pytest.raises(WriteError, match="Not a directory"):
        score.test("run", output=str(tmp_path / "file/out"))


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


def test_views_are_of_a_segment_s_own_frames_and_the_last_is_its_middle(index):
    """Of a video that is not square: three crops of each of two clips, and the middle one alone."""
    row = dataclasses.replace(read_index(index)[0], start=5, frames=20)
    cfg = ClipsConfig(sampling="frames", sampling_rate=2, workers=0)
    batch = clips.Views([row], cfg, 4, 10**4, 2, 3).batch(0)
    with VideoReader(row.path) as reader:
        height, width = reader.read([0]).shape[1:3]
        times = [*clips.views_in_time(cfg, 20, row.fps, 4, 2)]
        (middle,) = clips.views_in_time(cfg, 20, row.fps, 4, 1)
        wanted = [reader.read((t + 5).tolist()) for t in [*times, middle]]
    boxes = clips.views_in_space(cfg, height, width, 3)
    assert len({*boxes}) == 3
    assert [tuple(box) for box in batch.boxes.tolist()] == [*boxes, *boxes, boxes[1]]
    for found, k in zip(batch.frames, (0, 0, 0, 1, 1, 1, 2), strict=True):
        assert torch.equal(found, wanted[k])


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
    page, wrong = (folder / "index.html").read_text(), 7 - round(8 * again["top1_softmax_mean"])
    assert page.count("<td>") > 16 and "bad, counted as wrong" in page
    assert page.count("<figure>") == page.count("<img") == wrong > 0  # each mistake, with a frame
    assert again["top5_1x1"] <= 7 / 8
    assert cli.main(["test", str(tmp_path / "nothing.toml")]) == 2
    assert cli.main(["test", str(tmp_path)]) == 73


def test_a_test_takes_what_its_toml_file_says_now(motions, tmp_path):
    """Views and videos of a test are no part of the training, which goes on with others too."""
    changes = dict(train__steps=1, data__val_index=str(motions.train), data__sampling="frames")
    cfg = config(motions, tmp_path / "run", **changes)
    finetune(cfg)
    tree = to_dict(cfg) | {"test": {"temporal": 1, "spatial": 1}, "recipe": "mae_st_k400"}
    assert finetune(from_dict(tree))["step"] == 1
    tree["data"]["val_index"] = str(motions.val)
    sections = [k for k, v in tree.items() if isinstance(v, dict)]
    lines = [f"{k} = {json.dumps(tree[k])}" for k in tree if k not in sections]
    for k in sections:
        lines += [f"[{k}]", *(f"{n} = {json.dumps(v)}" for n, v in tree[k].items())]
    (tmp_path / "tune.toml").write_text("\n".join(lines))
    assert cli.main(["test", str(tmp_path / "tune.toml")]) == 0
    results = json.loads((tmp_path / "run" / "test" / "results.json").read_text())
    assert results["views"] == "1 x 1" and results["videos"] == 8
    assert results["sampling"] == "frames"


def test_a_test_takes_what_its_options_say(motions, tmp_path, monkeypatch):
    changes = dict(train__steps=1, train__precision="bf16", data__val_index=str(motions.val))
    finetune(config(motions, tmp_path / "run", **changes))
    seen = []

    def recorded(model, views, numbers, precision="", size=0):
        seen.append((views.temporal, views.spatial, views.short_side, precision, size))
        return torch.zeros(len(numbers), len(views), 4), []

    monkeypatch.setattr(score, "logits_of", recorded)
    options = "--temporal 3 --spatial 1 --short-side 40 --batch-size 5".split()
    for more in ([], options):
        assert cli.main(["test", str(tmp_path / "run"), *more]) == 0
    assert seen == [(2, 3, 32, "bf16", 8), (3, 1, 40, "bf16", 5)]


def test_views_that_there_are_not_are_refused(motions, tmp_path, capsys):
    rows = read_index(motions.val)
    for sampling, temporal, spatial in (("uniform", 3, 1), ("seconds", 1, 2), ("frames", 0, 3)):
        with pytest.raises(ConfigError, match=r"test\.(temporal|spatial) must be"):
            clips.Views(rows, ClipsConfig(sampling=sampling), 4, 32, temporal, spatial)
    finetune(config(motions, tmp_path / "run", train__steps=1, data__val_index=str(motions.val)))
    assert cli.main(["test", str(tmp_path / "run"), "--batch-size", "0"]) == 2
    assert "--batch-size must be positive, got 0" in capsys.readouterr().err


def test_a_moment_s_trouble_makes_no_video_of_a_test_wrong(motions, monkeypatch):
    read, tried = ClipDataset._read, []

    def hindered(self, video, path, *how):
        tried.append(video)
        if tried.count(video) == 1:
            raise BadVideo(path, "cannot be opened", False)
        return read(self, video, path, *how)

    monkeypatch.setattr(ClipDataset, "_read", hindered)
    rows = read_index(motions.val)[:2]
    batches = list(clips.Views(rows, ClipsConfig(workers=0), 4, 32, 1, 1).of(range(2)))
    assert tried == [0, 0, 1, 1] and not any(b.bad for b in batches)


def test_the_page_of_ten_thousand_classes_needs_no_table_of_their_pairs(largest):
    labels = torch.tensor([7, 7, 7, 3])
    logits = torch.nn.functional.one_hot(torch.tensor([9, 9, 7, 4]), 10_000)[:, None].float()
    logits[3] = torch.nan
    classes, rows = tuple(f"c{i}" for i in range(10_000)), [VideoRow("none.mp4")] * 4
    with largest:
        text = score.page({}, logits, labels, rows, classes, []).html()
    assert largest.numbers <= 10 * 10_000
    assert 'c7</td><td class="text">c9</td><td>2<' in text and "c3</td>" not in text


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


def test_the_surest_mistake_is_shown_first_and_called_what_it_was_taken_for():
    logits = torch.tensor([[3.0, 4, 0], [9, 0, 0], [0, 12, 0], [9, 0, 0]])[:, None]
    rows = [VideoRow(f"{name}.mp4") for name in "abcd"]
    page = score.page({}, logits, torch.tensor([0, 0, 2, 1]), rows, ("x", "y", "z"), []).html()
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == [
        "c.mp4: y (100%), is z",
        "d.mp4: x (100%), is y",
        "a.mp4: y (72%), is x",
    ]


def test_views_of_a_pack_are_held_to_their_own_size(tmp_path):
    """Not to that of training, which a test on a smaller pack does without."""
    how = {"short_side": 256, "copy": False, "index_crc": 0, "shards": {}}
    how |= {"table_bytes": 0, "table_crc": 0}
    (tmp_path / "pack.json").write_text(json.dumps(how))
    rows = [VideoRow(str(tmp_path / "shard-00000.tar/a.mp4"), frames=40, fps=30.0, at=512)]
    clips.Views(rows, ClipsConfig(short_side=320), 4, 224, 1, 1)
    with pytest.raises(ConfigError, match=r"short_side 320 is more than .* --short-side 256"):
        clips.Views(rows, ClipsConfig(short_side=224), 4, 320, 1, 1)
