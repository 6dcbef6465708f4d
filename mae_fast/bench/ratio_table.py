"""Records of `mae-fast bench ratio` from its samples, what they say, and the tables of it.

`summary` computes everything from the records alone, for the tables, for --json and for the report.
"""

import statistics
from collections.abc import Iterable
from typing import Any

from mae_fast.bench.cell import Cell, config_of
from mae_fast.bench.engines import flop_limit, label, parts, source_of
from mae_fast.bench.flops import forward_flop
from mae_fast.bench.paper import PAPER
from mae_fast.bench.timing import spread

OFFICIAL = "official_eager"
NOISY = 0.10  # a spread above it is marked
# Of the step, what masking does not shrink as it shrinks the encoder.
LOST = ("decoder", "patch embedding", "optimizer", "overhead", "data")
OVERHEAD = ("rest", "mask", "loss", "idle")


def assemble(log: dict[str, Any], cells: list[Cell]) -> list[dict]:
    """A record for each model, strategy and ratio: all engines, with all their samples."""
    found = {}
    for cell in cells:
        lines = [n for n, line in enumerate(log["rounds"]) if cell.key in line["seconds"]]
        if not lines or cell.key in log["skipped"]:
            continue
        key = (cell.model, cell.strategy, cell.ratio)
        record = found.setdefault(key, _new_record(log, cell))
        probe, name = log["probe"][cell.key], label(cell.engine)
        done = parts(cell.engine, config_of(cell.model), 1, cell.masking)
        update = [log["rounds"][n].get("until_update", {}).get(cell.key) for n in lines]
        record["seconds"][name] = [log["rounds"][n]["seconds"][cell.key] for n in lines]
        record["engines"][name] = {
            "rounds": lines,
            "clips": probe["clips"],
            "peak_memory_mb": probe["peak_memory_mb"],
            "flop": done and probe["clips"] * sum(map(sum, done.values())),
            "parts": log["parts"][cell.key],
            "data": log["data"].get(cell.key),
            "until_update": None if None in update else update,
            "source": source_of(cell.engine),
        }
    for record in found.values():
        names = list(record["seconds"])
        record["baseline"] = OFFICIAL if OFFICIAL in names else names[0]
        record["batch_clips"] = max(e["clips"] for e in record["engines"].values())
        used = sorted({n for e in record["engines"].values() for n in e["rounds"]})
        limits = [log["rounds"][n]["limits"] for n in used]
        commits = dict.fromkeys(str(log["rounds"][n]["commit"]) for n in used)
        record["environment"] = log["environment"] | {"commit": ", ".join(commits)}
        record["rounds"], record["limits"] = used, limits[0]
        for later in limits[1:]:
            for name, limit in record["limits"].items():
                limit = limit | {"seconds": limit["seconds"] + later[name]["seconds"]}
                record["limits"] = record["limits"] | {name: limit}
    return list(found.values())


def _new_record(log: dict[str, Any], cell: Cell) -> dict:
    cfg = config_of(cell.model)
    return {
        "kind": "ratio",
        "what": "training step by masking ratio, synthetic clips, interleaved",
        "model": cell.model,
        "strategy": cell.strategy,
        "ratio": cell.ratio,
        "precision": log["setting"]["precision"],
        "device": log["setting"]["device"],
        "asked_clips": log["clips"],
        "seconds": {},
        "engines": {},
        "flop_limit": flop_limit(cfg, cell.masking),
        "forward_gflop": forward_flop(cfg, cell.masking.official_ratio(cfg)) / 1e9,
        "environment": log["environment"],
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
    clips, median = engine["clips"], statistics.median(seconds)
    told = {
        "model": record["model"],
        "strategy": record["strategy"],
        "ratio": record["ratio"],
        "engine": name,
        "precision": record["precision"],
        "device": record["device"],
        "clips": clips,
        "asked_clips": record["asked_clips"],
        "seconds_a_step": median,
        "seconds_a_clip": median / clips,
        "clips_a_second": clips / median,
        "samples": len(seconds),
        "spread": spread(seconds),
        "noisy": spread(seconds) > NOISY,
        "peak_memory_mb": engine["peak_memory_mb"],
        "forward_gflop": record["forward_gflop"],
        "gflop_a_clip": engine["flop"] and engine["flop"] / clips / 1e9,
        "share_of_product_rate": _share(record, name),
        "flop_limit": record["flop_limit"],
        "against_itself_at_0": faster(dense, name, record, name),
        "against_official_at_0": faster(dense, OFFICIAL, record, name),
        "against_official": faster(record, OFFICIAL, record, name),
    }
    told["parts_a_clip"] = parts_of(record, name)
    told["lost"] = lost(record, dense, name)
    told["data"] = _data(record, dense, name)
    return told


def faster(base: dict | None, base_name: str, record: dict, name: str) -> dict | None:
    """Seconds a clip of one engine over those of another: the median over the rounds that both
    were in; where there are none, the ratio of medians, and `apart` is true."""
    if base is None or base_name not in base["seconds"]:
        return None
    (a, a_clips), (b, b_clips) = _samples(base, base_name), _samples(record, name)
    both = a.keys() & b.keys()
    if both:
        ratio = statistics.median(a[n] / b[n] for n in both)
    else:
        ratio = statistics.median(a.values()) / statistics.median(b.values())
    return {"times": ratio * b_clips / a_clips, "apart": not both}


def _samples(record: dict, name: str) -> tuple[dict[int, float], int]:
    """({round: seconds}, clips a step)."""
    engine = record["engines"][name]
    return dict(zip(engine["rounds"], record["seconds"][name], strict=True)), engine["clips"]


def _share(record: dict, name: str) -> float | None:
    """FLOP really done, of what the machine's best product does in the same rounds."""
    engine = record["engines"][name]
    if engine["flop"] is None:
        return None
    samples, _ = _samples(record, name)
    shares = []
    products = [limit for limit in record["limits"].values() if "flop" in limit]
    for number, seconds in samples.items():
        at = record["rounds"].index(number)
        best = max(limit["flop"] / limit["seconds"][at] for limit in products)
        shares.append(engine["flop"] / seconds / best)
    return statistics.median(shares)


def parts_of(record: dict, name: str) -> dict[str, float]:
    """Seconds a clip by part: the shares of a profiled step, of the median step."""
    engine, found = record["engines"][name], {}
    each = statistics.median(record["seconds"][name]) / engine["clips"]
    total = sum(engine["parts"].values())
    for phase, seconds in engine["parts"].items():
        part = "overhead" if phase in OVERHEAD else phase
        found[part] = found.get(part, 0.0) + each * seconds / total
    if engine["data"]:
        data = statistics.median(engine["data"]["seconds"]) / engine["data"]["clips"]
        found["data"] = max(0.0, data - each)
    return found


def lost(record: dict, dense: dict | None, name: str) -> dict[str, dict]:
    """{part: its share of the step, and what the speed-up over 0% would be without it}. data: of
    loading and computing, on top of the step."""
    if dense is None or name not in dense["seconds"] or record is dense:
        return {}
    here, there = parts_of(record, name), parts_of(dense, name)
    found = {}
    for part in LOST:
        if part not in here:
            continue
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
        "seconds_a_clip": statistics.median(data["seconds"]) / data["clips"],
        "waiting": statistics.median(
            w / s for w, s in zip(data["waits"], data["seconds"], strict=True)
        ),
        "repeat": data["repeat"],
        "spread": spread(data["seconds"]),
    }
    before = dense and dense["engines"].get(name, {}).get("data")
    if before:
        seconds = statistics.median(before["seconds"]) / before["clips"]
        told["against_itself_at_0"] = seconds / told["seconds_a_clip"]
    return told


def print_tables(told: dict[str, Any]) -> None:
    """The cells, what is lost, the paper's table, and what was left out."""
    groups: dict[tuple, list[dict]] = {}
    for cell in told["cells"]:
        groups.setdefault((cell["model"], cell["strategy"]), []).append(cell)
    for (model, strategy), cells in groups.items():
        print(f"\n{model}, {strategy} masking, {cells[0]['precision']}, {cells[0]['device']}")
        print(text_table(CELL_HEAD, [cell_row(c) for c in cells]))
        if any(c["noisy"] for c in cells):
            print(f"! spread over {NOISY:.0%}: the machine was not quiet")
        for cell in cells:
            if cell["clips"] != cell["asked_clips"]:
                print(
                    f"{cell['engine']} at {cell['ratio']:.0%}: {cell['clips']} clips a step, not "
                    f"{cell['asked_clips']}, which do not fit in memory"
                )
        rows = [_lost_row(c) for c in cells if c["lost"]]
        if rows:
            print("\nwhat is lost: share of the step (speed-up over 0% without it)")
            print(text_table(["masked", "engine", "speed-up", *LOST], rows))
        print(paper_table(cells))
    for cell, reason in told["skipped"].items():
        print(f"left out: {cell}: {reason}")


CELL_HEAD = [
    "masked",
    "engine",
    "clips",
    "s a step",
    "spread",
    "clips/s",
    "peak MB",
    "GFLOP a clip",
    "of rate",
    "over itself at 0%",
    "official at 0%",
    "official here",
    "FLOP limit",
]


def _times(found: dict | None) -> str:
    return "-" if found is None else f"{found['times']:.2f}x{'*' if found['apart'] else ''}"


def cell_row(c: dict[str, Any]) -> list[str]:
    """A cell of `summary` under CELL_HEAD, here and in the report."""
    gflop, share = c["gflop_a_clip"], c["share_of_product_rate"]
    return [
        f"{c['ratio']:.0%}",
        c["engine"],
        str(c["clips"]),
        f"{c['seconds_a_step']:.3f}",
        f"{c['spread']:.0%}{'!' if c['noisy'] else ''}",
        f"{c['clips_a_second']:.3g}",
        f"{c['peak_memory_mb']:.0f}",
        "-" if gflop is None else f"{gflop:.0f}",
        "-" if share is None else f"{share:.0%}",
        _times(c["against_itself_at_0"]),
        _times(c["against_official_at_0"]),
        _times(c["against_official"]),
        f"{c['flop_limit']:.1f}x",
    ]


def _lost_row(c: dict) -> list[str]:
    def told(part: str) -> str:
        x = c["lost"].get(part)
        return "-" if x is None else f"{x['share']:.0%} ({x['speed_up_without']:.1f}x)"

    return [
        f"{c['ratio']:.0%}",
        c["engine"],
        _times(c["against_itself_at_0"]),
        *map(told, LOST),
    ]


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
        hours = 1 / c["clips_a_second"] / 3600 * 1e6
        rows.append(
            [
                f"{c['engine']}, here",
                f"{c['flop_limit']:.1f}x",
                _times(c["against_itself_at_0"]),
                "unmeasured" if data is None else f"{data:.2f}x",
                f"{hours:.3g} h a million clips",
            ]
        )
    rows.append(
        [
            PAPER["whose"],
            f"{PAPER['flop']}x",
            f"{PAPER['compute']}x",
            f"{PAPER['with_data']}x",
            f"{PAPER['compute_hours']} h, with loading {PAPER['with_data_hours']} h",
        ]
    )
    head = [f"{at:.0%} over 0%", "FLOP", "compute", "with loading", "time at that ratio"]
    return "\n" + text_table(head, rows)


def text_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Columns as wide as they need; the first two to the left."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        aligned = (
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, lines[1:])])
