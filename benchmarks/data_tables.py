"""The tables of what loads clips, and of what is made of them there."""

import statistics

from benchmarks.markdown import TARGET, met, newest, section, target
from mae_fast.bench.timing import ratio, spread

OLD = ("720p, old", "256, old")


def loading_tables(records: list[dict]) -> list[str]:
    """Loading clips, beside the older loader, and what stands beside it: the newest of each."""
    found = {r["item"]: r for r in records}
    if not found:
        return []
    first, size = found["repeat_aug 1"], found["repeat_aug 1"]["megabytes"]
    seconds = {r["item"]: r["seconds"] for r in records}
    once, four, made = (seconds[item] for item in ("repeat_aug 1", "repeat_aug 4", "patches"))

    def row(name: str) -> list[str]:
        cells = (
            f"{1 / statistics.median(of[name]):.1f}: "
            + " / ".join(f"{ratio(of[old], of[name]):.1f}x" for old in OLD)
            for of in (once, four)
        )
        return [name, *cells, f"{size[name.split(',')[0]]:.2f} MB", f"{spread(once[name]):.0%}"]

    def part(precision: str) -> list[str]:
        step = statistics.median(seconds[precision]["mae_fast"])
        share = (pack := statistics.median(once["pack"])) / (pack + step)
        what = f"loading's part of a ViT-B step, {precision}"
        return [what, "1%", f"{share:.1%}", met(share <= 0.01)]

    small, psnr = size["pack"] / size["256"], first["psnr"]
    faster = [
        ("pack, against the 720p files by the old loader", "30x", once, "720p, old", "pack"),
        ("pack, against 256, GOP 250, by the old loader", "8x", once, "256, old", "pack"),
        ("the first, at repeat_aug 4", "20x", four, "720p, old", "pack"),
        ("the second, at repeat_aug 4", "5x", four, "256, old", "pack"),
        ("`--copy` of the 256 files, by the old loader", "1.5x", once, "256, old", "copy"),
        (
            "patches from planes, against RGB and the whole clip",
            "4x",
            made,
            "RGB, whole clip",
            "patches from planes",
        ),
    ]
    judged = [
        *(
            target(what, n, of, lambda r, x=x, y=y: ratio(r[x], r[y]))
            for what, n, of, x, y in faster
        ),
        ["size of the pack over 256, GOP 250", "under 3x", f"{small:.3f}x", met(small < 3)],
        ["its PSNR against the scaled source", "39 dB", f"{psnr:.1f} dB", met(psnr >= 39)],
        part("fp32"),
        part("bf16"),
    ]
    words = (
        "**Loading**, clips a second and core (processor time), and how many times as many as the "
        f"older loader (commit {first['old']}) from the 720p files / from short side 256, GOP 250; "
        "footage of the demo at 30 frames a second. `python -m benchmarks.loading`."
    )
    head = ["files, loader", "repeat_aug 1", "repeat_aug 4", "size", "spread"]
    return [section(words, [first], head, [*map(row, once)]), section("", [], TARGET, judged)]


def clips_tables(records: list[dict]) -> list[str]:
    """What is made of a clip, by operation and by who does it: the newest of each."""
    parts = []
    for r in newest(records, "op"):
        both = [name.rpartition(" ")[::2] for name in r["seconds"]]
        whats, makers = (list(dict.fromkeys(some)) for some in zip(*both, strict=True))
        rows = [
            [what, *(f"{1e3 * statistics.median(r['seconds'][f'{what} {m}']):.1f}" for m in makers)]
            for what in whats
        ]
        head = ["operation", *(f"{m}, ms a clip" for m in makers)]
        parts.append(section(f"**{r['what']}**, processor time.", [r], head, rows))
    return parts
