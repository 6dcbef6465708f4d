"""The records: a line of JSON for each item of a stage, written as it ends, so that nothing is lost
and a second run goes on where the first one stopped."""

import contextlib
import gc
import hashlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ROOT
from mae_fast.environment import commit, environment

RESULTS = ROOT / "benchmarks/results/gpu"
# Statuses of an item. One that was not reached is tried again by the next run.
MEASURED, FAILED, DECLINED, NOT_REACHED = "measured", "failed", "declined", "not reached"


class Declined(Exception):
    """Why an item cannot be measured here; nothing is wrong."""


@dataclass(frozen=True)
class Item:
    """One thing to measure: `run` gives the fields of its record, or raises. A field `wrong` that
    is not empty says what gave wrong results: the item failed, but what else it has is kept."""

    name: str
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Records:
    """The records of these sources on one device: written to `path`, read from `folders` too."""

    path: Path
    sources: str
    folders: tuple[Path, ...] = ()

    def all(self) -> Iterator[dict[str, Any]]:
        """What is recorded of these sources, oldest first; a line cut short by a crash is left."""
        folders = dict.fromkeys([*self.folders, self.path.parent])
        for file in (file for folder in folders for file in sorted(folder.glob("*.jsonl"))):
            for line in file.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    if (record := json.loads(line))["sources"] == self.sources:
                        yield record

    def done(self, stage: str) -> set[str]:
        """The items of a stage that need not be run again."""
        found = (r for r in self.all() if r["stage"] == stage)
        return {r["item"] for r in found if r["status"] != NOT_REACHED}

    def add(self, stage: str, item: str, status: str, **data: Any) -> None:
        name = {"kind": "check", "what": f"{stage}: {item}", "stage": stage, "item": item}
        name |= {"status": status, "sources": self.sources}
        record = {**name, "at": time.strftime("%Y-%m-%dT%H:%M:%S"), **data}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        # Not validated: what was measured on a borrowed machine is kept, whatever it is.
        text = json.dumps(record)
        # A traceback names files by their place in the checkout and in the virtual environment.
        for folder in (ROOT, *[sys.prefix] * (sys.prefix != sys.base_prefix)):
            text = text.replace(f"{folder}/", "")
        with self.path.open("a") as f:
            f.write("\n" * cut + text + "\n")


def open_records(rehearsal: bool, path: Path | None = None) -> Records:
    """`path`, or else <$OUT, or benchmarks/results/gpu>/<device>/<date>-<commit>.jsonl; what is
    recorded in the usual place counts too. A rehearsal without OUT writes to build/."""
    device = "rehearsal-cpu" if rehearsal else torch.cuda.get_device_name()
    name, version = (_plain(text) for text in (device, commit() or "no-commit"))
    here = ROOT / "build/gpu-rehearsal" if rehearsal else RESULTS
    folder = Path(os.environ.get("OUT") or here) / name
    # A run that goes on after midnight goes on in the same file.
    found = sorted(folder.glob(f"*-{version}.jsonl"))
    new = folder / f"{time.strftime('%Y-%m-%d')}-{version}.jsonl"
    return Records(path or next(iter(found), new), hash_of_sources(), (here / name,))


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def hash_of_sources() -> str:
    """Of the code that a record depends on: a checkout may have changes, or no git."""
    digest = hashlib.sha256()
    for folder in ("mae_fast", "kernels", "csrc", "benchmarks", "tests/ops"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def work(stage: str, items: Iterator[Item], records: Records, deadline: float) -> None:
    """Run the items that are not recorded yet, in their order, until `deadline` (of time.time);
    what an item raises is its record, and the next one is run."""
    done, conditions = records.done(stage), environment()
    for item in items:
        if item.name in done:
            print(f"{stage}: {item.name}: recorded before", flush=True)
            continue
        began = time.time()
        status, data = outcome(item) if began < deadline else (NOT_REACHED, {})
        data = {**data, "took": round(time.time() - began, 3), "environment": conditions}
        records.add(stage, item.name, status, **data)
        told = data.get("reason", "").splitlines()[:1] or [data.get("told", "")]
        print(f"{stage}: {item.name}: {status}: {told[0]}", flush=True)
        free()


def outcome(item: Item) -> tuple[str, dict[str, Any]]:
    """(status, fields of the record) of an item that is run."""
    try:
        data = item.run()
    except Declined as e:
        return DECLINED, {"reason": str(e)}
    except Exception as e:
        text = "".join(traceback.format_exception(e))
        return FAILED, {"reason": f"{type(e).__name__}: {e}", "traceback": text}
    if data.get("wrong"):
        return FAILED, {"reason": f"wrong, and not timed: {data['wrong']}", **data}
    return MEASURED, data


def free() -> None:
    """Give back the memory of what went before; an exception may have kept it until now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
