"""`mae-fast report`: records and profiles as one page that needs no network."""

import statistics
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import tyro

from mae_fast.bench import records
from mae_fast.bench.ratio_table import (
    CELL,
    LOSS_HEAD,
    NOISY,
    OFFICIAL,
    cell_row,
    lost_row,
    paper_table,
    summary,
)
from mae_fast.bench.records import Record
from mae_fast.bench.table import grouped
from mae_fast.bench.timing import ratio as times
from mae_fast.bench.timing import spread
from mae_fast.errors import ConfigError
from mae_fast.figures import write_figure
from mae_fast.files import check_output, write
from mae_fast.page import Page
from mae_fast.profile.pictures import memory, roofline
from mae_fast.profile.step import PART_HEAD, part_rows
from mae_fast.report import pictures, rows
from mae_fast.report.rows import OURS

GROUP = ("model", "strategy", "precision", "asked_clips")  # of one picture, on one machine


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
    files = records.files(results)
    check_output(output, *files)
    found = [r for path in files for r in records.read(path) if records.measured(r)]
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
    """The page of these records; of each subject and machine the newest counts."""
    latest = {(records.subject(r), records.where(r)): r for r in found}.values()
    kinds = {kind: [r for r in latest if r["kind"] == kind] for kind in records.KINDS}
    engines = [r for r in kinds["steps"] if len(r["seconds"]) > 1]
    groups = [
        (f"{model}, {strategy} masking, {clips} clips, {precision}", summary(group)["cells"])
        for (model, strategy, precision, clips, _), group in grouped(
            kinds["ratio"],
            lambda r: (*itemgetter(*GROUP)(r), records.where(r)),
        )
    ]
    page = Page("mae_fast: what was measured", _lead(groups, engines))
    if groups:
        _ratio_sections(page, groups)
    if engines:
        page.section("Engines", "Training steps taken in turn; ratios round by round.")
    for n, record in enumerate(engines):
        title = records.title(record)
        page.figure(f"engines-{n}", pictures.ladder(record["seconds"], title), f"Engines: {title}")
        page.table(rows.STEP_HEAD, rows.step_rows(record))
    if ops := kinds["op"]:
        page.section(
            "Ops against the machine's limits",
            "The limit is copy bandwidth, or the rate of a large product, whichever binds, timed "
            "in the same rounds.",
        )
        bars = [(f"{r['op']}, {r['shape']}", *rows.op_share(r)) for r in ops]
        page.figure("ops", pictures.ops(bars, "ops"), "Share of the machine's limit by op")
        page.table(rows.OP_HEAD, map(rows.op_row, ops))
    for n, record in enumerate(kinds["profile"]):
        _profile_section(page, record, n)
    peaks = [
        [r["model"], f"{r['ratio']:.0%}", name, str(e["clips"]), r["precision"], f"{peak:.0f}"]
        for r in [*kinds["ratio"], *kinds["steps"]]
        for name, e in r["engines"].items()
        if (peak := e.get("peak_memory_mb"))
    ]
    if peaks:
        page.section("Memory", "Peak of a process of its own (CPU: resident; GPU: allocated).")
        page.table(["model", "masked", "engine", "clips", "precision", "peak MB"], peaks)
    _every_record(page, found, sources)
    return page


def _lead(groups: list[tuple[str, list]], ladders: list[Record]) -> list[str]:
    """What masking and the engine buy together, in a sentence for each model and machine."""
    said = [sentence for _, cells in groups for sentence in rows.bought(cells)]
    said = said or [
        f"{records.title(r)}: {times(r['seconds'][OFFICIAL], r['seconds'][OURS]):.2f}x as fast as "
        f"{OFFICIAL}."
        for r in ladders
        if {OURS, OFFICIAL} <= r["seconds"].keys()
    ]
    return said or ["No record here holds both mae_fast and the official code."]


def _ratio_sections(page: Page, groups: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Of records of `bench ratio`, by what belongs in one picture."""
    page.section(
        "Speed-up against masking ratio",
        "Medians over rounds in which engines took turns; with loading, of steps of one engine "
        "alone, which for the official code is another state of memory. At 0% the encoder sees "
        "every token; the decoder and the loss are those of 90%. A spread above "
        f"{NOISY:.0%} is marked with !; * is a ratio of medians of different rounds.",
    )
    for n, (title, cells) in enumerate(groups):
        page.figure(f"speed-up-{n}", pictures.speed_up(cells, title), f"Speed-up: {title}")
        page.table([*CELL], map(cell_row, cells))
        page.code(paper_table(cells).strip())
    page.section(
        "What is lost",
        "What a step spends where masking does not shrink it: its share, and in brackets what the "
        "speed-up over 0% would be without it.",
    )
    for n, (title, cells) in enumerate(groups):
        title = f"{OURS}, {title}"
        ours = [c for c in cells if c["engine"] == OURS and c["parts_a_clip"]]
        if ours:
            page.figure(f"parts-{n}", pictures.parts(ours, title), f"Parts of a step: {title}")
        if lost := [lost_row(c) for c in cells if c["lost"]]:
            page.table(LOSS_HEAD, lost)


def _profile_section(page: Page, record: Record, n: int) -> None:
    title = records.title(record)
    page.section(
        f"Profile: {title}",
        f"Limits here: {record['product_rate'] / 1e9:.0f} GFLOP/s, {record['copy_rate'] / 1e9:.1f} "
        "GB/s. Shares are of the step without a profiler; unaccounted is what is left of it.",
    )
    for kind, draw in (("roofline", roofline), ("memory", memory)):
        page.figure(f"{kind}-{n}", draw(record), f"{kind.capitalize()}: {title}")
    parts = [[name, *row] for name, e in record["engines"].items() for row in part_rows(e)]
    page.table(["engine", *PART_HEAD], parts)


def _every_record(page: Page, found: list[Record], sources: list[str]) -> None:
    page.section("Every record", "All samples as they were recorded: median and spread.")
    every = [
        [
            record["what"],
            records.describe(record),
            name,
            f"{statistics.median(samples):.4g}",
            f"{spread(samples):.0%}",
            str(len(samples)),
            str(record["environment"]["commit"]),
        ]
        for record in found
        if record["kind"] != "check"  # which has times, and no samples
        for name, samples in record.get("seconds", {}).items()
    ]
    page.table(["what", "of", "name", "seconds", "spread", "samples", "commit"], every)
    page.section("Environment")
    pairs = ((key, str(value)) for r in found for key, value in r["environment"].items())
    values = [
        [key, "; ".join(dict.fromkeys(value for _, value in group))]
        for key, group in grouped(pairs, itemgetter(0))
    ]
    page.table(["what", "found"], values)
    page.section(
        "How to repeat it",
        "On a quiet machine, at one of the commits above. Times differ from machine to machine; "
        "ratios that were taken in turn differ less.",
    )
    again = dict.fromkeys(map(_command, found))
    page.code("\n".join([*again, f"mae-fast report {' '.join(sources)} -o report.html"]))


# What measures a record again, by its kind.
COMMANDS = {
    "ratio": "mae-fast bench ratio --model {model} --batch {asked_clips}",
    "steps": "mae-fast bench step --model {model} --batch {batch_clips}",
    "profile": "mae-fast profile --model {model} --batch {batch_clips} --ratio {ratio}",
    "finetune": "mae-fast bench finetune --model {model} --batch {batch_clips}",
    "augment": "python -m benchmarks.randaugment",
    "losses": "python -m benchmarks.curves --model {model}",
}


def _command(r: Record) -> str:
    if "stage" in r:
        return "make gpu"
    if r["kind"] == "steps" and len(r["seconds"]) > 1:
        engines = "..." if "family" in r else " ".join(r["seconds"])
        how = f"--model {r['model']} --batch {r['batch_clips']} --ratios 0.9 --engines {engines}"
        return f"mae-fast bench ratio {how}"
    said = COMMANDS.get(r["kind"], "mae-fast bench ops").format(**r)
    if r["kind"] == "profile":
        said += "" if r.get("workers") is None else " --with-data FOLDER"
        said += "".join(f" --against {name}" for name in list(r["engines"])[1:])
    return said
