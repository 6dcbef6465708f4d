"""Indexing: layouts, labels, broken files, going on after a stop, both formats."""

import dataclasses
import errno
import json
import os
import re
import signal
import struct
import sys
from concurrent.futures import wait

import in_process
import pytest

from mae_fast.data import helpers, index
from mae_fast.data.index import VideoRow, build_index, read_index
from mae_fast.data.pack import write_pack
from mae_fast.data.sources import find_videos
from mae_fast.errors import ConfigError, DataError


def build(sources, out, **options):
    return build_index(sources, out, workers=1, progress=False, **options)


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(root, *sources):
    """(path relative to root, label) of each."""
    videos = find_videos(sources)
    return [(os.path.relpath(v.path, root), v.label) for v in videos]


@pytest.fixture
def one(tmp_path, video):
    return video.write(tmp_path / "one.mp4", 12)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_and_summary(tmp_path, video, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    root = tmp_path / "vidéos 视频"
    (root / "jump").mkdir(parents=True)
    video.write(root / "jump" / "å b.mp4", 50)
    video.write(root / "top.mkv", 25, width=101, height=67, pix_fmt="yuv444p")
    (root / "broken.mp4").touch()
    out = root / f"index.{suffix}"
    summary = build([root], out)
    assert (summary.videos, summary.broken, summary.reused) == (2, {"empty": 1}, 0)
    assert summary.hours == pytest.approx(3 / 3600)
    assert "hours, 1 labels; 1 broken (1 empty)" in str(summary)
    broken, top, jump = read_index(out, broken=True)
    assert read_index(out) == [top, jump]
    assert broken.error == "empty: 0 bytes" and broken.path == str(root / "broken.mp4")
    assert 2 <= jump.gop <= 10
    assert jump == VideoRow(
        path=str(root / "jump" / "å b.mp4"),
        label="jump",
        frames=50,
        fps=25.0,
        duration=2.0,
        width=64,
        height=48,
        codec="h264",
        pix_fmt="yuv420p",
        bytes=(root / "jump" / "å b.mp4").stat().st_size,
        mtime=(root / "jump" / "å b.mp4").stat().st_mtime,
        total=50,
        gop=jump.gop,
    )
    assert (top.label, top.width, top.height, top.frames) == (None, 101, 67, 25)
    assert sorted(p.name for p in root.iterdir()) == sorted(
        ["broken.mp4", f"index.{suffix}", "jump", "top.mkv"]
    )
    # Paths are kept relative: the whole folder may move.
    moved = root.rename(tmp_path / "moved")
    assert read_index(moved / out.name)[0].path == str(moved / "top.mkv")


@pytest.mark.parametrize(
    "at, code", [("", errno.EACCES), ("/lost+found", errno.EACCES), ("/lost+found", errno.EIO)]
)
def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch, caplog, at, code):
    """One of others' below is passed over. Root may read everything, so the system's answer is
    given by hand."""
    touch(tmp_path, "a/1.mp4", "lost+found/2.mp4")
    scan = os.scandir

    def refused(path):
        if str(path) == f"{tmp_path}{at}":
            raise OSError(code, os.strerror(code), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    words = f"{tmp_path}{at}: cannot be read"
    if at and code == errno.EACCES:
        assert [os.path.basename(v.path) for v in find_videos([tmp_path])] == ["1.mp4"]
        assert words in caplog.text
    else:
        with pytest.raises(DataError, match=re.escape(words)):
            find_videos([tmp_path])


def test_sources_are_read_once(tmp_path):
    touch(tmp_path, "a.mp4")
    found = build_index(iter([tmp_path / "a.mp4"]), tmp_path / "i.jsonl", progress=False)
    assert sum(found.broken.values()) == 1


def test_one_path_is_not_a_list_of_its_letters(tmp_path):
    with pytest.raises(ConfigError, match="sources must be a list of paths, got 'videos'"):
        build_index("videos", tmp_path / "i.jsonl")


def test_folder_labels_order_hidden_and_links(tmp_path):
    touch(tmp_path, "b/2.MP4", "b/10.webm", "a/x.avi", "top.mov", "a/notes.txt", "a/._x.mp4")
    touch(tmp_path, ".cache/y.mp4")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert found(tmp_path, tmp_path) == [
        ("top.mov", None),
        ("a/x.avi", "a"),
        ("b/10.webm", "b"),
        ("b/2.MP4", "b"),
    ]


def test_lists(tmp_path):
    (tmp_path / "k.txt").write_text(
        "# comment\n\na/x.mp4 3\nwith blank, and comma.mp4 4\nplain.mp4\n/abs/y.avi,dance well\n"
    )
    assert [(v.path, v.label) for v in find_videos([tmp_path / "k.txt"])] == [
        (str(tmp_path / "a/x.mp4"), "3"),
        (str(tmp_path / "with blank, and comma.mp4"), "4"),
        (str(tmp_path / "plain.mp4"), None),
        ("/abs/y.avi", "dance well"),
    ]
    (tmp_path / "k.csv").write_text("x.mp4,0\nx.mp4,0\ny.mp4, 1\n")
    assert found(tmp_path, tmp_path / "k.csv") == [("x.mp4", "0"), ("y.mp4", "1")]
    (tmp_path / "bad.txt").write_text("x.mp4 1\nno video here\n")
    with pytest.raises(DataError, match="line 2 names no video"):
        find_videos([tmp_path / "bad.txt"])


def test_kinetics(tmp_path, video):
    (tmp_path / "train").mkdir()
    video.write(tmp_path / "train" / "-abc_000001_000011.mp4", 30)
    video.write(tmp_path / "whole.mp4", 100, rate=10)
    video.write(tmp_path / "trimmed.mp4", 30, rate=10)
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "playing cards,-abc,1,11,train\n"
        '"a, b",whole,2,5,train\n'
        "late,whole,90,95,train\n"
        "gone,nowhere,0,10,train\n"
        "cut before,trimmed,50,53,train\n"
    )
    out = tmp_path / "k.jsonl"
    summary = build([tmp_path / "train.csv"], out)
    assert summary.broken == {"segment": 1, "missing": 1}
    cut, segment, trimmed = read_index(out)
    assert (cut.label, cut.start, cut.frames) == ("playing cards", 0, 30)
    # From 2 to 5 s of a video of 10 s at 10 frames a second.
    assert (segment.label, segment.start, segment.frames) == ("a, b", 20, 30)
    assert segment.duration == 3.0
    assert (trimmed.start, trimmed.frames) == (0, 30)
    assert [r.label for r in read_index(out, broken=True) if r.error] == ["late", "gone"]


def test_something_something(tmp_path):
    touch(tmp_path, "20bn/1.webm", "20bn/2.webm")
    entries = [
        {"id": "2", "label": "spinning a cup", "template": "Spinning [something]"},
        {"id": "1", "label": "plain"},
        {"id": 3},
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    assert found(tmp_path, tmp_path / "train.json") == [
        ("20bn/2.webm", "Spinning something"),
        ("20bn/1.webm", "plain"),
        ("3.webm", None),
    ]
    (tmp_path / "labels.json").write_text('{"Spinning something": "1"}')
    with pytest.raises(DataError, match="not a Something-Something list"):
        find_videos([tmp_path / "labels.json"])


def test_nothing_found_or_unknown_format(tmp_path, one):
    with pytest.raises(DataError, match="no such file or folder"):
        build([tmp_path / "nowhere"], tmp_path / "i.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no videos in"):
        build([tmp_path / "empty"], tmp_path / "i.jsonl")
    with pytest.raises(DataError, match=r"is a \.jsonl or .parquet file"):
        build([one], tmp_path / "i.csv")


def test_parquet_without_pyarrow_says_so(tmp_path, one, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="parquet needs pyarrow"):
        build([one], tmp_path / "i.parquet")
    assert build([one], tmp_path / "i.jsonl").videos == 1


@pytest.fixture
def asked(monkeypatch):
    """The names of the files that were really probed."""
    names, ask = [], helpers._Helper.ask

    def spy(self, path, *how):
        names.append(os.path.basename(path))
        return ask(self, path, *how)

    monkeypatch.setattr(helpers._Helper, "ask", spy)
    return names


def test_without_a_decoder_no_video_is_called_broken(tmp_path, one, monkeypatch):
    build_index([one], tmp_path / "i.jsonl", progress=False, workers=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="decoder pyav: not installed"):
        build_index([one], tmp_path / "new.jsonl", progress=False, workers=1)
    with pytest.raises(ConfigError, match="decoder pyav: not installed"):
        write_pack(tmp_path / "i.jsonl", tmp_path / "pack", {}, 1)
    assert not (tmp_path / "pack").exists() and not (tmp_path / "new.jsonl").exists()


def test_second_run_probes_what_changed(tmp_path, video, asked):
    for name in "abc":
        video.write(tmp_path / f"{name}.mp4", 10)
    (tmp_path / "broken.mp4").touch()
    out = tmp_path / "i.jsonl"
    build([tmp_path], out)
    first = out.read_text()
    del asked[:]
    assert build([tmp_path], out).reused == 3
    assert asked == ["broken.mp4"] and out.read_text() == first
    del asked[:]
    video.write(tmp_path / "b.mp4", 11)
    assert build([tmp_path], out).reused == 2
    assert sorted(asked) == ["b.mp4", "broken.mp4"]
    assert [r.frames for r in read_index(out)] == [10, 11, 10]


def test_goes_on_after_a_stop(tmp_path, video, asked):
    """Stopped after two videos, and killed in the middle of a line."""
    for name in "abcd":
        video.write(tmp_path / f"{name}.mp4", 10)
    out = tmp_path / "i.jsonl"
    build([tmp_path], out)
    whole = out.read_text()
    out.unlink()
    rows = [json.loads(line) for line in whole.splitlines()]
    lines = [json.dumps({**r, "path": str(tmp_path / r["path"])}) for r in rows]
    (tmp_path / "i.jsonl.partial").write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    index.end_last_line(tmp_path / "i.jsonl.partial")
    assert (tmp_path / "i.jsonl.partial").read_text().endswith(lines[2][:30] + "\n")
    del asked[:]
    assert build([tmp_path], out).reused == 2
    assert asked == ["c.mp4", "d.mp4"] and out.read_text() == whole
    assert not (tmp_path / "i.jsonl.partial").exists()


def test_a_stop_keeps_the_rows_made_so_far(tmp_path, video, monkeypatch):
    for name in "abc":
        video.write(tmp_path / f"{name}.mp4", 10)
    ask = helpers._Helper.ask

    def stop(self, path, *how):
        if path.endswith("c.mp4"):
            raise KeyboardInterrupt
        return ask(self, path, *how)

    def late(pending, **how):  # all are done when it is looked
        done, _ = wait(pending)
        return sorted(done, key=lambda f: f.exception() is None), set()

    out = tmp_path / "i.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(helpers._Helper, "ask", stop)
        patch.setattr(helpers, "wait", late)
        build([tmp_path], out)
    assert not out.exists()
    assert len((tmp_path / "i.jsonl.partial").read_text().splitlines()) == 2
    assert build([tmp_path], out).reused == 2


LOOP = """
import json, os, signal, sys, time
from mae_fast.data import decode
probe = decode.probe
def trap(path, *how):
    if "killed" in path: os.kill(os.getpid(), signal.SIGKILL)
    if "hangs" in path: time.sleep(60)
    if "film" in path: time.sleep(2.5)
    return probe(path, *how)
decode.probe = trap
from mae_fast.data.helpers import answer
answer('mae_fast.data.index:_probe')
"""


def test_a_file_that_kills_or_hangs_its_process_is_a_row(tmp_path, video, monkeypatch):
    for name in ("a", "b_killed", "c", "d_hangs", "e", "film"):
        video.write(tmp_path / f"{name}.mp4", 10)
    with open(tmp_path / "film.mp4", "ab") as f:
        f.write(bytes(10**6))
    popen = helpers.subprocess.Popen
    monkeypatch.setattr(
        helpers.subprocess, "Popen", lambda cmd, **kw: popen([cmd[0], "-c", LOOP], **kw)
    )
    summary = build([tmp_path], tmp_path / "i.jsonl", timeout=1.5)
    assert (summary.videos, summary.broken) == (4, {"crash": 1, "timeout": 1})
    errors = [r.error for r in read_index(tmp_path / "i.jsonl", broken=True)]
    assert errors[1] == f"crash: the decoder died with exit status {-signal.SIGKILL}"
    assert errors[3] == "timeout: not done within 1.5 s"


def test_a_file_that_grows_while_it_is_read_is_read_again(tmp_path, one, video, monkeypatch):
    later = video.write(tmp_path / "later.mp4", 20).read_bytes()

    def grown(*asked):
        for answer in in_process.answers(*asked):
            one.write_bytes(later)
            yield answer

    monkeypatch.setattr(index, "answers", grown)
    frames = []
    for _ in range(2):
        assert build([one], tmp_path / "i.jsonl").reused == 0
        frames += [r.frames for r in read_index(tmp_path / "i.jsonl")]
    assert frames == [12, 20]


def test_the_same_command_twice_at_once_ends_twice(tmp_path, one, monkeypatch):
    def other_ends(rows, out):
        (tmp_path / "i.jsonl.partial").unlink()

    monkeypatch.setattr(index, "answers", in_process.answers)
    monkeypatch.setattr(index, "write_index", other_ends)
    assert build([one], tmp_path / "i.jsonl").videos == 1


def test_a_header_that_cannot_be_true_is_a_row(tmp_path, one, video):
    data = bytearray(video.write(tmp_path / "two.avi", 12, codec="mpeg4", bframes=0).read_bytes())
    struct.pack_into("<II", data, data.index(b"strh") + 28, 2**31 - 1, 1)  # seconds a frame
    (tmp_path / "two.avi").write_bytes(data)
    assert build([tmp_path], tmp_path / "i.jsonl").broken == {"damaged header": 1}
    row = read_index(tmp_path / "i.jsonl", broken=True)[1]
    assert "duration must be in [0, 2147483647], got 25" in row.error


def test_parallel_gives_the_same_file(tmp_path, folder):
    out = tmp_path / "one.jsonl"
    build([folder], out)
    build_index([folder], tmp_path / "two.jsonl", workers=2, progress=False)
    assert out.read_text() == (tmp_path / "two.jsonl").read_text()


def test_unreadable_indexes(tmp_path):
    def refused(text, match, name="i.jsonl"):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=match):
            read_index(tmp_path / name)

    for name, how in {
        "nowhere.jsonl": f"FOLDER -o {tmp_path}/nowhere.jsonl",
        "nowhere": "FOLDER -o index.jsonl",  # an index has one of two names
        "a folder": f"'{tmp_path}/a folder' -o index.jsonl",
    }.items():
        (tmp_path / "a folder").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=f"no such index; make one with `mae-fast index {how}`"):
            read_index(tmp_path / name)
    broken = dataclasses.asdict(VideoRow("a.mp4", error="empty: 0 bytes"))
    refused(json.dumps(broken), "no usable videos among 1 rows")
    pytest.importorskip("pyarrow")
    refused("text", "not a readable index", "i.parquet")


def test_readers_start_by_the_cores_that_may_be_used(one, tmp_path, monkeypatch):
    asked = []
    probe = index._probe_all

    def spy(todo, workers, *rest):
        asked.append(workers)
        return probe(todo, 1, *rest)

    monkeypatch.setattr(index, "_probe_all", spy)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 9}, raising=False)
    build_index([one], tmp_path / "a.jsonl", progress=False)
    build_index([one], tmp_path / "b.jsonl", progress=False, workers=7)
    assert asked == [3, 7]
