"""What `make gpu` measured, as tables: of each device the newest record of every item, whatever the
commit; benchmarks/tables.py puts them into docs/results.md and the README.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.engines import ENGINES, OURS
from benchmarks.gpu.records import RESULTS
from benchmarks.gpu.stages.steps import BAR
from mae_fast.bench.timing import ratio, spread

SOURCES = RESULTS / "sources.json"  # hash_of_sources -> commit
Rows = list[dict[str, str]]  # cells by column


def devices(folder: Path) -> Iterator[tuple[str, list[dict]]]:
    """(device, the newest record of each item that was measured), of results/gpu."""
    for path in sorted(p for p in folder.glob("*") if p.is_dir()):
        found: dict[tuple[str, str], dict] = {}
        for file in sorted(path.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                if record["status"] == "measured":
                    key = record["stage"], record["item"]
                    found[key] = max(found.get(key, record), record, key=lambda r: r["at"])
        if found:
            yield path.name, list(found.values())


def where(records: list[dict]) -> str:
    """Device, versions and commits of some records; those of SOURCES where a copy's git was older
    than its files."""
    e = records[-1]["environment"]
    known = json.loads(SOURCES.read_text())
    commits = dict.fromkeys(known.get(r["sources"], r["environment"]["commit"]) for r in records)
    versions = f"torch {e['torch']}, triton {e['triton']}"
    return f"{e['cuda:0']}; {versions}; commit {', '.join(map(str, commits))}"


def microseconds(samples: list[float]) -> str:
    """Their median; ! where they spread over 10%."""
    return f"{1e6 * statistics.median(samples):.0f}{'!' * (spread(samples) > 0.1)}"


def direction(record: dict) -> str:
    return record["direction"].replace("_", " + ")


def steps(records: list[dict]) -> list[dict]:
    """The records of training steps at 90%, by model and clips, ours first."""
    found = [r for r in records if r["kind"] == "steps" and r.get("engine") in ENGINES]
    order = list(dict.fromkeys((r["model"], r["batch_asked"]) for r in found))
    return sorted(found, key=lambda r: order.index((r["model"], r["batch_asked"])))


def faster(record: dict) -> float:
    """mae_fast's clips a second over the record's engine's, round by round."""
    engine, clips = record["engine"], record["engines"]
    times = ratio(record["seconds"][engine], record["seconds"][OURS])
    return times * clips[OURS]["clips"] / clips[engine]["clips"]


def tables(records: list[dict]) -> Iterator[tuple[str, Rows]]:
    """(words, rows) of one device's records."""
    for stages, (make, words) in TABLES.items():
        used = [r for r in records if r["stage"] in stages]
        rows = make(used)
        if rows:
            yield f"{words} {where(used)}.", rows


def step_rows(records: list[dict]) -> Rows:
    rows = []
    for r in steps(records):
        name, rate = r["engine"], r["clips_per_second"][r["engine"]]
        engine, done, of = r["engines"][name], rate * r["official_flop_a_clip"] / 1e12, "-"
        if product := r["limits"].get("product"):
            peak = product["flop"] / statistics.median(product["seconds"]) / 1e12
            of = f"{done / peak:.0%} of {peak:.0f}"
        row = {
            "model": r["model"],
            "clips": str(engine["clips"]),
            "engine": f"`{name}`",
            "clips/s": f"{rate:.0f}",
            "TFLOP/s of the official count": f"{done:.0f}",
            "of the product rate, TFLOP/s": of,
            "mae_fast is faster": "-" if name == OURS else f"{faster(r):.2f}x",
            "peak GB": f"{engine['peak_memory_mb'] / 1024:.1f}",
            "spread": f"{spread(r['seconds'][name]):.0%}",
        }
        rows.append(row)
    return rows


def ratio_rows(records: list[dict]) -> Rows:
    return [
        {
            "model": r["model"],
            "masked": f"{r['ratio']:.0%}",
            "clips/s": f"{r['clips_per_second'][OURS]:.0f}",
            "time of a clip, of that at 90%": f"{r['times_the_base']:.2f}x",
            "in FLOP": f"{r['times_the_base_in_flop']:.2f}x",
        }
        for r in sorted(records, key=lambda r: (r["model"], r["ratio"]))
    ]


def ours_and_others(records: list[dict]) -> Iterator[tuple[dict, float, dict[str, float]]]:
    """(record, microseconds of Triton's kernel, {other: its}) of each that has Triton's."""
    for r in records:
        medians = {n: 1e6 * statistics.median(s) for n, s in r.get("seconds", {}).items()}
        ours = medians.pop("triton", None)
        if ours is not None:
            yield r, ours, medians


def attention_rows(records: list[dict]) -> Rows:
    rows = []
    for r, ours, others in ours_and_others(records):
        others.pop("reference", None)
        if not others:
            continue
        best = min(others, key=others.get)
        row = {
            "model": r["model"],
            "q, and k and v": " ".join(x.removeprefix("bfloat16") for x in r["shape"].split()[:2]),
            "direction": direction(r),
            "us": microseconds(r["seconds"]["triton"]),
            "TFLOP/s": f"{r['flop'] / ours / 1e6:.0f}",
            "fastest library, us": f"{microseconds(r['seconds'][best])} (`{best}`)",
            "ours is faster": f"{others[best] / ours:.2f}x",
        }
        rows.append(row)
    return rows


def op_rows(records: list[dict]) -> Rows:
    rows = []
    for r, ours, others in ours_and_others(records):
        copy = r["limits"]["copy"]
        rate = copy["bytes"] / statistics.median(copy["seconds"])
        row = {
            "op": f"`{r['op']}`",
            "shape": r["shape"].split()[0],
            "direction": direction(r),
            "us": microseconds(r["seconds"]["triton"]),
            "of copy": f"{r['bytes'] / (ours / 1e6) / rate:.0%}",
            "others, us": ", ".join(f"{us:.0f} (`{n}`)" for n, us in others.items()),
        }
        rows.append(row)
    return rows


def profile_rows(records: list[dict]) -> Rows:
    return [
        {
            "model": r["model"],
            "clips": str(r["batch_clips"]),
            "ms of kernels": f"{r['microseconds'] / 1e3:.1f}",
            "shares": ", ".join(f"{op} {part:.0%}" for op, part in list(r["shares"].items())[:8]),
            "launches": str(sum(r["launches"].values())),
            "with graphs": str(sum(r["launches_with_graph"].values())),
        }
        for r in records
    ]


TABLES = {  # of which stages, and what is said above them
    ("steps", "rungs"): (
        step_rows,
        "**Training steps on a GPU**, 90% masked, bf16 autocast with fp32 weights (`official_fp32` "
        "and `official_tf32` as they are called), clip and AdamW included, synthetic uint8 clips "
        "on the device. Each engine beside `mae_fast` in the same rounds; the official code is "
        "written from the specification. `mae_fast` replays CUDA graphs, as training does there.",
    ),
    ("ratios",): (
        ratio_rows,
        "**What masking buys on a GPU**, 64 clips, bf16, beside 90% in the same rounds. At 0% the "
        "encoder sees every token; the decoder and the loss stay those of 90%.",
    ),
    ("attention",): (
        attention_rows,
        "**Attention on a GPU**, on the calls of a step at 64 clips in bf16, caches cold: the "
        "Triton kernel beside the fastest of torch's four kernels and of the libraries that were "
        "there; ! spread over 10%: the host was not far enough ahead, and is in it.",
    ),
    ("kernels",): (
        op_rows,
        "**Ops on a GPU**, on the calls of a step at 64 clips under autocast, caches cold: "
        "Triton's kernels, the share of a copy's bandwidth at which they move the least bytes, and "
        "the other ways.",
    ),
    ("profile",): (
        profile_rows,
        "**Where a step's time goes on a GPU**: its kernels, by op; what the host launches.",
    ),
}


def headline(folder: Path) -> str:
    """The README's sentence: steps of B and L at 64 clips, and against the bar."""
    for _, records in devices(folder):
        found = {(r["model"], r["batch_asked"], r["engine"]): r for r in steps(records)}
        parts, used = [], []
        for model, name in (("vit_base", "ViT-B"), ("vit_large", "ViT-L")):
            ours, bar = (found.get((model, 64, engine)) for engine in (OURS, BAR))
            if not ours:
                continue
            used += [r for r in (ours, bar) if r]
            text = f"{name} **{ours['clips_per_second'][OURS]:.0f} clips/s**"
            parts.append(text + (f", {faster(bar):.2f}x" if bar else ""))
        if parts:
            return (
                "**On one GPU** (64 clips of 16 frames, 90% masked, bf16, clips on the device):\n"
                f"{', '.join(parts)},\nagainst the official code with SDPA and torch.compile in "
                f"the same rounds\n({where(used)})."
            )
    return "On a GPU: **unmeasured**."
