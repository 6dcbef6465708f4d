"""Records read, and what every table of docs/results.md is written with."""

import json
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from mae_fast.report.rows import grouped

TARGET = ["target", "at least", "measured", "met"]


def read(path: Path) -> list[dict]:
    """The records of a file, oldest first, without those of a quick run."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [r for r in map(json.loads, lines) if r.get("model") != "quick"]


def newest(records: Iterable[dict], *keys: str) -> list[dict]:
    """The last record of each combination of these keys' values."""
    return [group[-1] for _, group in grouped(records, itemgetter(*keys))]


def cpu(record: dict) -> str:
    """The maker and make of the CPU that a record was taken on."""
    return record["environment"]["cpu"].split(",")[0]


def malloc(record: dict) -> str:
    """What glibc was told of memory that is freed: nothing, or ", NAME=VALUE" each."""
    found = (f", {k}={v}" for k, v in record["environment"].items() if k.startswith("MALLOC_"))
    return "".join(found)


def where(records: Iterable[dict]) -> str:
    """Device, torch and commits of some records."""

    def machine(r: dict) -> str:
        return f"{r['environment']['cpu']}; torch {r['environment']['torch']}{malloc(r)}"

    return "; ".join(
        f"{name}; commit {', '.join(dict.fromkeys(str(r['environment']['commit']) for r in group))}"
        for name, group in grouped(records, machine)
    )


def section(
    words: str, records: Sequence[dict], head: Iterable[str], rows: Sequence[Iterable[str]]
) -> str:
    """Words, where the records were taken, and the table; nothing without a row."""
    if not rows:
        return ""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    said = f"{words} {where(records)}." if records else words
    rule = "|---" * len([*head]) + "|"
    return "\n".join([*([said, ""] if said else []), first, rule, *others, ""])


def target(what: str, least: str, record: Any, of: Callable[[Any], float]) -> list[str]:
    """A row under TARGET: whether of(record), where there is one, is so many times or percent."""
    if record is None:
        return [what, least, "unmeasured", "-"]
    found, percent = of(record), least.endswith("%")
    enough = found >= float(least[:-1]) / (100 if percent else 1)
    return [what, least, f"{found:.0%}" if percent else f"{found:.2f}x", met(enough)]


def met(enough: bool) -> str:
    return "yes" if enough else "**no**"
