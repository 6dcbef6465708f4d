"""One video made ready for a pack: every frame coded by itself (H.264), or its packets copied.

Runs in a process of its own (helpers.py). Leaves FILE.mp4 and FILE.npy, its packets as packed.py
has them, with bytes counted from the mp4's begin.
"""

import contextlib
import itertools
import os
import zlib
from base64 import b64encode
from fractions import Fraction
from typing import Any

import numpy as np

from mae_fast.data.container import BadVideo, open_video
from mae_fast.data.decode import VideoReader
from mae_fast.data.filters import OPTIONS, Look, too_short
from mae_fast.data.frames import Frames
from mae_fast.data.index import VideoRow, file_stat
from mae_fast.data.packed import DAMAGED, HIDDEN, KEY, LEAF, PACKET, open_decoder
from mae_fast.data.timeline import orientation

SCALER = "bicubic"  # swscale's, with accurate rounding
# Of x264. CAVLC without deblocking decodes 2.5 times as fast as x264's defaults. What deblocking
# would gain, a file of the same size gains by leaving out what is chosen for the eye.
PRESET, CODING = "slow", "cabac=0:psy=0:aq-strength=0.3:no-deblock=1:chroma-qp-offset=2"
# Codecs that an mp4 takes, and of which a decoder needs the parameter sets and packets alone.
_COPIED = ("h264", "hevc", "vp9", "mpeg4", "mpeg2video")


def encode(path: str, row: dict[str, Any], how: dict[str, Any], out: str) -> dict[str, Any]:
    """The video of an index's row, as a pack of `how` holds it, in `out`.mp4 and .npy; returns the
    columns of its new row that differ, and "psnr"; with filters its "pieces" too (Look.pieces), or
    nothing else where none is kept. Raises BadVideo."""
    row = VideoRow(**row)
    if row.bytes and file_stat(path) != (row.bytes, row.mtime):
        raise BadVideo(path, "changed: another size or time than when it was indexed")
    look = Look(how, row.fps) if any(how.get(name) for name in OPTIONS) else None
    if look and not look.detector and (error := too_short(row.duration, how)):
        return {"pieces": [{"start": 0, "frames": row.frames, "error": error}]}
    temporary = out + ".tmp"
    with contextlib.closing(Frames(path, row.access)) as frames:
        if len(frames) < row.start + row.frames:
            reason = f"changed: {len(frames)} frames, {row.start + row.frames} when indexed"
            raise BadVideo(path, reason)
        table, facts = (_copy if how["copy"] else _encode)(frames, row, how, temporary, look)
        if look:
            facts["pieces"] = look.pieces(_seconds(frames, row))
    if look and all(piece["error"] for piece in facts["pieces"]):
        os.unlink(temporary)
        return {"pieces": facts["pieces"]}
    with open(temporary, "rb") as f:
        data = f.read()
    for k, (at, _, size, _, _) in enumerate(table.tolist()):
        table["crc"][k] = zlib.crc32(data[at : at + size])
    np.save(out + ".npy", table)
    os.replace(temporary, out + ".mp4")
    return {**facts, "bytes": len(data), "packets": len(table), "crc": zlib.crc32(data)}


def _encode(frames: Frames, row: VideoRow, how: dict, file: str, look) -> tuple[np.ndarray, dict]:
    begin, n = row.start, row.frames
    times = _times(frames, begin, n)
    writer, done, sizes = None, 0, {}
    flags = np.zeros(n, np.uint32)
    kept: dict[int, np.ndarray] = {}  # pictures as they were given to the encoder
    try:
        for i, frame, damage in frames.numbered(begin):
            k = i - begin
            if k >= n:
                break
            # What was met twice: a seek that met damage is given up, and begun again from earlier.
            if k < done:
                continue
            writer = writer or _Writer(file, frame, frames.stream.time_base, row.fps, how)
            if damage is not None or frame.is_corrupt:
                flags[k] = DAMAGED
            picture = writer.write(frame, times[k])
            if look:
                look.add(k, frame)
            if k in (0, n // 2, n - 1):
                kept[k] = picture
            sizes[k], done = times[k], k + 1
    finally:
        if writer:
            writer.close()
    if writer is None:
        raise BadVideo(frames.path, f"damaged: no frame of {n} decodes")
    table = np.zeros(n, PACKET)
    table["pts"], table["flags"] = times, flags
    setup = _places(frames, file, table, sizes, Fraction(frames.stream.time_base), how)
    facts = {
        "start": 0,
        "total": n,
        "width": writer.width,
        "height": writer.height,
        "codec": "h264",
        "pix_fmt": "yuv420p",
        "rotation": 0,
        "mirrored": False,
        "ordered": True,
        "seekable": True,
        "hidden": "",
        "gop": how["gop"],
        "damaged": int((flags != 0).sum() + n - len(sizes)),
        "setup": b64encode(setup).decode(),
        "psnr": _psnr(file, setup, table, kept) if how["gop"] == 1 else None,
    }
    return table, facts


def _times(frames: Frames, begin: int, n: int) -> list[int]:
    """The frames' times from 0 on, in the stream's units: the source's own where they rise."""
    times = frames.times[begin : begin + n]
    rise = len(times) == n and None not in times
    if rise and all(a < b for a, b in itertools.pairwise(times)):
        return [t - times[0] for t in times]
    unit = Fraction(frames.stream.time_base)
    step = max(1, round(1 / (Fraction(frames.fps) * unit)))
    return [k * step for k in range(n)]


def _seconds(frames: Frames, row: VideoRow) -> list[float]:
    """When each frame is shown, and where the last one ends."""
    unit = Fraction(frames.stream.time_base)
    times = [float(t * unit) for t in _times(frames, row.start, row.frames)]
    return [*times, times[-1] + 1 / row.fps]


class _Writer:
    """The mp4 of one video. Size, colours and range are those of its first frame."""

    def __init__(self, file: str, frame, unit: Fraction, fps: float, how: dict):
        import av
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        matrix = frame.side_data.get("DISPLAYMATRIX")
        turned = orientation(bytes(matrix)) if matrix is not None else (False, 0)
        if turned is None:
            raise BadVideo(file, f"turned by {frame.rotation} degrees: not a quarter turn")
        self.mirrored, self.turns = turned
        height, width = even_size(frame.height, frame.width, how["short_side"])
        # threads: swscale would start one for each core.
        scaler = Interpolation[SCALER.upper()] | Interpolation.ACCURATE_RND
        self.convert = dict(
            width=width, height=height, format="yuv420p", interpolation=scaler, threads=1
        )
        rgb = frame.format.is_rgb or any(s in frame.format.name for s in ("rgb", "bgr", "pal8"))
        if rgb:
            self.convert |= dict(dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG)
        elif frame.format.name.startswith("yuvj"):
            full = dict(src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.JPEG)
            self.convert |= full
        self.height, self.width = (width, height) if self.turns % 2 else (height, width)
        self.unit, self.container = unit, av.open(file, "w", format="mp4")
        keys = f"keyint={how['gop']}:min-keyint={how['gop']}:scenecut=0:bframes=0:threads=1"
        keys += f":{CODING}"
        options = {"crf": str(how["crf"]), "preset": PRESET, "x264-params": keys}
        rate = Fraction(fps).limit_denominator(2000)
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        self.stream.width, self.stream.height = self.width, self.height
        self.stream.pix_fmt = "yuv420p"
        context = self.stream.codec_context
        context.thread_count, context.time_base = 1, unit
        first = self.upright(frame)
        context.colorspace, context.color_range = first.colorspace, first.color_range
        context.color_primaries, context.color_trc = first.color_primaries, first.color_trc

    def upright(self, frame):
        import av

        new = frame.reformat(**self.convert)
        if not self.mirrored and not self.turns:
            return new
        turned = av.VideoFrame(self.width, self.height, "yuv420p")
        for source, plane in zip(_planes(new), turned.planes, strict=True):
            image = source[:, ::-1] if self.mirrored else source
            image = np.rot90(image, self.turns)
            rows = np.zeros((plane.height, plane.line_size), np.uint8)
            rows[:, : plane.width] = image
            plane.update(rows)
        turned.colorspace, turned.color_range = new.colorspace, new.color_range
        turned.color_primaries, turned.color_trc = new.color_primaries, new.color_trc
        return turned

    def write(self, frame, time: int) -> np.ndarray:
        """The planes of the picture that was coded, one after another."""
        new = self.upright(frame)
        planes = np.concatenate([p.ravel() for p in _planes(new)])
        new.pts, new.time_base, new.pict_type = time, self.unit, 0
        self.container.mux(self.stream.encode(new))
        return planes

    def close(self) -> None:
        self.container.mux(self.stream.encode(None))
        self.container.close()


def even_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """A picture's size in a pack: short side brought down to short_side (0: never), the long one
    rounded down as the official code does, and both to even numbers, as 4:2:0 has them."""
    short = min(height, width)
    if short_side and short > short_side:
        height, width = height * short_side // short, width * short_side // short
    return max(2, height // 2 * 2), max(2, width // 2 * 2)


def _planes(frame) -> list[np.ndarray]:
    """Y, U and V of an 8-bit planar frame, without what pads their rows; views."""
    return [
        np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width]
        for p in frame.planes
    ]


def _places(frames, file: str, table, times: dict[int, int], unit: Fraction, how) -> bytes:
    """Fill in where the packets of an mp4 lie, those of frames `times` holds. Returns its parameter
    sets."""
    import av

    with av.open(file) as container:
        stream = container.streams.video[0]
        found = [p for p in container.demux(stream) if p.size]
        shift = found[0].pts - Fraction(next(iter(times.values()))) * unit / stream.time_base
        exact = [(p.pts - shift) * stream.time_base / unit for p in found]
        if exact != list(times.values()):
            raise BadVideo(frames.path, "cannot be packed: an mp4 does not hold its timestamps")
        for k, p in zip(times, found, strict=True):
            table["at"][k], table["size"][k] = p.pos, p.size
            if p.is_keyframe:
                table["flags"][k] |= KEY
            elif how["gop"] == 1:
                raise BadVideo(frames.path, f"cannot be packed: frame {k} is no keyframe")
        return bytes(stream.codec_context.extradata)


def _psnr(file: str, setup: bytes, table, kept: dict[int, np.ndarray]) -> float:
    """Of some frames decoded again, against what was coded: dB over the samples of all planes."""
    import av

    decoder = open_decoder("h264", setup)
    errors = []
    with open(file, "rb") as f:
        for k, picture in kept.items():
            f.seek(int(table["at"][k]))
            got = decoder.decode(av.Packet(f.read(int(table["size"][k]))))
            got += decoder.decode(None)
            decoder.flush_buffers()
            decoded = np.concatenate([p.ravel() for p in _planes(got[0])])
            errors.append(np.square(decoded.astype(np.float32) - picture).mean())
    return float(10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-3)))


def _copy(frames: Frames, row: VideoRow, how: dict, file: str, look) -> tuple[np.ndarray, dict]:
    """The source's packets in an mp4, as they are; decoded only to be looked at."""
    import av

    path, access = frames.path, frames.access
    if not (access.ordered and access.seekable):
        raise BadVideo(path, "not copied: its frames are not found by timestamps; pack it anew")
    codec = frames.stream.codec_context.codec.canonical_name
    if codec not in _COPIED:
        raise BadVideo(path, f"not copied: {codec} does not decode from packets; pack it anew")
    with VideoReader(path, "pyav", access, strict=False) as reader:
        height, width, mirrored, turns = reader._shape
    for i, frame, _ in frames.numbered(row.start) if look else ():
        if i >= row.start + row.frames:
            break
        look.add(i - row.start, frame)
    rows = []
    container, stream = open_video(path)
    try:
        with container, av.open(file, "w", format="mp4") as out:
            to = out.add_stream_from_template(stream)
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                hidden = packet.is_discard or packet.pts not in frames._number
                flags = HIDDEN if hidden else 0
                rows.append((0, packet.pts, 0, 0, flags | (KEY if packet.is_keyframe else 0)))
                packet.stream = to
                out.mux(packet)
        with av.open(file, options={"ignore_editlist": "1"}) as made:
            stream = made.streams.video[0]
            found = [p for p in made.demux(stream) if p.size]
            setup = bytes(stream.codec_context.extradata or b"")
            pix_fmt = stream.codec_context.pix_fmt or ""
            leaves = [_is_leaf(bytes(p), setup) if codec == "h264" else False for p in found]
    except (av.error.FFmpegError, ValueError) as e:
        if isinstance(e, OSError) and e.errno in (28, 30):  # the disk's fault
            raise
        raise BadVideo(path, f"not copied: an mp4 does not take it: {e}; pack it anew") from None
    if len(found) != len(rows):
        raise BadVideo(path, f"not copied: {len(found)} of {len(rows)} packets; pack it anew")
    table = np.array(rows, PACKET)
    table["at"], table["size"] = [p.pos for p in found], [p.size for p in found]
    table["flags"] |= np.where(leaves, LEAF, 0).astype(np.uint32)
    facts = {
        "start": row.start,
        "total": len(frames),
        "width": width,
        "height": height,
        "codec": codec,
        "pix_fmt": pix_fmt,
        "rotation": turns * 90,
        "mirrored": mirrored,
        "ordered": True,
        "seekable": True,
        "hidden": "",
        "gop": frames.gop,
        "damaged": row.damaged,
        "setup": b64encode(setup).decode(),
        "psnr": None,
    }
    return table, facts


def _is_leaf(data: bytes, setup: bytes) -> bool:
    """Whether no other frame leans on an H.264 packet: nal_ref_idc 0 of all its slices. Packets
    are as an mp4 has them, each unit behind its length."""
    if len(setup) < 5 or setup[0] != 1:
        return False
    length, at, slices = (setup[4] & 3) + 1, 0, []
    while at + length < len(data):
        size = int.from_bytes(data[at : at + length], "big")
        head = data[at + length]
        if head & 31 in (1, 2, 5):
            slices.append(head >> 5 & 3)
        at += length + size
    return bool(slices) and not any(slices)
