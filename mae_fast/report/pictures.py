"""The figures of a report, by matplotlib. Colours that read on light and dark."""

import statistics
from typing import Any

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
GRAY = "#808080"


def speed_up(cells: list[dict[str, Any]], title: str):
    """Each engine over itself at 0%, mae_fast over the official code at 0%, and the limit by FLOP,
    against the masked share."""
    figure, axis = _figure(8, 4.6)
    for number, engine in enumerate(dict.fromkeys(c["engine"] for c in cells)):
        for key, style, words in (
            ("against_itself_at_0", "-", "over itself at 0%"),
            ("against_official_at_0", "--", "over official_eager at 0%"),
        ):
            if key == "against_official_at_0" and engine != "mae_fast":
                continue
            points = [
                (c["ratio"], c[key]["times"]) for c in cells if c["engine"] == engine and c[key]
            ]
            if points:
                x, y = zip(*sorted(points), strict=True)
                color = COLORS[number % len(COLORS)]
                axis.plot(x, y, style, marker="o", color=color, label=f"{engine}, {words}")
    limit = sorted({(c["ratio"], c["flop_limit"]) for c in cells})
    words = "limit: FLOP of the official code"
    axis.plot(*zip(*limit, strict=True), ":", color=GRAY, linewidth=3, zorder=3, label=words)
    axis.set(xlabel="masked share", ylabel="times as fast", title=title, ylim=(0, None))
    return _finish(figure, axis)


def parts(cells: list[dict[str, Any]], title: str):
    """Seconds a clip by part of the step, a bar for each ratio of one engine."""
    figure, axis = _figure(8, 4)
    cells = sorted(cells, key=lambda c: c["ratio"])
    names = list(dict.fromkeys(p for c in cells for p in c["parts_a_clip"]))
    labels, bottom = [f"{c['ratio']:.0%}" for c in cells], [0.0] * len(cells)
    for number, name in enumerate(names):
        heights = [c["parts_a_clip"].get(name, 0.0) for c in cells]
        color = COLORS[number % len(COLORS)]
        axis.bar(labels, heights, bottom=bottom, color=color, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axis.set(xlabel="masked share", ylabel="seconds a clip", title=title)
    return _finish(figure, axis)


def ladder(rows: list[tuple[str, list[float]]], title: str):
    """Seconds of a step by engine, with every sample."""
    figure, axis = _figure(8, 0.5 * len(rows) + 1.4)
    for number, (name, samples) in enumerate(reversed(rows)):
        color = COLORS[0] if name.startswith(("mae_fast", "accelerated")) else GRAY
        axis.barh(name, statistics.median(samples), color=color, height=0.6)
        axis.plot(samples, [number] * len(samples), "|", color="#000000", markersize=9)
    axis.set(xlabel="seconds a step: median, and every sample", title=title, xlim=(0, None))
    axis.grid(alpha=0.3, axis="x")
    return figure


def ops(rows: list[tuple[str, float, str]], title: str):
    """Share of the machine's limit by op: (name, share, limit)."""
    figure, axis = _figure(8, 0.34 * len(rows) + 1.6)
    names = [name for name, _, _ in reversed(rows)]
    for number, (_, share, limit) in enumerate(reversed(rows)):
        axis.barh(number, share, color=COLORS[0] if "product" in limit else COLORS[2], height=0.7)
    for color, words in ((COLORS[0], "of the product rate"), (COLORS[2], "of copy bandwidth")):
        axis.barh(0, 0, color=color, label=words)
    axis.axvline(1, color=GRAY, linestyle=":")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="share of the machine's limit", title=title)
    return _finish(figure, axis)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _finish(figure, axis):
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
