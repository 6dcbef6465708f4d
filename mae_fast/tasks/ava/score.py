"""The test on AVA: scores of every person in every keyframe, once, and what they are worth."""

import csv
import functools
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_fast import distributed
from mae_fast.errors import ConfigError
from mae_fast.files import write
from mae_fast.tasks.ava import evaluate
from mae_fast.tasks.ava.clips import Keyframes, WholeFrames, keyframes, read_movies
from mae_fast.tasks.ava.evaluate import Key, Labelled, Scores
from mae_fast.tasks.ava.files import LeftOut, people, read_boxes, read_classes, read_excluded
from mae_fast.tasks.ava.model import BoxClassifier
from mae_fast.tasks.config import FinetuneConfig

log = logging.getLogger("mae_fast")
BAD_CLIPS = "clips that do not decode, their scores are 0"


def rule(cfg: FinetuneConfig) -> tuple[int, int, float]:
    """How a clip lies around its second: frames, their distance, the rate that it is of."""
    return cfg.model.num_frames, cfg.data.sampling_rate, cfg.data.target_fps


@dataclass(frozen=True)
class TestSet:
    """The keyframes to be labelled, the truth, and the classes that count."""

    __test__ = False  # no test of pytest's
    keyframes: Keyframes
    truth: list[Labelled]
    names: dict[int, str]
    excluded: set[Key]
    detected: bool  # the boxes are a detector's, not the truth's

    @classmethod
    def read(cls, cfg: FinetuneConfig, left: LeftOut, every: int = 1) -> "TestSet":
        """That of [ava]; of the seconds that are multiples of `every`."""
        a = cfg.ava
        for name in ("val_csv", "labels"):
            if not getattr(a, name):
                raise ConfigError(f"ava.{name} is empty: a test needs it")
        truth = read_boxes(a.val_csv, left, a.num_classes)
        rows = truth
        if a.val_detections:
            rows = read_boxes(a.val_detections, left, a.num_classes)
        frames = people(rows, a.score if a.val_detections else 0.0)
        if not a.val_detections:  # the eighth column is a person's number
            frames = {k: [p.__class__(p.box, p.classes) for p in v] for k, v in frames.items()}
        frames = {k: v for k, v in frames.items() if k[1] % every == 0}
        excluded = read_excluded(a.excluded, left) if a.excluded else set()
        movies = read_movies(cfg.data.index, a, {movie for movie, _ in frames})
        found = keyframes(frames, movies, rule(cfg), a.begins_at, left, excluded)
        truth = [row for row in truth if row.second % every == 0]
        return cls(found, truth, read_classes(a.labels), excluded, bool(a.val_detections))

    @functools.cached_property
    def by_key(self) -> dict[Key, list[Labelled]]:
        """The truth's rows of each frame."""
        found: dict[Key, list[Labelled]] = {}
        for row in self.truth:
            found.setdefault(row.key, []).append(row)
        return found

    def labelled(self, scores: Sequence[np.ndarray]) -> list[Labelled]:
        """Every person's score of every class that counts; scores[i] are [P, classes] of keyframe
        i."""
        found = []
        for i, second in enumerate(self.keyframes.seconds):
            where = self.keyframes.movie(i), float(second)
            for person, row in zip(self.keyframes.people[i], scores[i], strict=True):
                found += [Labelled(*where, person.box, c, float(row[c - 1])) for c in self.names]
        return found

    def papers(self, scores: Sequence[np.ndarray]) -> Scores:
        return evaluate.papers(self.truth, self.labelled(scores), self.names, self.excluded)

    def chance(self, draws: int = 20, seed: int = 0) -> float:
        """The mean mAP of scores that are random numbers, on the same boxes."""
        rng, found = np.random.default_rng(seed), []
        width = max(self.names)
        for _ in range(draws):
            scores = [rng.random((len(p), width)) for p in self.keyframes.people]
            found.append(self.papers(scores).mean_ap)
        return float(np.mean(found))


@torch.no_grad()
def scores_of(
    model: BoxClassifier,
    test: TestSet,
    cfg: FinetuneConfig,
    numbers: Sequence[int],
    waiting: Callable[[], None] = lambda: None,
) -> tuple[list[np.ndarray], list[tuple[str, str]]]:
    """(scores [P, classes] of each keyframe, (clip, reason) of those that do not decode, which
    score 0). In fp32 on the host."""
    model.eval()
    device, found, bad = model.head.weight.device, [], []
    short = cfg.test.short_side or cfg.model.img_size
    frames = WholeFrames(test.keyframes, cfg.data, cfg.model.num_frames, cfg.ava, short)
    half = cfg.train.precision == "bf16"
    for batch in frames.of(numbers, cfg.data.workers, waiting):
        persons = test.keyframes.people[int(batch.samples[0])]
        if batch.bad:
            bad += batch.bad
            found.append(np.zeros((len(persons), model.head.out_features), np.float32))
            continue
        video = frames.video(batch.to(device), cfg.model.patch_size, model.family.pixels)
        boxes = torch.cat([torch.zeros(len(persons), 1, device="cpu"), batch.labels.float()], dim=1)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(video, boxes.to(device))
        scores = logits.float().sigmoid().cpu().numpy()
        if cfg.ava.times_detection and test.detected:
            scores = scores * np.array([[p.score] for p in persons], np.float32)
        found.append(scores)
    return found, bad


def test(
    path: Path, cfg: FinetuneConfig, model: BoxClassifier, output: str, ema: bool = False
) -> dict[str, Any]:
    """Test a checkpoint on all keyframes; leaves detections.csv, results.json and index.html in
    `output`. Under torchrun each keyframe is one process's, none twice. `ema`: the model's weights
    are the averaged ones, which the results say."""
    left = LeftOut()
    found = TestSet.read(cfg, left)
    world = distributed.start(cfg.train.device)
    try:
        model.to(world.device)
        mine = range(world.rank, len(found.keyframes), world.size)
        parts = distributed.gather(scores_of(model, found, cfg, mine), world)
    finally:
        distributed.finish()
    if not world.writer:
        return {}
    scores: list[np.ndarray] = [np.empty(0)] * len(found.keyframes)
    for rank, (part, _) in enumerate(parts):
        scores[rank :: world.size] = part
    for name, reason in (x for _, some in parts for x in some):
        left.add(name, f"{BAD_CLIPS}: {reason}")
    said = {"checkpoint": str(path), **({"weights": "averaged"} if ema else {})}
    return report(Path(output or path.parent / "test"), said, cfg, found, scores, left)


def report(
    folder: Path,
    said: dict[str, str],
    cfg: FinetuneConfig,
    found: TestSet,
    scores: Sequence[np.ndarray],
    left: LeftOut,
) -> dict[str, Any]:
    """Write and print what a test found, after what is `said` of it; returns what results.json
    holds."""
    from mae_fast.tasks.ava.page import page

    detections = found.labelled(scores)
    papers = evaluate.papers(found.truth, detections, found.names, found.excluded)
    challenge = evaluate.activitynet(found.truth, detections, found.names)
    here = {found.keyframes.movie(i) for i in range(len(found.keyframes))}
    truth = [row for row in found.truth if row.movie in here]
    present = evaluate.papers(truth, detections, found.names, found.excluded)
    results = {
        **said,
        "keyframes": len(found.keyframes),
        "movies": len(here),
        "boxes": sum(map(len, found.keyframes.people)),
        "boxes_of": cfg.ava.val_detections or f"the truth ({cfg.ava.val_csv}): not comparable",
        "short_side": cfg.test.short_side or cfg.model.img_size,
        "bad_clips": left.counts.get(BAD_CLIPS, 0),
        "mAP": papers.mean_ap,
        "mAP_activitynet": challenge.mean_ap,
        "mAP_chance": found.chance(3),
        "classes": sum(n > 0 for n in papers.boxes.values()),
    }
    if present.boxes != papers.boxes:
        results["mAP_of_movies_here"] = present.mean_ap
    table = {
        found.names[c]: {"ap": papers.ap[c], "activitynet": challenge.ap[c], "boxes": n}
        for c, n in papers.boxes.items()
    }
    text = json.dumps({**results, "by_class": table}, indent=1).replace("NaN", "null")
    write(folder / "results.json", text)
    write(folder / "left_out.json", json.dumps(vars(left), indent=1))
    write(folder / "detections.csv", as_csv(detections))
    write(folder / "index.html", page(results, table, found, scores, cfg, left.lines).html())
    for key, value in results.items():
        print(f"{key}: {value:.2%}" if isinstance(value, float) else f"{key}: {value}")
    for line in left.say():
        print(f"left out: {line}")
    print(folder / "index.html")
    return results


def as_csv(detections: Sequence[Labelled]) -> str:
    """Rows as the official evaluations read them: movie, second, x1, y1, x2, y2, class, score."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    for row in detections:
        box = (f"{x:.6f}" for x in row.box)
        lines.writerow([row.movie, f"{row.second:04.0f}", *box, row.class_id, f"{row.score:.6f}"])
    return text.getvalue()
