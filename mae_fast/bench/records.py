"""Records of measurements: one line of JSON each, in files that are only appended to.

A record says what was timed, under which conditions, and keeps every sample:

    kind         one of KINDS, which names the fields that it has beside these
    what         a sentence
    environment  mae_fast.environment.environment()
    seconds      {name: [a sample for each round]}
    baseline     one of the names, where others are held against it
    limits       as mae_fast.bench.machine.as_record, timed in the same rounds

Those of `make gpu` also tell their stage, item and status, and one of a stage that was
killed has no environment.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mae_fast.environment import environment
from mae_fast.errors import ConfigError
from mae_fast.files import check_output, writing

Record = dict[str, Any]
ENVIRONMENT = ("mae_fast", "python", "torch", "cpu", "commit")
STEP = "model batch_clips ratio precision device engines seconds"
# What a record is of, and the fields that it has.
KINDS = {
    # Training steps; ratio 0: the encoder sees every token. Of each engine what was measured:
    # clips, rounds (of its samples), peak_memory_mb, flop, until_update (before the optimizer).
    "steps": STEP,
    # The same by `bench ratio`; of each engine also its parts, and steps with loading (data).
    "ratio": f"{STEP} strategy flop_limit",
    # One step by phase and op: of each engine its parts and its memory.
    "profile": f"{STEP} product_rate copy_rate",
    # Steps of fine-tuning a classifier; of each engine its masked share, 0: every token.
    "finetune": STEP,
    # Processor time a clip, by way: loading, and what stands beside it.
    "loading": "item seconds",
    # What a data worker makes of a clip, by operation and by who does it.
    "augment": "op shape seconds",
    # One op on one call, by backend; flop and bytes: what it does at the least.
    "op": "op shape direction precision seconds",
    # One call of an op on its smallest input, by way.
    "call": "op seconds",
    # Losses step by step, by how they were computed.
    "losses": "model precision losses",
    # Another's model in its own loop, before and after the one line (`make gpu`).
    "accelerate": "family model engines seconds_a_clip times launches",
    # Something that holds or does not.
    "check": "",
}
GPU = "item status sources at"  # beside these
TYPES = dict.fromkeys(("environment", "engines", "seconds", "losses"), dict)  # others are str
TYPES |= dict.fromkeys(("seconds_a_clip", "times", "launches"), dict)
TYPES |= {"batch_clips": int, "ratio": int | float}
TYPES |= dict.fromkeys(("flop_limit", "product_rate", "copy_rate"), float)


def conditions(
    model: str, clips: int, ratio: float, precision: str, device: str = "cpu"
) -> dict[str, Any]:
    """What every record of a model's steps, or of their ops, says beside its times."""
    said = {"model": model, "batch_clips": clips, "ratio": ratio, "precision": precision}
    return {**said, "device": device, "environment": environment()}


def check_appends(path: str) -> None:
    """Before what is measured, so that it is not lost: WriteError where a file cannot be written,
    ConfigError where it holds something else. None is named by an empty path."""
    if path:
        check_output(path)
        if os.path.isfile(path):
            read(path)


def append(path: str | Path, record: Record) -> None:
    """Add a record to a file. ValueError for one that is not valid: nothing is written."""
    wrong = problems(record)
    if wrong:
        raise ValueError(f"not a record: {'; '.join(wrong)}")
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as f:
            f.write(json.dumps(record) + "\n")


def files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that are named, and below folders each profile.json and .jsonl of records: runs,
    packs and indices have others."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            lists = (f for f in path.rglob("*.jsonl") if _holds_records(f))
            found += sorted([*lists, *path.rglob("profile.json")])
        else:
            found.append(path)
    return found


def _holds_records(path: Path) -> bool:
    """Whether a file begins with a record, or is so damaged that `read` is to tell."""
    if not path.is_file() or path.name == "samples.jsonl":  # what records of `bench ratio` are of
        return False
    with open(path, "rb") as f, contextlib.suppress(ValueError):
        first = json.loads(f.readline())
        return not isinstance(first, dict) or "kind" in first
    return True


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


def problems(record: Any) -> list[str]:
    """What keeps something from being a record; empty for a record."""
    if not isinstance(record, dict):
        return [f"a {type(record).__name__}, not an object"]
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        return [f"kind must be one of {', '.join(KINDS)}, got {kind!r:.60}"]
    fields = f"what {GPU if 'stage' in record else ''}".split()
    if measured(record):
        fields += ["environment", *KINDS[kind].split()]
    types = {field: TYPES.get(field, str) for field in fields}
    found = [
        f"{field} must be {getattr(of, '__name__', of)}, got {record.get(field)!r:.60}"
        for field, of in types.items()
        if not isinstance(record.get(field), of)
    ]
    if found:
        return found
    lacking = [key for key in ENVIRONMENT if key not in record.get("environment", ENVIRONMENT)]
    if lacking:
        found.append(f"environment lacks {', '.join(lacking)}")
    timed = [field for field in fields if field.startswith("seconds")]
    samples = {name: s for field in timed for name, s in record[field].items()}
    if timed and not samples:
        found.append("it has no samples")
    for series, values in samples.items():
        times = (isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values)
        if not values or not all(times):
            found.append(f"samples of {series} must be seconds above 0, got {values!s:.60}")
    if "baseline" in record and record["baseline"] not in samples:
        found.append(f"baseline {record['baseline']} is none of {', '.join(samples)}")
    return found


def measured(record: Record) -> bool:
    return record.get("status", "measured") == "measured"


def ours(record: Record) -> tuple[int, list[float]] | None:
    """(clips, samples) of mae_fast's step, where a record has it."""
    seconds = record.get("seconds", {})
    if record["kind"] not in ("steps", "ratio") or "mae_fast" not in seconds:
        return None
    clips = record["engines"].get("mae_fast", {}).get("clips", record["batch_clips"])
    return clips, seconds["mae_fast"]


def subject(record: Record) -> tuple:
    """What was timed: records that can be compared have the same."""
    fields = ("what", "stage", "item", "family", "model", "variant", "op", "shape", "direction")
    fields += ("batch_clips", "ratio", "strategy", "precision", "device")
    return tuple((f, record[f]) for f in fields if isinstance(record.get(f), str | int | float))


def describe(record: Record) -> str:
    """The subject in words."""
    return ", ".join(str(value) for field, value in subject(record) if field != "what")


def title(record: Record) -> str:
    """Of a record of steps: what was run."""
    family = f"{record['family']}, " if "family" in record else ""
    said = f"{family}{record['model']}, {record['ratio']:.0%} masked, {record['batch_clips']} clips"
    if record.get("workers") is not None:
        said += f" loaded by {record['workers']} processes"
    return f"{said}, {record['precision']}"


def where(record: Record) -> str:
    """The machine: the GPU if it was timed on one, otherwise the CPU."""
    found = record["environment"]
    return found.get("cuda:0", found["cpu"])


def newest(records: Iterable[Record]) -> dict[tuple, Record]:
    """{subject: its last record}, in the order in which subjects first appear."""
    return {subject(r): r for r in records}
