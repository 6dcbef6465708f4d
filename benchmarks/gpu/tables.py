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
Tables = list[tuple[str, str, list[list[str]]]]  # (words, head, rows)


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


def tables(records: list[dict]) -> Tables:
    """Of one device's records."""
    found = []
    for stages, make in TABLES.items():
        used = [r for r in records if r["stage"] in stages]
        words, head, rows = make(used)
        if rows:
            found.append((f"{words} {where(used)}.", head, rows))
    return found


def step_table(records: list[dict]) -> tuple[str, str, list[list[str]]]:
    rows = []
    for r in steps(records):
        name, rate = r["engine"], r["clips_per_second"][r["engine"]]
        done = rate * r["official_flop_a_clip"] / 1e12
        product = r["limits"].get("product")
        of = "-"
        if product:
            peak = product["flop"] / statistics.median(product["seconds"]) / 1e12
            of = f"{done / peak:.0%} of {peak:.0f}"
        rows.append(
            [
                r["model"],
                str(r["engines"][name]["clips"]),
                f"`{name}`",
                f"{rate:.0f}",
                f"{done:.0f}",
                of,
                "-" if name == OURS else f"{faster(r):.2f}x",
                f"{r['engines'][name]['peak_memory_mb'] / 1024:.1f}",
                f"{spread(r['seconds'][name]):.0%}",
            ]
        )
    words = (
        "**Training steps on a GPU**, 90% masked, bf16 autocast with fp32 weights (`official_fp32` "
        "and `official_tf32` as they are called), clip and AdamW included, synthetic uint8 clips "
        "on the device. Each engine beside `mae_fast` in the same rounds; the official code is "
        "written from the specification. `mae_fast` replays CUDA graphs, as training does there."
    )
    head = (
        "model|clips|engine|clips/s|TFLOP/s of the official count|of the product rate, TFLOP/s|"
        "mae_fast is faster|peak GB|spread"
    )
    return words, head, rows


def ratio_table(records: list[dict]) -> tuple[str, str, list[list[str]]]:
    rows = [
        [
            r["model"],
            f"{r['ratio']:.0%}",
            f"{r['clips_per_second'][OURS]:.0f}",
            f"{r['times_the_base']:.2f}x",
            f"{r['times_the_base_in_flop']:.2f}x",
        ]
        for r in sorted(records, key=lambda r: (r["model"], r["ratio"]))
    ]
    words = (
        "**What masking buys on a GPU**, 64 clips, bf16, beside 90% in the same rounds. At 0% the "
        "encoder sees every token; the decoder and the loss stay those of 90%."
    )
    head = "model|masked|clips/s|time of a clip, of that at 90%|in FLOP"
    return words, head, rows


def ours_and_others(records: list[dict]) -> Iterator[tuple[dict, float, dict[str, float]]]:
    """(record, microseconds of Triton's kernel, {other: its}) of each that has Triton's."""
    for r in records:
        medians = {n: 1e6 * statistics.median(s) for n, s in r.get("seconds", {}).items()}
        ours = medians.pop("triton", None)
        if ours is not None:
            yield r, ours, medians


def attention_table(records: list[dict]) -> tuple[str, str, list[list[str]]]:
    rows = []
    for r, ours, medians in ours_and_others(records):
        medians.pop("reference", None)
        if not medians:
            continue
        best = min(medians, key=medians.get)
        shape = " ".join(x.removeprefix("bfloat16") for x in r["shape"].split()[:2])
        rows.append(
            [
                r["model"],
                shape,
                r["direction"].replace("_", " + "),
                microseconds(r["seconds"]["triton"]),
                f"{r['flop'] / ours / 1e6:.0f}",
                f"{microseconds(r['seconds'][best])} (`{best}`)",
                f"{medians[best] / ours:.2f}x",
            ]
        )
    words = (
        "**Attention on a GPU**, on the calls of a step at 64 clips in bf16, caches cold: the "
        "Triton kernel beside the fastest of torch's four kernels and of the libraries that were "
        "there; ! spread over 10%: the host was not far enough ahead, and is in it."
    )
    head = "model|q, and k and v|direction|us|TFLOP/s|fastest library, us|ours is faster"
    return words, head, rows


def op_table(records: list[dict]) -> tuple[str, str, list[list[str]]]:
    rows = []
    for r, ours, medians in ours_and_others(records):
        copy = r["limits"]["copy"]
        rate = copy["bytes"] / statistics.median(copy["seconds"])
        others = ", ".join(f"{us:.0f} (`{n}`)" for n, us in medians.items())
        share = f"{r['bytes'] / (ours / 1e6) / rate:.0%}"
        shape = r["shape"].split()[0]
        samples = microseconds(r["seconds"]["triton"])
        rows.append([f"`{r['op']}`", shape, r["direction"].replace("_", " + "), samples])
        rows[-1] += [share, others]
    words = (
        "**Ops on a GPU**, on the calls of a step at 64 clips under autocast, caches cold: "
        "Triton's kernels, the share of a copy's bandwidth at which they move the least bytes, and "
        "the other ways."
    )
    return words, "op|shape|direction|us|of copy|others, us", rows


def profile_table(records: list[dict]) -> tuple[str, str, list[list[str]]]:
    rows = [
        [
            r["model"],
            str(r["batch_clips"]),
            f"{r['microseconds'] / 1e3:.1f}",
            ", ".join(f"{op} {part:.0%}" for op, part in list(r["shares"].items())[:8]),
            str(sum(r["launches"].values())),
            str(sum(r["launches_with_graph"].values())),
        ]
        for r in records
    ]
    words = "**Where a step's time goes on a GPU**: its kernels, by op; what the host launches."
    return words, "model|clips|ms of kernels|shares|launches|with graphs", rows


TABLES = {  # of which stages
    ("steps", "rungs"): step_table,
    ("ratios",): ratio_table,
    ("attention",): attention_table,
    ("kernels",): op_table,
    ("profile",): profile_table,
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
