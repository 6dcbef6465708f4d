"""Batches: reproducible, exact after a resume and over ranks, and robust to bad files."""

import json
import logging
import os
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from batches import clips, config, load, numbers

from mae_fast.cli import main
from mae_fast.data.decode import VideoReader
from mae_fast.data.index import VideoRow, read_index
from mae_fast.data.loader import BadVideos, ClipDataset, make_loader
from mae_fast.data.pack import write_pack
from mae_fast.errors import ConfigError, DataError
from mae_fast.ops.crop_resize_patchify_gather import crop_resize
from mae_fast.ops.source import PLANAR
from mae_fast.resume import draws

HOW = {"short_side": 256, "crf": 30, "gop": 1, "copy": False, "shard": 1000}


def test_batch_holds_what_it_says(rows):
    (batch,) = load(rows, config(short_side=32), steps=1)
    assert len(batch) == 4 and batch.samples.tolist() == [0, 1, 2, 3]
    assert [tuple(f.shape) for f in batch.frames] == [(8, 32, 42, 3)] * 4
    assert all(f.dtype == torch.uint8 for f in batch.frames)
    assert batch.boxes.dtype == torch.int32 and batch.boxes.shape == (4, 4)
    assert batch.flips.dtype == torch.bool and batch.samples.dtype == torch.int64
    assert batch.paths[0] == batch.paths[1] != batch.paths[2] and batch.bad == []
    clip = batch.video(16)
    assert clip.shape == (4, 3, 8, 16, 16) and clip.dtype == torch.float32
    for i in range(4):
        box = batch.boxes[i].tolist()
        want = crop_resize(batch.frames[i], box, bool(batch.flips[i]), 16)
        assert torch.equal(clip[i], want)


def test_frames_are_those_of_the_video(rows, video):
    """The numbers in the pictures rise at the clip's stride and belong to the file named."""
    for batch in load(rows, steps=3):
        for frames, path in zip(batch.frames, batch.paths, strict=True):
            got = numbers(video, frames)
            fps = next(r.fps for r in rows if r.path == path)
            assert got == sorted(got)
            assert got[-1] - got[0] == pytest.approx(16 / 30 * fps - 1, abs=1.01)


def test_repeats_differ(rows, video):
    batches = load(rows, config(repeat_aug=4), batch_size=1, steps=20)
    starts = [{numbers(video, f)[0] for f in b.frames} for b in batches]
    assert sum(len(s) > 2 for s in starts) > 10
    assert all(len({tuple(box) for box in b.boxes.tolist()}) == 4 for b in batches)
    flips = torch.cat([b.flips for b in batches]).float().mean()
    assert 0.3 < flips < 0.7


def test_repeats_share_one_window_if_asked(rows, video):
    cfg = config(repeat_aug=4, span_seconds=0.7)
    batches = load(rows, cfg, batch_size=1, steps=10)
    for batch in batches:
        seen = [n for f in batch.frames for n in numbers(video, f)]
        assert max(seen) - min(seen) <= 0.7 * 30
    assert len({min(numbers(video, b.frames[0])) for b in batches}) > 3
    # A window shorter than a clip holds one clip, and is not clamped at the video's end.
    for batch in load(rows, config(span_seconds=0.01), batch_size=1, steps=20):
        assert len(set(numbers(video, batch.frames[0]))) == 8


def test_the_union_is_read_once(rows, monkeypatch):
    calls, read = [], VideoReader.pictures
    monkeypatch.setattr(
        VideoReader, "pictures", lambda self, i, *how: calls.append(list(i)) or read(self, i, *how)
    )
    load(rows, config(repeat_aug=4), batch_size=1, steps=1)
    assert len(calls) == 1 and len(set(map(int, calls[0]))) == len(calls[0]) > 8


def test_no_flip_and_always_flip(rows):
    assert not torch.cat([b.flips for b in load(rows, config(flip=0.0))]).any()
    assert torch.cat([b.flips for b in load(rows, config(flip=1.0))]).all()


def test_short_video_repeats_its_last_frame(tmp_path, video):
    path = video.write(tmp_path / "short.mp4", 5)
    row = VideoRow(str(path), frames=5, fps=25.0)
    (batch,) = load([row], batch_size=1, steps=1)
    assert numbers(video, batch.frames[0]) == [0, 1, 3, 4, 4, 4, 4, 4]


def test_segment_of_a_file(folder, video):
    row = VideoRow(str(folder / "v4.mp4"), start=20, frames=20, fps=30.0)
    seen = [n for b in load([row], steps=6) for f in b.frames for n in numbers(video, f)]
    assert min(seen) >= 20 and max(seen) <= 39 and max(seen) - min(seen) > 15


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_batches(rows, workers):
    assert clips(load(rows, config(workers=workers))) == clips(load(rows))
    assert clips(load(rows, seed=6)) != clips(load(rows))


def test_an_item_depends_on_seed_epoch_and_video_alone(rows):
    """Drawn alone, out of order, and in another process's stead."""
    dataset = ClipDataset(rows, config(), 8, 5)
    other = ClipDataset(rows, config(), 8, 5)
    late = clips([dataset[g] for g in (13, 2, 13)])
    assert late[:2] == late[4:] == clips([other[13]])


@pytest.mark.parametrize("start", [1, 3, 7])
def test_resume_in_mid_epoch_is_exact(rows, start):
    """5 videos, batches of 2: every start but the first lies inside an epoch."""
    whole = load(rows, steps=9)
    assert clips(load(rows, start=start, steps=9 - start)) == clips(whole[start:])


def test_every_video_once_an_epoch(rows):
    paths = [p for b in load(rows, config(repeat_aug=1), steps=10) for p in b.paths]
    for epoch in range(4):
        assert len(set(paths[5 * epoch : 5 * epoch + 5])) == 5
    again = clips(load(rows, config(repeat_aug=1), steps=10))
    first, second = ({c[1]: c[4] for c in again[e * 5 : e * 5 + 5]} for e in (0, 1))
    assert first != second


def test_weights_of_sources_decide_how_often(folder, tmp_path, capsys):
    """One video's folder beside another's; a bad video is replaced by weight too, and a run is told
    of other weights as of other videos."""
    names = sorted(p.name for p in folder.iterdir())
    sources = [str(folder / name) for name in names]
    ten = [10.0] + [1.0] * (len(sources) - 1)
    shares = ["--weights", *map(str, ten)]
    assert main(["index", *sources, "-o", str(tmp_path / "i.jsonl"), *shares]) == 0
    rows = read_index(tmp_path / "i.jsonl")
    assert [r.weight for r in rows] == ten
    batches = load(rows, config(repeat_aug=1), steps=5 * len(rows), batch_size=1)
    drawn = Counter(p for b in batches for p in b.paths)
    assert drawn[rows[0].path] == pytest.approx(50 * len(rows) / sum(ten), abs=5)
    assert drawn[rows[0].path] > 3 * max(drawn[r.path] for r in rows[1:])
    broken = [*rows[:2], *(replace(r, path="none.mp4") for r in rows[2:])]
    some = load(broken, config(repeat_aug=1, max_bad_share=1.0), steps=50)
    drawn = Counter(p for b in some for p in b.paths)
    assert drawn.keys() == {r.path for r in rows[:2]} and drawn[rows[1].path] < 100 / 6, drawn
    assert draws(rows) != draws([replace(r, weight=1.0) for r in rows])
    write_pack(tmp_path / "i.jsonl", tmp_path / "pack", HOW, 1)
    assert [r.weight for r in read_index(tmp_path / "pack")] == ten
    other = [*shares[:1], "3", *shares[2:]]  # of videos that the index knows already
    assert main(["index", *sources, "-o", str(tmp_path / "i.jsonl"), *other]) == 0
    assert [r.weight for r in read_index(tmp_path / "i.jsonl")] == [3.0, *ten[1:]]
    for wrong in (shares[:-1], [*shares[:-1], "0"], [*shares[:-1], "nan"]):
        assert main(["index", *sources, "-o", str(tmp_path / "j.jsonl"), *wrong]) == 2
        assert "weight" in capsys.readouterr().err


def test_a_video_drawn_again_in_an_epoch_gives_other_clips(rows):
    rows = [replace(rows[0], weight=10.0), *rows[1:]]
    seen = [b.table.tolist() for b in load(rows, config(repeat_aug=1), steps=5, batch_size=1)]
    assert len({str(table) for table in seen}) == len(seen)
    again = ClipDataset(rows, config(repeat_aug=1), 8, 5)
    assert again[3].table.tolist() == seen[3]


def test_two_ranks_draw_what_one_draws(rows):
    one = load(rows, batch_size=4)
    two = [load(rows, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    assert clips(one) == clips([b for pair in zip(*two, strict=True) for b in pair])
    with pytest.raises(ConfigError, match=r"the rank must be in \[0, 2\), got 2"):
        load(rows, rank=2, world=2)


def test_drawing_leaves_torch_s_generator_alone(rows):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load(rows, config(workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def some_bad(tmp_path, rows):
    """The five good videos, and two that broke after they were indexed."""
    (tmp_path / "empty.mp4").touch()
    gone = VideoRow(str(tmp_path / "gone.mp4"), frames=40, fps=30.0)
    empty = VideoRow(str(tmp_path / "empty.mp4"), frames=40, fps=30.0)
    return [rows[0], gone, *rows[1:3], empty, *rows[3:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_videos_are_replaced_the_same_way_every_time(some_bad, workers):
    batches = load(some_bad, steps=7)
    assert len(clips(batches)) == 28 and [len(b) for b in batches] == [4] * 7
    assert not any("gone" in p or "empty" in p for b in batches for p in b.paths)
    bad = [x for b in batches for x in b.bad]
    assert {(os.path.basename(p), r) for p, r in bad} == {
        ("gone.mp4", "missing: no such file"),
        ("empty.mp4", "empty: 0 bytes"),
    }
    assert [s for b in batches for s in b.samples.tolist()] == list(range(28))
    again = load(some_bad, config(workers=workers), start=3, steps=4)
    assert clips(again) == clips(batches[3:])
    assert [b.bad for b in again] == [b.bad for b in batches[3:]]


def test_a_replacement_is_not_the_draw_of_another(some_bad):
    """It takes other frames than the replacing video's own draw of the epoch."""
    dataset = ClipDataset(some_bad, config(repeat_aug=1), 8, 5)
    items = [dataset[g] for g in range(7)]
    contents = clips(items)
    assert sum(bool(b.bad) for b in items) == 2
    assert len({c[1] for c in contents}) < 7 == len({c[2:] for c in contents})


def test_a_bad_video_is_opened_once(some_bad, monkeypatch):
    opened, init = [], VideoReader.__init__

    def spy(self, path, *how):
        opened.append(os.path.basename(path))
        init(self, path, *how)

    monkeypatch.setattr(VideoReader, "__init__", spy)
    load(some_bad, steps=14)
    assert opened.count("gone.mp4") == opened.count("empty.mp4") == 1


def test_vanished_during_the_run(tmp_path, video):
    made = [video.write(tmp_path / f"{i}.mp4", 20) for i in range(3)]
    table = [VideoRow(str(p), frames=20, fps=25.0) for p in made]
    batches = iter(make_loader(table, config(), num_frames=8, batch_size=3, seed=0, steps=3))
    assert next(batches).bad == []
    made[1].unlink()
    second = next(batches)
    assert second.bad == [(str(made[1]), "missing: no such file")] * len(second.bad) != []
    assert str(made[1]) not in second.paths and len(second) == 6


def test_changed_since_indexed(folder, rows):
    longer = VideoRow(rows[0].path, frames=rows[0].frames + 1, fps=30.0)
    bad = [x for b in load([longer, rows[1]]) for x in b.bad]
    assert bad and all(reason.startswith("changed: 40 frames, 41") for _, reason in bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_videos_is_an_error_that_lists_them(tmp_path, workers):
    table = [VideoRow(str(tmp_path / f"{i}.mp4"), frames=40, fps=30.0) for i in range(3)]
    with pytest.raises(DataError, match="20 bad videos in a row") as caught:
        load(table, config(workers=workers))
    assert f"{tmp_path / '0.mp4'}: missing: no such file" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert {path for path, _ in caught.value.bad} == {row.path for row in table}


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no videos"):
        load([])


def test_planes_are_ffmpeg_s_pictures(rows, monkeypatch):
    """RGB frames by FFmpeg, as they were read before, and planes with our colours: equal bits."""
    planes = load(rows, config(short_side=0))
    assert all(b.table[:, PLANAR].all() for b in planes)
    monkeypatch.setattr(ClipDataset, "planar", False)
    rgb = load(rows, config(short_side=0))
    assert not any(b.table[:, PLANAR].any() for b in rgb)
    assert clips(planes) == clips(rgb)


def test_bad_videos_warn_once_and_are_listed(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="mae_fast")
    book = BadVideos(0.5, 10, tmp_path)
    book.add([("a.mp4", "empty: 0 bytes"), ("a.mp4", "empty: 0 bytes")])
    book.add([("a.mp4", "empty: 0 bytes"), ("ü.mp4", "missing: no such file")])
    assert len(caplog.records) == 2 and "a.mp4: empty: 0 bytes" in caplog.text
    records = [json.loads(line) for line in (tmp_path / "bad_videos.jsonl").open()]
    assert [(r["path"], r["reason"]) for r in records] == [
        ("a.mp4", "empty: 0 bytes"),
        ("ü.mp4", "missing: no such file"),
    ]
    assert time.time() - 60 < records[0]["time"] <= time.time()


def test_bad_videos_survive_a_resume(tmp_path, caplog):
    BadVideos(0.5, 10, tmp_path).add([("a.mp4", "empty: 0 bytes")])
    with (tmp_path / "bad_videos.jsonl").open("a") as f:
        f.write('{"path": "cut')
    book = BadVideos(0.1, 10, tmp_path)
    caplog.clear()
    book.add([("a.mp4", "empty: 0 bytes")])
    assert not caplog.records
    with pytest.raises(DataError, match="2 of 10 videos are bad"):
        book.add([("b.mp4", "empty: 0 bytes")])
    paths = []
    for line in (tmp_path / "bad_videos.jsonl").read_text().splitlines():
        try:
            paths.append(json.loads(line)["path"])
        except ValueError:
            continue
    assert paths == ["a.mp4", "b.mp4"]


def test_a_damaged_list_of_bad_videos_is_read_as_far_as_it_goes(tmp_path, caplog):
    good = '{"path": "a.mp4", "reason": "empty: 0 bytes"}'
    odd = [b"[" * 10**5, b"null", b"3", b'"x"', b"[1]", b"{}", b"\xff\xfe\0", b'{"path": ["a"]}']
    odd += [b'{"path": 3, "reason": "x"}', b'{"path": "b.mp4"}', b'{"path": null, "reason": 1}']
    odd += [b'{"path": "\xc3", "reason"', b"1" * 10**5]
    (tmp_path / "bad_videos.jsonl").write_bytes(b"\n".join([*odd, good.encode()]))
    book = BadVideos(0.2, 10, tmp_path)
    assert book.found == {"a.mp4": "empty: 0 bytes"}
    book.add([("c.mp4", "empty: 0 bytes")])
    assert len(BadVideos(0.2, 10, tmp_path).found) == 2
    with pytest.raises(DataError, match="3 of 10 videos are bad"):
        book.add([("d.mp4", "empty: 0 bytes")])


def test_too_large_a_share_stops_with_the_list():
    book = BadVideos(0.05, 100)
    book.add([(f"{i}.mp4", "empty: 0 bytes") for i in range(5)])
    with pytest.raises(DataError, match=r"6 of 100 videos are bad, more than .* 0.05") as caught:
        book.add([("last.mp4", "truncated: 3 of 9 frames")])
    assert "  0.mp4: empty: 0 bytes\n" in str(caught.value)
    assert str(caught.value).endswith("  last.mp4: truncated: 3 of 9 frames")
    many = BadVideos(0.0, 100)
    with pytest.raises(DataError, match="and 30 more"):
        many.add([(f"{i}.mp4", "empty: 0 bytes") for i in range(50)])
