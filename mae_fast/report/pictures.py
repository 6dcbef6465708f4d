"""The figures of a report."""

import statistics
from typing import Any

from mae_fast.figures import COLORS, GRAY, figure, finish
from mae_fast.report.rows import OURS


def speed_up(cells: list[dict[str, Any]], title: str):
    """Each engine over itself at 0%, mae_fast over the official code at 0%, and the limit by FLOP,
    against the masked share."""
    drawing, axis = figure(8, 4.6)
    lines = [("against_itself_at_0", "-", "over itself at 0%")]
    lines += [("against_official_at_0", "--", "over official_eager at 0%")]
    for number, engine in enumerate(dict.fromkeys(c["engine"] for c in cells)):
        for key, style, words in lines if engine == OURS else lines[:1]:
            own = (c for c in cells if c["engine"] == engine and c[key])
            points = sorted((c["ratio"], c[key]["times"]) for c in own)
            if points:
                how = {"color": COLORS[number % len(COLORS)], "label": f"{engine}, {words}"}
                axis.plot(*zip(*points, strict=True), style, marker="o", **how)
    limit = sorted({(c["ratio"], c["flop_limit"]) for c in cells})
    words = "limit: FLOP of the official code"
    axis.plot(*zip(*limit, strict=True), ":", color=GRAY, linewidth=3, zorder=3, label=words)
    finish(axis, xlabel="masked share", ylabel="times as fast", title=title, ylim=(0, None))
    return drawing


def parts(cells: list[dict[str, Any]], title: str):
    """Seconds a clip by part of the step, a bar for each ratio of one engine."""
    drawing, axis = figure(8, 4)
    cells = sorted(cells, key=lambda c: c["ratio"])
    labels, bottom = [f"{c['ratio']:.0%}" for c in cells], [0.0] * len(cells)
    for number, name in enumerate(dict.fromkeys(p for c in cells for p in c["parts_a_clip"])):
        heights = [c["parts_a_clip"].get(name, 0.0) for c in cells]
        color = COLORS[number % len(COLORS)]
        axis.bar(labels, heights, bottom=bottom, color=color, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    finish(axis, xlabel="masked share", ylabel="seconds a clip", title=title)
    return drawing


def ladder(seconds: dict[str, list[float]], title: str):
    """Seconds of a step by engine, with every sample."""
    drawing, axis = figure(8, 0.5 * len(seconds) + 1.4)
    for number, (name, samples) in enumerate(reversed(seconds.items())):
        color = COLORS[0] if name.startswith(("mae_fast", "accelerated")) else GRAY
        axis.barh(name, statistics.median(samples), color=color, height=0.6)
        axis.plot(samples, [number] * len(samples), "|", color="#000000", markersize=9)
    axis.set(xlabel="seconds a step: median, and every sample", title=title, xlim=(0, None))
    axis.grid(alpha=0.3, axis="x")
    return drawing


def ops(rows: list[tuple[str, float, str]], title: str):
    """Share of the machine's limit by op: (name, share, limit)."""
    drawing, axis = figure(8, 0.34 * len(rows) + 1.6)
    limits = {"product rate": (COLORS[0], "of the product rate")}
    limits |= {"copy bandwidth": (COLORS[2], "of copy bandwidth")}
    for number, (_, share, limit) in enumerate(reversed(rows)):
        axis.barh(number, share, color=limits[limit][0], height=0.7)
    for color, words in limits.values():
        axis.barh(0, 0, color=color, label=words)
    axis.axvline(1, color=GRAY, linestyle=":")
    axis.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)], fontsize=8)
    finish(axis, xlabel="share of the machine's limit", title=title)
    return drawing
