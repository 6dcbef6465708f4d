"""Pictures of a profile: its ops under the machine's roofline, and memory over the step."""

import logging
from pathlib import Path
from typing import Any

from mae_fast import figures
from mae_fast.bench.records import title
from mae_fast.errors import ConfigError

log = logging.getLogger("mae_fast")
HOLDERS = 8  # shown apart; the rest is one
NAMED = 0.02  # of the step: parts below it have no name beside their mark
NAME_SIZE = 6  # points
MARKERS = {"forward": "o", "backward": "s"}


def draw(told: dict[str, Any], folder: Path) -> list[Path]:
    """roofline.png and memory.png; none without matplotlib."""
    try:
        drawn = {folder / f"{f.__name__}.png": f(told) for f in (roofline, memory)}
    except ConfigError as e:
        log.warning("%s", e)
        return []
    for path, figure in drawn.items():
        figures.write_figure(path, figure, dpi=130)
    return list(drawn)


def roofline(told: dict[str, Any]):
    """A figure of rate against intensity of each part that has both."""
    figure, axis = figures.figure(8, 5)
    product, copy = told["product_rate"], told["copy_rate"]
    lines = [1e-3, product / copy, 1e5]
    roof = [min(product, x * copy) / 1e9 for x in lines]
    axis.plot(lines, roof, color="gray", label="this machine, measured in this process")
    marks, named = [(product / copy, product / 1e9)], []
    for number, (name, engine) in enumerate(told["engines"].items()):
        axis.scatter([], [], 60, color=(color := f"C{number}"), label=name)
        for part in engine["parts"]:
            if not (part.get("flop") and part.get("bytes") and part["seconds"] > 0):
                continue
            at = part["flop"] / part["bytes"], part["flop"] / part["seconds"] / 1e9
            marks.append(at)
            marker, share = MARKERS[part["direction"]], part["share"]
            axis.scatter(*at, 30 + 800 * share, color, marker=marker, alpha=0.5)
            if share >= NAMED:
                named.append((at, f"{part['phase']} {part['op']}", color))
    for way, more in (("forward", " (area: share of step)"), ("backward", "")):
        how = {"marker": MARKERS[way], "edgecolors": "gray", "label": way + more}
        axis.scatter([], [], 60, "none", **how)
    across, up = zip(*marks, strict=True)
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(min(across) / 3, 5 * max(across)),
        ylim=(min(up) / 3, 2 * max(up)),
        xlabel="FLOP a byte, by formula",
        ylabel="GFLOP/s",
        title=title(told),
    )
    axis.legend(loc="lower left")
    axis.grid(alpha=0.3)
    _name_marks(figure, axis, marks, named)
    return figure


def _name_marks(figure, axis, marks: list[tuple[float, float]], named: list[tuple]) -> None:
    """Write each name beside its mark, above or below it, where no name or mark stands."""
    figure.draw_without_rendering()  # lays out, so that marks have their places
    points = [axis.transData.transform(at) * 72 / figure.dpi for at in marks]
    taken = [(x - 5, y - NAME_SIZE / 2, 10.0) for x, y in points]  # left, bottom, width
    for at, name, color in named:
        (x, y), width = points[marks.index(at)], 0.6 * NAME_SIZE * len(name)
        places = [(dx, NAME_SIZE * n) for n in (0, 1, -1, 2, -2, 3, -3) for dx in (9, -9 - width)]
        free = (
            (dx, dy)
            for dx, dy in places
            if all(
                x + dx > left + w or x + dx + width < left or abs(y + dy - bottom) >= NAME_SIZE
                for left, bottom, w in taken
            )
        )
        place = next(free, places[0])
        taken.append((x + place[0], y + place[1], width))
        font = {"fontsize": NAME_SIZE, "color": color}
        axis.annotate(name, at, place, textcoords="offset points", **font)


def memory(told: dict[str, Any]):
    """A figure of what each holder has over the step, stacked, an engine a panel."""
    engines = told["engines"]
    figure, _ = figures.figure(10, 4 * len(engines), len(engines))
    for axis, (name, engine) in zip(figure.axes, engines.items(), strict=True):
        held = engine["memory"]
        ranked = sorted(held["holders"].items(), key=lambda item: -max(item[1], default=0.0))
        shown, rest = ranked[:HOLDERS], ranked[HOLDERS:]
        if rest:
            shown.append(("all other", [sum(v) for v in zip(*(s for _, s in rest), strict=True)]))
        if shown:
            names, series = zip(*shown, strict=True)
            axis.stackplot(held["seconds"], *series, labels=names, step="post", linewidth=0)
        axis.set(
            title=f"{name}: on top of {engine['state_mb']:.0f} MB of weights and "
            f"moments, {held['peak_mb']:.0f} MB at the peak",
            xlabel="seconds of the profiled step",
            ylabel="MB",
        )
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return figure
