"""Videos of every kind that a folder of them may hold, made by ffmpeg, and what ffmpeg itself gives
of each: the frames, in its order, upright. By hand: python tests/data/odd_videos.py [NAME ...]
compares all of them, frame by frame, all at once, one at a time and in a random order. With ffmpeg
5.1 and PyAV 18.1 (FFmpeg 8) two of 135 differ, rightly: of cut_open.ts ffmpeg decodes nothing
either, and of tail_hevc.ts FFmpeg 8 leaves out eight frames that lack what they lean on.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mae_fast.data.container import BadVideo
from mae_fast.data.decode import VideoReader

RAW = "-f rawvideo -pix_fmt rgb24 -s 192x120 -r 25 -i {raw}"
X264 = f"{RAW} -c:v libx264 -pix_fmt yuv420p -preset veryfast -g 12 -bf 3"
X265 = (
    f"{RAW} -c:v libx265 -pix_fmt yuv420p -preset ultrafast -x265-params log-level=none:keyint=12"
)
OPEN = X264 + " -x264-params open-gop=1"
MPEG2 = f"{RAW} -c:v mpeg2video -q:v 3 -g 12 -bf 2"
MPEG4 = f"{RAW} -c:v mpeg4 -q:v 3 -g 12 -bf 2"
VP9 = f"{RAW} -c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 12 -b:v 800k"
# Name of the file -> ffmpeg's arguments, in steps: each reads what the step before wrote ({in}).
MADE: dict[str, list[str]] = {
    # codecs and containers
    **{f"h264.{c}": [X264] for c in ("mp4", "mov", "mkv", "ts", "flv", "3gp", "avi", "nut", "f4v")},
    **{f"mpeg2.{c}": [MPEG2] for c in ("mpg", "ts", "mkv", "mp4", "vob", "m2v", "avi")},
    **{
        f"mpeg4.{c}": [f"{RAW} -c:v mpeg4 -bf 2 -g 12 -q:v 3"] for c in ("avi", "mp4", "mkv", "m4v")
    },
    **{f"hevc.{c}": [X265] for c in ("mp4", "mkv", "ts", "mov", "hevc")},
    **{f"vp9.{c}": [VP9] for c in ("webm", "mkv", "mp4")},
    "h264.h264": [X264],
    "mxf.mxf": [f"{RAW} -c:v mpeg2video -q:v 3 -g 12"],
    "mpeg1.mpg": [f"{RAW} -c:v mpeg1video -q:v 3 -g 12 -bf 2"],
    "vp8.webm": [f"{RAW} -c:v libvpx -deadline realtime -g 12 -b:v 800k"],
    "vp8_altref.webm": [f"{RAW} -c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -g 12 -b:v 800k"],
    "vp9_altref.webm": [
        f"{RAW} -c:v libvpx-vp9 -auto-alt-ref 1 -lag-in-frames 16 -cpu-used 8 -g 24 -b:v 800k"
    ],
    "av1.mp4": [f"{RAW} -c:v libsvtav1 -preset 12 -g 12"],
    "av1.mkv": [f"{RAW} -c:v libaom-av1 -cpu-used 8 -usage realtime -g 12 -b:v 800k"],
    "prores.mov": [f"{RAW} -c:v prores_ks -profile:v 0"],
    "mjpeg.avi": [f"{RAW} -c:v mjpeg -q:v 3"],
    "mjpeg.mov": [f"{RAW} -c:v mjpeg -q:v 3"],
    "ffv1.mkv": [f"{RAW} -c:v ffv1"],
    "huffyuv.avi": [f"{RAW} -c:v huffyuv -pix_fmt yuv422p"],
    "dnxhd.mov": [f"{RAW} -vf scale=1280:720:flags=neighbor -c:v dnxhd -b:v 90M -pix_fmt yuv422p"],
    "wmv2.wmv": [f"{RAW} -c:v wmv2 -q:v 3 -g 12"],
    "wmv1.asf": [f"{RAW} -c:v wmv1 -q:v 3 -g 12"],
    "msmpeg4.avi": [f"{RAW} -c:v msmpeg4 -q:v 3 -g 12"],
    "xvid.avi": [f"{RAW} -c:v libxvid -q:v 3 -g 12 -bf 2"],
    "flv1.flv": [f"{RAW} -c:v flv -q:v 3 -g 12"],
    "theora.ogv": [f"{RAW} -c:v libtheora -q:v 8 -g 12"],
    "theora.mkv": [f"{RAW} -c:v libtheora -q:v 8 -g 12"],
    "h263.3gp": [f"{RAW} -vf scale=176:144 -c:v h263 -q:v 3 -g 12"],
    "rv20.rm": [f"{RAW} -vf scale=176:144 -c:v rv20 -q:v 3 -g 12"],
    "svq1.mov": [f"{RAW} -c:v svq1 -q:v 3 -g 12"],
    "qtrle.mov": [f"{RAW} -c:v qtrle"],
    "gif.gif": [f"{RAW}"],
    "apng.apng": [f"{RAW} -plays 0"],
    # pixels
    "ten_bits.mp4": [f"{RAW} -c:v libx264 -pix_fmt yuv420p10le -preset veryfast -g 12"],
    "yuv444.mp4": [f"{RAW} -c:v libx264 -pix_fmt yuv444p -preset veryfast -g 12"],
    "rgb.mp4": [f"{RAW} -c:v libx264rgb -preset veryfast -g 12"],
    "grey.mp4": [f"{RAW} -c:v libx264 -pix_fmt gray -preset veryfast -g 12"],
    "full_range.mp4": [f"{X264} -vf scale=out_range=full -color_range pc"],
    "bt709.mp4": [f"{X264} -colorspace bt709 -color_primaries bt709 -color_trc bt709"],
    "alpha.webm": [f"{RAW} -c:v libvpx -pix_fmt yuva420p -auto-alt-ref 0 -g 12 -b:v 800k"],
    "anamorphic.mp4": [f"{X264} -aspect 3:1"],
    "odd_size.mkv": [f"{RAW} -vf crop=191:119 -c:v ffv1 -pix_fmt yuv444p"],
    # orders of frames
    "open_gop.mp4": [OPEN],
    "many_b.mkv": [
        f"{RAW} -c:v libx264 -preset veryfast -pix_fmt yuv420p -bf 16 -b_strategy 0 -g 48"
    ],
    "intra_refresh.mp4": [f"{X264} -x264-params intra-refresh=1"],
    "intra_only.mp4": [f"{RAW} -c:v libx264 -pix_fmt yuv420p -preset veryfast -g 1"],
    "one_gop.mp4": [f"{RAW} -c:v libx264 -pix_fmt yuv420p -preset veryfast -g 999 -bf 3"],
    "interlaced.mp4": [f"{X264} -flags +ildct+ilme -top 1"],
    "interlaced.mkv": [f"{X264} -x264-params tff=1"],
    "interlaced.mpg": [f"{MPEG2} -flags +ildct+ilme -top 1"],
    "pulldown.mp4": [f"{RAW} -vf telecine -c:v libx264 -pix_fmt yuv420p -preset veryfast -bf 2"],
    # copied between containers
    "h264_raw.mp4": [f"{X264} h264", "-r 25 -i {in} -c copy"],
    "hevc_raw.mp4": [f"{X265} hevc", "-r 25 -i {in} -c copy"],
    "mpg_to.mp4": [f"{MPEG2} mpg", "-i {in} -c copy"],
    "avi_to.mp4": [f"{MPEG4} avi", "-fflags +genpts -i {in} -c copy"],
    "avi_to.mkv": [f"{RAW} -c:v mpeg4 -g 12 -q:v 3 avi", "-i {in} -c copy"],
    "ts_to.mp4": [f"{X264} ts", "-i {in} -c copy"],
    "mp4_to.ts": [f"{X264} mp4", "-i {in} -c copy"],
    # cuts
    **{
        f"cut_{name}.{c}": [f"{how} mp4", f"-ss {at} -i {{in}} -c copy"]
        for name, how in (("closed", X264), ("open", OPEN), ("hevc", X265))
        for c in ("mp4", "mkv", "ts")
        for at in (0.9,)
    },
    "cut_end.mp4": [f"{OPEN} mp4", "-i {in} -t 1.3 -c copy"],
    "cut_both.mov": [f"{X264} mp4", "-ss 0.9 -i {in} -t 1.1 -c copy"],
    "cut_no_list.mp4": [f"{OPEN} mp4", "-ss 1.2 -i {in} -c copy -use_editlist 0"],
    "cut_negative.mkv": [f"{X264} mp4", "-ss 0.9 -i {in} -c copy -avoid_negative_ts disabled"],
    "cut_vp9.webm": [f"{VP9} webm", "-ss 0.9 -i {in} -c copy"],
    "cut_mpeg2.mpg": [f"{MPEG2} mpg", "-ss 0.9 -i {in} -c copy"],
    # times
    "late.mp4": [f"{X264} mp4", "-itsoffset 3 -i {in} -c copy"],
    "late.ts": [f"{X264} -output_ts_offset 95400"],
    "slow_motion.mp4": [f"{X264} -vf setpts=4*PTS -vsync vfr"],
    "ramp.mp4": [f"{X264} -vf setpts='PTS*(1+N/20)' -vsync vfr -video_track_timescale 90000"],
    "ramp.mkv": [f"{X264} -vf setpts='PTS*(1+N/20)' -vsync vfr"],
    "ramp.webm": [f"{VP9} -vf setpts='PTS*(1+N/20)' -vsync vfr"],
    "jitter.mp4": [f"{X264} -vf setpts='PTS+mod(N\\,3)*0.01/TB' -vsync vfr"],
    "duplicates.avi": [f"{RAW} -vf select='not(mod(n\\,3))' -vsync cfr -c:v mpeg4 -q:v 3 -g 12"],
    "ntsc.mp4": [f"{X264} -r 30000/1001"],
    "fps_1000.mp4": [f"{X264} -vf setpts=PTS/40 -r 1000"],
    "fps_half.mkv": [f"{X264} -vf setpts=PTS*50 -r 0.5"],
    "coarse.mp4": [f"{X264} -video_track_timescale 25"],
    # containers' own ways
    "fragmented.mp4": [f"{X264} -movflags frag_keyframe+empty_moov+default_base_moof"],
    "faststart.mp4": [f"{X264} -movflags faststart"],
    "dash.mp4": [f"{X264} -movflags dash+frag_every_frame"],
    "negative_cts.mp4": [f"{X264} -movflags negative_cts_offsets"],
    "no_list.mp4": [f"{X264} -use_editlist 0"],
    "live.mkv": [f"{X264} -f matroska -live 1"],
    "cluster.webm": [f"{VP9} -cluster_time_limit 100 -dash 1"],
    "m2ts.ts": [f"{X264} -mpegts_m2ts_mode 1"],
    "two_videos.mkv": [f"{X264} mkv", "-i {in} -i {in} -map 0 -map 1 -c copy"],
    "sound_first.mp4": [f"-f lavfi -i sine=duration=5 {X264} -map 0:a -map 1:v -c:a aac"],
    "sound_late.ts": [
        f"-itsoffset 2 -f lavfi -i sine=duration=1 {X264} -map 1:v -map 0:a -c:a mp2"
    ],
    "stale_tag.mkv": [f"{X264} -metadata:s:v:0 DURATION=09:00:00"],
    **{
        f"turned_{d}.mp4": [f"{X264} mp4", f"-i {{in}} -c copy -metadata:s:v rotate={d}"]
        for d in (90, 180, 270)
    },
}


def tail(data: bytes) -> bytes:
    """From some way in: a recording that begins in mid-stream."""
    return data[len(data) * 2 // 5 :]


def twice(data: bytes) -> bytes:
    return data + data


def late_packets(data: bytes) -> bytes:
    """A transport stream cut between two of its packets."""
    return data[188 * (len(data) // 188 * 2 // 5) :]


# Name of the file -> what it is made of, and how its bytes are changed.
CHANGED = {
    "tail.ts": ("h264.ts", late_packets),
    "tail_torn.ts": ("h264.ts", tail),
    "tail_hevc.ts": ("hevc.ts", tail),
    "tail.mpg": ("mpeg2.mpg", tail),
    "tail1.mpg": ("mpeg1.mpg", tail),
    "tail.vob": ("mpeg2.vob", tail),
    "tail.m2v": ("mpeg2.m2v", tail),
    "tail.h264": ("h264.h264", tail),
    "twice.ts": ("h264.ts", twice),
    "twice.mpg": ("mpeg2.mpg", twice),
    "twice.h264": ("h264.h264", twice),
    "twice.hevc": ("hevc.hevc", twice),
    "twice.flv": ("h264.flv", twice),
    "rest_after.mp4": ("h264.mp4", lambda data: data + bytes(5000)),
    "rest_after.avi": ("mpeg4.avi", lambda data: data + b"junk" * 1000),
    "named_otherwise.mp4": ("h264.mkv", bytes),
    "named_otherwise.avi": ("h264.mp4", bytes),
}
# A few of each kind, for the tests.
SAMPLE = (
    *("h264.3gp", "hevc.mov", "mpeg4.avi", "vp9_altref.webm", "vp8_altref.webm", "theora.ogv"),
    *("interlaced.mkv", "many_b.mkv", "open_gop.mp4", "one_gop.mp4", "pulldown.mp4", "gif.gif"),
    *("hevc_raw.mp4", "avi_to.mp4", "mpg_to.mp4", "cut_open.mp4", "cut_open.mkv", "cut_hevc.ts"),
    *("cut_both.mov", "cut_no_list.mp4", "cut_negative.mkv", "cut_mpeg2.mpg", "late.ts"),
    *("ramp.mp4", "duplicates.avi", "coarse.mp4", "fragmented.mp4", "negative_cts.mp4"),
    *("two_videos.mkv", "sound_late.ts", "turned_90.mp4", "tail_torn.ts", "tail.mpg", "tail.m2v"),
    *("twice.ts", "twice.h264", "rest_after.mp4", "named_otherwise.avi"),
)


def raw_frames(n: int, width: int, height: int) -> np.ndarray:
    """uint8 [n, height, width, 3]: each frame holds its number as eight bits, and their complement
    below, over a strip of colours."""
    frames = np.empty((n, height, width, 3), np.uint8)
    third, colours = height // 3, np.random.default_rng(0).integers(40, 216, (8, 3))
    for b in range(8):
        columns = slice(b * width // 8, (b + 1) * width // 8)
        bit = (np.arange(n) >> b & 1)[:, None, None, None].astype(bool)
        frames[:, :third, columns] = np.where(bit, 235, 20)
        frames[:, third : 2 * third, columns] = np.where(bit, 20, 235)
        frames[:, 2 * third :, columns] = colours[b]
    return frames


def ffmpeg(*arguments: str) -> bytes:
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout


def make(name: str, folder: Path, n: int = 60) -> Path:
    """The video of this name in `folder`. CalledProcessError where ffmpeg cannot write it."""
    if (folder / name).exists():
        return folder / name
    if name in CHANGED:
        source, change = CHANGED[name]
        (folder / name).write_bytes(change(make(source, folder, n).read_bytes()))
        return folder / name
    raw = folder / "frames.rgb"
    if not raw.exists():
        raw.write_bytes(raw_frames(n, 192, 120).tobytes())
    before = ""
    *steps, last = MADE[name]
    for k, step in enumerate(steps):
        *arguments, suffix = step.split()
        out = str(folder / f"{name}.{k}.{suffix}")
        ffmpeg(*(a.format(raw=raw, **{"in": before}) for a in arguments), out)
        before = out
    ffmpeg(*(a.format(raw=raw, **{"in": before}) for a in last.split()), str(folder / name))
    return folder / name


def ffmpegs_frames(path: Path, height: int, width: int) -> np.ndarray:
    """uint8 [n, height, width, 3], upright, in ffmpeg's order."""
    options = "-map 0:V:0 -vsync passthrough -f rawvideo -pix_fmt rgb24 -".split()
    given = ffmpeg("-i", str(path), *options)
    return np.frombuffer(given, np.uint8).reshape(-1, height, width, 3)


def differences(path: Path) -> list[str]:
    """Where the reader's frames are not ffmpeg's. Raises BadVideo."""
    wrong = []
    with VideoReader(path) as reader:
        want = ffmpegs_frames(path, reader.height, reader.width)
        n = reader.num_frames
        if n != len(want):
            return [f"{n} frames, ffmpeg's are {len(want)}"]
        order = np.random.default_rng(0).permutation(n).tolist()
        ways = {"at once": [range(n)], "one by one": [[i] for i in [n - 1, *range(n), *order]]}
        for way, reads in ways.items():
            for numbers in reads:
                try:
                    got = reader.read(numbers).numpy()
                except BadVideo as e:
                    wrong.append(f"{way}: {e.reason}")
                    continue
                apart = np.abs(got.astype(int) - want[list(numbers)]).mean((1, 2, 3))
                off = [i for i, d in zip(numbers, apart, strict=True) if d > 3]
                if off:
                    wrong.append(f"{way}: frame {off[0]} and {len(off) - 1} more are not ffmpeg's")
    return wrong


def main(names: list[str]) -> None:
    folder, equal, other = Path(tempfile.mkdtemp()), 0, 0
    for name in names or [*MADE, *CHANGED]:
        try:
            path = make(name, folder)
        except subprocess.CalledProcessError as e:
            print(f"{name}: not made: {e.stderr.decode().strip().splitlines()[-1:]}")
            continue
        try:
            wrong = differences(path)
        except BadVideo as e:
            wrong = [f"refused: {e.reason}"]
        equal, other = equal + (not wrong), other + bool(wrong)
        if wrong:
            print(f"{name}: {'; '.join(wrong[:3])}, {len(wrong)} in all", flush=True)
    shutil.rmtree(folder)
    print(f"{equal} videos as ffmpeg gives them, {other} not")


if __name__ == "__main__":
    main(sys.argv[1:])
