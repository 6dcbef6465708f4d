"""Records read, and what every table of docs/results.md is written with."""

import json
from collections.abc import Iterable
from pathlib import Path


def read(path: Path) -> list[dict]:
    """The records of a file, oldest first, without those of a quick run."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [r for r in map(json.loads, lines) if r.get("model") != "quick"]


def newest(records: Iterable[dict], *keys: str) -> list[dict]:
    """The last record of each combination of these keys' values."""
    return list({tuple(r[k] for k in keys): r for r in records}.values())


def cpu(record: dict) -> str:
    """The maker and make of the CPU that a record was taken on."""
    return record["environment"]["cpu"].split(",")[0]


def malloc(record: dict) -> str:
    """What glibc was told of memory that is freed: nothing, or ", NAME=VALUE" each."""
    found = (f", {k}={v}" for k, v in record["environment"].items() if k.startswith("MALLOC_"))
    return "".join(found)


def where(records: Iterable[dict]) -> str:
    """Device, torch and commits of some records."""
    found = {}
    for r in records:
        e = r["environment"]
        machine = f"{e['cpu']}; torch {e['torch']}{malloc(r)}"
        found.setdefault(machine, {})[str(e["commit"])] = None
    return "; ".join(f"{machine}; commit {', '.join(c)}" for machine, c in found.items())


def table(head: str, rows: list[list[str]]) -> str:
    """Markdown; the head's columns are parted by |."""
    columns = head.split("|")
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, *rows)).split("\n", 1)
    return f"{lines[0]}\n{'|---' * len(columns)}|\n{lines[1]}"


def target(what: str, least: float | str, measured: float | None) -> list[str]:
    percent = isinstance(least, str)
    number = float(least.rstrip("%")) / 100 if percent else least
    if measured is None:
        return [what, least if percent else f"{least:g}x", "unmeasured", "-"]
    text = f"{measured:.0%}" if percent else f"{measured:.2f}x"
    return [what, least if percent else f"{least:g}x", text, met(measured >= number)]


def met(enough: bool) -> str:
    return "yes" if enough else "**no**"
