"""Videos whose containers say what is not so: the decoder's frames, in its order, or a refusal.

videos/ holds files whose frames carry their number as bits, and its complement below. What ffmpeg
gives of each (`-vsync passthrough`) was written down with ffmpeg 5.1 and PyAV 18.1.
"""

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import odd_videos
import pytest
import torch

from mae_fast.config import DataConfig
from mae_fast.data import decode, timeline
from mae_fast.data.container import BadVideo
from mae_fast.data.decode import VideoReader, probe
from mae_fast.data.frames import Frames
from mae_fast.data.index import VideoRow, build_index, read_index
from mae_fast.data.loader import ClipDataset

VIDEOS = Path(__file__).parent / "videos"
UNUSABLE = decode._unusable("torchcodec")
DECODERS = [
    "pyav",
    pytest.param(
        "torchcodec",
        marks=pytest.mark.skipif(UNUSABLE is not None, reason=f"torchcodec {UNUSABLE}"),
    ),
]
DROPPED = [i for i in range(60) if i not in (5, 25, 45)]
# file -> numbers of its frames, frames a second on average
GIVEN = {
    "cut_hevc_opengop_noelst.mp4": (range(24, 60), 25),
    "dropped_mjpeg.avi": (DROPPED, 56 * 25 / 59),
    "gop60.mp4": (range(60), 25),
    "midgop.ts": (range(12, 60), 25),
    "ps2.mpg": (range(90), 25),
    "rawm2v.mp4": (range(60), 25),
    "seg265_1.mkv": (range(50, 96), 25),
    "vfr.mkv": (range(120), 119 / 12.8),
    "vfr.mp4": (range(120), 119 / 12.8),
}


def bits(frame) -> int:
    """The number of a frame of videos/: eight columns, brighter above than below for a one."""
    h, w = frame.shape[:2]
    grey = frame.float().mean(2)
    columns = [slice(b * w // 8 + w // 32, (b + 1) * w // 8 - w // 32) for b in range(8)]
    above = [grey[h // 24 : h // 3 - h // 24, x].mean() for x in columns]
    below = [grey[h // 3 + h // 24 : 2 * h // 3 - h // 24, x].mean() for x in columns]
    assert all(abs(a - b) > 120 for a, b in zip(above, below, strict=True)), "a torn frame"
    return sum(int(a > b) << i for i, (a, b) in enumerate(zip(above, below, strict=True)))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", GIVEN)
def test_the_decoders_frames_in_its_order(name, decoder, strict):
    numbers, rate = GIVEN[name]
    with VideoReader(VIDEOS / name, decoder, strict=strict) as reader:
        assert [bits(f) for f in reader.read(range(reader.num_frames))] == list(numbers)
        assert reader.fps == pytest.approx(rate, rel=1e-3)
        access = reader.access
        order = np.random.default_rng(0).permutation(len(numbers))[:12]
        for i in [len(numbers) - 1, *order]:
            assert bits(reader.read([i])[0]) == numbers[i], i
    # Opened with what was found, nothing is decoded before it is asked for.
    with VideoReader(VIDEOS / name, decoder, access, strict) as reader:
        assert bits(reader.read([7])[0]) == numbers[7]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="there is no ffmpeg")
@pytest.mark.parametrize("name", odd_videos.SAMPLE)
def test_frames_are_ffmpegs(tmp_path, name):
    try:
        path = odd_videos.make(name, tmp_path, 40)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"this ffmpeg cannot write it: {e.stderr.decode().strip()[-100:]}")
    assert odd_videos.differences(path) == []


def test_plain_files_are_not_decoded_at_index(monkeypatch, tmp_path, video):
    path = video.write(tmp_path / "a.mp4")
    monkeypatch.setattr(Frames, "_decode_all", None)
    assert probe(path)["frames"] == 40
    with pytest.raises(TypeError):
        probe(VIDEOS / "midgop.ts")


def test_what_was_found_is_kept_in_the_index(tmp_path, monkeypatch):
    build_index([VIDEOS], tmp_path / "i.jsonl", workers=1, progress=False, verify=True)
    rows = {Path(r.path).name: r for r in read_index(tmp_path / "i.jsonl")}
    assert {n: rows[n].total for n in GIVEN} == {n: len(g) for n, (g, _) in GIVEN.items()}
    assert rows["midgop.ts"].hidden == "0-8" and rows["hflip.mp4"].mirrored
    assert not rows["rawm2v.mp4"].ordered and {r.damaged for r in rows.values()} == {0}
    monkeypatch.setattr(Frames, "_decode_all", None)
    data = ClipDataset(list(rows.values()), DataConfig(workers=0, max_bad_share=0), 8, seed=0)
    assert [data[g].bad for g in range(len(rows))] == [[]] * len(rows)


def test_an_index_of_before_is_read_and_looks_again(tmp_path):
    """Rows without what is found today: the file is looked at when it is opened."""
    name = str(VIDEOS / "seg265_1.mkv")
    data = ClipDataset([VideoRow(name, frames=46, fps=25.0)], DataConfig(), 8, seed=0)
    assert data[0].bad == []
    (tmp_path / "i.jsonl").write_text(f'{{"path": "{name}", "frames": 46, "fps": 25.0}}\n')
    assert read_index(tmp_path / "i.jsonl")[0].access is None
    done = build_index([name], tmp_path / "i.jsonl", workers=1, progress=False)
    assert done.reused == 0 and read_index(tmp_path / "i.jsonl")[0].access.frames == 46


def test_segments_are_cut_by_time_not_by_rate():
    """One second of 60 frames, then 5 a second."""
    for name in ("vfr.mp4", "vfr.mkv"):
        facts = probe(VIDEOS / name, (5, 10))
        assert (facts["start"], facts["frames"]) == (60 + 4 * 5, 25)
        assert facts["fps"] == pytest.approx(5, rel=1e-3)
    with pytest.raises(BadVideo, match=r"segment: 90 to 95 s lies outside the 12\.9 s video"):
        probe(VIDEOS / "vfr.mp4", (90, 95))


MATRICES = {
    "as it is": (1, 0, 0, 1),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "half a turn": (-1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "right": (0, 1, -1, 0),
    "left": (0, -1, 1, 0),
    "anti-transposed": (0, -1, -1, 0),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", MATRICES)
def test_every_display_matrix_is_shown_upright(tmp_path, name, decoder):
    """Pixel (x, y) goes to (a x + c y, b x + d y)."""
    a, b, c, d = MATRICES[name]
    data = bytearray((VIDEOS / "gop60.mp4").read_bytes())
    with VideoReader(VIDEOS / "gop60.mp4") as reader:
        want = reader.read([9])[0]
    want = want if a or d else want.transpose(0, 1)
    want = want.flip([k for k, v in ((1, a or c), (0, d or b)) if v < 0])
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    with VideoReader(tmp_path / "turned.mp4", decoder, strict=False) as reader:
        assert torch.equal(reader.read([9])[0], want)
        assert (reader.height, reader.width) == tuple(want.shape[:2])


def test_a_picture_askew_is_refused(tmp_path):
    data = bytearray((VIDEOS / "gop60.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    r = 46341  # 45 degrees
    data[at : at + 36] = struct.pack(">9i", r, r, 0, -r, r, 0, 0, 0, 1 << 30)
    (tmp_path / "askew.mp4").write_bytes(data)
    with pytest.raises(BadVideo, match="turned by -45 degrees: only quarter turns"):
        probe(tmp_path / "askew.mp4")


def packets(path) -> list[tuple[int, int]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [(p.pos, p.size) for p in container.demux(stream) if p.size]


def test_what_leans_on_a_damaged_frame_is_refused(tmp_path):
    """gop60.mp4 is one group of pictures: from the damage on nothing is sure."""
    whole = (VIDEOS / "gop60.mp4").read_bytes()
    with VideoReader(VIDEOS / "gop60.mp4") as reader:
        clean = reader.read(range(60)).int()
    rng, caught = np.random.default_rng(0), 0
    for k, (pos, size) in list(enumerate(packets(VIDEOS / "gop60.mp4")))[::6]:
        for damage in (rng.bytes(size - size // 2), bytes(size - size // 2)):
            data = bytearray(whole)
            data[pos + size // 2 : pos + size] = damage
            (tmp_path / "damaged.mp4").write_bytes(data)
            try:
                reader = VideoReader(tmp_path / "damaged.mp4")
            except BadVideo as e:
                assert k == 0 and e.reason == "no frame decodes"
                continue
            with reader:
                for i in range(0, min(60, reader.num_frames), 7):
                    try:
                        frame = reader.read([i])[0].int()
                    except BadVideo as e:
                        assert "damaged: frame" in e.reason and not e.lasting
                        caught += 1
                        continue
                    assert (frame - clean[i]).abs().float().mean() < 3, (k, i)
    assert caught > 40


def test_lenient_gives_what_ffmpeg_gives_of_a_damaged_file(tmp_path):
    pos, size = packets(VIDEOS / "gop60.mp4")[20]
    data = bytearray((VIDEOS / "gop60.mp4").read_bytes())
    data[pos + size // 2 : pos + size] = bytes(size - size // 2)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with VideoReader(path, strict=False) as reader:
        assert len(reader.read([59])) == 1
    with VideoReader(path) as reader, pytest.raises(BadVideo, match="leans on frame"):
        reader.read([59])
    assert 10 < probe(path, verify=True)["damaged"] < 60 and probe(path)["damaged"] == -1


def test_a_damaged_clip_does_not_condemn_the_video(tmp_path):
    """Which draws are replaced must not depend on which were seen before: a resumed run."""
    pos, size = packets(VIDEOS / "gop60.mp4")[40]
    data = bytearray((VIDEOS / "gop60.mp4").read_bytes())
    data[pos : pos + size] = bytes(size)
    (tmp_path / "damaged.mp4").write_bytes(data)
    names = [str(tmp_path / "damaged.mp4"), str(VIDEOS / "vfr.mp4")]
    rows = [VideoRow(n, frames=60, fps=5.0, total=t) for n, t in zip(names, (60, 120), strict=True)]
    cfg = DataConfig(workers=0, repeat_aug=1)

    def outcome(data, draws):
        return {g: (b.paths, b.bad) for g in draws for b in [data[g]]}

    straight = outcome(ClipDataset(rows, cfg, 4, seed=0), range(16))
    kinds = [bool(bad) for _, bad in straight.values()]
    assert any(kinds) and not all(kinds)
    assert outcome(ClipDataset(rows, cfg, 4, seed=0), reversed(range(16))) == straight
    lenient = outcome(ClipDataset(rows, replace(cfg, strict=False), 4, seed=0), range(16))
    assert sum(bool(bad) for _, bad in lenient.values()) < sum(kinds)


def test_a_moments_trouble_is_tried_again_and_not_remembered(monkeypatch):
    rows = [VideoRow(str(VIDEOS / "gop60.mp4"), frames=60, fps=25.0, total=60)]
    failing, opened = [2], av.open

    def flaky(*args, **options):
        if failing[0]:
            failing[0] -= 1
            raise OSError(5, "Input/output error")
        return opened(*args, **options)

    monkeypatch.setattr(av, "open", flaky)
    waited = []
    monkeypatch.setattr("mae_fast.data.loader.time.sleep", waited.append)
    data = ClipDataset(rows, DataConfig(repeat_aug=1), 8, seed=0)
    assert data[0].bad == [] and waited == [0.0, 0.5]
    failing[0] = 3  # one more than tries: replaced by another draw, which finds the file again
    batch = data[1]
    assert batch.bad == [(rows[0].path, "cannot be opened: Input/output error")]
    assert data[2].bad == []


def test_joined_recordings_are_read_whole(tmp_path, video):
    """Timestamps that start again, or jump by a day, where streams were joined."""
    a = video.write(tmp_path / "a.ts", 20).read_bytes()
    b = video.write(tmp_path / "b.ts", 20, pts=range(10**6, 10**6 + 20)).read_bytes()
    for joined in (a + a, a + b, b + a):
        (tmp_path / "joined.ts").write_bytes(joined)
        with VideoReader(tmp_path / "joined.ts") as reader:
            frames = reader.read(range(reader.num_frames))
            assert [video.number(f) for f in frames] == [*range(20)] * 2
            assert video.number(reader.read([37])[0]) == 17
            assert reader.fps == pytest.approx(25, rel=0.03)


def test_a_stale_count_is_no_truncation(tmp_path, video):
    """A DURATION tag of the file that this one was cut from."""
    path = video.write(tmp_path / "a.mkv")
    data = path.read_bytes()
    at = data.index(b"DURATION") + 8
    at = data.index(b"00:00:0", at)
    path.write_bytes(data[: at + 6] + b"9" + data[at + 7 :])
    assert probe(path)["frames"] == 40


def test_ranges_and_rates():
    assert timeline.write_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert timeline.read_ranges("0-2,5,7-8") == {0, 1, 2, 5, 7, 8}
    assert timeline.read_ranges("") == set()
    assert timeline.steps([0, 4, 8, 3, 7, 5000, 5004], 100) == [0, 4, 8, 12, 16, 20, 24]
