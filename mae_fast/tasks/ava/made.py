"""`mae-fast demo --ava`: a small made set in AVA's own format, and what training makes of it.

Movies of noise in which a scene lasts a second: one to three "persons", rectangles whose texture is
what they do (stand, sit, lie), and who walk across the frame or stay. Whoever looks at the whole
frame cannot tell whose label is whose: boxes are needed; and walking is seen in no single frame. It
shows that the parts fit together, and says nothing of AVA.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from mae_fast.config import preset
from mae_fast.data import build_index
from mae_fast.data.pack import write_pack
from mae_fast.files import write
from mae_fast.motion import write_clip
from mae_fast.tasks.ava import score
from mae_fast.tasks.ava.config import AvaConfig
from mae_fast.tasks.ava.evaluate import iou
from mae_fast.tasks.ava.model import roi_align
from mae_fast.tasks.config import (
    AugmentConfig,
    ClipsConfig,
    FinetuneConfig,
    HeadConfig,
    TuneConfig,
    ViewsConfig,
)
from mae_fast.tasks.finetune import finetune
from mae_fast.tasks.score import load_run

HEIGHT, WIDTH, FPS, BEGINS = 64, 96, 10, 900
POSTURES = {1: "stand", 2: "sit", 3: "lie"}
WALK, WATCH = 10, 12  # WATCH is labelled, and not among the classes that count
NAMES = POSTURES | {WALK: "walk"}
MODEL = dict(
    img_size=64, patch_size=8, num_frames=4, embed_dim=96, depth=3, num_heads=3,
    decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2,
)  # fmt: skip
TRAIN_MOVIES, TEST_MOVIES, SECONDS = 6, 2, 40


def demo(folder: Path, steps: int = 0, seed: int = 0) -> dict[str, Any]:
    """Make the set, train on it from scratch, test before and after; what results.json holds."""
    began = time.perf_counter()
    roi_align()  # or torchvision would be missed once the set is made
    for name in ("set", "run", "test"):
        shutil.rmtree(folder / name, ignore_errors=True)
    a = make(folder / "set", seed)
    index = folder / "set" / "movies.jsonl"
    build_index([folder / "set" / "movies"], index, progress=False)
    how = {"short_side": 0, "crf": None, "gop": None, "copy": True, "shard": 1000}
    print(write_pack(index, folder / "set" / "pack", how, 2))
    cfg = config(folder, a, steps or 300, seed)
    finetune(cfg)
    path, _, model, _ = load_run(cfg.output)
    after = score.test(path, cfg, model, str(folder / "test"))
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    results = {
        "mAP_before": json.loads(rows[0])["val_map"],
        "mAP_after": after["mAP"],
        "mAP_chance": after["mAP_chance"],
        "steps": cfg.train.steps,
        "seconds": round(time.perf_counter() - began),
    }
    write(folder / "results.json", json.dumps(results, indent=2))
    for key, value in results.items():
        print(f"{key}: {value:.1%}" if isinstance(value, float) else f"{key}: {value}")
    print(folder / "test" / "index.html")
    return results


def config(folder: Path, ava: AvaConfig, steps: int, seed: int) -> FinetuneConfig:
    """A run from scratch on the pack of the set."""
    return FinetuneConfig(
        output=str(folder / "run"),
        task="ava",
        model=preset("vit_tiny", **MODEL),
        classifier=HeadConfig(drop_path=0.0, dropout=0.0, head_scale=1.0),
        augment=AugmentConfig(randaugment="", mixup=0.0, cutmix=0.0, erasing=0.0, smoothing=0.0),
        data=ClipsConfig(
            index=str(folder / "set" / "pack"), sampling_rate=2, target_fps=float(FPS),
            repeat_aug=1, short_side=0, flip=0.5, workers=1,
        ),
        train=TuneConfig(
            batch_size=8, steps=steps, warmup_steps=min(50, steps), blr=0.06, layer_decay=1.0,
            device="cpu", seed=seed, log_every=50, save_every=max(steps, 1),
        ),
        test=ViewsConfig(temporal=1, spatial=1),
        ava=ava,
    )  # fmt: skip


def make(folder: Path, seed: int = 0, movies: int = 0, seconds: int = SECONDS) -> AvaConfig:
    """Write movies, boxes, labels, detections and excluded timestamps; [ava] with their files."""
    rng = np.random.default_rng(seed)
    (folder / "movies").mkdir(parents=True, exist_ok=True)
    files = {name: [] for name in ("train", "val", "val_detections", "train_detections")}
    for k in range(movies or TRAIN_MOVIES + TEST_MOVIES):
        part = "val" if k < (TEST_MOVIES if not movies else 1) else "train"
        name = f"movie-{k:02d}"
        frames = []
        for s in range(seconds + 4):
            scene, people = _scene(rng)
            frames.append(scene)
            if 2 <= s < seconds + 2:
                _write(rng, files, part, name, BEGINS + s, people)
        # A scene lies half a second around its second: the file begins in the middle of one.
        movie = np.concatenate(frames)[FPS // 2 :]
        write_clip(folder / "movies" / f"{name}.mp4", movie, fps=FPS, gop=FPS, crf=16)
    for name, lines in files.items():
        write(folder / f"{name}.csv", "".join(lines))
    write(folder / "excluded.csv", f"movie-00,{BEGINS + 3:04d}\n")
    text = "".join(f'item {{\n  name: "{n}"\n  id: {c}\n}}\n' for c, n in NAMES.items())
    write(folder / "labels.pbtxt", text)
    return AvaConfig(
        train_csv=str(folder / "train.csv"), val_csv=str(folder / "val.csv"),
        labels=str(folder / "labels.pbtxt"), excluded=str(folder / "excluded.csv"),
        train_detections=str(folder / "train_detections.csv"),
        val_detections=str(folder / "val_detections.csv"),
        begins_at=BEGINS, num_classes=WATCH, short_sides=(64.0, 80.0), times_detection=True,
        val_every=1,
    )  # fmt: skip


def _scene(rng: np.random.Generator):
    """A second of frames uint8 [FPS, H, W, 3] and [(box at its middle in shares, classes)]."""
    frames = np.repeat(_noise(rng)[None], FPS, axis=0)
    people = []
    for _ in range(rng.integers(1, 4)):
        h, w = rng.integers(18, 30), rng.integers(14, 24)
        y, x = rng.integers(0, HEIGHT - h), rng.integers(8, WIDTH - w - 8)
        box = np.array([[x, y, x + w, y + h]], float)
        if people and iou(box, np.array([p[0] for p in people])).max() > 0:
            continue
        posture, walks = int(rng.integers(1, 4)), bool(rng.random() < 0.5)
        speed = float(rng.choice([-1, 1]) * rng.uniform(1.0, 1.6)) if walks else 0.0
        texture = _texture(rng, posture, h, w)
        for t in range(FPS):
            left = round(min(max(x + speed * (t - FPS // 2), 0), WIDTH - w))
            frames[t, y : y + h, left : left + w] = texture
        classes = [posture, *([WALK] if walks else []), *([WATCH] if rng.random() < 0.3 else [])]
        people.append((box[0], classes))
    shares = np.array([WIDTH, HEIGHT] * 2)
    return frames, [(box / shares, classes) for box, classes in people]


def _noise(rng: np.random.Generator) -> np.ndarray:
    coarse = rng.integers(60, 180, (HEIGHT // 8, WIDTH // 8, 3)).astype(np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def _texture(rng: np.random.Generator, posture: int, h: int, w: int) -> np.ndarray:
    """Stripes upright, level, or both."""
    rows, columns = np.mgrid[:h, :w] // 3 % 2
    which = {1: columns, 2: rows, 3: rows ^ columns}[posture]
    light, dark = rng.integers(170, 256, 3), rng.integers(0, 80, 3)
    return np.where(which[..., None], light, dark).astype(np.uint8)


def _write(rng, files: dict, part: str, movie: str, second: int, people: list) -> None:
    """The rows of a second: its truth, and detections near it, some of them false."""

    def row(box, label, last) -> str:
        return f"{movie},{second:04d},{','.join(f'{v:.3f}' for v in box)},{label},{last}\n"

    for number, (box, classes) in enumerate(people):
        files[part] += [row(box, c, number) for c in classes]
        near = np.clip(box + rng.normal(0, 0.004, 4), 0, 1)
        files[f"{part}_detections"].append(row(near, "", f"{rng.uniform(0.85, 1):.4f}"))
    if rng.random() < 0.2:
        x, y = rng.uniform(0, 0.7, 2)
        stray = (x, y, x + 0.2, y + 0.25)
        files[f"{part}_detections"].append(row(stray, "", f"{rng.uniform(0.5, 0.95):.4f}"))
