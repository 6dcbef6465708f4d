"""What befalls runs, done to real ones by hand: python tests/accidents.py [SEED] [CASE ...].

A line a case and a verdict at the end; about ten minutes on two idle cores. Cases: kills, signals,
torchrun, worker, stderr, disk, shm. Kills fall at moments drawn from the seed, some while a
checkpoint is being written. tests/test_accidents.py does five of them in CI.
"""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch

from mae_fast import checkpoint
from mae_fast.config_file import load_config
from mae_fast.data import build_index
from mae_fast.train import pretrain

STEPS = 60
LONG = ["--train.steps", "90000", "--train.save-every", "80000", "--train.log-every", "1"]
CONFIG = f"""
output = "{{output}}"
[model]
preset = "vit_tiny"
img_size = 32
num_frames = 4
depth = 2
decoder_depth = 1
[mask]
ratio = 0.5
[data]
index = "index.jsonl"
workers = {{workers}}
repeat_aug = 1
[train]
batch_size = 2
steps = {STEPS}
warmup_steps = 2
log_every = 1
save_every = 3
keep = 2
device = "cpu"
"""


def prepare(folder: Path, frames: int = 40, size: int = 64) -> None:
    """Four videos of noise that moves, and their index."""
    (folder / "videos").mkdir()
    for i in range(4):
        tile = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        picture = np.kron(tile, np.ones((size // 8, size // 8, 1), np.uint8))
        with av.open(str(folder / "videos" / f"{i}.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
            for t in range(frames):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, t, 1), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    build_index([folder / "videos"], folder / "index.jsonl", progress=False)


def command(
    folder: Path, name: str, *options: str, workers: int = 2, launch: tuple[str, ...] = ()
) -> list[str]:
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(output=name, workers=workers))
    launch = ("torch.distributed.run", *launch, "-m") if launch else ()
    return [sys.executable, "-m", *launch, "mae_fast", "pretrain", str(path), *options]


def start(argv: list[str], folder: Path, **options) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    options = {"stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(argv, cwd=folder, env=env, **options)


def pretrain_in(folder: Path, path: str) -> None:
    """The run of a configuration file, in this process."""
    torch.set_num_threads(1)
    cfg = load_config(path)
    data = dataclasses.replace(cfg.data, index=str(folder / cfg.data.index))
    pretrain(dataclasses.replace(cfg, output=str(folder / cfg.output), data=data))


def wait_for(done: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


def rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def same(a: Path, b: Path) -> bool:
    (_, x), (_, y) = checkpoint.latest(a), checkpoint.latest(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def kill(process, run: Path, draw: random.Random, begun: Callable[[], bool] = lambda: False) -> str:
    """SIGKILL at a drawn step: in the middle of one, or while a checkpoint is half written."""
    writing = draw.random() < 0.5
    before, more, late = rows(run), draw.randrange(1, 8), draw.random() * 0.02
    over = lambda: process.poll() is not None  # noqa: E731
    wait_for(lambda: over() or rows(run) >= before + more or rows(run) < before)
    if writing:
        wait_for(lambda: over() or list(run.glob("*.tmp")), 30)
    else:
        time.sleep(late)
    process.kill()
    process.wait()
    left = list(run.glob("checkpoint-*.tmp"))
    return f"after {rows(run)} rows, {'half a checkpoint left' if left else 'in a step'}"


def kills(folder: Path, seed: int, n: int = 24) -> Iterator[tuple[str, bool]]:
    """n kills, and after them the weights of a run that nothing befell."""
    whole = start(command(folder, "whole"), folder)
    whole.communicate()
    draw, number = random.Random(seed), 0
    while number < n:
        run = folder / f"killed{number}"
        for _ in range(4):  # kills of one run
            process = start(command(folder, run.name), folder, stderr=subprocess.DEVNULL)
            words = kill(process, run, draw)
            number += 1
            yield f"kill {number}: {words}", process.returncode == -signal.SIGKILL
            if number == n:
                break
        last = start(command(folder, run.name), folder)
        text = last.communicate()[1]
        steps = [line.split(",")[0] for line in (run / "metrics.jsonl").read_text().splitlines()]
        good = last.returncode == 0 and same(run, folder / "whole")
        good = good and steps == [f'{{"step": {i}' for i in range(1, STEPS + 1)]
        yield f"  {run.name}: resumed to the end, same weights, each row once", good
        if not good:
            print(text[-2000:])


def signals(folder: Path, seed: int) -> Iterator[tuple[str, bool]]:
    """Each signal in a step, and while the loader waits for workers that are stopped."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        for stopped in (False, True):
            run = folder / f"{name}{stopped}"
            process = start(command(folder, run.name, *LONG), folder)
            wait_for(lambda run=run: rows(run) >= 3)
            if stopped:
                for child in children(process.pid):
                    os.kill(child, signal.SIGSTOP)
                time.sleep(2.0)
            process.send_signal(signal.Signals[name])
            began = time.monotonic()
            text = process.communicate(timeout=60)[1]
            took = time.monotonic() - began
            step = checkpoint.latest(run)[0]["step"]
            good = process.returncode == 75 and f"{name} after step {step}" in text and took < 20
            where = "workers stopped" if stopped else "in a step"
            yield f"{name}, {where}: left in {took:.1f} s, step {step} saved", good
    run = folder / "nohup"
    process = start(["nohup", *command(folder, "nohup")], folder)
    wait_for(lambda: rows(run) >= 3)
    process.send_signal(signal.SIGHUP)
    process.communicate()
    yield "SIGHUP under nohup: goes on to its end", process.returncode == 0


def torchrun(folder: Path, seed: int) -> Iterator[tuple[str, bool]]:
    """Signals to torchrun alone, which hands on those it is told to, and dies of the others."""
    two = ("--standalone", "--nproc-per-node=2")
    handed = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2")
    options = [*LONG[:-1], "80000"]  # no meeting to log
    for name, launch, stopped in (
        ("SIGTERM", two, False),
        ("SIGTERM", two, True),
        ("SIGUSR1", (*two, *handed), False),
        ("SIGUSR2", (*two, *handed), True),
        ("SIGUSR1", two, False),
    ):
        run = folder / f"two{name}{stopped}{len(launch)}"
        process = start(command(folder, run.name, *options, launch=launch), folder)
        wait_for(lambda run=run: (run / "metrics.jsonl").exists())
        time.sleep(5.0)
        if stopped:
            for child in children(children(process.pid)[1]):
                os.kill(child, signal.SIGSTOP)
            time.sleep(2.0)
        process.send_signal(signal.Signals[name])
        began = time.monotonic()
        text = process.communicate(timeout=60)[1]
        took = time.monotonic() - began
        step = checkpoint.latest(run)[0]["step"]
        dies = name == "SIGUSR1" and launch == two
        words = "see its --signals-to-handle)" if dies else f"error: stopped by {name}"
        good = text.count(f"{words} after step {step}, ") == 2 and took < 25
        where = ", one rank's workers stopped" if stopped else ""
        fate = ", of which it dies" if dies else ""
        yield f"{name} to torchrun{fate}{where}: {took:.1f} s, step {step} saved", good


def worker(folder: Path, seed: int) -> Iterator[tuple[str, bool]]:
    process = start(command(folder, "worker", *LONG), folder)
    wait_for(lambda: rows(folder / "worker") >= 5)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    text = process.communicate()[1]
    step = checkpoint.latest(folder / "worker")[0]["step"]
    good = process.returncode == 65 and "Traceback" not in text and "worker was lost" in text
    yield f"a killed worker: code {process.returncode}, step {step} saved", good and step >= 5


def stderr(folder: Path, seed: int) -> Iterator[tuple[str, bool]]:
    process = start(command(folder, "pipe"), folder)
    process.stderr.read(1)
    process.stderr.close()
    yield "stderr's reader gone: goes on to its end", process.wait() == 0
    with open("/dev/full", "w") as full:
        process = start(command(folder, "full"), folder, stderr=full)
        yield "stderr on a full disk: goes on to its end", process.wait() == 0


def disk(folder: Path, seed: int) -> Iterator[tuple[str, bool]]:
    """A limit on a file's size stands in for a full disk."""
    argv = [
        "sh",
        "-c",
        'ulimit -f 20; exec "$@"',
        "sh",
        *command(folder, "disk", "--train.save-every", "7", workers=0),
    ]
    process = start(argv, folder)
    text = process.communicate()[1]
    good = process.returncode == 73 and "cannot write" in text and "Traceback" not in text
    yield f"no room for a checkpoint: code {process.returncode}, one line", good
    left = list((folder / "disk").glob("checkpoint-*"))
    yield f"  and nothing half written is left: {[p.name for p in left]}", not left


def shm(folder: Path, seed: int) -> Iterator[tuple[str, bool]]:
    """1 MB of /dev/shm where a batch has more; as root, who may mount."""
    argv = command(
        folder, "shm", "--train.steps", "4", "--data.repeat-aug", "64", "--data.short-side", "0"
    )
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    process = start(["unshare", "-m", "sh", "-c", mount, "sh", *argv], folder)
    text = process.communicate(timeout=120)[1]
    if "unshare" in text or "mount:" in text:
        yield "small /dev/shm: not tried, no right to mount", True
    else:
        yield f"small /dev/shm: code {process.returncode}", process.returncode == 0


CASES = {f.__name__: f for f in (kills, signals, torchrun, worker, stderr, disk, shm)}


def main(cases: dict[str, Callable], seed: int = 0, *names: str) -> int:
    bad, began = 0, time.monotonic()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup too
    print(f"seed {seed}", flush=True)
    for name in names or cases:
        folder = Path(tempfile.mkdtemp(prefix="accidents-"))
        prepare(folder)
        for words, good in cases[name](folder, seed):
            bad += not good
            print("ok  " if good else "BAD ", words, flush=True)
        shutil.rmtree(folder)
    print(f"{bad} bad, {time.monotonic() - began:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(CASES, *map(int, sys.argv[1:2]), *sys.argv[2:]))
