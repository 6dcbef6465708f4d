"""Frames by number: exact for every container, codec, order of reading and decoder."""

import itertools
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch

from mae_fast.data import decode
from mae_fast.data.container import BadVideo
from mae_fast.data.decode import VideoReader, decoders, probe
from mae_fast.data.timeline import Access
from mae_fast.errors import ConfigError

UNUSABLE = decode._unusable("torchcodec")
TORCHCODEC = pytest.param(
    "torchcodec", marks=pytest.mark.skipif(UNUSABLE is not None, reason=f"torchcodec {UNUSABLE}")
)
VFR = [int(t) for t in np.cumsum([0, *[1, 4, 2, 9, 1] * 8])][:40]
X265 = "log-level=none:keyint=10:bframes=3"
# name of the file -> how it is written
FILES = {
    "bframes.mp4": {},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}},
    "long_gop.mp4": {"gop": 250},
    "all_intra.mp4": {"gop": 1, "bframes": 0},
    "two_frame_gop.mp4": {"gop": 2, "bframes": 1},
    "vfr.mp4": {"pts": VFR},
    "vfr.mkv": {"pts": VFR},
    "bframes.mkv": {},
    "hevc_open_gop.mp4": {"codec": "libx265", "options": {"x265-params": X265}},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg4.avi": {"codec": "mpeg4", "bframes": 0},
    "mpeg4_bframes.avi": {"codec": "mpeg4"},
    "h264_bframes.avi": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "stream.ts": {},
    "raw.h264": {},
    "odd_size.mp4": {"width": 101, "height": 67, "pix_fmt": "yuv444p"},
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "grey.mp4": {"pix_fmt": "gray"},
    "ünïcode 视频 #1: a%20b.mp4": {},
    "late_start.mp4": {"pts": range(30, 70)},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, video):
    made = {}

    def get(name):
        if name not in made:
            made[name] = video.write(tmp_path_factory.mktemp("decode") / name, **FILES[name])
        return made[name]

    return get


@pytest.mark.parametrize("decoder", ["pyav", TORCHCODEC])
@pytest.mark.parametrize("name", FILES)
def test_every_frame_alone_and_all_at_once(files, video, name, decoder):
    with VideoReader(files(name), decoder, strict=decoder == "pyav") as reader:
        assert reader.num_frames == 40
        everything = reader.read(range(40))
        assert [video.number(f) for f in everything] == list(range(40))
        for i in (39, 0, 17, 18, 5, 29, 30, 31, 1):
            assert torch.equal(reader.read([i])[0], everything[i]), i


@pytest.mark.parametrize("decoder", ["pyav", TORCHCODEC])
def test_any_order_and_repeats(files, video, decoder):
    wanted = [30, 2, 2, 39, 0, 30, 17]
    with VideoReader(files("bframes.mp4"), decoder, strict=False) as reader:
        frames = reader.read(torch.tensor(wanted))
    assert frames.dtype == torch.uint8 and frames.shape == (7, 48, 64, 3)
    assert [video.number(f) for f in frames] == wanted


def test_pyav_19_takes_no_metadata_errors(files, monkeypatch):
    """The PyAV of Python 3.12 and later (constraints.txt)."""
    opened = av.open
    monkeypatch.setattr(av, "__version__", "19.0.2")
    monkeypatch.setattr(
        av, "open", lambda file, mode, options: opened(file, mode=mode, options=options)
    )
    with VideoReader(files("bframes.mp4")) as reader:
        assert reader.num_frames == 40


@pytest.mark.parametrize("index", [-1, 40])
def test_number_outside_the_video_is_refused(files, index):
    with VideoReader(files("bframes.mp4")) as reader, pytest.raises(IndexError, match="of 40"):
        reader.read([0, index])


def count_decoded(reader, wanted):
    """How many frames the codec gave for one read."""
    given, frames = [], reader._frames._decoded
    reader._frames._decoded = lambda start: (given.append(f) or f for f in frames(start))
    reader.read(wanted)
    return len(given)


def test_each_frame_is_decoded_once(files):
    with VideoReader(files("bframes.mp4")) as reader:
        assert count_decoded(reader, [*range(40), *range(40)]) == 40


def test_seeks_instead_of_decoding_the_whole_file(tmp_path, video):
    path = video.write(tmp_path / "long.mp4", 240, gop=10)
    with VideoReader(path) as reader:
        assert count_decoded(reader, [235]) <= 10
        assert count_decoded(reader, [3, 121, 125, 235]) <= 4 + 6 + 6
        assert [video.number(f) for f in reader.read([3, 121, 125, 235])] == [3, 121, 125, 235]


def test_seek_that_lands_late_starts_earlier(files, video):
    """A container may seek past the frame wanted; it must not be taken for missing."""
    with VideoReader(files("bframes.mp4")) as reader:
        frames = reader._frames._decoded

        def late(start):
            return itertools.islice(frames(start), 4, None) if start else frames(start)

        reader._frames._decoded = late
        assert [video.number(f) for f in reader.read([21, 12])] == [21, 12]


@pytest.mark.parametrize("degrees", [90, 180, -90])
@pytest.mark.parametrize("decoder", ["pyav", TORCHCODEC])
def test_rotation_is_applied(tmp_path, video, decoder, degrees):
    path = video.write(tmp_path / "r.mp4", 6, rotate=degrees)
    with VideoReader(path, decoder, strict=False) as reader:
        frame = reader.read([5])[0]
        size = (48, 64) if degrees == 180 else (64, 48)
        assert tuple(frame.shape[:2]) == size == (reader.height, reader.width)
    upright = frame.rot90(-degrees // 90)
    assert video.number(upright) == 5
    assert upright[-6:].float().mean() > upright[:6].float().mean() + 30
    assert probe(path)["rotation"] == degrees % 360


def test_grey_stays_grey_and_ten_bits_become_eight(files):
    with VideoReader(files("grey.mp4")) as reader:
        grey = reader.read([7])[0]
    assert torch.equal(grey[..., 0], grey[..., 1]) and torch.equal(grey[..., 0], grey[..., 2])
    with VideoReader(files("ten_bit.mp4")) as reader:
        ten = reader.read([7])[0]
    with VideoReader(files("bframes.mp4")) as reader:
        assert (ten.int() - reader.read([7])[0].int()).abs().float().mean() < 4


@pytest.mark.skipif(UNUSABLE is not None, reason=f"torchcodec {UNUSABLE}")
@pytest.mark.parametrize("name", FILES)
def test_torchcodec_gives_the_same_pixels(files, name):
    frames = []
    for decoder in ("pyav", "torchcodec"):
        with VideoReader(files(name), decoder, strict=False) as reader:
            frames.append(reader.read(range(0, 40, 3)))
    assert torch.equal(*frames)


@pytest.mark.skipif(UNUSABLE is not None, reason=f"torchcodec {UNUSABLE}")
def test_torchcodec_is_used_when_asked_for(files, monkeypatch):
    whole = Access(40, whole=True)
    with VideoReader(files("vfr.mp4"), "torchcodec") as reader:
        assert reader._torchcodec is None  # strict, and nobody has decoded it
    monkeypatch.setattr(VideoReader, "_read_pyav", None)
    for how in ({"strict": False}, {"access": whole}):
        with VideoReader(files("vfr.mp4"), "torchcodec", **how) as reader:
            assert reader.read([3]).shape == (1, 48, 64, 3)


def test_shrinks_while_reading(files):
    with VideoReader(files("odd_size.mp4")) as reader:
        assert reader.read([0, 5], short_side=32).shape == (2, 32, 101 * 32 // 67, 3)
        assert reader.read([0, 5], short_side=67).shape == (2, 67, 101, 3)


def test_probe(files):
    facts = probe(files("vfr.mp4"))
    assert (facts["frames"], facts["width"], facts["height"]) == (40, 64, 48)
    assert (facts["codec"], facts["pix_fmt"], facts["rotation"]) == ("h264", "yuv420p", 0)
    assert facts["duration"] == pytest.approx(VFR[-1] / 25 + 1 / facts["fps"], rel=1e-3)
    assert facts["fps"] == pytest.approx(40 * 25 / (VFR[-1] + 1), rel=0.1)
    assert probe(files("odd_size.mp4"))["width"] == 101


def test_unknown_or_missing_decoder_is_refused(files, monkeypatch):
    with pytest.raises(ConfigError, match="known: auto, pyav, torchcodec"):
        VideoReader(files("bframes.mp4"), "decord")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(ConfigError, match="torchcodec"):
        VideoReader(files("bframes.mp4"), "torchcodec")
    assert "torchcodec" in decoders()["torchcodec"] and decoders()["pyav"][0].isdigit()


def test_a_damaged_frame_is_named(tmp_path, files):
    """Bytes of one packet in the middle are overwritten: that frame is refused, others are not."""
    import av

    path = files("all_intra.mp4")
    with av.open(str(path)) as container:
        entry = container.streams.video[0].index_entries[20]
        start, end = entry.pos, entry.pos + entry.size
    data = bytearray(path.read_bytes())
    data[start:end] = bytes(end - start)
    broken = tmp_path / "damaged.mp4"
    broken.write_bytes(data)
    with VideoReader(broken) as reader:
        assert reader.read([19, 21]).shape[0] == 2
        with pytest.raises(BadVideo, match="frame 20 of 40"):
            reader.read([19, 20, 21])


def test_a_frame_that_the_codec_had_to_make_up_is_named(tmp_path, video):
    import av

    path = video.write(tmp_path / "a.mp4", gop=1, bframes=0, width=320, height=240)
    with av.open(str(path)) as container:
        entry = container.streams.video[0].index_entries[20]
        start, end = entry.pos + int(entry.size * 0.3), entry.pos + entry.size
    data = bytearray(path.read_bytes())
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with VideoReader(path) as reader:
        assert reader.read([19, 21]).shape[0] == 2
        with pytest.raises(BadVideo, match="damaged: frame 20 of 40"):
            reader.read([20])


class Shim:
    """An object with some attributes replaced."""

    def __init__(self, real, **changes):
        self.__dict__.update(changes, real=real)

    def __getattr__(self, name):
        return getattr(self.real, name)


def test_a_seek_between_keyframes_gives_no_torn_frames(files, video):
    """Some containers seek to any packet; decoding from there gives pictures that look right to
    the codec and are not."""
    with VideoReader(files("mpeg4.mp4")) as reader:
        want = reader.read([25])
        frames = reader._frames
        real, step = frames.container, frames.pts[1] - frames.pts[0]
        frames.container = Shim(
            real,
            seek=lambda pts, stream: real.seek(pts + 3 * step, stream=stream, any_frame=True),
        )
        assert torch.equal(reader.read([25]), want)


def test_colour_conversion_starts_no_threads(files):
    """swscale's default is one thread for each core, for each frame."""
    asked = []

    def spy(frame):
        def to_ndarray(**options):
            asked.append(options["threads"])
            return frame.to_ndarray(**options)

        return Shim(frame, to_ndarray=to_ndarray)

    with VideoReader(files("bframes.mp4")) as reader:
        decode_run = reader._decode
        reader._decode = lambda run: ((i, spy(frame)) for i, frame in decode_run(run))
        reader.read([3, 4])
    assert asked == [1, 1]


@pytest.mark.skipif(UNUSABLE is not None, reason=f"torchcodec {UNUSABLE}")
def test_a_neighbour_in_place_of_a_missing_frame_is_noticed(files, video):
    """torchcodec gives one where a frame does not decode; its timestamp tells, PyAV decides."""
    with VideoReader(files("bframes.mp4"), "torchcodec", strict=False) as reader:
        real = reader._torchcodec
        reader._torchcodec = Shim(real, get_frames_at=lambda wanted: real.get_frames_at([4, 7]))
        assert [video.number(f) for f in reader.read([4, 6])] == [4, 6]


def test_importing_loads_no_decoder():
    code = (
        "import sys, mae_fast.data; "
        "print([m for m in ('av', 'torchcodec', 'pyarrow') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == "[]", out.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="counts threads in /proc")
def test_one_thread(files):
    def threads():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("Threads"))

    with VideoReader(files("bframes.mp4")) as reader:
        reader.read([0])
        before = threads()
        reader.read(range(40))
        assert reader._frames.stream.codec_context.thread_count == 1
        assert threads() == before


def test_bad_video_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(BadVideo("a.mp4", "empty: 0 bytes")))
    assert (error.path, error.reason, str(error)) == (
        "a.mp4",
        "empty: 0 bytes",
        "a.mp4: empty: 0 bytes",
    )
