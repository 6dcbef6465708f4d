"""Packs: frame i is the source's, times and colours too; resumed after kill -9; damage by name."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import odd_videos
import pytest
import torch
from in_process import in_process

from mae_fast import cli, resume
from mae_fast.bench.data import stages
from mae_fast.config import DataConfig
from mae_fast.data import VideoReader, build_index, make_loader, read_index
from mae_fast.data.container import BadVideo
from mae_fast.data.loader import ClipDataset
from mae_fast.data.pack import check_pack, write_pack
from mae_fast.data.packed import KEY, LEAF, PACKET, PackReader, Place, _needed, packs_of
from mae_fast.errors import ConfigError, DataError, WriteError

VIDEOS = Path(__file__).parent / "videos"
HOW = {"short_side": 256, "crf": 20, "gop": 1, "copy": False, "shard": 1000}
COPY = {"short_side": 0, "crf": None, "gop": None, "copy": True, "shard": 1000}
ODD = (
    *("ten_bits.mp4", "grey.mp4", "odd_size.mkv", "full_range.mp4", "bt709.mp4", "rgb.mp4"),
    *("ramp.mp4", "many_b.mkv", "open_gop.mp4", "turned_90.mp4", "cut_both.mov", "cut_no_list.mp4"),
    *("cut_negative.mkv", "midgop.ts", "hflip.mp4", "vfr.mp4", "yuv444.mp4"),
)


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    with in_process():
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(folder, reader of its rows by the name of their source) of the odd videos, and --copy's."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "v").mkdir()
    for name in ODD:
        if (VIDEOS / name).exists():
            shutil.copy(VIDEOS / name, folder / "v")
            continue
        (folder / name).mkdir()  # what it is made of stays there
        shutil.copy(odd_videos.make(name, folder / name), folder / "v")
    build_index([folder / "v"], folder / "i.jsonl", workers=1, progress=False)
    for name, how in (("pack", HOW), ("copy", COPY)):
        write_pack(folder / "i.jsonl", folder / name, how, 2)
    return folder


def rows_of(pack: Path) -> dict[str, object]:
    return {os.path.basename(r.source): r for r in read_index(pack)}


def place(row) -> Place:
    return ClipDataset([row], DataConfig(short_side=2), 2, 0)._place(0, row.path)


@pytest.mark.parametrize("kind", ["pack", "copy"])
def test_frame_i_of_a_pack_is_frame_i_of_the_source(packed, kind):
    """By the colours of all pixels: numbers are written into the pictures as bits."""
    rows, reader, rng = rows_of(packed / kind), PackReader(), np.random.default_rng(0)
    assert len(rows) >= (len(ODD) if kind == "pack" else 12)
    order = [*rows.values(), *rows.values()]  # sizes change under one decoder, and back
    for row in order:
        with VideoReader(row.source) as source:
            assert row.total == source.num_frames
            wanted = sorted({0, row.total - 1, *rng.choice(row.total, 6).tolist()})
            want = source.read(wanted).numpy().astype(int)
        got = reader.read(place(row), wanted).numpy().astype(int)
        h, w = (min(a, b) for a, b in zip(want.shape[1:3], got.shape[1:3], strict=True))
        assert h > want.shape[1] - 2 and w > want.shape[2] - 2, row.source
        off = np.abs(got[:, :h, :w] - want[:, :h, :w]).mean((1, 2, 3))
        most = 0.01 if kind == "copy" else 6 if want.shape != got.shape else 3
        assert off.max() < most, (row.source, dict(zip(wanted, off, strict=True)))
        alone = reader.read(place(row), wanted[3:4]).numpy()
        assert (alone[0] == got[3]).all(), row.source


def test_packed_planes_are_ffmpegs_bit_for_bit(packed, tmp_path):
    """Of the mp4 as tar gives it; every packet is a keyframe."""
    rows, reader = rows_of(packed / "pack"), PackReader()
    with tarfile.open(packed / "pack" / "shard-00000.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    for name in ("vfr.mp4", "turned_90.mp4", "full_range.mp4", "odd_size.mkv"):
        row = rows[name]
        mp4 = tmp_path / os.path.basename(row.path)
        options = "-map 0:v -vsync passthrough -f rawvideo -".split()
        pix_fmt = "yuvj420p" if "full" in name else "yuv420p"
        want = odd_videos.ffmpeg("-i", str(mp4), "-pix_fmt", pix_fmt, *options)
        frames = reader.frames(place(row), list(range(row.total)))
        assert b"".join(f.to_ndarray().tobytes() for f in frames) == want
        with av.open(str(mp4)) as container:
            assert all(p.is_keyframe for p in container.demux(video=0) if p.size)


def test_times_and_colours_are_kept(packed, tmp_path):
    rows = rows_of(packed / "pack")
    for name in ("ramp.mp4", "vfr.mp4", "cut_negative.mkv", "many_b.mkv"):
        row = rows[name]
        times = []
        for path in (row.source, row.path):
            with VideoReader(path) as reader:
                f = reader._frames
                times.append([Fraction(t - f.times[0]) * f.stream.time_base for t in f.times])
        assert times[0] == times[1] and len(times[0]) == row.total
    for name in ("bt709.mp4", "full_range.mp4"):
        tags = []
        for path in (rows[name].source, rows[name].path):
            with VideoReader(path) as reader:
                frame = next(reader._frames.numbered(0))[1]
                tags.append((frame.colorspace, frame.color_range, frame.color_trc))
        assert tags[0] == tags[1], name
    assert rows["turned_90.mp4"].height > rows["turned_90.mp4"].width


@pytest.mark.parametrize("short_side", [256, 24])
def test_the_loader_draws_the_same_frames(folder, tmp_path, video, short_side):
    """The official sampling to the frame: numbers in the pictures, sizes, boxes, flips, samples."""
    build_index([folder], tmp_path / "i.jsonl", workers=1, progress=False)
    write_pack(tmp_path / "i.jsonl", tmp_path / "pack", HOW, 1)
    options = dict(num_frames=8, batch_size=2, seed=3, steps=4)
    cfg = DataConfig(workers=0, repeat_aug=2, sampling_rate=2, short_side=short_side)
    both = [make_loader(read_index(tmp_path / p), cfg, **options) for p in ("i.jsonl", "pack")]
    for a, b in zip(*both, strict=True):
        for x, y in zip(a.frames, b.frames, strict=True):
            assert [video.number(f) for f in x] == [video.number(f) for f in y]
            assert x.shape == y.shape and min(x.shape[1:3]) == min(short_side, 48)
        assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("boxes", "flips", "samples"))


@pytest.fixture(scope="module")
def small(tmp_path_factory, video):
    """A pack of three labelled videos in two shards, and of one that is broken."""
    root = tmp_path_factory.mktemp("small")
    for name, n in (("a", 12), ("b", 14), ("c", 16)):
        (root / "v" / name).mkdir(parents=True)
        video.write(root / "v" / name / f"{name}.mp4", n)
    (root / "v" / "broken.mp4").write_text("no video")
    build_index([root / "v"], root / "i.jsonl", workers=1, progress=False)
    said = write_pack(root / "i.jsonl", root / "pack", {**HOW, "shard": 2}, 1)
    assert "3 videos" in said and "in 2 shards" in said and "PSNR" in said
    assert f"1 broken (1 not a video)\n  {root / 'v' / 'broken.mp4'}: not a video" in said
    return root


@pytest.fixture
def copied(small, tmp_path):
    return Path(shutil.copytree(small / "pack", tmp_path / "pack"))


def test_frames_are_given_in_the_order_and_as_often_as_they_are_asked_for(small, video):
    row = rows_of(small / "pack")["c.mp4"]
    wanted = [7, 2, 7, 15, 0, 2]
    assert [video.number(f) for f in PackReader().read(place(row), wanted)] == wanted


def test_no_packet_is_sent_that_nothing_leans_on():
    table = np.zeros(8, PACKET)
    table["pts"], table["size"] = range(8), 1
    table["flags"][[0, 5]], table["flags"][[2, 3, 6]] = KEY, LEAF
    needed, starts = _needed(table, np.array([4]))
    assert needed.tolist() == [0, 1, 4] and starts == set()
    needed, starts = _needed(table, np.array([3, 6]))
    assert needed.tolist() == [0, 1, 3, 5, 6] and starts == {5}


def test_more_shards_and_decoders_than_stay_open(small, packed, video, monkeypatch):
    """The one that was not read for the longest time is closed, and opened again."""
    monkeypatch.setattr("mae_fast.data.packed._SHARDS", 1)
    monkeypatch.setattr("mae_fast.data.packed._DECODERS", 1)
    reader, rows = PackReader(), read_index(small / "pack")
    assert len({os.path.dirname(r.path) for r in rows}) == 2
    for row in [*rows, *rows]:
        assert video.number(reader.read(place(row), [5])[0]) == 5
        (shard,) = reader._shards.values()
        os.fstat(shard)  # is open
    others = [rows_of(packed / "pack")[name] for name in ("grey.mp4", "bt709.mp4")]
    for row in [*others, *others]:
        assert len(reader.read(place(row), [1])) == len(reader._decoders) == 1


def test_a_shard_whose_server_forgot_it_is_opened_anew(small, monkeypatch):
    reader, row = PackReader(), read_index(small / "pack")[0]
    reader.read(place(row), [0])
    opens, preads, opened = os.open, os.pread, []

    def pread(*args):
        if not opened:
            raise OSError(errno.ESTALE, "Stale file handle")
        return preads(*args)

    monkeypatch.setattr(os, "open", lambda *args: opened.append(args) or opens(*args))
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(BadVideo, match="tar: Stale file handle"):
        reader.read(place(row), [0])
    assert len(reader.read(place(row), [0])) == len(opened) == 1


def test_labels_names_and_broken_rows_come_out(small):
    rows = read_index(small / "pack", broken=True)
    assert [r.label for r in rows if not r.error] == ["a", "b", "c"]
    assert [r.error for r in rows if r.error] == ["not a video: the file holds text"]
    assert rows == read_index(small / "pack" / "index.jsonl", broken=True)
    assert check_pack(small / "pack").endswith("sound: 3 videos in 2 shards")
    [how] = packs_of(rows).values()
    assert (how["crf"], how["short_side"], how["scaler"]) == (20, 256, "bicubic")


def refusal(capsys, *args) -> str:
    code = cli.main(list(map(str, args)))
    said = capsys.readouterr().err.strip()
    assert code == 65 and "\n" not in said.split(":\n")[0], said
    return said


def test_check_names_a_damaged_packet_by_its_bytes(copied, capsys):
    row = read_index(copied)[1]
    at = int(np.load(copied / "packets.npy")[row.first + 3]["at"])
    shard = Path(row.path).parent
    data = bytearray(shard.read_bytes())
    data[at + 40] ^= 1
    shard.write_bytes(data)
    said = refusal(capsys, "pack", "--check", copied)
    assert f"{shard.name}: bytes {at} to " in said and "packet 3 of" in said
    with pytest.raises(BadVideo, match=f"damaged: bytes {at} to .* have changed"):
        PackReader().read(place(row), [2, 3])
    assert len(PackReader().read(place(row), [2, 4])) == 2
    data[at + 40] ^= 1
    data[row.at - 500] ^= 1  # the tar's head
    shard.write_bytes(data)
    assert "the tar's head of" in refusal(capsys, "pack", "--check", copied)


def test_a_cut_missing_or_foreign_part_is_one_line(copied, capsys, tmp_path):
    rows, shard = read_index(copied), copied / "shard-00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:3000])
    assert "byte 3000" in refusal(capsys, "pack", "--check", copied)
    with pytest.raises(DataError, match=r"shard-00001.tar: 3000 bytes, \d+ when packed: cut off"):
        read_index(copied)
    with pytest.raises(BadVideo, match=r"truncated: .* ends at byte 3000"):
        PackReader().read(place(rows[2]), [15])
    shard.unlink()
    assert "shard-00001.tar: missing" in refusal(capsys, "pack", "--check", copied)
    with pytest.raises(DataError, match=r"shard-00001.tar: missing from the pack"):
        read_index(copied)
    with pytest.raises(BadVideo, match="missing: no shard"):
        PackReader().read(place(rows[2]), [0])
    shard.write_bytes(data)
    index = copied / "index.jsonl"
    index.write_text(index.read_text().replace('"first": 12', '"first": 26'))
    with pytest.raises(DataError, match="is not the index that this pack was written with"):
        read_index(copied)
    row = dataclasses.replace(rows[1], first=rows[2].first)
    with pytest.raises(BadVideo, match="wrong index: its packets are another video's"):
        PackReader().read(place(row), [0])


def test_a_larger_short_side_and_another_pack_are_refused(small, tmp_path):
    write_pack(small / "i.jsonl", tmp_path / "other", {**HOW, "crf": 30, "short_side": 40}, 1)
    rows, other = read_index(small / "pack"), read_index(tmp_path / "other")
    for asked in (41, 0):
        with pytest.raises(ConfigError, match=f"short_side {asked} .*is more than .* holds"):
            ClipDataset(other, DataConfig(short_side=asked), 4, 0)
    ClipDataset(other, DataConfig(short_side=40), 4, 0)
    assert resume.draws(rows) != resume.draws(other)
    moved = Path(shutil.copytree(small / "pack", tmp_path / "moved"))
    assert resume.draws(read_index(moved)) == resume.draws(rows)


def test_the_same_command_goes_on_and_another_is_refused(small, tmp_path):
    how = {**HOW, "shard": 2}
    assert write_pack(small / "i.jsonl", small / "pack", how, 1).endswith("done already")
    with pytest.raises(ConfigError, match="holds another pack"):
        write_pack(small / "i.jsonl", small / "pack", {**how, "crf": 30}, 1)
    (tmp_path / "p" / ".partial").mkdir(parents=True)
    index = {"index": "of others"}
    (tmp_path / "p" / ".partial" / "how.json").write_text(json.dumps({**how, **index}))
    with pytest.raises(ConfigError, match=r"begun otherwise .index: of others -> "):
        write_pack(small / "i.jsonl", tmp_path / "p", how, 1)


def test_a_pack_that_was_killed_gives_the_same_bytes(small, tmp_path):
    """kill -9, once a shard is there and the next is begun."""
    out = tmp_path / "pack"
    call = (
        "from mae_fast.data import encode, pack, helpers; import sys, time\n"
        "write = pack._Work.write_shard\n"
        "def slow(self, shard, errors):\n"
        "    write(self, shard, errors)\n"
        "    (self.out / 'one').touch(); time.sleep(60)\n"
        "pack._Work.write_shard = slow\n"
        f"pack.write_pack({str(small / 'i.jsonl')!r}, {str(out)!r}, { ({**HOW, 'shard': 2})!r}, 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (out / "one").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (out / "one").unlink()
    assert not (out / "pack.json").exists() and (out / ".partial").is_dir()
    with pytest.raises(DataError, match=r"no such index|not a finished pack"):
        check_pack(out)
    first = (out / "shard-00000.tar").stat().st_mtime_ns
    write_pack(small / "i.jsonl", out, {**HOW, "shard": 2}, 1)
    assert (out / "shard-00000.tar").stat().st_mtime_ns == first
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted(p.name for p in (small / "pack").iterdir())
    for name in names:
        assert (out / name).read_bytes() == (small / "pack" / name).read_bytes(), name


def test_a_full_disk_is_asked_for_before_and_one_line(small, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert cli.main(["pack", str(small / "i.jsonl"), "-o", str(tmp_path / "p")]) == 73
    said = capsys.readouterr().err
    assert "it would take about 0.0 GB, and 0.0 GB are free" in said and said.count("\n") == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def full(*_, **__):
        raise OSError(28, "No space left on device", "x.mp4")

    monkeypatch.setattr("mae_fast.data.pack.answers", full)
    assert cli.main(["pack", str(small / "i.jsonl"), "-o", str(tmp_path / "q")]) == 73
    assert "cannot write x.mp4: No space left on device" in capsys.readouterr().err


def test_a_packed_video_opens_by_its_name(small):
    """FFmpeg reads a part of the tar: for `reconstruct`, and for pictures of a demo."""
    row = read_index(small / "pack")[2]
    with VideoReader(row.path) as reader:
        assert (reader.num_frames, reader.height, reader.width) == (16, 48, 64)
        assert torch.equal(reader.read([3, 9]), PackReader().read(place(row), [3, 9]))
    with pytest.raises(BadVideo, match="missing: no such file in the tar"):
        VideoReader(os.path.join(os.path.dirname(row.path), "other.mp4"))


def test_frames_that_a_source_had_lost_stay_lost(tmp_path, monkeypatch):
    """Their numbers stay: a damaged packet of the source refuses the same frames in the pack."""
    from damage import packets

    pos, size = packets(VIDEOS / "gop60.mp4")[40]
    data = bytearray((VIDEOS / "gop60.mp4").read_bytes())
    data[pos : pos + size] = bytes(size)
    (tmp_path / "damaged.mp4").write_bytes(data)
    sources = [tmp_path / "damaged.mp4", VIDEOS / "gop60.mp4"]
    build_index(sources, tmp_path / "i.jsonl", workers=1, progress=False)
    said = write_pack(tmp_path / "i.jsonl", tmp_path / "pack", HOW, 1)
    assert "; 1 with damaged frames" in said
    row, whole = read_index(tmp_path / "pack")
    refused: list[list[int]] = [[], []]
    with VideoReader(row.source) as source:
        ways = (source.read, lambda i: PackReader().read(place(row), i))
        for i in range(row.total):
            for read, numbers in zip(ways, refused, strict=True):
                try:
                    read([i])
                except BadVideo:
                    numbers.append(i)
    assert refused[0] == refused[1] and 0 < len(refused[0]) < 60
    assert row.damaged == len(refused[1])
    # `bench data` times what stands in where such a frame is drawn.
    dataset, lenient = (
        ClipDataset([row, whole], DataConfig(repeat_aug=1, strict=strict), 16, seed=0)
        for strict in (True, False)
    )
    bad, left = (sum(bool(data[g].bad) for g in range(8)) for data in (dataset, lenient))
    monkeypatch.setattr("mae_fast.bench.data._STAGED", 8)
    assert bad > left and len(stages(dataset)) == 5


def test_packs_are_coded_for_speed(small):
    """x264 writes into its first frame what it was asked for."""
    row = read_index(small / "pack")[0]
    data = (small / "pack" / os.path.basename(os.path.dirname(row.path))).read_bytes()
    said = data[data.index(b"x264 - core") :][:1500].split(b"\0")[0].decode()
    wanted = (
        "cabac=0",
        "deblock=0",
        "psy=0",
        "aq=1:0.30",
        "chroma_qp_offset=2",
        "keyint=1",
        "crf=20",
    )
    assert all(any(w.startswith(x) for w in said.split()) for x in wanted), said


def test_encoders_start_by_the_cores_that_may_be_used(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("mae_fast.data.pack.write_pack", lambda *how: asked.append(how[-1]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 9}, raising=False)
    assert cli.main(["pack", str(tmp_path / "i.jsonl")]) == 0
    assert cli.main(["pack", str(tmp_path / "i.jsonl"), "--workers", "7"]) == 0
    assert asked == [3, 7]


def test_an_unwritable_pack_is_refused(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot write"):
        write_pack(small / "i.jsonl", tmp_path / "file" / "pack", HOW, 1)
    with pytest.raises(ConfigError, match="is of a pack already"):
        write_pack(small / "pack", tmp_path / "again", HOW, 1)
