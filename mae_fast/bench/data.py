"""`mae-fast bench data`: clips a second that a core can load, and where its time goes."""

import cProfile
import json as jsonlib
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from mae_fast import cost, memory
from mae_fast.bench.timing import cpu_time
from mae_fast.config import DataConfig, preset
from mae_fast.data import remote
from mae_fast.data.decode import VideoReader
from mae_fast.data.index import VideoRow, read_source
from mae_fast.data.loader import ClipDataset, join, make_loader
from mae_fast.data.packed import PackReader
from mae_fast.environment import environment, usable_cores
from mae_fast.fields import positive, require
from mae_fast.files import check_output, write
from mae_fast.model import PIXEL_MEAN, PIXEL_STD
from mae_fast.ops.crop_resize_patchify_gather import crop_resize_patchify_gather
from mae_fast.ops.source import Source

FRAMES = 16
_STAGED = 24  # clips whose stages are timed
_SIZE = 224  # of the clips whose patches are made


def data(
    source: Annotated[str, tyro.conf.arg(metavar="FOLDER|INDEX|PACK")],
    /,
    repeat_aug: int = 1,
    short_side: int = 256,
    workers: int = 1,
    seconds: float = 3.0,
    rounds: int = 3,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "",
    json: bool = False,
) -> None:
    """Load clips as training does, and say how many a second one core gives, stage by stage.

    A clip is 16 frames of the official sampling, until the joined batch lies in the training
    process. A core's second is a second of processor time, so that others on the machine count
    little; `plan --data-rate RECORD.json` takes what -o writes.

    Args:
        source: a folder of videos, an index or a pack.
        repeat_aug: clips of each video, which is then decoded once for all of them; the recipe has
            4.
        short_side: as `data.short_side`.
        workers: processes that load.
        seconds: of processor time that a round takes, about.
        rounds: of which the median is taken.
        output: also write the document to this file.
        json: print one JSON document and nothing else.
    """
    require(0 < seconds <= 3600, "--seconds must be in (0, 3600]", seconds)
    require(1 <= rounds <= 100, "--rounds must be in [1, 100]", rounds)
    positive(workers=workers)
    if output:
        check_output(output, source)
    rows = read_source(source)
    cfg = DataConfig(
        repeat_aug=repeat_aug, workers=workers, short_side=short_side, max_bad_share=1.0
    )
    torch.set_num_threads(1)
    found = {"source": str(source), "kind": "pack" if rows[0].at >= 0 else "files"}
    found |= measure(rows, cfg, seconds, rounds)
    found["environment"] = environment()
    if output:
        write(output, jsonlib.dumps(found, indent=1))
    print(jsonlib.dumps(found) if json else tell(found))


def measure(rows: list[VideoRow], cfg: DataConfig, seconds: float, rounds: int) -> dict[str, Any]:
    dataset = ClipDataset(rows, cfg, FRAMES, seed=0)
    dataset[0]  # opens what stays open
    before, read = time.process_time(), _bytes_read()
    count = 0
    while time.process_time() - before < min(seconds, 1.0) or not count:
        dataset[count]
        count += 1
    a_video = (time.process_time() - before) / count
    bytes_a_clip = (_bytes_read() - read) / count / cfg.repeat_aug
    steps = max(2, round(seconds / a_video / 2))
    samples = [_round(rows, cfg, steps, k) for k in range(rounds)]
    cold = _forget(rows) and _round(rows, cfg, steps, rounds)
    rates = [s["clips_per_s_core"] for s in samples]
    return {
        "clips_per_s_core": statistics.median(rates),
        "clips_per_s_core_rounds": rates,
        "clips_per_s": statistics.median(s["clips_per_s"] for s in samples),
        "clips_per_s_cold_cache": cold["clips_per_s"] if cold else None,
        "workers": cfg.workers,
        "repeat_aug": cfg.repeat_aug,
        "clips_a_round": samples[0]["clips"],
        "bytes_a_clip": bytes_a_clip,
        "memory_mb": samples[-1]["memory_mb"],
        "stages_ms": stages(dataset),
        "cores": usable_cores(),
        "needs": needs(statistics.median(rates)),
    }


def _round(rows, cfg: DataConfig, steps: int, k: int) -> dict[str, float]:
    """One run of a loader: its worker processes have ended, so their time is known."""
    loader = make_loader(rows, cfg, num_frames=FRAMES, batch_size=2, seed=k, steps=steps)
    before = os.times()
    clips = sum(len(batch) for batch in loader)
    after = os.times()
    wall, cpu = after.elapsed - before.elapsed, sum(after[:4]) - sum(before[:4])
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    rates = {"clips_per_s": clips / wall, "clips_per_s_core": clips / cpu}
    return {"clips": clips, "memory_mb": memory, **rates}


def _bytes_read() -> int:
    """Of this process, from disk, cache or servers; 0 where the system does not count."""
    try:
        return int(Path("/proc/self/io").read_text().split()[1]) + remote.received
    except OSError:
        return remote.received


def _forget(rows: list[VideoRow]) -> bool:
    """Have the system drop the videos from its page cache; whether it can be asked."""
    if not hasattr(os, "posix_fadvise") or any(remote.is_remote(r.path) for r in rows):
        return False
    for path in {os.path.dirname(r.path) if r.at >= 0 else r.path for r in rows}:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return True


def stages(dataset: ClipDataset) -> dict[str, float]:
    """Processor milliseconds a clip by stage, in this process, the least of three rounds."""
    videos = max(1, _STAGED // dataset.cfg.repeat_aug)
    rounds = [_stages(dataset, videos) for _ in range(3)]
    ready = [join([dataset[g]]).source(_SIZE) for g in range(videos)]
    out = {name: min(each[name] for each in rounds) for name in rounds[0]}
    out["patches"] = min(cpu_time(lambda: [*map(patches, ready)]) for _ in range(3))
    return {name: 1e3 * taken / videos / dataset.cfg.repeat_aug for name, taken in out.items()}


def _stages(dataset: ClipDataset, videos: int) -> dict[str, float]:
    """Seconds of what joins so many videos: of each stage without those within it."""
    profiler = cProfile.Profile(time.process_time, builtins=False)
    with profiler:
        for g in range(videos):
            join([dataset[g]])
    taken = {entry.code: entry.totaltime for entry in profiler.getstats()}

    def of(*functions: Callable) -> float:
        return sum(taken.get(function.__code__, 0.0) for function in functions)

    read = of(PackReader._table, PackReader._bytes)
    opened = of(VideoReader.__init__, VideoReader.close)
    decoded = of(PackReader.frames, VideoReader._read_pyav)
    pictures = of(PackReader.pictures, VideoReader.pictures)
    whole = of(join, ClipDataset.__getitem__)
    return {
        **({"open": opened} if opened else {"read": read}),
        "decode": decoded - read,
        "planes": pictures - decoded,
        "sample, copy, join": whole - pictures - opened,
    }


def patches(source: Source) -> None:
    """What a step at 90% makes of frames in the training process: visible tokens, and targets."""
    tokens = FRAMES // 2 * (source.size // 16) ** 2
    ids = torch.rand(len(source), tokens, device="cpu").argsort(dim=1).int()
    numbers = 16, PIXEL_MEAN, PIXEL_STD, torch.float32
    crop_resize_patchify_gather(source, ids[:, : tokens // 10], 2, *numbers)
    target = source.of_frames(range(0, FRAMES, 2))
    crop_resize_patchify_gather(target, ids[:, tokens // 10 :], 1, *numbers, channel_last=True)


def needs(rate: float) -> dict[str, dict[str, float]]:
    """Clips a second that one H100 would take, as `mae-fast plan` predicts, and the cores at so
    many a second that feed it."""
    where, found = cost.DEVICES["h100"], {}
    for name in ("vit_base", "vit_large", "vit_huge"):
        cfg = preset(name)
        batch = min(64, memory.greatest_batch(cfg, 0.9, where.product_bytes, where.memory))
        takes = cost.Step(cfg, batch, 0.9, where).clips_per_second
        found[name] = {"clips_per_s_predicted": takes, "cores": takes / rate}
    return found


def tell(found: dict[str, Any]) -> str:
    rate, cores, rounds = (
        found[key] for key in ("clips_per_s_core", "cores", "clips_per_s_core_rounds")
    )
    cold = found["clips_per_s_cold_cache"]
    stages = ", ".join(f"{name} {ms:.2f}" for name, ms in found["stages_ms"].items())
    lines = [
        f"{found['source']} ({found['kind']}), repeat_aug {found['repeat_aug']}: "
        f"{rate:.1f} clips a second and core ({min(rounds):.1f} to {max(rounds):.1f} of "
        f"{len(rounds)} rounds of {found['clips_a_round']} clips)",
        f"with {found['workers']} workers {found['clips_per_s']:.1f} clips/s"
        + (f", {cold:.1f} from a cold page cache" if cold else "")
        + f"; {found['memory_mb']:.0f} MB a worker; "
        f"{found['bytes_a_clip'] / 1e6:.2f} MB read a clip",
        f"a clip, in ms of a core: {stages}",
        f"this machine's {cores} cores feed {rate * cores:.0f} clips/s",
    ]
    lines += [
        f"{name} at {each['clips_per_s_predicted']:.0f} clips/s of an H100 (predicted) needs "
        f"{each['cores']:.0f} cores of this kind"
        for name, each in found["needs"].items()
    ]
    return "\n".join(lines)
