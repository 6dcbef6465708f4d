"""Records of measurements: one line of JSON each, in files that are only appended to.

A record says what was timed, under which conditions, and keeps every sample:

    what         a sentence            environment   mae_fast.environment.environment()
    precision    fp32 or bf16          seconds       {name: [a sample for each round]}
    baseline     one of the names      limits        as mae_fast.bench.machine.as_record, if timed
    model, batch_clips, ratio          of a step; of an op: op and shape

Older records lie otherwise; FORMS tells how, and `seconds` reads them all.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mae_fast.errors import ConfigError

Record = dict[str, Any]
ENVIRONMENT = ("mae_fast", "python", "torch", "cpu", "commit")
STEP = {"model": str, "batch_clips": int, "ratio": (int, float), "precision": str}
# Form -> the field that shows it, and the fields that it must have beside `what`. The first that
# fits is a record's form; "timed" is the one to write today.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpu": ("stage", {"item": str, "status": str, "sources": str, "at": str}),
    "profile": ("product_rate", {**STEP, "device": str, "engines": list}),
    "ladder": ("engines", {**STEP, "engines": dict}),
    "overhead": ("ops", {"ops": dict, "calls_a_sample": int}),
    "curves": ("greatest_relative_difference", {"model": str, "precision": str}),
    "op": ("op", {"shape": str, "dtype": str, "baseline": str, "chosen": str, "seconds": dict}),
    "step": ("variant", {**STEP, "variant": str, "device": str, "seconds": list}),
    "timed": ("seconds", {"precision": str, "baseline": str, "seconds": dict}),
}


def append(path: str | Path, record: Record) -> None:
    """Add a record to a file. ValueError for one that is not valid: nothing is written."""
    wrong = problems(record)
    if wrong:
        raise ValueError(f"not a record: {'; '.join(wrong)}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


def files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that are named, and the .jsonl and profile.json below folders."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            below = [*path.rglob("*.jsonl"), *path.rglob("profile.json")]
            # Of a run of `bench ratio`, samples.jsonl is what its records are made of.
            found += sorted(f for f in below if f.name != "samples.jsonl")
        else:
            found.append(path)
    return found


def read(path: str | Path) -> list[Record]:
    """The records of a file, oldest first: one a line, or one document (profile.json). ConfigError,
    with the line, for what is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not records: {e}") from e
    found = []
    lines = [text] if Path(path).suffix == ".json" else text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{path}:{number}: not JSON: {e}") from e
        wrong = problems(record)
        if wrong:
            raise ConfigError(f"{path}:{number}: not a record: {'; '.join(wrong)}")
        found.append(record)
    return found


def form(record: Record) -> str | None:
    """Which of FORMS a record has; None for something else."""
    return next((name for name, (shows, _) in FORMS.items() if shows in record), None)


def problems(record: Any) -> list[str]:
    """What keeps something from being a record; empty for a record."""
    if not isinstance(record, dict):
        return [f"a {type(record).__name__}, not an object"]
    name = form(record)
    if name is None:
        return ["it has no seconds"]
    fields = dict(FORMS[name][1]) | {"environment": dict}
    if name != "gpu":
        fields["what"] = str
    found = [
        f"{field} must be {_name(kind)}, got {record.get(field)!r:.60}"
        for field, kind in fields.items()
        if not isinstance(record.get(field), kind)
    ]
    if found:
        return found
    lacking = [key for key in ENVIRONMENT if key not in record["environment"]]
    if lacking:
        found.append(f"environment lacks {', '.join(lacking)}")
    samples = seconds(record)
    if not samples and name not in ("gpu", "curves"):
        found.append("it has no samples")
    for series, values in samples.items():
        if not values or not all(_is_time(v) for v in values):
            found.append(f"samples of {series} must be seconds above 0, got {values!s:.60}")
    if "baseline" in fields and record["baseline"] not in samples:
        found.append(f"baseline {record['baseline']} is none of {', '.join(samples)}")
    return found


def seconds(record: Record) -> dict[str, list[float]]:
    """{name: samples in seconds} of a record in any form, in the order of the rounds."""
    match form(record):
        case "profile":
            return {engine["engine"]: engine["seconds"] for engine in record["engines"]}
        case "ladder":
            return {name: engine["step"] for name, engine in record["engines"].items()}
        case "overhead":
            ways = record["ops"].items()
            return {f"{op} {way}": s for op, found in ways for way, s in found.items()}
        case "step":
            return {"mae_fast": record["seconds"]}
        case "gpu":
            found = (record.get(k) for k in ("step_seconds", "seconds_a_clip", "seconds"))
            return next((f for f in found if isinstance(f, dict)), {})
        case "op" | "timed":
            return record["seconds"]
    return {}


class Step(NamedTuple):
    """Samples of mae_fast's training step; ratio 0: its encoder saw every token."""

    model: str
    ratio: float
    clips: int
    seconds: list[float]


def steps(record: Record) -> list[Step]:
    """The steps of mae_fast that a record of any form holds."""
    name, times = form(record), seconds(record)
    if name == "gpu":
        model, ratio, clips = (record.get(k) for k in ("model", "ratio", "batch"))
        if record["stage"] == "steps" and "mae_fast" in times:
            return [Step(model, ratio, clips, times["mae_fast"])]
        if record["stage"] == "ratios" and "this" in times:
            return [Step(model, ratio, clips, [clips * s for s in times["this"]])]
        return []
    if name == "timed" and "mae_fast" in record.get("cells", {}):
        clips = record["cells"]["mae_fast"]["clips"]
        return [Step(record["model"], record["ratio"], clips, times["mae_fast"])]
    if name not in ("ladder", "step"):
        return []
    model, ratio, clips = (record[k] for k in ("model", "ratio", "batch_clips"))
    found = {"mae_fast": ratio, "mae_fast_encode_all": 0.0}
    return [Step(model, r, clips, times[engine]) for engine, r in found.items() if engine in times]


def subject(record: Record) -> tuple:
    """What was timed: records that can be compared have the same."""
    fields = ("what", "stage", "item", "family", "model", "variant", "op", "shape")
    fields += ("batch_clips", "clips", "ratio", "strategy", "precision", "dtype", "device")
    return tuple((f, record[f]) for f in fields if isinstance(record.get(f), str | int | float))


def describe(record: Record) -> str:
    """The subject in words."""
    return ", ".join(str(value) for field, value in subject(record) if field != "what")


def title(record: Record) -> str:
    """Of a record of steps: what was run."""
    family = f"{record['family']}, " if "family" in record else ""
    said = f"{family}{record['model']}, {record['ratio']:.0%} masked, {record['batch_clips']} clips"
    workers = record.get("workers")  # with loading
    loaded = "" if workers is None else f" loaded by {workers} processes"
    return f"{said}{loaded}, {record['precision']}"


def where(record: Record) -> str:
    """The machine: the GPU if it was timed on one, otherwise the CPU."""
    found = record["environment"]
    return found.get("cuda:0", found["cpu"])


def newest(records: Iterable[Record]) -> dict[tuple, Record]:
    """{subject: its last record}, in the order in which subjects first appear."""
    return {subject(r): r for r in records}


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _name(kind: Any) -> str:
    return " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__
