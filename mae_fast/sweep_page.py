"""The table of a sweep in words, and its page: arms, units, and what a better judgement costs."""

import math
from collections.abc import Callable
from typing import Any

from mae_fast.errors import ConfigError
from mae_fast.figures import COLORS, figure, finish
from mae_fast.page import Page
from mae_fast.sweep_judge import JUDGES, Judge

PAPER = "the paper's top-1"


def head(judge: Judge) -> list[str]:
    both = [cell for name in judge.by for cell in (JUDGES[name], "against the first")]
    return ["arm", *both, "own loss", "train s", "s/step", PAPER]


def cells(row: dict[str, Any], judge: Judge) -> list[str]:
    """An arm's row of the table, under `head`."""
    both = []
    for name in judge.by:
        both += [_shown(row["judged"].get(name)), _shown(row["against_first"].get(name))]
    own = " ".join(filter(None, [_shown(row["loss"]), row["part"]]))
    seconds = _shown(row["seconds"], 1)
    return [row["arm"], *both, own, seconds, f"{row['step_seconds']:.3f}", row["paper"] or "-"]


def _shown(found: tuple[float, float] | None, digits: int = 4) -> str:
    """A mean, and half of its interval where there is one."""
    if found is None:
        return "-"
    mean, half = (f"{x:.{digits}f}" for x in found)
    return mean if math.isnan(found[1]) else f"{mean} ± {half}"


def page(
    rows: list[dict[str, Any]], judge: Judge, seeds: int, hours: Callable[[str], float]
) -> Page:
    """`hours` of an arm in the paper's setting, predicted: for the figure beside."""
    mask, model = judge.cfg.mask, judge.cfg.model
    lead = []
    if "loss" in judge.by:
        lead.append(
            f"Held-out loss: {model.loss_unit}, of all hidden patches, {mask.ratio:.0%} "
            f"{mask.strategy}, the same clips, crops and masks for every arm. An arm that trains "
            "with the judge's own mask and crops is at home there. An arm whose loss has another "
            "unit, or whose targets are its own encoder's, has none."
        )
    if judge.probes:
        lead.append(
            "Accuracies are of probes of the frozen encoder: they learn the labels of "
            f"{judge.train_index} and tell those of {judge.test_index}, one view of each video."
        )
    lead.append(
        f"Means over {seeds} seeds; ± is half of Student's 95% interval, of seeds alone. "
        "Differences are seed by seed. The paper's column is its own, and nothing of it was "
        "measured here: ViT-L, K400, 800 effective epochs, top-1 after fine-tuning; M: not "
        "confirmed in its text."
    )
    made = Page("Sweep", lead)
    made.section("Arms", "An arm's own loss is of its own mask and target.")
    made.table(head(judge), [cells(row, judge) for row in rows])
    units = list(dict.fromkeys(row["unit"] for row in rows))
    note = "One unit." if len(units) == 1 else "Losses of different units are not to be compared."
    made.section("Units of the arms' own losses", note)
    made.table(["arm", "unit"], [[row["arm"], row["unit"]] for row in rows])
    figure = trade_off(rows, judge, hours)
    if figure is not None:
        made.section(
            "What a better judgement costs",
            "To the left what this sweep measured. The paper's accuracies, where it has them, "
            "stand apart, against hours that are predicted for its setting.",
        )
        made.figure("trade-off", figure, "judgement against seconds of training, by arm")
    return made


def trade_off(rows: list[dict[str, Any]], judge: Judge, hours: Callable[[str], float]):
    """A panel for each judge, its judgement against seconds of training; and one of the paper's
    top-1 against predicted hours. None without matplotlib, or anything judged."""
    panels = []
    for name in judge.by:
        judged = [r for r in rows if r["judged"].get(name)]
        points = [(r["arm"], r["seconds"], r["judged"][name]) for r in judged]
        if points:
            panels.append(("seconds of training", JUDGES[name], "measured here", points))
    if not panels:
        return None
    known = {row["arm"]: _number(row["paper"]) for row in rows if _number(row["paper"])}
    if len(known) > 1:
        points = [(arm, (hours(arm), math.nan), (x, math.nan)) for arm, x in known.items()]
        where = "hours on 8 H100, predicted: ViT-L, 800 epochs"
        panels.append((where, PAPER, "the paper's accuracy, not ours", points))
    try:
        drawing, _ = figure(6.2 * len(panels), 4.2, columns=len(panels))
    except ConfigError:
        return None
    colors = {row["arm"]: COLORS[i % len(COLORS)] for i, row in enumerate(rows)}
    for axis, (xlabel, ylabel, title, points) in zip(drawing.axes, panels, strict=True):
        for arm, (x, dx), (y, dy) in points:
            half = {k: d for k, d in (("xerr", dx), ("yerr", dy)) if not math.isnan(d)}
            axis.errorbar(x, y, fmt="o", color=colors[arm], capsize=3, label=arm, **half)
        finish(axis, xlabel=xlabel, ylabel=ylabel, title=title)
    return drawing


def _number(paper: str) -> float | None:
    try:
        return float(paper.removesuffix(" M"))
    except ValueError:
        return None
