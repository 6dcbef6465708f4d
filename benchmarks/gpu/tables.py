"""What `make gpu` measured, as tables: of each device the newest record of every item, whatever the
commit; benchmarks/tables.py puts them into docs/results.md and the README.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.engines import BAR, ENGINES, OURS
from benchmarks.gpu.records import MEASURED, RESULTS
from benchmarks.gpu.stages.accelerate import AFTER, BEFORE, HOW
from benchmarks.markdown import read, section, where
from mae_fast.bench.table import grouped
from mae_fast.bench.timing import ratio, spread
from mae_fast.ops import OPS

SOURCES = RESULTS / "sources.json"  # hash_of_sources -> commit


def tables(folder: Path) -> Iterator[str]:
    """Each table of each device in results/gpu, in Markdown."""
    for _, records in devices(folder):
        for kind in TABLES:
            used = [r for r in records if r["stage"] in kind.stages]
            rows = [cells for r in kind.order(used) if (cells := kind.cells(r))]
            if rows:
                yield section(kind.words, used, kind.head.split("|"), rows)


def devices(folder: Path) -> Iterator[tuple[str, list[dict]]]:
    """(device, the newest record of each item that was measured), of results/gpu; the commits are
    those of SOURCES where a copy's git was older than its files."""
    known = json.loads(SOURCES.read_text())
    for path in sorted(p for p in folder.glob("*") if p.is_dir()):
        every = (r for file in sorted(path.glob("*.jsonl")) for r in read(file))
        items = grouped((r for r in every if r["status"] == MEASURED), itemgetter("stage", "item"))
        found = [max(group, key=itemgetter("at")) for _, group in items]
        for r in found:
            commit = r["environment"]["commit"]
            r["environment"]["commit"] = known.get(r["sources"], commit)
        if found:
            yield path.name, found


def steps(records: list[dict]) -> list[dict]:
    """The records of training steps at 90%, by model and clips, ours first."""
    found = (r for r in records if r["kind"] == "steps" and r.get("engine") in ENGINES)
    cells = grouped(found, itemgetter("model", "batch_asked"))
    return [r for _, group in cells for r in group]


def faster(record: dict) -> float:
    """mae_fast's clips a second over the record's engine's, round by round."""
    engine, clips = record["engine"], record["engines"]
    times = ratio(record["seconds"][engine], record["seconds"][OURS])
    return times * clips[OURS]["clips"] / clips[engine]["clips"]


def step_cells(r: dict) -> list[str]:
    name, rate = r["engine"], r["clips_per_second"][r["engine"]]
    engine, done, of = r["engines"][name], rate * r["official_flop_a_clip"] / 1e12, "-"
    if product := r["limits"].get("product"):
        peak = product["flop"] / statistics.median(product["seconds"]) / 1e12
        of = f"{done / peak:.0%} of {peak:.0f}"
    times = "-" if name == OURS else f"{faster(r):.2f}x"
    cells = [r["model"], str(engine["clips"]), f"`{name}`", f"{rate:.0f}", f"{done:.0f}", of, times]
    return [*cells, f"{engine['peak_memory_mb'] / 1024:.1f}", f"{spread(r['seconds'][name]):.0%}"]


def ratio_cells(r: dict) -> list[str]:
    rate, times = r["clips_per_second"][OURS], (r["times_the_base"], r["times_the_base_in_flop"])
    return [r["model"], f"{r['ratio']:.0%}", f"{rate:.0f}", *(f"{x:.2f}x" for x in times)]


def medians(record: dict) -> dict[str, float]:
    """Microseconds by backend."""
    return {name: 1e6 * statistics.median(s) for name, s in record.get("seconds", {}).items()}


def microseconds(samples: list[float]) -> str:
    """Their median; ! where they spread over 10%."""
    return f"{1e6 * statistics.median(samples):.0f}{'!' * (spread(samples) > 0.1)}"


def attention_cells(r: dict) -> list[str] | None:
    others, seconds = medians(r), r["seconds"]
    ours, _ = others.pop("triton", None), others.pop("reference", None)
    if ours is None or not others:
        return None
    best = min(others, key=others.get)
    return [
        r["model"],
        " ".join(x.removeprefix("bfloat16") for x in r["shape"].split()[:2]),
        r["direction"].replace("_", " + "),
        microseconds(seconds["triton"]),
        f"{r['flop'] / ours / 1e6:.0f}",
        f"{microseconds(seconds[best])} (`{best}`)",
        f"{others[best] / ours:.2f}x",
    ]


def op_cells(r: dict) -> list[str] | None:
    others = medians(r)
    if "triton" not in others or r["op"] not in OPS:  # one was measured, and not kept
        return None
    ours, copy = others.pop("triton"), r["limits"]["copy"]
    rate = copy["bytes"] / statistics.median(copy["seconds"])
    return [
        f"`{r['op']}`",
        r["shape"].split()[0],
        r["direction"].replace("_", " + "),
        microseconds(r["seconds"]["triton"]),
        f"{r['bytes'] / (ours / 1e6) / rate:.0%}",
        ", ".join(f"{us:.0f} (`{name}`)" for name, us in others.items()),
    ]


def profile_cells(r: dict) -> list[str]:
    shares = ", ".join(f"{op} {part:.0%}" for op, part in list(r["shares"].items())[:8])
    launches = (str(sum(r[how].values())) for how in ("launches", "launches_with_graph"))
    return [r["model"], str(r["batch_clips"]), f"{r['microseconds'] / 1e3:.1f}", shares, *launches]


def clips_of(record: dict) -> set[int]:
    return {engine["clips"] for engine in record["engines"].values()}


def accelerate_cells(r: dict) -> list[str]:
    engines, seconds = r["engines"], r["seconds_a_clip"]
    cells = [f"{r['family']}, {r['model']}", ", ".join(map(str, sorted(clips_of(r))))]
    for name in (BEFORE, *HOW, OURS):
        rate = 1 / statistics.median(seconds[name])
        asked = name in HOW and HOW[name].get("cuda_graph", True)
        lacks = " (no graphs)" * (asked and "cudaGraphLaunch" not in r["launches"][name])
        cells.append(f"{rate:.0f}, {r['times'][name]:.2f}x{lacks}")
    launches = (str(sum(of.values())) for of in r["launches"].values())
    peaks = (engines[name]["peak_memory_mb"] / 1024 for name in (BEFORE, *HOW, OURS))
    gigabytes = (f"{peak:.1f}" for peak in peaks)
    return [*cells, ", ".join(launches), ", ".join(gigabytes)]


class Kind(NamedTuple):
    """A table: of which stages, what is said above it, its columns, a record's cells or None."""

    stages: tuple[str, ...]
    words: str
    head: str
    cells: Callable[[dict], list[str] | None]
    order: Callable[[list[dict]], list[dict]] = list


TABLES = (
    Kind(
        ("steps", "rungs"),
        "**Training steps on a GPU**, 90% masked, bf16 autocast with fp32 weights (`official_fp32` "
        "and `official_tf32` as they are called), clip and AdamW included, synthetic uint8 clips "
        "on the device. Each engine beside `mae_fast` in the same rounds; the official code is "
        "written from the specification. `mae_fast` replays CUDA graphs, as training does there.",
        "model|clips|engine|clips/s|TFLOP/s of the official count|of the product rate, TFLOP/s|"
        "mae_fast is faster|peak GB|spread",
        step_cells,
        steps,
    ),
    Kind(
        ("accelerate",),
        "**accelerate on a GPU**: other people's models, 90% masked, bf16 autocast, in the step of "
        "their own loop, uint8 clips on the device. Clips/s as they are, after the one line with "
        "its options, and of mae_fast's own step, and how many times that is of before, round by "
        "round. In the same order: what the host launches in a step, and peak GB of one without "
        "graphs, the weights and optimizers of all in each.",
        "|".join(["family, model", "clips", "as it is", *HOW, "`mae_fast`", "launches", "peak GB"]),
        accelerate_cells,
    ),
    Kind(
        ("ratios",),
        "**What masking buys on a GPU**, 64 clips, bf16, beside 90% in the same rounds. At 0% the "
        "encoder sees every token; the decoder and the loss stay those of 90%.",
        "model|masked|clips/s|time of a clip, of that at 90%|in FLOP",
        ratio_cells,
        partial(sorted, key=itemgetter("model", "ratio")),
    ),
    Kind(
        ("attention",),
        "**Attention on a GPU**, on the calls of a step at 64 clips in bf16, caches cold: the "
        "Triton kernel beside the fastest of torch's four kernels and of the libraries that were "
        "there; ! spread over 10%: the host was not far enough ahead, and is in it.",
        "model|q, and k and v|direction|us|TFLOP/s|fastest library, us|ours is faster",
        attention_cells,
    ),
    Kind(
        ("kernels",),
        "**Ops on a GPU**, on the calls of a step at 64 clips under autocast, caches cold: "
        "Triton's kernels, the share of a copy's bandwidth at which they move the least bytes, and "
        "the other ways.",
        "op|shape|direction|us|of copy|others, us",
        op_cells,
    ),
    Kind(
        ("profile",),
        "**Where a step's time goes on a GPU**: its kernels, by op; what the host launches.",
        "model|clips|ms of kernels|shares|launches|with graphs",
        profile_cells,
    ),
)


def headline(folder: Path) -> str:
    """The README's sentence: steps of B and L at 64 clips, and against the bar."""
    for _, records in devices(folder):
        found = {(r["model"], r["batch_asked"], r["engine"]): r for r in steps(records)}
        parts, used = [], []
        for model, name in (("vit_base", "ViT-B"), ("vit_large", "ViT-L")):
            ours, bar = (found.get((model, 64, engine)) for engine in (OURS, BAR))
            if ours:
                used += [r for r in (ours, bar) if r]
                text = f"{name} **{ours['clips_per_second'][OURS]:.0f} clips/s**"
                parts.append(text + (f", {faster(bar):.2f}x" if bar else ""))
        if parts:
            others = [r for r in records if r["kind"] == "accelerate"]
            most = {r["family"]: r for r in sorted(others, key=lambda r: max(clips_of(r)))}
            words = ", ".join(
                f"`{family}` **{r['times'][AFTER]:.2f}x** ({max(clips_of(r))} clips)"
                for family, r in sorted(most.items())
            )
            return (
                "**On one GPU** (64 clips of 16 frames, 90% masked, bf16, clips on the device):\n"
                f"{', '.join(parts)}, against the official code with SDPA and torch.compile\n"
                f"in the same rounds ({where(used)})."
                + (f"\n`accelerate`, B size, in their own loops: {words}." if words else "")
            )
    return "On a GPU: **unmeasured**."
