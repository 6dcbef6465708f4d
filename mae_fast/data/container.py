"""A video file opened: its container and the stream of its pictures, or what is wrong with it."""

import errno
import functools
import os
import stat
import tarfile

from mae_fast.data import timeline

# Text that names other files; FFmpeg would open those.
_PLAYLISTS = ("concat", "hls", "dash", "imf")


class BadVideo(Exception):
    """A file that cannot give the frames asked of it. `path`, and `reason` in one line, which
    begins with its kind: "truncated: 30 of 100 frames". lasting: other frames of it, or another
    try, would fail as well."""

    def __init__(self, path, reason: str, lasting: bool = True):
        super().__init__(os.fspath(path), reason, lasting)
        self.path, self.reason, self.lasting = os.fspath(path), reason, lasting

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_video(path: str):
    """(container, stream of its pictures) of a file, by PyAV. Raises BadVideo."""
    import av

    # PyAV counts the errors that FFmpeg logs at any level but None; at this one it prints none.
    if av.logging.get_level() is None:
        av.logging.set_level(av.logging.PANIC)

    try:
        # The prefix and the list keep a name or a playlist from opening anything else.
        url, allowed = f"file:{path}", "file"
        if member := in_tar(path):
            begin, end = member
            url, allowed = f"subfile,,start,{begin},end,{end},,:file:{_tar(path)}", "subfile,file"
        else:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise BadVideo(path, "not a regular file")
        if size_of(path) == 0:
            raise BadVideo(path, "empty: 0 bytes")
        # Of tags that are no UTF-8; PyAV 19 takes them as they are, and no argument.
        tags = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        container = av.open(url, mode="r", options={"protocol_whitelist": allowed}, **tags)
    except FileNotFoundError:
        raise BadVideo(path, "missing: no such file") from None
    except OSError as e:
        lasting = e.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP)
        raise BadVideo(path, f"cannot be opened: {e.strerror}", lasting) from None
    except av.error.FFmpegError as e:
        raise BadVideo(path, _why_not_opened(path, e)) from None
    try:
        stream = _picture_stream(path, container)
        stream.codec_context.thread_count = 1
    except BaseException:
        container.close()
        raise
    return container, stream


def _tar(path: str) -> str:
    return os.path.dirname(path)


@functools.lru_cache(maxsize=64)
def in_tar(path: str) -> tuple[int, int] | None:
    """Where a video TAR/NAME begins and ends in its tar; None for a file of its own."""
    if not _tar(path).endswith(".tar") or not os.path.isfile(_tar(path)):
        return None
    try:
        with tarfile.open(_tar(path), "r:") as archive:
            info = archive.getmember(os.path.basename(path))
    except (KeyError, tarfile.TarError):
        raise BadVideo(path, "missing: no such file in the tar") from None
    return info.offset_data, info.offset_data + info.size


def size_of(path: str) -> int:
    """Bytes of a video, in a tar or not."""
    begin, end = in_tar(path) or (0, os.path.getsize(path))
    return end - begin


def refuse_if_cut(path: str, container, stream, packets: int) -> None:
    """A file shorter than it says itself is truncated; counts in its tags prove nothing."""
    size, stated = size_of(path), packets
    if "mp4" in container.format.name:
        entries = stream.index_entries
        if len(entries) > packets and max(e.pos + e.size for e in entries) > size:
            stated = len(entries)
    elif claimed := timeline.claimed_bytes(path, container.format.name):
        stated = round(packets * claimed / size)
    if stated - packets > max(2, 0.01 * stated):
        raise BadVideo(path, f"truncated: {packets} of {stated} frames")


def _picture_stream(path: str, container):
    import av

    if container.format.name in _PLAYLISTS:
        raise BadVideo(path, f"not a video: a {container.format.name} playlist")
    videos = container.streams.video
    moving = [s for s in videos if not s.disposition & av.stream.Disposition.attached_pic]
    if not moving:
        other = "only a cover picture" if videos else "no video stream"
        kinds = ", ".join(sorted({s.type for s in container.streams if s not in videos}))
        raise BadVideo(path, f"no video: {other}" + (f" ({kinds})" if kinds else ""))
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    if stream.codec_context is None:
        raise BadVideo(path, "unknown codec: FFmpeg has no decoder for it")
    return stream


def _why_not_opened(path: str, error: Exception) -> str:
    try:
        with open(path, "rb") as f:
            head = f.read(512)
    except OSError as e:
        return f"cannot be opened: {e.strerror}"
    for name, mark in (("MP4", b"ftyp"), ("AVI", b"AVI LIST"), ("Matroska", b"matroska")):
        if mark in head[:64]:
            return f"truncated: begins as {name}, but its header or index is missing or damaged"
    if all(c >= 32 or c in b"\t\n\r" for c in head):
        return "not a video: the file holds text"
    return f"not a video: {error.strerror}"
