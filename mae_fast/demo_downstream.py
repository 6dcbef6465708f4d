"""`mae-fast demo --downstream`: a made set told apart by motion alone, and what pre-training buys.

Many clips without labels, few with: pre-train, fine-tune from there and from scratch with the same
steps and recipe, each at the rate that did best on a part of the training clips; probe the frozen
encoder; test all on clips over other pictures. It shows a mechanism and says nothing of Kinetics.
"""

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_fast import motion, probe
from mae_fast.bench.step import time_run
from mae_fast.checkpoint import checkpoints
from mae_fast.config import Config, DataConfig, MaskConfig, TrainConfig, preset
from mae_fast.data import VideoRow, build_index, read_index, write_index
from mae_fast.errors import DataError
from mae_fast.files import write
from mae_fast.page import Page
from mae_fast.tasks.clips import Views, numbers_of
from mae_fast.tasks.config import (
    AugmentConfig,
    ClipsConfig,
    FinetuneConfig,
    HeadConfig,
    TuneConfig,
    ViewsConfig,
)
from mae_fast.tasks.finetune import finetune
from mae_fast.tasks.score import frames_of, load_run, logits_of
from mae_fast.train import pretrain

MODEL = dict(
    img_size=motion.SIDE, patch_size=8, num_frames=8, embed_dim=96, depth=4, num_heads=3,
    decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2,
)  # fmt: skip
MASKED = 0.75  # of 64 patches: at 90% six would be left
UNLABELLED, PER_CLASS, TEST = 1200, 16, 200
RATES = (0.02, 0.08)  # blr, of 256 clips
TUNE_STEPS, LEAST_STEPS = 200, 300
FOLDERS = ("set", "pretrain", "runs", "features")


def demo(source: Path, folder: Path, minutes: float, steps: int = 0, seed: int = 0) -> dict:
    """Everything, into `folder`; returns what results.json holds. `steps` replaces the minutes of
    pre-training."""
    began = time.perf_counter()
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    sets = make_sets(source, folder / "set", seed)
    last = pretrained(sets, folder, minutes, steps, seed)
    rates = {}
    for name, init in (("scratch", "scratch"), ("pretrained", str(last))):
        rates[name] = choose_rate(name, init, sets, folder, seed)
        tune(name, init, rates[name], sets["train"], folder, seed)
    tune("single_frame", str(last), rates["pretrained"], sets["still"], folder, seed)
    results: dict[str, Any] = {"chance": 1 / len(motion.CLASSES)}
    for name in ("single_frame", "scratch", "pretrained"):
        tested = sets["still_test" if name == "single_frame" else "test"]
        results[name] = tested_on(folder / "runs" / name, tested)
    results |= probed(last, sets, seed)
    results["seconds"] = round(time.perf_counter() - began)
    write(folder / "results.json", json.dumps(results, indent=2))
    write(folder / "index.html", page(results, sets).html())
    for key, value in results.items():
        print(f"{key}: {value:.1%}" if isinstance(value, float) else f"{key}: {value}")
    print(folder / "index.html")
    return results


def make_sets(source: Path, folder: Path, seed: int) -> dict[str, Path]:
    """{name: index}: unlabelled, train, its parts fit and choose, test, and still and still_test,
    which show one frame of each clip of train and of test all the time."""
    index = folder / "footage.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    build_index([source], index, progress=False)
    videos = sorted({r.path for r in read_index(index)})
    if len(videos) < 2:
        raise DataError(f"{source}: two videos are needed, one for training and one for the test")
    cut = max(1, len(videos) * 3 // 5)
    print(f"pictures of {cut} videos for training, of the other {len(videos) - cut} for the test")
    train, test = motion.pictures(videos[:cut], 40), motion.pictures(videos[cut:], 40)
    count = PER_CLASS * len(motion.CLASSES)
    parts = {
        "unlabelled": (UNLABELLED, train, 0, False),
        "train": (count, train, 1, False),
        "test": (TEST, test, 2, False),
        "still": (count, train, 1, True),
        "still_test": (TEST, test, 2, True),
    }
    found = {}
    for name, (n, pictures, which, still) in parts.items():
        print(f"making {n} clips: {name}")
        key = 10 * seed + which
        found[name] = motion.make(
            folder, name, n, pictures, key, labelled=name != "unlabelled", still=still
        )
    rows = read_index(found["train"])  # class by class in turn: a quarter of each to choose by
    quarter = len(rows) // 4
    for name, some in (("fit", rows[quarter:]), ("choose", rows[:quarter])):
        found[name] = folder / f"{name}.jsonl"
        write_index(some, found[name])
    return found


def pretrained(sets: dict[str, Path], folder: Path, minutes: float, steps: int, seed: int) -> Path:
    """The checkpoint of a run on the unlabelled clips. No flip: it would swap left and right."""
    data = DataConfig(
        index=str(sets["unlabelled"]), sampling_rate=4, repeat_aug=4, short_side=0,
        crop_area=(0.7, 1.0), flip=0.0, workers=1,
    )  # fmt: skip
    train = TrainConfig(batch_size=12, blr=0.02, clip_grad=1.0, device="cpu", seed=seed)
    mask = MaskConfig(ratio=MASKED)
    model = preset("vit_tiny", **MODEL)
    cfg = Config(str(folder / "pretrain"), model, mask=mask, data=data, train=train)
    if not steps:
        logging.getLogger("mae_fast").setLevel(logging.ERROR)
        seconds = float(np.median(time_run(cfg, steps=8, warmup=4)[0]))
        logging.getLogger("mae_fast").setLevel(logging.WARNING)
        steps = max(LEAST_STEPS, int(60 * minutes / seconds))
    print(f"pre-training {steps} steps of 48 clips, {MASKED:.0%} masked, on {UNLABELLED} clips")
    train = replace(train, steps=steps, warmup_steps=steps // 10, save_every=steps, log_every=50)
    pretrain(replace(cfg, train=train))
    return checkpoints(folder / "pretrain")[-1]


def tune(
    name: str,
    init: str,
    rate: float,
    index: Path,
    folder: Path,
    seed: int,
    val: str = "",
    masked: float = 0.0,
) -> dict[str, Any]:
    """A run of the one recipe that all share, into folder/runs/name; `rate` is its blr, `masked`
    the share of patches left out at first."""
    cfg = FinetuneConfig(
        output=str(folder / "runs" / name),
        init=init,
        model=preset("vit_tiny", **MODEL),
        classifier=HeadConfig(drop_path=0.1, dropout=0.0),
        augment=AugmentConfig(randaugment="", mixup=0.0, cutmix=0.0, erasing=0.0),
        data=ClipsConfig(
            index=str(index), val_index=val, sampling_rate=4, repeat_aug=2, short_side=0,
            crop_area=(0.7, 1.0), flip=0.0, workers=1,
        ),
        train=TuneConfig(
            batch_size=8, steps=TUNE_STEPS, warmup_steps=TUNE_STEPS // 10, blr=rate, device="cpu",
            layer_decay=1.0 if init == "scratch" else 0.75, mask_ratio=masked, log_every=50,
            seed=seed, save_every=TUNE_STEPS,
        ),
        test=ViewsConfig(temporal=1, spatial=1),
    )  # fmt: skip
    print(f"fine-tuning {name}: {TUNE_STEPS} steps of 16 clips, blr {rate:g}")
    return finetune(cfg)


def choose_rate(name: str, init: str, sets: dict[str, Path], folder: Path, seed: int) -> float:
    """The rate that does best on the part of the training clips that is kept for it."""
    found = {}
    for rate in RATES:
        part = f"{name}-{rate:g}"
        row = tune(part, init, rate, sets["fit"], folder, seed, str(sets["choose"]))
        found[rate] = row["val_acc1"]
    return max(found, key=found.get)


def tested_on(run: Path, index: Path) -> float:
    """Top-1 of a run's classifier on the one view that a clip has."""
    _, cfg, model, classes = load_run(str(run))
    rows = read_index(index, broken=True)
    views = Views(rows, cfg.data, cfg.model.num_frames, cfg.model.img_size, 1, 1)
    logits, _ = logits_of(model, views, range(len(rows)))
    return probe.accuracy(logits[:, 0], torch.tensor(numbers_of(rows, classes), device="cpu"))


def probed(last: Path, sets: dict[str, Path], seed: int) -> dict[str, float]:
    """kNN, linear and attentive accuracies of the frozen encoder."""
    print("probing the frozen encoder")
    rows = read_index(sets["train"]), read_index(sets["test"])
    clips = ClipsConfig(sampling_rate=4, short_side=0, workers=1)
    grid = [(rate, 0.1) for rate in (3e-3, 1e-3, 3e-4)]
    kinds = ("knn", "linear", "attentive")
    return probe.judge(probe.encoder(str(last)), *rows, clips, kinds, seed=seed, grid=grid)


_SAID = {
    "chance": "chance",
    "single_frame": "fine-tuned and tested on one frame of each clip, shown all the time",
    "scratch": "fine-tuned from scratch",
    "pretrained": "fine-tuned from the pre-trained encoder: same steps and recipe",
    "knn": "frozen: 10 nearest neighbours",
    "linear": "frozen: linear probe",
    "attentive": "frozen: attentive probe",
}


def page(results: dict[str, Any], sets: dict[str, Path]) -> Page:
    """The table, and a clip of each class."""
    lead = (
        "Discs move up, down, left or right over still pictures: no single frame tells the class, "
        f"and every labelled scene has one clip of each. {UNLABELLED} clips without labels, "
        f"{PER_CLASS} a class with, {TEST} for the test, over pictures of other videos. One seed, "
        f"{results['seconds']} seconds in all. It shows a mechanism, and says nothing about "
        "Kinetics."
    )
    made = Page("What pre-training buys, on a made set", [lead])
    rows = [[text, f"{results[key]:.1%}"] for key, text in _SAID.items()]
    made.table(["model", f"top-1 of {TEST} clips"], rows)
    shown: dict[str, VideoRow] = {}
    for r in read_index(sets["test"]):
        shown.setdefault(r.label or "", r)
    for label, r in sorted(shown.items()):
        made.image(frames_of(r), "jpeg", f"{label}: 3 moments")
    return made
