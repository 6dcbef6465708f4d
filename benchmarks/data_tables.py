"""The tables of what loads clips, and of what is made of them there."""

import statistics

from benchmarks.markdown import met, newest, table, target, where
from mae_fast.bench.timing import ratio, spread

OLD = ("720p, old", "256, old")


def loading_tables(records: list[dict]) -> str:
    """Loading clips, beside the older loader, and what stands beside it: the newest of each."""
    found = {r["item"]: r for r in records}
    if not found:
        return ""
    first, made = found["repeat_aug 1"], found["patches"]["seconds"]
    rows = []
    for name, samples in first["seconds"].items():
        cells = []
        for n in (1, 4):
            seconds = found[f"repeat_aug {n}"]["seconds"]
            times = " / ".join(f"{ratio(seconds[old], seconds[name]):.1f}x" for old in OLD)
            cells.append(f"{1 / statistics.median(seconds[name]):.1f}: {times}")
        size = first["megabytes"][name.split(",")[0]]
        rows.append([name, *cells, f"{size:.2f} MB", f"{spread(samples):.0%}"])
    pack = first["seconds"]["pack"]
    targets = [
        ("pack, against the 720p files by the old loader", 30.0, (1, "720p, old", "pack")),
        ("pack, against 256, GOP 250, by the old loader", 8.0, (1, "256, old", "pack")),
        ("the first, at repeat_aug 4", 20.0, (4, "720p, old", "pack")),
        ("the second, at repeat_aug 4", 5.0, (4, "256, old", "pack")),
        ("`--copy` of the 256 files, by the old loader", 1.5, (1, "256, old", "copy")),
    ]
    judged = []
    for what, least, (n, old, new) in targets:
        seconds = found[f"repeat_aug {n}"]["seconds"]
        judged.append(target(what, least, ratio(seconds[old], seconds[new])))
    by_rgb = ratio(made["RGB, whole clip"], made["patches from planes"])
    judged.append(target("patches from planes, against RGB and the whole clip", 4.0, by_rgb))
    mega = first["megabytes"]
    small = mega["pack"] / mega["256"]
    judged.append(
        ["size of the pack over 256, GOP 250", "under 3x", f"{small:.3f}x", met(small < 3)]
    )
    psnr = first["psnr"]
    judged.append(
        ["its PSNR against the scaled source", "39 dB", f"{psnr:.1f} dB", met(psnr >= 39)]
    )
    for precision in ("fp32", "bf16"):
        step = found[precision]["seconds"]["mae_fast"]
        part = statistics.median(pack) / (statistics.median(pack) + statistics.median(step))
        judged.append(
            [
                f"loading's part of a ViT-B step, {precision}",
                "1%",
                f"{part:.1%}",
                met(part <= 0.01),
            ]
        )
    return (
        "**Loading**, clips a second and core (processor time), and how many times as many as the "
        f"older loader (commit {first['old']}) from the 720p files / from short side 256, GOP 250; "
        "footage of the demo at 30 frames a second. `python -m benchmarks.loading`. "
        f"{where([first])}.\n\n"
        + table("files, loader|repeat_aug 1|repeat_aug 4|size|spread", rows)
        + "\n"
        + table("target|at least|measured|met", judged)
    )


def clips_table(records: list[dict]) -> str:
    """What is made of a clip, by operation and by who does it: the newest of each."""
    parts = []
    for r in newest(records, "op"):
        makers = list(dict.fromkeys(name.rpartition(" ")[2] for name in r["seconds"]))
        rows = [
            [name, *(f"{1e3 * statistics.median(r['seconds'][f'{name} {m}']):.1f}" for m in makers)]
            for name in dict.fromkeys(n.rpartition(" ")[0] for n in r["seconds"])
        ]
        head = "|".join(["operation", *(f"{m}, ms a clip" for m in makers)])
        parts.append(f"**{r['what']}**, processor time. {where([r])}.\n\n{table(head, rows)}")
    return "\n".join(parts)
