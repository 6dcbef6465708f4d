"""The rows of tables of records, for the page (mae_fast/report) and for docs/results.md."""

import statistics
from collections.abc import Iterable
from typing import Any

from mae_fast.bench.records import Record
from mae_fast.bench.table import number
from mae_fast.bench.timing import ratio, share, spread

OURS, AFTER = "mae_fast", "accelerated"  # another's model, by mae_fast.accelerate
STEP_HEAD = ["engine", "clips", "seconds a step", "spread", "samples", "mae_fast is faster"]
STEP_HEAD += ["forward + backward", "waiting for data", "peak MB"]
OP_HEAD = ["op", "shape", "direction", "precision", "backend", "ms", "spread", "share", "of"]
OP_HEAD += ["speed-up", "over", "commit"]


def bought(cells: Iterable[dict[str, Any]]) -> list[str]:
    """What masking of 90% and the engine buy together, a sentence for each `summary` of them."""
    return [
        f"{c['model']}, {c['strategy']} masking of 90%, {c['precision']}, {c['device']}: a step is "
        f"{c['against_official_at_0']['times']:.1f}x as fast as the official code's at 0%, and "
        f"{c['against_official']['times']:.2f}x as fast as the official code's at 90%."
        for c in cells
        if c["engine"] == OURS and c["ratio"] == 0.9 and c["against_official_at_0"]
    ]


def step_rows(record: Record) -> list[list[str]]:
    """A row for each engine of a record of steps, under STEP_HEAD."""
    engines, seconds, rows = record["engines"], record["seconds"], []
    for name, samples in seconds.items():
        # What it is held against; ours against nothing.
        held = next((n for n in (f"{name}_{AFTER}", OURS, AFTER) if n in seconds), name)
        faster = ratio(samples, seconds[held]) if held != name else None
        both = [engines[n].get("until_update") for n in (name, held)]
        until = ratio(*both) if held != name and all(both) else None
        engine = engines[name]
        rows.append(
            [
                name,
                str(engine.get("clips", record["batch_clips"])),
                f"{statistics.median(samples):.3f}",
                f"{spread(samples):.0%}",
                str(len(samples)),
                number(faster, ".2f", "x"),
                number(until, ".2f", "x"),
                number(engine.get("data_wait_share"), ".1%"),
                number(engine.get("peak_memory_mb"), ".0f"),
            ]
        )
    return rows


def op_share(record: Record) -> tuple[float, str]:
    """(what the chosen backend reaches of the limit that binds it, which one that is)."""
    samples, limits = record["seconds"][record["chosen"]], record["limits"]
    reached = share(limits, record, samples)
    copies = share(limits, {"bytes": record["bytes"]}, samples)
    return reached, "copy bandwidth" if reached == copies else "product rate"


def op_faster(record: Record) -> float:
    """The chosen backend over what it replaces."""
    return ratio(record["seconds"][record["baseline"]], record["seconds"][record["chosen"]])


def op_row(record: Record) -> list[str]:
    """Of the chosen backend, under OP_HEAD."""
    samples, (reached, limit) = record["seconds"][record["chosen"]], op_share(record)
    return [
        *(record[key] for key in ("op", "shape", "direction", "precision", "chosen")),
        f"{1e3 * statistics.median(samples):.3f}",
        f"{spread(samples):.0%}",
        f"{reached:.0%}",
        limit,
        f"{op_faster(record):.2f}x",
        record["baseline"],
        str(record["environment"]["commit"]),
    ]
