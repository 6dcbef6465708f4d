"""Every kind of broken file: the reason given, and that nothing is printed or left open."""

import os

import numpy as np
import pytest

from mae_fast.data.container import BadVideo
from mae_fast.data.decode import VideoReader, decoders, probe


def noise(k, height, width):
    return np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cut(path, share, source):
    path.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])


def make_zero_bytes(video, path):
    path.touch()


def make_text(video, path):
    path.write_text("Grüße, this is not a video\n" * 40)


def make_random_bytes(video, path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def make_playlist(video, path):
    video.write(path.with_name("other.mp4"), 10)
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")


def make_no_moov(video, path):
    cut(path, 0.6, video.write(path.with_name("whole.mp4")))


def make_faststart_cut(video, path):
    cut(path, 0.5, video.write(path.with_name("whole.mp4"), faststart=True, make=noise))


def make_matroska_cut(video, path):
    whole = video.write(path.with_name("whole.mkv"), make=noise)
    cut(path, 0.5, whole)


def make_avi_cut(video, path):
    whole = video.write(path.with_name("whole.avi"), codec="mpeg4", make=noise)
    cut(path, 0.5, whole)


def make_audio_only(video, path):
    video.write_audio(path)


def make_cover_picture(video, path):
    # MP4 muxed by FFmpeg keeps the picture as a cover.
    video.write_audio(path, cover=True)


def make_one_frame(video, path):
    video.write(path, 1)


def make_missing(video, path):
    pass


def make_folder(video, path):
    path.mkdir()


def make_pipe(video, path):
    os.mkfifo(path)


BAD = {
    "zero_bytes": (make_zero_bytes, "empty: 0 bytes"),
    "text_named_mp4": (make_text, "not a video: the file holds text"),
    "random_bytes": (make_random_bytes, "not a video: Invalid data"),
    "playlist_named_mp4": (make_playlist, "not a video: a concat playlist"),
    "truncated_no_moov": (make_no_moov, "truncated: begins as MP4"),
    "truncated_faststart": (make_faststart_cut, "truncated: (1[0-9]|2[0-9]) of 40 frames"),
    "truncated_matroska": (make_matroska_cut, "truncated: (1[0-9]|2[0-9]) of"),
    "truncated_avi": (make_avi_cut, "truncated: "),
    "audio_only": (make_audio_only, r"no video: no video stream \(audio\)"),
    "cover_picture": (make_cover_picture, r"no video: only a cover picture \(audio\)"),
    "one_frame": (make_one_frame, "1 frame: a picture"),
    "vanished": (make_missing, "missing: no such file"),
    "folder": (make_folder, "not a regular file"),
    "named_pipe": (make_pipe, "not a regular file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file(tmp_path, video, kind, capfd):
    make, reason = BAD[kind]
    path = tmp_path / "bad.mp4"
    make(video, path)
    capfd.readouterr()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for use in (probe, VideoReader):
        with pytest.raises(BadVideo, match=reason) as caught:
            use(path)
        assert caught.value.path == str(path) and "\n" not in caught.value.reason
        del caught
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    out, err = capfd.readouterr()
    assert out == err == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden(tmp_path, video):
    path = video.write(tmp_path / "a.mp4", 5)
    path.chmod(0)
    with pytest.raises(BadVideo, match="cannot be opened: Permission denied"):
        probe(path)


def test_permission_error_has_its_reason(tmp_path, video, monkeypatch):
    """The same for root, to whom nothing is forbidden."""
    path = video.write(tmp_path / "a.mp4", 5)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("av.open", refuse)
    with pytest.raises(BadVideo, match="cannot be opened: Permission denied"):
        probe(path)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_frame_or_two_short_of_the_count_is_no_truncation(tmp_path, video, missing):
    """Recorders often cut the last frame off."""
    import av

    whole = video.write(tmp_path / "w.mp4", faststart=True, bframes=0)
    with av.open(str(whole)) as container:
        # Read while the file is open: an entry points into what closing frees.
        positions = [entry.pos for entry in container.streams.video[0].index_entries]
    short = tmp_path / "s.mp4"
    short.write_bytes(whole.read_bytes()[: positions[-missing]])
    assert probe(short)["frames"] == 40 - missing
    with VideoReader(short) as reader:
        assert video.number(reader.read([39 - missing])[0]) == 39 - missing


def test_edit_list_is_no_truncation(tmp_path, video):
    """A clip cut out without re-encoding holds more frames than it shows."""
    import av

    whole = video.write(tmp_path / "w.mp4", gop=40, bframes=0)
    trimmed = tmp_path / "t.mp4"
    with av.open(str(whole)) as source, av.open(str(trimmed), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        first = 10 * 512
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts = packet.pts - first, packet.dts - first
                packet.stream = copy
                target.mux(packet)
    usable = [d for d, version in decoders().items() if version[0].isdigit()]
    for decoder in usable:
        with VideoReader(trimmed, decoder) as reader:
            assert reader.num_frames == 30
            assert [video.number(f) for f in reader.read([0, 1, 29])] == [10, 11, 39]
