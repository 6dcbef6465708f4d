"""Records of `mae-fast bench ratio` from its samples, what they say, and the tables of it.

`summary` computes everything from the records alone, for the tables, for --json and for the report.
"""

import statistics
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

from mae_fast.bench.cell import Cell, config_of
from mae_fast.bench.engines import flop_limit, label, source_of, work
from mae_fast.bench.flops import forward_flop
from mae_fast.bench.paper import PAPER
from mae_fast.bench.table import grouped, number, text_table
from mae_fast.bench.timing import ratio, share, spread

OFFICIAL = "official_eager"
NOISY = 0.10  # a spread above it is marked
# Of the step, what masking does not shrink as it shrinks the encoder.
LOST = ("decoder", "patch embedding", "optimizer", "overhead", "data")
OVERHEAD = ("rest", "mask", "loss", "idle")


def assemble(log: dict[str, Any], cells: list[Cell]) -> list[dict]:
    """A record for each model, strategy and ratio: all engines, with all their samples."""
    timed = {key for line in log["rounds"] for key in line["seconds"]} - log["skipped"].keys()
    found = (cell for cell in cells if cell.key in timed)
    groups = grouped(found, attrgetter("model", "strategy", "ratio"))
    return [_record(log, group) for _, group in groups]


def _record(log: dict[str, Any], cells: list[Cell]) -> dict:
    """Of engines at one ratio."""
    first, rounds = cells[0], log["rounds"]
    cfg, masking = config_of(first.model), first.masking
    seconds, engines = {}, {}
    for cell in cells:
        name, probe = label(cell.engine), log["probe"][cell.key]
        mine = [n for n, line in enumerate(rounds) if cell.key in line["seconds"]]
        done = work(cell.engine, cfg, 1, cell.masking)
        flop = done and probe["clips"] * int(sum(w.flop for both in done.values() for w in both))
        update = [rounds[n].get("until_update", {}).get(cell.key) for n in mine]
        seconds[name] = [rounds[n]["seconds"][cell.key] for n in mine]
        engines[name] = {
            "rounds": mine,
            "clips": probe["clips"],
            "peak_memory_mb": probe["peak_memory_mb"],
            "flop": flop,
            "parts": log["parts"][cell.key],
            "data": log["data"].get(cell.key),
            "until_update": None if None in update else update,
            "source": source_of(cell.engine),
        }
    used = sorted({n for engine in engines.values() for n in engine["rounds"]})
    limits = [rounds[n]["limits"] for n in used]
    commits = dict.fromkeys(str(rounds[n]["commit"]) for n in used)
    return {
        "kind": "ratio",
        "what": "training step by masking ratio, synthetic clips, interleaved",
        "model": first.model,
        "strategy": first.strategy,
        "ratio": first.ratio,
        "precision": log["setting"]["precision"],
        "device": log["setting"]["device"],
        "asked_clips": log["clips"],
        "batch_clips": max(e["clips"] for e in engines.values()),
        "baseline": OFFICIAL if OFFICIAL in engines else next(iter(engines)),
        "seconds": seconds,
        "engines": engines,
        "rounds": used,
        "limits": {
            name: limit | {"seconds": [s for each in limits for s in each[name]["seconds"]]}
            for name, limit in limits[0].items()
        },
        "flop_limit": flop_limit(cfg, masking),
        "forward_gflop": forward_flop(cfg, masking.official_ratio(cfg)) / 1e9,
        "environment": log["environment"] | {"commit": ", ".join(commits)},
    }


def summary(records: list[dict]) -> dict[str, Any]:
    """{"cells": [...], "paper": PAPER, "environment": ...}: what each cell took, against itself
    and the official code at 0%, against the official code at its own ratio, and where it went."""
    cells = []
    for record in records:
        same = (r for r in records if r["model"] == record["model"])
        same = (r for r in same if r["strategy"] == record["strategy"])
        dense = next((r for r in same if r["ratio"] == 0), None)
        cells += [_cell(record, dense, name) for name in record["seconds"]]
    environment = records[0]["environment"] if records else {}
    return {"cells": cells, "paper": PAPER, "environment": environment}


def _cell(record: dict, dense: dict | None, name: str) -> dict[str, Any]:
    engine, seconds = record["engines"][name], record["seconds"][name]
    clips, flop, median = engine["clips"], engine["flop"], statistics.median(seconds)
    at = [record["rounds"].index(n) for n in engine["rounds"]]
    limits = {
        limit: found | {"seconds": [found["seconds"][n] for n in at]}
        for limit, found in record["limits"].items()
    }
    asked = ("model", "strategy", "ratio", "precision", "device", "asked_clips")
    return {
        **{key: record[key] for key in (*asked, "forward_gflop", "flop_limit")},
        "engine": name,
        "clips": clips,
        "seconds_a_step": median,
        "seconds_a_clip": median / clips,
        "clips_a_second": clips / median,
        "samples": len(seconds),
        "spread": spread(seconds),
        "noisy": spread(seconds) > NOISY,
        "peak_memory_mb": engine["peak_memory_mb"],
        "gflop_a_clip": flop and flop / clips / 1e9,
        "share_of_product_rate": flop and share(limits, {"flop": flop}, seconds),
        "against_itself_at_0": faster(dense, name, record, name),
        "against_official_at_0": faster(dense, OFFICIAL, record, name),
        "against_official": faster(record, OFFICIAL, record, name),
        "parts_a_clip": parts_of(record, name),
        "lost": lost(record, dense, name),
        "data": _data(record, dense, name),
    }


def faster(base: dict | None, base_name: str, record: dict, name: str) -> dict | None:
    """Seconds a clip of one engine over those of another: the median over the rounds that both
    were in; where there are none, the ratio of medians, and `apart` is true."""
    if base is None or base_name not in base["seconds"]:
        return None
    a, b = _by_round(base, base_name), _by_round(record, name)
    if both := a.keys() & b.keys():
        times = statistics.median(a[n] / b[n] for n in both)
    else:
        times = statistics.median(a.values()) / statistics.median(b.values())
    return {"times": times, "apart": not both}


def _by_round(record: dict, name: str) -> dict[int, float]:
    """{round: seconds a clip}."""
    engine, seconds = record["engines"][name], record["seconds"][name]
    return {n: s / engine["clips"] for n, s in zip(engine["rounds"], seconds, strict=True)}


def parts_of(record: dict, name: str) -> dict[str, float]:
    """Seconds a clip by part: the shares of a profiled step, of the median step; "data" is what
    loading takes on top."""
    engine, found = record["engines"][name], {}
    each = statistics.median(record["seconds"][name]) / engine["clips"]
    total = sum(engine["parts"].values())
    for phase, seconds in engine["parts"].items():
        part = "overhead" if phase in OVERHEAD else phase
        found[part] = found.get(part, 0.0) + each * seconds / total
    if engine["data"]:
        found["data"] = max(0.0, _loaded(engine["data"]) - each)
    return found


def _loaded(data: dict) -> float:
    """Seconds a clip of loading and computing."""
    return statistics.median(data["seconds"]) / data["clips"]


def lost(record: dict, dense: dict | None, name: str) -> dict[str, dict]:
    """{part: its share of the step, and what the speed-up over 0% would be without it}. data: of
    loading and computing, on top of the step."""
    if dense is None or name not in dense["seconds"] or record is dense:
        return {}
    here, there = parts_of(record, name), parts_of(dense, name)
    found = {}
    for part in (p for p in LOST if p in here):
        keys = here.keys() if part == "data" else here.keys() - {"data"}
        now, before = sum(here[k] for k in keys), sum(there.get(k, 0.0) for k in keys)
        without = (before - there.get(part, 0.0)) / (now - here[part])
        found[part] = {"share": here[part] / now, "speed_up_without": without}
    return found


def _data(record: dict, dense: dict | None, name: str) -> dict | None:
    """Loading and computing: seconds a clip, the share of waiting, and the speed-up over 0%."""
    data = record["engines"][name]["data"]
    if not data:
        return None
    told = {
        "seconds_a_clip": _loaded(data),
        "waiting": ratio(data["waits"], data["seconds"]),
        "repeat": data["repeat"],
        "spread": spread(data["seconds"]),
    }
    before = dense and dense["engines"].get(name, {}).get("data")
    return told | ({"against_itself_at_0": _loaded(before) / _loaded(data)} if before else {})


def print_tables(told: dict[str, Any]) -> None:
    """The cells, what is lost, the paper's table, and what was left out."""
    for (model, strategy), cells in grouped(told["cells"], itemgetter("model", "strategy")):
        print(f"\n{model}, {strategy} masking, {cells[0]['precision']}, {cells[0]['device']}")
        print(text_table([*CELL], map(cell_row, cells)))
        if any(c["noisy"] for c in cells):
            print(f"! spread over {NOISY:.0%}: the machine was not quiet")
        for cell in cells:
            if cell["clips"] != cell["asked_clips"]:
                print(
                    f"{cell['engine']} at {cell['ratio']:.0%}: {cell['clips']} clips a step, not "
                    f"{cell['asked_clips']}, which do not fit in memory"
                )
        rows = [lost_row(c) for c in cells if c["lost"]]
        if rows:
            print("\nwhat is lost: share of the step (speed-up over 0% without it)")
            print(text_table(LOSS_HEAD, rows))
        print(paper_table(cells))
    for cell, reason in told["skipped"].items():
        print(f"left out: {cell}: {reason}")


def _times(found: dict | None) -> str:
    return "-" if found is None else f"{found['times']:.2f}x{'*' if found['apart'] else ''}"


# The columns of a cell of `summary`, here and in the report.
CELL: dict[str, Callable[[dict[str, Any]], str]] = {
    "masked": lambda c: f"{c['ratio']:.0%}",
    "engine": lambda c: c["engine"],
    "clips": lambda c: str(c["clips"]),
    "s a step": lambda c: f"{c['seconds_a_step']:.3f}",
    "spread": lambda c: f"{c['spread']:.0%}{'!' if c['noisy'] else ''}",
    "clips/s": lambda c: f"{c['clips_a_second']:.3g}",
    "peak MB": lambda c: f"{c['peak_memory_mb']:.0f}",
    "GFLOP a clip": lambda c: number(c["gflop_a_clip"], ".0f"),
    "of rate": lambda c: number(c["share_of_product_rate"], ".0%"),
    "over itself at 0%": lambda c: _times(c["against_itself_at_0"]),
    "official at 0%": lambda c: _times(c["against_official_at_0"]),
    "official here": lambda c: _times(c["against_official"]),
    "FLOP limit": lambda c: f"{c['flop_limit']:.1f}x",
}


def cell_row(cell: dict[str, Any]) -> list[str]:
    return [column(cell) for column in CELL.values()]


LOSS_HEAD = ["masked", "engine", "speed-up", *LOST]


def lost_row(c: dict) -> list[str]:
    def told(part: str) -> str:
        x = c["lost"].get(part)
        return "-" if x is None else f"{x['share']:.0%} ({x['speed_up_without']:.1f}x)"

    return [f"{c['ratio']:.0%}", c["engine"], _times(c["against_itself_at_0"]), *map(told, LOST)]


def paper_table(cells: list[dict]) -> str:
    """As table 1 of the paper: FLOP, compute, loading and computing, at 90% or the ratio nearest
    to it, over 0%."""
    masked = [c for c in cells if c["ratio"] > 0]
    if not masked:
        return ""
    at = min((c["ratio"] for c in masked), key=lambda r: abs(r - 0.9))
    rows = []
    for c in (c for c in masked if c["ratio"] == at):
        data = (c["data"] or {}).get("against_itself_at_0")
        loading = "unmeasured" if data is None else f"{data:.2f}x"
        hours = f"{1 / c['clips_a_second'] / 3600 * 1e6:.3g} h a million clips"
        compute = _times(c["against_itself_at_0"])
        rows.append([f"{c['engine']}, here", f"{c['flop_limit']:.1f}x", compute, loading, hours])
    times = [f"{PAPER[key]}x" for key in ("flop", "compute", "with_data")]
    hours = f"{PAPER['compute_hours']} h, with loading {PAPER['with_data_hours']} h"
    rows.append([PAPER["whose"], *times, hours])
    head = [f"{at:.0%} over 0%", "FLOP", "compute", "with loading", "time at that ratio"]
    return "\n" + text_table(head, rows)
