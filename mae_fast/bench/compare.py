"""`mae-fast bench compare` and `mae-fast bench history`: what changed between two records, or over
all of them, with confidence intervals."""

import json as jsonlib
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from mae_fast.bench import records
from mae_fast.bench.records import Record
from mae_fast.bench.table import grouped
from mae_fast.errors import ConfigError
from mae_fast.figures import figure, write_figure

DRAWS = 4000  # of the bootstrap
CONFIDENCE = 0.95
PRODUCTS = ("engine_product", "product", "torch_mm")  # the limit that a time is held against
NO_DIFFERENCE = "no difference seen"


def compare(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str, tyro.conf.Positional],
    seed: int = 0,
    json: bool = False,
) -> None:
    """Compare two records of the same thing, or the newest of each thing in two files: B's time
    over A's, with a 95% interval by bootstrap over samples, together for all lines that are shown.
    Times are in units of the machine's own product, where it was timed in the same rounds.

    Args:
        a: a file of records, or FILE:LINE; the last line is -1.
        b: another, or the same file with another line.
        seed: of the bootstrap.
        json: print one JSON document and nothing else.
    """
    found = compare_records(_pick(a), _pick(b), seed)
    if not found:
        raise ConfigError(f"{a} and {b} have no two records of the same thing")
    if json:
        told = {"a": a, "b": b, "confidence": CONFIDENCE, "changes": found}
        print(jsonlib.dumps(told, indent=2))
        return
    subject = None
    for row in found:
        if row["subject"] != subject:
            subject = row["subject"]
            print(f"{subject}\n  A: {row['from']}\n  B: {row['to']}")
        line = f"  {row['name']:32} {row['ratio']:.3f}x [{row['low']:.3f}, {row['high']:.3f}] "
        line += row["verdict"]
        if row["machine"] is not None:
            line += f"; the machine's own products took {row['machine']:.2f}x"
        print(line)


def compare_records(
    a: dict[tuple, Record], b: dict[tuple, Record], seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each name that both records of a subject have."""
    pairs = [
        (a[s], b[s], name) for s in a if s in b for name in _seconds(a[s]) if name in _seconds(b[s])
    ]
    generator = np.random.default_rng(seed)
    level = 1 - (1 - CONFIDENCE) / max(1, len(pairs))  # together they hold with CONFIDENCE
    return [
        {
            "subject": records.describe(one),
            "from": _origin(one),
            "to": _origin(two),
            "name": name,
            **_change(one, two, name, generator, level),
        }
        for one, two, name in pairs
    ]


def _change(
    a: Record, b: Record, name: str, generator: np.random.Generator, level: float
) -> dict[str, Any]:
    """B's median time over A's, and the interval that holds it; "machine": what the machine's own
    products took in B's rounds over A's, where both records have them. The ratio is then without
    it."""
    x, y, machine = _seconds(a)[name], _seconds(b)[name], None
    product = next((p for p in PRODUCTS if _product(a, p, x) and _product(b, p, y)), None)
    if product:
        one, two = _product(a, product, x), _product(b, product, y)
        machine = statistics.median(two) / statistics.median(one)
        x, y = ([s / p for s, p in zip(*pair, strict=True)] for pair in ((x, one), (y, two)))
    ratio, low, high = interval(x, y, generator, level)
    verdict = f"B takes {ratio:.2f}x as long" if low > 1 else f"B is {1 / ratio:.2f}x as fast"
    if low <= 1 <= high:
        verdict = NO_DIFFERENCE
    return {"ratio": ratio, "low": low, "high": high, "machine": machine, "verdict": verdict}


def interval(
    a: Sequence[float],
    b: Sequence[float],
    generator: np.random.Generator,
    level: float = CONFIDENCE,
) -> tuple[float, float, float]:
    """(median of b over median of a, and the interval that holds it), by percentile bootstrap."""

    def medians(samples: Sequence[float]) -> np.ndarray:
        drawn = generator.integers(0, len(samples), (DRAWS, len(samples)))
        return np.median(np.asarray(samples)[drawn], axis=1)

    ratios = medians(b) / medians(a)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return statistics.median(b) / statistics.median(a), float(low), float(high)


def history(
    results: Annotated[list[str], tyro.conf.Positional],
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "history.png",
    names: tuple[str, ...] = ("mae_fast",),
) -> None:
    """Draw the times of records commit by commit, oldest first, a panel for each thing timed.

    Args:
        results: files of records; records are only ever appended to them.
        output: the PNG to write.
        names: what to draw of each record: engines, or backends of an op.
    """
    if not results:
        raise ConfigError("bench history: name at least one file of records")
    every = (r for path in results for r in records.read(path))
    panels = grouped((r for r in every if set(names) & _seconds(r).keys()), records.subject)
    if not panels:
        raise ConfigError(f"{', '.join(results)}: no record has {', '.join(names)}")
    drawing, _ = figure(8, 2.6 * len(panels), len(panels))
    generator = np.random.default_rng(0)
    for axis, (_, found) in zip(drawing.axes, panels, strict=True):
        for name in names:
            _draw_history(axis, found, name, generator)
        axis.set_xticks(range(len(found)), [_origin(r).split(",")[0] for r in found], fontsize=7)
        axis.set_title(records.describe(found[0]), fontsize=9)
        axis.set(ylabel="seconds", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    write_figure(output, drawing, dpi=110)
    print(f"wrote {output}: {len(panels)} panels, medians with 95% intervals")


def _draw_history(
    axis: Any, found: list[Record], name: str, generator: np.random.Generator
) -> None:
    points = []
    for at, samples in enumerate(_seconds(record).get(name) for record in found):
        if samples:
            _, low, high = interval([1.0], samples, generator)
            median = statistics.median(samples)
            points.append((at, median, median - low, high - median))
    at, medians, *bars = zip(*points, strict=True) if points else ((), (), (), ())
    axis.errorbar(at, medians, bars, marker="o", capsize=3, label=name)


def _pick(what: str) -> dict[tuple, Record]:
    """{subject: record} of FILE, or of one line of it."""
    match = re.fullmatch(r"(.+):(-?\d+)", what)
    if not match or Path(what).exists():
        return records.newest(records.read(what))
    found, line = records.read(match[1]), int(match[2])
    if line == 0 or abs(line) > len(found):
        raise ConfigError(f"{match[1]} has lines 1 to {len(found)}, not {line}")
    return records.newest([found[line - 1 if line > 0 else line]])


def _seconds(record: Record) -> dict[str, list[float]]:
    return record.get("seconds", {})


def _product(record: Record, name: str, samples: Sequence[float]) -> list[float] | None:
    """Samples of the machine's product in the rounds of `samples`."""
    limit = (record.get("limits") or {}).get(name)
    return limit["seconds"] if limit and len(limit["seconds"]) == len(samples) else None


def _origin(record: Record) -> str:
    environment = record["environment"]
    return f"{environment['commit']}, {records.where(record)}, torch {environment['torch']}"
