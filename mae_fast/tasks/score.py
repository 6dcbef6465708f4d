"""Tests of a classifier: every view of every video, once, and what their combinations score."""

import io
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from mae_fast import checkpoint, distributed, resume
from mae_fast.classifier import VideoClassifier
from mae_fast.config_file import to_dict
from mae_fast.data import VideoRow, read_index
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.fields import positive
from mae_fast.files import check_output, write, writing
from mae_fast.page import Page, said
from mae_fast.tasks.clips import Views, normalised, numbers_of
from mae_fast.tasks.config import FinetuneConfig, from_state, load

log = logging.getLogger("mae_fast")
_WORST = 12


def test(
    run: Annotated[str, tyro.conf.arg(metavar="CONFIG|CHECKPOINT")],
    /,
    index: str = "",
    output: str = "",
    temporal: int = 0,
    spatial: int = 0,
    short_side: int = 0,
    batch_size: int = 8,
    ema: bool = False,
) -> None:
    """Test a fine-tuned classifier on all views of every video of an index; of a run with
    task = "ava" on every keyframe of [ava], which leaves detections.csv and mAP instead.

    Leaves logits.safetensors (every view's), results.json and index.html in the output. Videos that
    do not decode count as wrong and are listed. Under torchrun each video is one process's.

    Args:
        run: a run's TOML file, or its folder (the last checkpoint in it), or one checkpoint.
        index: videos with labels; by default the run's data.val_index.
        output: folder of the results; by default `test` in the run's folder.
        temporal: clips spread over a video; by default the run's test.temporal.
        spatial: square crops, 1 or 3; by default the run's test.spatial.
        short_side: pixels of the short side; by default the run's test.short_side.
        batch_size: views that go through the model together.
        ema: test the averaged weights (train.ema).
    """
    path, cfg, model, classes = load_run(run, ema)
    folder = Path(output or path.parent / "test")
    check_output(folder / "results.json")
    if cfg.task == "ava":
        from mae_fast.tasks.ava.score import test as test_ava

        if index or temporal or spatial:
            raise ConfigError("--index, --temporal and --spatial are not for AVA: see [ava]")
        if short_side:
            cfg = replace(cfg, test=replace(cfg.test, short_side=short_side))
        test_ava(path, cfg, model, output, ema)
        return
    positive(batch_size=batch_size)
    rows = labelled(index or cfg.data.val_index)
    t = cfg.test
    temporal, spatial = temporal or t.temporal, spatial or t.spatial
    short = short_side or t.short_side or cfg.model.img_size
    views = Views(rows, cfg.data, cfg.model.num_frames, short, temporal, spatial)
    labels = torch.tensor(numbers_of(rows, classes), device="cpu")
    world = distributed.start(cfg.train.device)
    try:
        model.to(world.device)
        mine = range(world.rank, len(rows), world.size)
        found = logits_of(model, views, mine, cfg.train.precision, size=batch_size)
        parts = distributed.gather(found, world)
        if not world.writer:
            return
        logits = torch.empty(len(rows), len(views), len(classes), device="cpu")
        for rank, (part, _) in enumerate(parts):
            logits[rank :: world.size] = part
        bad = [x for _, some in parts for x in some]
    finally:
        distributed.finish()
    results = {
        "checkpoint": str(path),
        **({"weights": "averaged"} if ema else {}),
        "videos": len(rows),
        "bad_videos": len(bad),
        "views": f"{temporal} x {spatial}",
        "short_side": short,
        "sampling": cfg.data.sampling,
        **accuracies(logits, labels),
    }
    save(folder, results, logits, labels, rows, classes, bad)
    for key, value in results.items():
        print(f"{key}: {value:.2%}" if isinstance(value, float) else f"{key}: {value}")
    for name, reason in bad[:20]:
        print(f"bad video, counted as wrong: {name}: {reason}")
    print(folder / "index.html")


test.__test__ = False  # a verb, and no test of pytest's


def load_run(
    run: str, ema: bool = False
) -> tuple[Path, FinetuneConfig, VideoClassifier, tuple[str, ...]]:
    """(checkpoint, configuration, classifier in eval mode, classes) of a run's TOML file, folder or
    checkpoint; `ema`: with its averaged weights. A TOML file says again what may change in a run:
    where videos are, and [test]. Raises CheckpointError where that is no fine-tuned classifier of a
    run, or it has no averaged weights."""
    path, asked = Path(run), None
    if path.suffix == ".toml":
        asked = load(path)
        path = Path(asked.output)
    if path.is_dir():
        found = checkpoint.checkpoints(path)
        if not found:
            raise CheckpointError(f"{path} holds no checkpoint: fine-tune first")
        path = found[-1]
    state, tensors = checkpoint.read(path)
    config = state.get("config")
    if not isinstance(config, dict) or "classifier" not in config or "classes" not in state:
        raise CheckpointError(f"{path} is not a checkpoint of `mae-fast finetune`")
    try:
        cfg = from_state(resume.moved(config, to_dict(asked)) if asked else config)
    except (KeyError, TypeError, ConfigError) as e:
        raise CheckpointError(f"{path}: the configuration in its state is none: {e}") from e
    classes = tuple(state["classes"])
    kind = VideoClassifier
    if cfg.task == "ava":
        from mae_fast.tasks.ava.model import BoxClassifier as kind
    model = kind(cfg.classifier_of(len(classes)))
    if ema:
        tensors = {f"model.{n[10:]}": t for n, t in tensors.items() if n.startswith("optim.ema.")}
        if not tensors:
            raise CheckpointError(f"{path} has no averaged weights: train.ema was 0")
    checkpoint.restore(tensors, model)
    return path, cfg, model.eval(), classes


def labelled(index: str) -> list[VideoRow]:
    """All rows of an index, broken videos too: they are counted."""
    if not index:
        raise ConfigError("no videos to test on: give --index, or data.val_index in the run")
    return read_index(index, broken=True)


@torch.no_grad()
def logits_of(
    model: VideoClassifier,
    views: Views,
    numbers: range,
    precision: str = "fp32",
    waiting: Callable[[], None] = lambda: None,
    size: int = 8,
) -> tuple[Tensor, list[tuple[str, str]]]:
    """(logits [n, views, classes] fp32 on the CPU, (path, reason) of bad videos), NaN for these."""
    model.eval()
    device, bad = model.head.weight.device, []
    shape = (len(views), model.head.out_features)
    found = []
    for batch in views.of(numbers, waiting):
        if batch.bad:
            bad += batch.bad
            found.append(torch.full(shape, torch.nan, device="cpu"))
            continue
        video = normalised(batch.to(device), model)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts = [model(part) for part in video.split(size)]
        found.append(torch.cat(parts).float().cpu())
    return torch.stack(found) if found else torch.empty(0, *shape, device="cpu"), bad


def accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 of the means over views of softmax and of logits, and of the middle view
    alone, for logits [N, V, C] whose last view is the middle one. A NaN is wrong."""
    views = logits[:, :-1] if logits.shape[1] > 1 else logits
    combined = {
        "softmax_mean": views.softmax(dim=-1).mean(dim=1),
        "logit_mean": views.mean(dim=1),
        "1x1": logits[:, -1],
    }
    found = {}
    for name, scores in combined.items():
        good = scores.isfinite().all(dim=1, keepdim=True)
        for k in (1, 5):
            top = scores.nan_to_num().topk(min(k, scores.shape[1]), dim=1).indices
            right = ((top == labels[:, None]) & good).any(dim=1)
            found[f"top{k}_{name}"] = float(right.double().mean())
    return found


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """Counts [C, C], rows the label, columns the prediction; bad videos are in no column."""
    classes, good = scores.shape[1], scores.isfinite().all(dim=1)
    pairs = labels[good] * classes + scores[good].argmax(dim=1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def save(
    folder: Path,
    results: dict[str, Any],
    logits: Tensor,
    labels: Tensor,
    rows: list[VideoRow],
    classes: tuple[str, ...],
    bad: list[tuple[str, str]],
) -> None:
    """logits.safetensors, results.json, bad_videos.json and index.html."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = {"paths": json.dumps([r.path for r in rows]), "classes": json.dumps(classes)}
        tensors = {"logits": logits, "labels": labels}
        checkpoint.write_tensors(folder / "logits.safetensors", tensors, names)
    write(folder / "results.json", json.dumps(results, indent=2))
    write(folder / "bad_videos.json", json.dumps(bad, indent=2))
    write(folder / "index.html", page(results, logits, labels, rows, classes, bad).html())


def page(results, logits, labels, rows, classes, bad) -> Page:
    """Accuracies, a confusion table, and the surest mistakes with a frame of each."""
    scores = (logits[:, :-1] if logits.shape[1] > 1 else logits).softmax(dim=-1).mean(dim=1)
    wrong, made = scores.argmax(dim=1) != labels, Page("Test", [])
    made.section("Results")
    made.table(["what", "found"], [[key, said(value)] for key, value in results.items()])
    if len(classes) <= 30:
        made.section("Confusion", "Rows are labels.")
        table = confusion(scores, labels).tolist()
        counts = ([name, *map(str, row)] for name, row in zip(classes, table, strict=True))
        made.table(["", *classes], counts)
    else:
        # Not by a table of all pairs, which of 10,000 classes has 800 MB.
        at = wrong & scores.isfinite().all(dim=1)
        pairs = zip(labels[at].tolist(), scores[at].argmax(dim=1).tolist(), strict=True)
        made.section("Most often taken for another")
        most = Counter(pairs).most_common(20)
        pairs = [[classes[a], classes[b], str(n)] for (a, b), n in most]
        made.table(["label", "taken for", "videos"], pairs)
    made.section("The surest mistakes")
    sure = torch.where(wrong, scores.amax(dim=1).nan_to_num(-1), -1.0)
    for i in sure.argsort(descending=True)[:_WORST].tolist():
        if sure[i] > 0:
            taken = f"{classes[scores[i].argmax()]} ({sure[i]:.0%}), is {classes[labels[i]]}"
            made.image(frames_of(rows[i]), "jpeg", f"{rows[i].path}: {taken}")
    made.text(*(f"bad, counted as wrong: {path}: {reason}" for path, reason in bad))
    return made


def frames_of(row: VideoRow) -> bytes:
    """Three frames of a video, as a JPEG; nothing of a bad one."""
    from PIL import Image

    from mae_fast.data import BadVideo, VideoReader

    try:
        with VideoReader(row.path, "pyav", strict=False) as reader:
            at = [row.start + int(row.frames * x) for x in (0.1, 0.5, 0.9)]
            frames = reader.read(at, 112)
    except (BadVideo, IndexError):
        return b""
    buffer = io.BytesIO()
    Image.fromarray(torch.cat(list(frames), dim=1).numpy()).save(buffer, "JPEG")
    return buffer.getvalue()
