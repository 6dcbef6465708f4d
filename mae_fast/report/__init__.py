"""`mae-fast report`: records and profiles as one page that needs no network."""

import statistics
from pathlib import Path
from typing import Annotated

import tyro

from mae_fast.bench import records
from mae_fast.bench.ratio_table import CELL_HEAD, LOST, NOISY, cell_row, paper_table, summary
from mae_fast.bench.records import Record
from mae_fast.bench.timing import ratio as times
from mae_fast.bench.timing import share, spread
from mae_fast.errors import ConfigError
from mae_fast.files import write, write_figure
from mae_fast.profile.pictures import memory as memory_figure
from mae_fast.profile.pictures import roofline as roofline_figure
from mae_fast.report import pictures
from mae_fast.report.page import Page

OURS, OFFICIAL, ENCODE_ALL = "mae_fast", "official_eager", "mae_fast_encode_all"
AFTER = "accelerated"  # another's model, by mae_fast.accelerate


def report(
    results: Annotated[list[str], tyro.conf.Positional],
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html",
    png: str = "",
) -> None:
    """Write what was measured as one HTML page: speed-up by masking ratio, what is lost, engines,
    ops against the machine's limits, profiles, memory, environment, how to repeat it.

    Args:
        results: records (.jsonl of `bench ratio`, `bench step`, benchmarks/results), and
            profile.json files, or folders of them.
        output: the page.
        png: write the figures into this folder too.
    """
    if not results:
        raise ConfigError("report: name at least one file of records or a folder of them")
    found = [r for path in records.files(results) for r in records.read(path)]
    found = [r for r in found if r.get("model") != "quick"] or found
    if not found:
        raise ConfigError(f"{', '.join(results)}: no records")
    page = build(found, results)
    write(output, page.html())
    said = f"wrote {output}: {len(found)} records"
    if png:
        for name, figure in page.figures.items():
            write_figure(Path(png) / f"{name}.png", figure, dpi=200)
        said += f"; {len(page.figures)} PNG in {png}"
    print(said)


def write_page(path: Path) -> Path:
    """report.html beside a file of records, for a command that ends with it."""
    page = path.with_name("report.html")
    write(page, build(records.read(path), [str(path)]).html())
    return page


def build(found: list[Record], sources: list[str]) -> Page:
    """The page of these records; of each subject and machine the newest counts, and the newest that
    encodes every token."""
    by_form: dict[str, list[Record]] = {}

    def key(r: Record) -> tuple:
        return records.subject(r), records.where(r), ENCODE_ALL in records.seconds(r)

    for record in {key(r): r for r in found}.values():
        by_form.setdefault(records.form(record), []).append(record)
    ratios = [r for r in by_form.get("timed", []) if "cells" in r]
    page = Page("mae_fast: what was measured", _lead(ratios, by_form.get("ladder", [])))
    _ratio_sections(page, ratios)
    _ladder_section(page, by_form.get("ladder", []))
    _ops_section(page, by_form.get("op", []))
    for number, record in enumerate(by_form.get("profile", [])):
        _profile_section(page, record, number)
    _memory_section(page, ratios, by_form.get("ladder", []))
    _all_section(page, found)
    _environment_section(page, found, sources)
    return page


def _lead(ratios: list[Record], ladders: list[Record]) -> list[str]:
    """What masking and the engine buy together, in a sentence for each model and machine."""
    said = []
    for cell in (c for group in _grouped(ratios).values() for c in summary(group)["cells"]):
        if cell["engine"] != OURS or cell["ratio"] != 0.9 or not cell["against_official_at_0"]:
            continue
        at_0, here = cell["against_official_at_0"], cell["against_official"]
        said.append(
            f"{cell['model']}, {cell['strategy']} masking of 90%, {cell['precision']}, "
            f"{cell['device']}: a step is {at_0['times']:.1f}x as fast as the official code's at "
            f"0%, and {here['times']:.2f}x as fast as the official code's at 90%."
        )
    if not said:
        for r in ladders:
            names = records.seconds(r)
            if OURS in names and OFFICIAL in names:
                faster = times(names[OFFICIAL], names[OURS])
                said.append(f"{records.title(r)}: {faster:.2f}x as fast as {OFFICIAL}.")
    return said or ["No record here holds both mae_fast and the official code."]


def _grouped(ratios: list[Record]) -> dict[tuple, list[Record]]:
    """Records of `bench ratio` that belong in one picture."""
    groups: dict[tuple, list[Record]] = {}
    for r in ratios:
        key = (r["model"], r["strategy"], r["precision"], r["asked_clips"], records.where(r))
        groups.setdefault(key, []).append(r)
    return groups


def _ratio_sections(page: Page, ratios: list[Record]) -> None:
    groups = {key: summary(group)["cells"] for key, group in _grouped(ratios).items()}
    if not groups:
        return
    page.section(
        "Speed-up against masking ratio",
        "Medians over rounds in which engines took turns; with loading, of steps of one engine "
        "alone, which for the official code is another state of memory. At 0% the encoder sees "
        "every token; the decoder and the loss are those of 90%. A spread above "
        f"{NOISY:.0%} is marked with !; * is a ratio of medians of different rounds.",
    )
    for number, (key, cells) in enumerate(groups.items()):
        title = _group_title(key)
        page.figure(f"speed-up-{number}", pictures.speed_up(cells, title), f"Speed-up: {title}")
        page.table(CELL_HEAD, map(cell_row, cells))
        page.code(paper_table(cells).strip())
    page.section(
        "What is lost",
        "What a step spends where masking does not shrink it: its share, and what the speed-up "
        "over 0% would be without it.",
    )
    for number, (key, cells) in enumerate(groups.items()):
        ours = [c for c in cells if c["engine"] == OURS and c["parts_a_clip"]]
        title = f"{OURS}, {_group_title(key)}"
        if ours:
            page.figure(f"parts-{number}", pictures.parts(ours, title), f"Parts of a step: {title}")
        rows = [
            [
                f"{c['ratio']:.0%}",
                c["engine"],
                part,
                f"{c['lost'][part]['share']:.1%}",
                f"{c['lost'][part]['speed_up_without']:.2f}x",
            ]
            for c in cells
            for part in LOST
            if part in c["lost"]
        ]
        page.table(["masked", "engine", "part", "share of step", "speed-up without it"], rows)


def _ladder_section(page: Page, ladders: list[Record]) -> None:
    if not ladders:
        return
    page.section("Engines", "Training steps taken in turn; ratios round by round.")
    for number, record in enumerate(ladders):
        named = records.seconds(record)
        ours = named.get(OURS) or named.get(AFTER)
        figure = pictures.ladder(list(named.items()), records.title(record))
        page.figure(f"engines-{number}", figure, f"Engines: {records.title(record)}")
        rows = []
        for name, samples in named.items():
            faster = f"{times(samples, ours):.2f}x" if ours else "-"
            peak = record["engines"][name].get("peak_memory_mb")
            rows.append(
                [
                    name,
                    f"{statistics.median(samples):.3f}",
                    f"{spread(samples):.0%}",
                    str(len(samples)),
                    faster,
                    "-" if peak is None else f"{peak:.0f}",
                ]
            )
        head = ["engine", "seconds a step", "spread", "samples", "mae_fast is faster", "peak MB"]
        page.table(head, rows)


def _ops_section(page: Page, ops: list[Record]) -> None:
    if not ops:
        return
    page.section(
        "Ops against the machine's limits",
        "Forward and backward; the limit is copy bandwidth, or the rate of a large product, timed "
        "in the same rounds.",
    )
    rows, bars = [], []
    for r in ops:
        chosen, baseline = r["seconds"][r["chosen"]], r["seconds"][r["baseline"]]
        limit = "product rate" if r["flop"] else "copy bandwidth"
        reached = share(r["limits"], r, chosen)
        rows.append(
            [
                r["op"],
                r["shape"],
                r["dtype"],
                r["chosen"],
                f"{1e3 * statistics.median(chosen):.3f}",
                f"{spread(chosen):.0%}",
                f"{reached:.0%}",
                limit,
                f"{times(baseline, chosen):.2f}x",
                r["baseline"],
                str(r["environment"]["commit"]),
            ]
        )
        bars.append((f"{r['op']}, {r['shape']}", reached, limit))
    page.figure("ops", pictures.ops(bars, "ops"), "Share of the machine's limit by op")
    head = ["op", "shape", "dtype", "backend", "ms", "spread", "share", "of", "speed-up", "over"]
    page.table([*head, "commit"], rows)


def _profile_section(page: Page, record: Record, number: int) -> None:
    title = records.title(record)
    page.section(
        f"Profile: {title}",
        f"Limits here: {record['product_rate'] / 1e9:.0f} GFLOP/s, {record['copy_rate'] / 1e9:.1f} "
        "GB/s. Shares are of the step without a profiler; unaccounted is what is left of it.",
    )
    for kind, figure in (("roofline", roofline_figure), ("memory", memory_figure)):
        page.figure(f"{kind}-{number}", figure(record), f"{kind.capitalize()}: {title}")
    rows = []
    for engine in record["engines"]:
        for part in engine["parts"]:
            flop, limit = part.get("flop"), part.get("share_of_limit")
            rate = flop / part["seconds"] / 1e9 if flop and part["seconds"] > 0 else None
            rows.append(
                [
                    engine["engine"],
                    part["phase"],
                    part["op"] or "-",
                    part["direction"] or "-",
                    f"{1e3 * part['seconds']:.2f}",
                    f"{part['share']:.1%}",
                    "-" if rate is None else f"{rate:.0f}",
                    "-" if limit is None else f"{limit:.0%}",
                ]
            )
    head = ["engine", "phase", "op", "direction", "ms", "share of step", "GFLOP/s", "of limit"]
    page.table(head, rows)


def _memory_section(page: Page, ratios: list[Record], ladders: list[Record]) -> None:
    rows = []
    for record in [*ratios, *ladders]:
        engines = record.get("cells") or record["engines"]
        for name, engine in engines.items():
            if engine.get("peak_memory_mb"):
                clips = engine.get("clips", record["batch_clips"])
                row = [record["model"], f"{record['ratio']:.0%}", name, str(clips)]
                rows.append([*row, record["precision"], f"{engine['peak_memory_mb']:.0f}"])
    if not rows:
        return
    page.section("Memory", "Peak of a process of its own (CPU: resident; GPU: allocated).")
    page.table(["model", "masked", "engine", "clips", "precision", "peak MB"], rows)


def _all_section(page: Page, found: list[Record]) -> None:
    page.section("Every record", "All samples as they were recorded: median and spread.")
    rows = [
        [
            record.get("what", record.get("stage", "")),
            records.describe(record),
            name,
            f"{statistics.median(samples):.4g}",
            f"{spread(samples):.0%}",
            str(len(samples)),
            str(record["environment"]["commit"]),
        ]
        for record in found
        for name, samples in records.seconds(record).items()
    ]
    page.table(["what", "of", "name", "seconds", "spread", "samples", "commit"], rows)


def _environment_section(page: Page, found: list[Record], sources: list[str]) -> None:
    page.section("Environment")
    keys = list(dict.fromkeys(k for r in found for k in r["environment"]))
    values: dict[str, dict[str, None]] = {key: {} for key in keys}
    for record in found:
        for key, value in record["environment"].items():
            values[key][str(value)] = None
    page.table(["what", "found"], [[k, "; ".join(v)] for k, v in values.items()])
    page.section(
        "How to repeat it",
        "On a quiet machine, at one of the commits above. Times differ from machine to machine; "
        "ratios that were taken in turn differ less.",
    )
    page.code("\n".join([*_commands(found), f"mae-fast report {' '.join(sources)} -o report.html"]))


def _commands(found: list[Record]) -> list[str]:
    """What measures such records again, once each."""
    lines = {}
    for r in found:
        form, step = records.form(r), f"--model {r.get('model')}"
        if form == "timed" and "cells" in r:
            lines[f"mae-fast bench ratio {step} --batch {r['asked_clips']}"] = None
        elif form == "ladder":
            lines[f"python -m benchmarks.ladder {step} --batch {r['batch_clips']}"] = None
        elif form == "profile":
            clips = f"--batch {r['batch_clips']} --ratio {r['ratio']}"
            clips += " --with-data FOLDER" if r.get("workers") is not None else ""
            others = [e["engine"] for e in r["engines"][1:]]
            lines[
                f"mae-fast profile {step} {clips}" + "".join(f" --against {o}" for o in others)
            ] = None
        elif form == "step":
            lines[f"mae-fast bench step {step} --batch {r['batch_clips']}"] = None
        elif form in ("op", "overhead"):
            lines["python -m benchmarks.ops"] = None
        elif form == "curves":
            lines["python -m benchmarks.curves"] = None
        elif form == "gpu":
            lines["make gpu"] = None
    return list(lines)


def _group_title(key: tuple) -> str:
    model, strategy, precision, clips, _ = key
    return f"{model}, {strategy} masking, {clips} clips, {precision}"
