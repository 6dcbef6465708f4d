"""Pictures of a profile: its ops under the machine's roofline, and memory over the step."""

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("mae_fast")
HOLDERS = 8  # shown apart; the rest is one
NAMED = 0.02  # of the step: parts below it have no name beside their mark


def draw_roofline(told: dict[str, Any], folder: Path) -> Path | None:
    """roofline.png; None without matplotlib."""
    figure = roofline(told)
    return figure and _save(figure, folder / "roofline.png")


def draw_memory(told: dict[str, Any], folder: Path) -> Path | None:
    """memory.png; None without matplotlib."""
    figure = memory(told)
    return figure and _save(figure, folder / "memory.png")


def roofline(told: dict[str, Any]):
    """A figure of rate against intensity of each part that has both; None without matplotlib."""
    figure = _figure((8, 5))
    if figure is None:
        return None
    axes = figure.subplots()
    product, copy = told["product_rate"], told["copy_rate"]
    lines = [1e-2, product / copy, 1e4]
    roof = [min(product, x * copy) / 1e9 for x in lines]
    axes.plot(lines, roof, color="gray", label="this machine, measured in this process")
    for number, engine in enumerate(told["engines"]):
        axes.scatter([], [], 60, color=f"C{number}", label=engine["engine"])
        for part in engine["parts"]:
            if not (part.get("flop") and part.get("bytes") and part["seconds"] > 0):
                continue
            x, y = part["flop"] / part["bytes"], part["flop"] / part["seconds"] / 1e9
            marker = {"forward": "o", "backward": "s"}[part["direction"]]
            axes.scatter(x, y, 30 + 800 * part["share"], f"C{number}", marker=marker, alpha=0.5)
            if part["share"] >= NAMED:
                name = f"{part['phase']} {part['op']}"
                axes.annotate(name, (x, y), fontsize=6, xytext=(5, 4), textcoords="offset points")
    axes.scatter(
        [], [], 60, "none", marker="o", edgecolors="gray", label="forward (area: share of step)"
    )
    axes.scatter([], [], 60, "none", marker="s", edgecolors="gray", label="backward")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP a byte, by formula",
        ylabel="GFLOP/s",
        title=f"{told['model']}, {told['batch_clips']} clips, {told['ratio']:.0%} masked",
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def memory(told: dict[str, Any]):
    """A figure of what each holder has over the step, stacked, an engine a panel."""
    figure = _figure((10, 4 * len(told["engines"])))
    if figure is None:
        return None
    panels = figure.subplots(len(told["engines"]), squeeze=False)[:, 0]
    for axes, engine in zip(panels, told["engines"], strict=True):
        held = engine["memory"]
        ranked = sorted(held["holders"].items(), key=lambda item: -max(item[1], default=0.0))
        shown, rest = ranked[:HOLDERS], ranked[HOLDERS:]
        if rest:
            shown.append(("all other", [sum(v) for v in zip(*(s for _, s in rest), strict=True)]))
        if shown:
            names, series = zip(*shown, strict=True)
            axes.stackplot(held["seconds"], *series, labels=names, step="post", linewidth=0)
        axes.set(
            title=f"{engine['engine']}: on top of {engine['state_mb']:.0f} MB of weights and "
            f"moments, {held['peak_mb']:.0f} MB at the peak",
            xlabel="seconds of the profiled step",
            ylabel="MB",
        )
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return figure


def _figure(size: tuple[float, float]):
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        log.warning("no pictures: %s (pip install matplotlib)", e)
        return None
    return Figure(figsize=size, layout="constrained")


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
