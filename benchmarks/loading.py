"""Loading clips beside an older commit's loader: `python -m benchmarks.loading VIDEOS OUT OLD`, a
folder of videos and a checkout of the older commit. ffmpeg, with x264, makes the files.

Each video is brought to 720p and, from that, to a short side of 256, 30 frames a second in GOPs of
250; a pack is made of the first, and one without re-encoding of the second. A clip is 16 frames of
the official sampling, and loaded when the joined batch lies in the training process. Times are
processor time, of one worker and the training process, and each round is a process of its own, of
about --seconds. --record is the file that the records are appended to.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import tyro

from mae_fast.bench.data import patches
from mae_fast.bench.ours import Ours
from mae_fast.bench.records import append
from mae_fast.bench.timing import cpu_time, interleave
from mae_fast.config import DataConfig, preset
from mae_fast.data.planes import pictures
from mae_fast.data.sampling import crop_box
from mae_fast.environment import environment, usable_cores
from mae_fast.ops.crop_resize_patchify_gather import crop_resize

SIZES = {"720p": 720, "256": 256}
# Both loaders: seconds a clip of this many steps, after so many have filled the caches.
ROUND = """
import os, sys
import torch
from mae_fast.config import DataConfig
from mae_fast.data import index
from mae_fast.data.loader import make_loader
path, repeats, steps, seed = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
rows = getattr(index, "read_source", index.read_index)(path)
cfg = DataConfig(repeat_aug=repeats, workers=1, short_side=256, max_bad_share=1.0)
how = dict(num_frames=16, batch_size=2, seed=seed)
for steps in (2, steps):
    before = os.times()
    clips = sum(len(batch) for batch in make_loader(rows, cfg, steps=steps, **how))
    taken = sum(os.times()[:4]) - sum(before[:4])
print(taken / clips)
"""
INDEX = """
import sys
from mae_fast.data.index import build_index
build_index([sys.argv[1]], sys.argv[2], progress=False)
"""


def python(root: Path, code: str, *args: object) -> str:
    """What code prints that runs on the package in `root`."""
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", code, *map(str, args)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    if run.returncode:
        raise SystemExit(f"{root}: {run.stderr[-2000:]}")
    return run.stdout


def encode(video: Path, side: int, path: Path) -> None:
    scale = f"scale='if(gt(iw,ih),-2,{side})':'if(gt(iw,ih),{side},-2)',format=yuv420p"
    x264 = ["-c:v", "libx264", "-crf", "23", "-g", "250"]
    command = ["ffmpeg", "-v", "error", "-y", "-i", video, "-an", "-vf", scale, "-r", "30", *x264]
    subprocess.run([*command, path], check=True)


def make(videos: Path, out: Path, old: Path) -> dict[str, tuple[Path, Path]]:
    """{what is loaded: (whose loader, its index or pack)}; what is there is not made again."""
    here, ways = Path(__file__).resolve().parent.parent, {}
    source = videos
    for name, side in SIZES.items():
        folder = out / name
        if not folder.exists():
            half = out / f"{name}.part"
            half.mkdir(parents=True, exist_ok=True)
            for video in sorted(p for p in source.iterdir() if p.is_file()):
                encode(video, side, half / f"{video.stem}.mp4")
            half.rename(folder)
        for whose, root in (("old", old), ("new", here)):
            index = out / f"{name}.{whose}.jsonl"
            if not index.exists():
                python(root, INDEX, folder, index)
            ways[f"{name}, {whose}"] = root, index
        source = folder
    for pack, name, how in (("pack", "720p", []), ("copy", "256", ["--copy"])):
        command = [sys.executable, "-m", "mae_fast", "pack", out / f"{name}.new.jsonl", *how]
        subprocess.run([*command, "-o", out / pack], check=True)
        ways[pack] = here, out / pack
    return ways


def loading(ways: dict[str, tuple[Path, Path]], repeats: int, rounds: int, seconds: float) -> dict:
    """Seconds a clip of each way, in turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    a_clip = {
        n: float(python(root, ROUND, path, repeats, 4, 99)) for n, (root, path) in ways.items()
    }
    for k in range(rounds):
        for name, (root, path) in ways.items():
            steps = max(4, round(seconds / a_clip[name] / 2 / repeats))
            found[name].append(float(python(root, ROUND, path, repeats, steps, k)))
    return found


def making(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds a clip from its decoded frames: planes copied, and from them the patches of a step;
    and by way of FFmpeg's RGB the whole clip, of which no patch is made yet."""
    clips = [decoded(path, k) for k, path in enumerate(sorted(folder.glob("*.mp4")))]

    def planes_of() -> list:
        kept = ([(k, frame, (False, 0)) for k, frame in enumerate(c[0])] for c in clips)
        return [pictures("", frames, 16, 256) for frames in kept]

    pairs = zip(planes_of(), clips, strict=True)
    sources = [planes.source([(list(range(16)), *c[1:])], 224) for planes, c in pairs]

    def by_rgb() -> None:
        for frames, box, flip in clips:
            rgb = [torch.from_numpy(f.to_ndarray(format="rgb24", threads=1)) for f in frames]
            crop_resize(torch.stack(rgb), box, flip, 224)

    runs = {
        "planes copied": planes_of,
        "patches from planes": lambda: [patches(source) for source in sources],
        "RGB, whole clip": by_rgb,
    }
    for run in runs.values():
        run()
    found = interleave(runs, rounds, timer=cpu_time)
    return {name: [s / len(clips) for s in samples] for name, samples in found.items()}


def decoded(path: Path, seed: int) -> tuple[list[Any], tuple[int, ...], bool]:
    """16 frames, one in four, a random box and whether it is mirrored."""
    with av.open(str(path)) as container:
        frames = [f for f in itertools.islice(container.decode(video=0), 64)][::4]
    rng, cfg = np.random.default_rng(seed), DataConfig()
    box = crop_box(rng, frames[0].height, frames[0].width, cfg.crop_area, cfg.crop_aspect)
    return frames, box, bool(seed % 2)


def step(precision: str, rounds: int) -> list[float]:
    """Processor seconds a clip of a ViT-B step on clips that lie ready."""
    torch.set_num_threads(usable_cores())
    cfg = preset("vit_base")
    built = Ours().build(cfg, precision=precision)
    clips = torch.randint(0, 256, (2, 3, 16, 224, 224), dtype=torch.uint8)
    run = functools.partial(built.step, clips, torch.rand(2, 1568))
    run()
    return [cpu_time(run) / 2 for _ in range(rounds)]


def mega(path: Path) -> float:
    return sum(p.stat().st_size for p in path.rglob("*") if p.suffix in (".mp4", ".tar")) / 1e6


def main(
    videos: Path, out: Path, old: Path, /, rounds: int = 5, seconds: float = 5.0, record: str = ""
) -> None:
    torch.set_num_threads(1)
    ways = make(videos, out.resolve(), old.resolve())
    size = {name: mega(out / name) for name in (*SIZES, "pack", "copy")}
    psnr = json.loads((out / "pack/pack.json").read_text())["psnr"]
    head = ["git", "-C", old, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    of_files = {"megabytes": size, "psnr": psnr}
    found = [
        (f"repeat_aug {n}", "loading a clip, processor time", loading(ways, n, rounds, seconds))
        for n in (1, 4)
    ]
    found.append(("patches", "a clip of decoded frames", making(out / "256", rounds)))
    found += [
        (each, "a step of vit_base, processor time a clip", {"mae_fast": step(each, rounds)})
        for each in ("fp32", "bf16")
    ]
    for item, what, times in found:
        for name, samples in times.items():
            print(f"{item:14} {name:22} {1e3 * statistics.median(samples):9.2f} ms a clip")
        made = {"kind": "loading", "what": what, "item": item, "old": commit, "seconds": times}
        if record:
            more = of_files if item.startswith("repeat") else {}
            append(record, made | more | {"environment": environment()})
    print(size, f"PSNR {psnr:.1f} dB")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
