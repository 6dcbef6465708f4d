"""Write the generated part of docs/results.md, and the README's lines of it, from
benchmarks/results: `python -m benchmarks.tables`. With --check nothing is written, and the exit
code says whether both are up to date.
"""

import statistics
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

from benchmarks.data_tables import clips_tables, loading_tables
from benchmarks.gpu import tables as gpu
from benchmarks.markdown import TARGET, cpu, malloc, newest, placed, read, section, target, where
from mae_fast.bench.flops import step_flop
from mae_fast.bench.ratio_table import NOISY, summary
from mae_fast.bench.table import grouped
from mae_fast.bench.timing import ratio, share, spread
from mae_fast.config import preset
from mae_fast.ops import OPS
from mae_fast.report.rows import (
    AFTER,
    OURS,
    STEP_HEAD,
    bought,
    op_faster,
    op_share,
    step_rows,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EAGER, FUSED, PEER = "official_eager", "official_sdpa_fused_adamw", "transformers_sdpa"
AMX = ("videomae_base", PEER), ("videomae_base", f"{PEER}_fp32"), ("vit_base", f"{EAGER}_fp32")


def main(argv: list[str]) -> int:
    texts = {ROOT / "README.md": headline(RESULTS), ROOT / "docs/results.md": tables(RESULTS)}
    new = {path: placed(path, text.rstrip()) for path, text in texts.items()}
    if "--check" in argv:
        return int(any(path.read_text() != text for path, text in new.items()))
    for path, text in new.items():
        path.write_text(text)
    return 0


def tables(results: Path) -> str:
    """Everything that is generated, from a folder of records."""
    ladder, ops = read(results / "ladder.jsonl"), read(results / "ops.jsonl")
    parts = [
        *gpu.tables(results / "gpu"),
        targets_table(ladder, ops),
        *ladder_tables(ladder),
        *amx_tables(read(results / "amx.jsonl")),
        accelerate_table(read(results / "accelerate.jsonl")),
        *ratio_tables(read(results / "ratio.jsonl")),
        ops_table(ops),
        *curves_lines(read(results / "curves.jsonl")),
        step_table(read(results / "steps.jsonl")),
        *loading_tables(read(results / "loading.jsonl")),
        finetune_table(read(results / "finetune.jsonl")),
        *clips_tables(read(results / "augment.jsonl")),
    ]
    return "\n".join(part for part in parts if part)


def targets_table(ladder: list[dict], ops: list[dict]) -> str:
    """What was to be reached on a CPU in fp32, what was measured, and whether it is enough."""
    of = ("vit_base", EAGER), ("vit_base", FUSED), ("videomae_base", PEER)
    base, fused, peer = ((_of(ladder, *what) or [None])[-1] for what in of)
    timed = {r["op"]: r for r in ops if r["kind"] == "op"}
    embed, loss = timed.get("patch_embed"), timed.get("masked_mse")
    rates = base if base and "limits" in base else None
    # 0% beside the record of 90% that was taken in the same rounds.
    dense = [r for r in ladder if (r["model"], r["ratio"]) == ("vit_base", 0.0)]
    masked = [r for r in ladder if r["ratio"] == 0.9]
    pairs = [(z, r) for z in dense for r in masked if r.get("limits") == z["limits"]]

    def reached(product: str) -> Callable[[dict], float]:
        def of(r: dict) -> float:
            work = {"flop": r["engines"][OURS]["flop"]}
            return share(r["limits"], work, r["seconds"][OURS], product)

        return of

    def memory(r: dict) -> float:
        return r["engines"][EAGER]["peak_memory_mb"] / r["engines"][OURS]["peak_memory_mb"]

    def masking(pair: tuple[dict, dict]) -> float:
        return ratio(*(r["seconds"][OURS] for r in pair))

    vit_base = preset("vit_base")
    possible = step_flop(vit_base, 2, encode_all=True) / step_flop(vit_base, 2)
    less = f"0% masked against 90%, of {possible:.1f}x in FLOP"
    share_of = "step, share of the rate of"
    rows = [
        ("step, against official eager", "2.5x", base, _faster(EAGER)),
        (
            "forward + backward, against official eager",
            "2.2x",
            base,
            _faster(EAGER, "until_update"),
        ),
        ("step, against official + SDPA + fused AdamW", "1.1x", fused, _faster(FUSED)),
        ("step, against transformers' VideoMAE-B with SDPA", "1.3x", peer, _faster(PEER)),
        ("peak memory of official eager, over ours", "2x", base, memory),
        (less, "4x", pairs[-1] if pairs else None, masking),
        ("patchify, gather and embed, against official", "15x", embed, op_faster),
        ("loss, against official", "10x", loss, op_faster),
        ("loss, share of copy bandwidth (stretch)", "60%", loss, lambda r: op_share(r)[0]),
        (f"{share_of} the engine's own products", "85%", rates, reached("engine_product")),
        (f"{share_of} torch's sgemm", "85%", rates, reached("torch_mm")),
    ]
    text = "**Targets**, ViT-B, 2 clips, 90% masked, fp32, CPU; the newest record of each."
    if all_times := _times(ladder, "vit_base", EAGER):
        text += (
            f" A step against official eager, all {len(all_times)} records of any machine and "
            f"commit: {', '.join(f'{x:.1f}x' for x in all_times)}."
        )
    return section(text, [], TARGET, [target(*row) for row in rows])


def headline(results: Path) -> str:
    """The README's lines: a step where it was measured, and how much that moves."""
    ladder = read(results / "ladder.jsonl")
    base, fused = (_of(ladder, "vit_base", engine)[-1:] for engine in (EAGER, FUSED))
    times = _times(ladder, "vit_base", EAGER)
    if not base or not fused:
        return "A training step of ViT-B is **unmeasured**."
    return (
        f"- **A training step of ViT-B on 2 CPU cores** (2 clips, 90% masked, fp32) is "
        f"**{_faster(EAGER)(*base):.1f}x** as fast as the\nofficial code ({times[0]:.1f}x"
        f" to {times[-1]:.1f}x over {len(times)} records), and {_faster(FUSED)(*fused):.2f}x as "
        f"fast as the official code with SDPA and\nfused AdamW ({where(base)}).\n"
        f"{_amx_line(read(results / 'amx.jsonl'))}"
        f"- {gpu.headline(results / 'gpu')} All numbers: [docs/results.md](docs/results.md)."
    )


def _faster(name: str, key: str = "") -> Callable[[dict], float]:
    """An engine's steps over ours, of a record; until_update: forward and backward alone."""

    def of(record: dict) -> float:
        of = {n: e[key] for n, e in record["engines"].items()} if key else record["seconds"]
        return ratio(of[name], of[OURS])

    return of


def _of(records: list[dict], model: str, engine: str, precision: str = "fp32") -> list[dict]:
    """The records of a model's steps at 2 clips and 90% that have the engine."""
    key, of = (model, 2, 0.9, precision), itemgetter("model", "batch_clips", "ratio", "precision")
    steps = (r for r in records if r["kind"] != "op")
    return [r for r in steps if of(r) == key and engine in r["seconds"]]


def _times(records: list[dict], model: str, engine: str, precision: str = "fp32") -> list[float]:
    """An engine's step over ours, by every record of both, the least first."""
    return sorted(map(_faster(engine), _of(records, model, engine, precision)))


def engines_table(
    words: str, records: list[dict], name: Callable[[dict, str], str] = lambda r, e: f"`{e}`"
) -> str:
    """A section of every engine of some records of steps, under these names."""
    rows = [[name(r, engine), *rest] for r in records for engine, *rest in step_rows(r)]
    return section(words, records, STEP_HEAD, rows)


def ladder_tables(records: list[dict]) -> list[str]:
    """The newest record of several engines for each model, batch, ratio, precision and CPU."""
    keys = ("model", "ratio", "precision", "machine")
    records = [r | {"machine": cpu(r) + malloc(r)} for r in records if len(r["seconds"]) > 1]
    return [
        engines_table(
            f"**{model}, {masked:.0%} masked, {precision}** - training steps interleaved, medians "
            "with their spread; ratios round by round.",
            sorted(group, key=itemgetter("batch_clips")),
        )
        for (model, masked, precision, _), group in grouped(
            newest(records, *keys, "batch_clips"), itemgetter(*keys)
        )
    ]


def amx_tables(records: list[dict]) -> list[str]:
    """bf16 on a CPU that multiplies tiles: what was to be reached, steps, and attention."""
    steps = [r for r in records if r["kind"] == "ratio"]
    ops = newest((r for r in records if r["kind"] == "op"), "model", "shape", "direction")
    if not steps:
        return []

    def attention(width: int) -> dict | None:
        """The longest forward and backward of a head dim."""
        both = (r for r in ops if r["direction"] == "forward_backward")
        found = (r for r in both if r["shape"].endswith(f",{width}]"))
        return max(found, key=itemgetter("flop"), default=None)

    def over_vectors(r: dict) -> float:
        return ratio(r["seconds"]["cpp"], r["seconds"]["amx"])

    as_it_is = [r for r in records if not malloc(r)]
    of = zip((records, records, as_it_is), AMX, strict=True)
    bf16, fp32, published = (_times(some, *what, "bf16") or None for some, what in of)
    rows = [
        ("VideoMAE-B, against transformers' SDPA in bf16", "1.5x", bf16, min),
        ("the same, in fp32", "2.8x", fp32, min),
        ("ViT-B, against official eager in fp32, as published", "5x", published, min),
        ("attention d=64, against the vectors' kernel", "3.5x", attention(64), over_vectors),
        ("attention d=32, against the vectors' kernel", "2.7x", attention(32), over_vectors),
    ]
    text = (
        "**bf16 on a CPU's tiles (AMX)**, 2 clips, 90% masked, the least of all records: steps in "
        "bf16 by autocast, `_fp32` as the name says, and attention forward + backward on the "
        "decoder's tokens, interleaved."
    )
    times = [
        [
            f"{r['model']}, {r['shape'].split()[0]}, {r['direction'].replace('_', ' + ')}",
            *(f"{1e3 * statistics.median(r['seconds'][b]):.2f}" for b in ("amx", "cpp", "sdpa")),
        ]
        for r in ops
    ]
    head = ["shape", *(f"`{b}`, ms" for b in ("amx", "cpp", "sdpa"))]
    return [
        section(text, records, TARGET, [target(*row) for row in rows]),
        *ladder_tables(steps),
        section("**Attention in bf16**, medians.", ops, head, times),
    ]


def _amx_line(records: list[dict]) -> str:
    """The README's line of bf16 on a CPU's tiles."""
    if not records:
        return ""
    peer, fp32, official = (
        " to ".join(f"{x:.1f}x" for x in sorted({found[0], found[-1]}))
        for found in (_times(records, *what, "bf16") for what in AMX)
    )
    return (
        f"- **In bf16 on 2 CPU cores with AMX**: VideoMAE-B **{peer}** transformers' with SDPA in "
        f"bf16 ({fp32} in fp32),\nViT-B **{official}** the official code in fp32: the least where "
        f"malloc keeps what is freed ({cpu(records[0])}).\n"
    )


def accelerate_table(records: list[dict]) -> str:
    """The newest record of each family and CPU: its own model against the same, accelerated."""
    records = [r | {"machine": cpu(r)} for r in records]
    return engines_table(
        "**accelerate** - other people's models of B size, 90% masked, before and after the one "
        "line, float clips, fp32, interleaved.",
        newest(records, "family", "model", "batch_clips", "precision", "machine"),
        lambda r, e: f"{r['family']}, {e.removeprefix(r['family'] + '_')}, {r['machine']}",
    ).replace(OURS, AFTER)


def ratio_tables(records: list[dict]) -> list[str]:
    """What masking buys, by model: the newest record of each ratio, every engine in a row."""
    found, parts = newest(records, "model", "strategy", "precision", "device", "ratio"), []
    for (model, strategy), group in grouped(found, itemgetter("model", "strategy")):
        cells = summary(sorted(group, key=itemgetter("ratio")))["cells"]
        engines, rows = list(dict.fromkeys(c["engine"] for c in cells)), []
        for masked, some in grouped(cells, itemgetter("ratio")):
            at, limit = {c["engine"]: c for c in some}, f"{some[0]['flop_limit']:.1f}x"
            shown = [at.get(name) for name in engines]
            rows.append([f"{masked:.0%}", limit, *map(_clip, shown)])
            if any(c["data"] for c in some):
                loading = (_clip(c, loading=True) for c in shown)
                rows.append([f"{masked:.0%}, with loading", limit, *loading])
        words = (
            f"**What masking buys**, {model}, {strategy}, {cells[0]['precision']}: seconds a clip, "
            "and how many times less than the same engine at 0% (`mae-fast bench ratio`; ! spread "
            "over 10%; with loading, each engine runs alone)."
        )
        text = " ".join([words, *bought(cells)])
        parts.append(section(text, group, ["masked", "limit", *engines], rows))
    return parts


def _clip(cell: dict | None, loading: bool = False) -> str:
    of = cell and (cell["data"] if loading else cell)
    if not of:
        return "unmeasured"
    less = of.get("against_itself_at_0") if cell["ratio"] else None
    times = f", {less if loading else less['times']:.2f}x" if less else ""
    return f"{of['seconds_a_clip']:.2f}{'!' * (of['spread'] > NOISY)}{times}"


def ops_table(records: list[dict]) -> str:
    """One row for each op, and shape that was timed: the backend chosen, against the baseline."""
    calls = {r["op"]: r["seconds"] for r in records if r["kind"] == "call"}
    latest = newest((r for r in records if r["kind"] == "op"), "op", "shape", "direction")
    rows = []
    for name, op in sorted(OPS.items()):
        cost = ", ".join(
            f"{1e6 * statistics.median(calls[name][way]):.0f}" if way in calls[name] else "-"
            for way in (("public", "bare", "reference") if name in calls else ())
        )
        first = [f"`{name}`", op.what, ", ".join(op.backends)]
        measured = [_op_cells(r) for r in latest if r["op"] == name] or [["unmeasured"] * 2]
        rows += [[*first, *cells, cost or "unmeasured"] for cells in measured]
    return section(
        "**Ops** - forward + backward in fp32 at ViT-B's shapes, 2 clips, interleaved, from cold "
        "caches, against the official or torch's expression; share of what the machine can do in "
        "the same rounds. A call: microseconds on the smallest input, public function, bare "
        "operator, reference.",
        [r for r in latest if r["op"] in OPS],
        ["op", "what it fuses", "backends", "speed-up", "share", "a call"],
        rows,
    )


def _op_cells(record: dict) -> list[str]:
    samples, (reached, limit) = record["seconds"][record["chosen"]], op_share(record)
    return [
        f"{op_faster(record):.2f}x {record['baseline']}, {record['shape']} "
        f"({record['chosen']}, spread {spread(samples):.0%})",
        f"{reached:.0%} of {limit}",
    ]


def curves_lines(records: list[dict]) -> list[str]:
    """How far losses move apart when every op is forced to its reference."""
    return [
        f"{r['model']}, {len(r['losses']['chosen'])} steps: the losses with the ops chosen and "
        f"with every op forced to its reference differ by {r['greatest_relative_difference']:.1e} "
        f"at most ({where([r])}).\n"
        for r in newest(records, "model")
    ]


def step_table(records: list[dict]) -> str:
    """The newest record of steps.jsonl for each thing timed: how long, under which conditions."""
    found = newest(records, "model", "variant", "what", "batch_clips", "ratio", "precision")
    rows = [
        [f"{r['model']} ({r['variant']}), {r['what']}", *rest, where([r])]
        for r in found
        for _, *rest in step_rows(r)
    ]
    return section("", [], ["step", *STEP_HEAD[1:], "where"], rows)


def finetune_table(records: list[dict]) -> str:
    """Steps of fine-tuning a classifier: the newest of each."""
    return engines_table(
        "**Fine-tuning** - steps of a classifier that sees every patch (`masked`: half of them), "
        "interleaved (`mae-fast bench finetune`).",
        newest(records, "model", "batch_clips", "precision"),
        lambda r, engine: f"{r['model']}, {r['precision']}, `{engine}`",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
