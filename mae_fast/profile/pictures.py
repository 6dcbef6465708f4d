"""Pictures of a profile: its ops under the machine's roofline, and memory over the step."""

import logging
from pathlib import Path
from typing import Any

from mae_fast.bench.records import title
from mae_fast.files import write_figure

log = logging.getLogger("mae_fast")
HOLDERS = 8  # shown apart; the rest is one
NAMED = 0.02  # of the step: parts below it have no name beside their mark
NAME_SIZE = 6  # points


def draw(told: dict[str, Any], folder: Path) -> list[Path]:
    """roofline.png and memory.png; none without matplotlib."""
    try:
        figures = {"roofline": roofline(told), "memory": memory(told)}
    except ImportError as e:
        log.warning("no pictures: %s (pip install matplotlib)", e)
        return []
    for name, figure in figures.items():
        write_figure(folder / f"{name}.png", figure, dpi=130)
    return [folder / f"{name}.png" for name in figures]


def roofline(told: dict[str, Any]):
    """A figure of rate against intensity of each part that has both."""
    figure = _figure((8, 5))
    axes = figure.subplots()
    product, copy = told["product_rate"], told["copy_rate"]
    lines = [1e-3, product / copy, 1e5]
    roof = [min(product, x * copy) / 1e9 for x in lines]
    axes.plot(lines, roof, color="gray", label="this machine, measured in this process")
    marks, named = [(product / copy, product / 1e9)], []
    for number, (name, engine) in enumerate(told["engines"].items()):
        axes.scatter([], [], 60, color=f"C{number}", label=name)
        for part in engine["parts"]:
            if not (part.get("flop") and part.get("bytes") and part["seconds"] > 0):
                continue
            x, y = part["flop"] / part["bytes"], part["flop"] / part["seconds"] / 1e9
            marks.append((x, y))
            marker = {"forward": "o", "backward": "s"}[part["direction"]]
            axes.scatter(x, y, 30 + 800 * part["share"], f"C{number}", marker=marker, alpha=0.5)
            if part["share"] >= NAMED:
                named.append((x, y, f"{part['phase']} {part['op']}", f"C{number}"))
    axes.scatter(
        [], [], 60, "none", marker="o", edgecolors="gray", label="forward (area: share of step)"
    )
    axes.scatter([], [], 60, "none", marker="s", edgecolors="gray", label="backward")
    across, up = zip(*marks, strict=True)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(min(across) / 3, 5 * max(across)),
        ylim=(min(up) / 3, 2 * max(up)),
        xlabel="FLOP a byte, by formula",
        ylabel="GFLOP/s",
        title=title(told),
    )
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3)
    _name_marks(figure, axes, marks, named)
    return figure


def _name_marks(
    figure,
    axes,
    marks: list[tuple[float, float]],
    named: list[tuple[float, float, str, str]],
) -> None:
    """Write each name beside its mark, above or below it, where no name or mark stands."""
    figure.draw_without_rendering()  # lays out, so that marks have their places

    def place_of(x: float, y: float) -> tuple[float, float]:
        """In points."""
        return axes.transData.transform((x, y)) * 72 / figure.dpi

    taken = [(x - 5, y - NAME_SIZE / 2, 10.0) for x, y in (place_of(*m) for m in marks)]
    for x, y, name, color in named:
        left, bottom = place_of(x, y)
        width = 0.6 * NAME_SIZE * len(name)
        places = [(dx, NAME_SIZE * n) for n in (0, 1, -1, 2, -2, 3, -3) for dx in (9, -9 - width)]

        def free(place: tuple[float, float], at=(left, bottom), width=width) -> bool:
            a, b = at[0] + place[0], at[1] + place[1]
            return all(
                a > right_of + w or a + width < right_of or abs(b - above) >= NAME_SIZE
                for right_of, above, w in taken  # left, bottom, width
            )

        place = next(filter(free, places), places[0])
        taken.append((left + place[0], bottom + place[1], width))
        font = {"fontsize": NAME_SIZE, "color": color}
        axes.annotate(name, (x, y), place, textcoords="offset points", **font)


def memory(told: dict[str, Any]):
    """A figure of what each holder has over the step, stacked, an engine a panel."""
    figure = _figure((10, 4 * len(told["engines"])))
    panels = figure.subplots(len(told["engines"]), squeeze=False)[:, 0]
    for axes, (name, engine) in zip(panels, told["engines"].items(), strict=True):
        held = engine["memory"]
        ranked = sorted(held["holders"].items(), key=lambda item: -max(item[1], default=0.0))
        shown, rest = ranked[:HOLDERS], ranked[HOLDERS:]
        if rest:
            shown.append(("all other", [sum(v) for v in zip(*(s for _, s in rest), strict=True)]))
        if shown:
            names, series = zip(*shown, strict=True)
            axes.stackplot(held["seconds"], *series, labels=names, step="post", linewidth=0)
        axes.set(
            title=f"{name}: on top of {engine['state_mb']:.0f} MB of weights and "
            f"moments, {held['peak_mb']:.0f} MB at the peak",
            xlabel="seconds of the profiled step",
            ylabel="MB",
        )
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return figure


def _figure(size: tuple[float, float]):
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")
