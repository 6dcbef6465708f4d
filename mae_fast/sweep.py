"""`mae-fast sweep SWEEP.toml`: runs that differ in one thing, and one table of what it does.

Every arm is the same configuration with some keys changed, run once for each seed. Of one seed, all
arms start from the same random state and draw the same clips, crops and (of one strategy) masks.
One judge: the held-out loss under the mask and the crops of the configuration itself, whatever an
arm trains with; arms whose loss has another unit have none. See docs/sweeps.md.
"""

import dataclasses
import itertools
import json as jsonlib
import math
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro

from mae_fast import cost, metrics, plan
from mae_fast.checkpoint import checkpoints
from mae_fast.config import Config
from mae_fast.config_file import config_from_dict, to_dict, tomllib
from mae_fast.data import read_index
from mae_fast.errors import ConfigError
from mae_fast.evaluate import held_out_loss
from mae_fast.fields import require, typed
from mae_fast.files import write
from mae_fast.report.page import Page
from mae_fast.sweep_ready import READY, Arm
from mae_fast.train import pretrain
from mae_fast.weights import load_model

# Of Student's t, two-sided 95%, by degrees of freedom from 1 on; the normal's after them.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_KEYS = ("config", "output", "seeds", "ready", "arms", "grid")


class Sweep(NamedTuple):
    """The configuration that arms change, as TOML has it; the arms by name; seeds; the folder."""

    tree: dict[str, Any]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    output: Path

    def config(self, arm: str | None, seed: int) -> Config:
        """A run's configuration; that of the judge for None."""
        tree = _merged(self.tree, self.arms[arm].overrides if arm else {})
        tree = _merged(tree, {"train": {"seed": seed}})
        tree["output"] = str(self.output / _folder(arm or "judge") / f"seed-{seed}")
        try:
            return config_from_dict(tree)
        except ConfigError as e:
            raise ConfigError(f"arm {arm or 'of the configuration itself'}: {e}") from e


def sweep(
    file: Annotated[str, tyro.conf.Positional],
    plan_only: bool = False,
    part: str = "",
    device: Literal["h100", "h200", "a100", "b200", "this"] = "this",
    gpus: int = 1,
    dataset: str = "k400",
    price: float = 0.0,
) -> None:
    """Run every arm of SWEEP.toml with every seed, one after another, then write sweep.json and
    index.html into its output. The same command goes on where it was stopped.

    Args:
        file: the sweep: `config` (a run's TOML file), `output`, `seeds`, and arms: `ready` (ratio,
            masks, decoder_width, decoder_depth, target, crop, repeats), [arms.NAME] tables of keys
            that it changes, or [grid] of lists of values. docs/sweeps.md has examples.
        plan_only: say what it would take, run nothing.
        part: I/N: only every N-th run, the I-th from 0, as in --part
            $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT; the last to end writes the table.
        device: of the prediction.
        gpus: of the prediction.
        dataset: of the prediction, where the configuration names no index: k400, k600, k700, ssv2,
            or a number of videos.
        price: of one device for an hour, in any currency.
    """
    require(gpus > 0, "--gpus must be positive", gpus)
    found = read(file)
    runs = list(itertools.product(found.arms, found.seeds))
    configs = {run: found.config(*run) for run in runs}
    print(_prediction(found, device, gpus, dataset, price))
    if plan_only:
        return
    judge = found.config(None, found.seeds[0])
    if not judge.data.val_index:
        raise ConfigError("a sweep is judged by the held-out loss: data.val_index is empty")
    for number, run in enumerate(_part(runs, part)):
        print(f"{run[0]}, seed {run[1]} ({number + 1} of {len(_part(runs, part))})", flush=True)
        _run(configs[run], judge)
    results = {run: _result(cfg, judge) for run, cfg in configs.items()}
    missing = [run for run, result in results.items() if result is None]
    if missing:
        print(f"{len(missing)} of {len(runs)} runs are still to be done: no table yet")
        return
    rows = table(found, results, judge)
    write(found.output / "sweep.json", jsonlib.dumps(rows, indent=2) + "\n")
    write(found.output / "index.html", _page(rows, judge, len(found.seeds)).html())
    print("\n".join("  ".join(cells) for cells in _padded([_HEAD, *map(_cells, rows)])))
    print(f"as a page: {found.output / 'index.html'}")


def read(file: str | Path) -> Sweep:
    """Read a sweep's TOML file. Raises ConfigError, with the file's name."""
    path = Path(file)
    tree = _toml(path)
    for key in tree:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key!r} (known: {', '.join(_KEYS)})")
    for key, kind in (("config", str), ("output", str), ("arms", dict), ("grid", dict)):
        require(isinstance(tree.get(key, kind()), kind), f"{path}: {key} is", tree.get(key))
    if not tree.get("config"):
        raise ConfigError(f"{path}: config is missing: the TOML file of a run")
    seeds = tree.get("seeds", [0])
    require(isinstance(seeds, list), f"{path}: seeds must be a list of integers", seeds)
    seeds = [typed("seeds", seed, int) for seed in seeds]
    require(len(seeds) == len({*seeds}) > 0, f"{path}: seeds must be different", seeds)
    arms: dict[str, Arm] = {}
    ready = tree.get("ready", [])
    names = [ready] if isinstance(ready, str) else ready
    for name in names:
        if name not in READY:
            raise ConfigError(f"{path}: unknown ready sweep {name!r} (known: {', '.join(READY)})")
        prefix = f"{name} " if len(names) > 1 else ""
        arms |= {f"{prefix}{arm}": READY[name][arm] for arm in READY[name]}
    for name, overrides in tree.get("arms", {}).items():
        require(isinstance(overrides, dict), f"{path}: [arms.{name}] must be a table", overrides)
        arms[name] = Arm(_nested(overrides))
    grid = tree.get("grid", {})
    for values in grid.values():
        require(isinstance(values, list) and values, f"{path}: [grid] has lists of values", values)
    for values in itertools.product(*grid.values()) if grid else ():
        changed = dict(zip(grid, values, strict=True))
        name = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in changed.items())
        arms[name] = Arm(_nested(changed))
    if not arms:
        raise ConfigError(f"{path}: there are no arms: give ready, [arms.NAME] or [grid]")
    folders = {_folder(name) for name in arms}
    require(len(folders) == len(arms), f"{path}: arms of one folder", sorted(arms))
    output = tree.get("output") or f"runs/{path.stem}"
    return Sweep(_toml(path.parent / tree["config"]), arms, tuple(seeds), Path(output))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from e
    except ValueError as e:
        raise ConfigError(f"{path}: {' '.join(str(e).split())}") from e


def _nested(overrides: dict[str, Any]) -> dict[str, Any]:
    """{"mask.ratio": 0.5} as {"mask": {"ratio": 0.5}}; tables stay as they are."""
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        found = _merged(found, value)
    return found


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _folder(arm: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in arm)


def _part(runs: list, part: str) -> list:
    if not part:
        return runs
    try:
        i, n = map(int, part.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 0 <= i < n:
        raise ConfigError(f"--part must be I/N with 0 <= I < N, got {part!r}")
    return runs[i::n]


def _run(cfg: Config, judge: Config) -> None:
    """Train one run, unless that is done, and judge it."""
    if _result(cfg, judge) is not None:
        return
    pretrain(cfg)
    folder = Path(cfg.output)
    rows = [row for row in metrics.read(folder / "metrics.jsonl") if "loss" in row]
    result = {
        "config": to_dict(cfg),
        "judge": _judging(judge),
        "loss": rows[-1]["loss"],
        "step_seconds": statistics.median(row["step_seconds"] for row in rows),
        "train_seconds": sum(
            row["step_seconds"] * (row["step"] - before)
            for before, row in zip([0, *(r["step"] for r in rows)], rows, strict=False)
        ),
        "judged": None,
    }
    if cfg.model.loss_unit == judge.model.loss_unit:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(str(checkpoints(folder)[-1])).to(device).eval()
        asked = dataclasses.replace(judge, model=cfg.model)
        val = read_index(judge.data.val_index)
        result["judged"] = held_out_loss(model, val, asked, device)["val_loss"]
    write(folder / "result.json", jsonlib.dumps(result, indent=2) + "\n")


def _judging(judge: Config) -> dict[str, Any]:
    return jsonlib.loads(jsonlib.dumps({"mask": to_dict(judge.mask), "data": to_dict(judge.data)}))


def _result(cfg: Config, judge: Config) -> dict[str, Any] | None:
    """What a run came to, if it is done. Raises ConfigError where it was another run."""
    path = Path(cfg.output) / "result.json"
    if not path.exists():
        return None
    result = jsonlib.loads(path.read_text())
    if result["config"] != jsonlib.loads(jsonlib.dumps(to_dict(cfg))):
        raise ConfigError(f"{path} is of other settings: give the sweep another output")
    if result["judge"] != _judging(judge):
        raise ConfigError(f"{path} was judged otherwise: give the sweep another output")
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval over seeds; nan for one seed)."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.nan
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def table(found: Sweep, results: dict, judge: Config) -> list[dict[str, Any]]:
    """One row an arm: means over seeds with their intervals, and the difference to the first arm
    with a judged loss, seed by seed."""
    rows, first = [], None
    for name, arm in found.arms.items():
        each = [results[name, seed] for seed in found.seeds]
        cfg = found.config(name, found.seeds[0])
        row: dict[str, Any] = {
            "arm": name,
            "loss": interval([r["loss"] for r in each]),
            "unit": cfg.model.loss_unit,
            "part": "" if cfg.mask.decoder == "all" else f"of a {cfg.mask.decoder} part",
            "seconds": interval([r["train_seconds"] for r in each]),
            "step_seconds": statistics.median(r["step_seconds"] for r in each),
            "paper": arm.paper,
            "judged": None,
            "against_first": None,
        }
        if each[0]["judged"] is not None:
            judged = [r["judged"] for r in each]
            row["judged"] = interval(judged)
            if first is None:
                first = judged
            else:
                row["against_first"] = interval([a - b for a, b in zip(judged, first, strict=True)])
        rows.append(row)
    return rows


_HEAD = ["arm", "held-out loss", "against the first", "own loss", "train s", "s/step", "paper's"]


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(found, digits: int = 4) -> str:
        if found is None:
            return "-"
        mean, half = found
        return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    return [
        row["arm"],
        shown(row["judged"]),
        shown(row["against_first"]),
        " ".join(filter(None, [shown(row["loss"]), row["part"]])),
        shown(row["seconds"], 1),
        f"{row['step_seconds']:.3f}",
        row["paper"] or "-",
    ]


def _padded(rows: list[list[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]


def _page(rows: list[dict[str, Any]], judge: Config, seeds: int) -> Page:
    mask = judge.mask
    page = Page(
        "Sweep",
        [
            f"Held-out loss: {judge.model.loss_unit}, of all hidden patches, {mask.ratio:.0%} "
            f"{mask.strategy}, the same clips, crops and masks for every arm. An arm that trains "
            "with the judge's own mask and crops is at home there.",
            f"Means over {seeds} seeds; ± is half of Student's 95% interval, of seeds alone. "
            "Differences are seed by seed. The paper's column is its own: ViT-L, K400, 800 "
            "effective epochs, top-1 after fine-tuning; M: not confirmed in its text.",
        ],
    )
    page.section("Arms", "An arm's own loss is of its own mask and target.")
    page.table(_HEAD, map(_cells, rows))
    page.section("Units of the arms' own losses")
    page.table(["arm", "unit"], [[row["arm"], row["unit"]] for row in rows])
    figure = _trade_off(rows)
    if figure is not None:
        page.section("What a better loss costs")
        page.figure("trade-off", figure, "held-out loss against seconds of training, by arm")
    return page


def _trade_off(rows: list[dict[str, Any]]):
    judged = [row for row in rows if row["judged"]]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not judged:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row in judged:
        (x, dx), (y, dy) = row["seconds"], row["judged"]
        axes.errorbar(
            x, y, xerr=None if math.isnan(dx) else dx, yerr=None if math.isnan(dy) else dy, fmt="o"
        )
        axes.annotate(row["arm"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="seconds of training", ylabel="held-out loss")
    axes.grid(alpha=0.3)
    return figure


def _prediction(found: Sweep, device: str, gpus: int, dataset: str, price: float) -> str:
    """What the sweep takes, predicted as `mae-fast plan` does, arm by arm."""
    where = plan.this_device() if device == "this" else cost.DEVICES[device]
    lines, hours = [], 0.0
    for name in found.arms:
        cfg = found.config(name, found.seeds[0])
        videos = len(read_index(cfg.data.index)) if cfg.data.index else plan._videos(dataset)
        t = cfg.train
        clips = t.epochs * videos * cfg.data.repeat_aug
        if t.steps:
            clips = t.steps * t.batch_size * t.accum_steps * cfg.data.repeat_aug * gpus
        clips *= cfg.mask.per_clip
        batch = min(64, t.batch_size * cfg.data.repeat_aug)
        step = plan.predict(cfg.model, cfg.mask.ratio, where, gpus, 8, batch, "none", 0.0)
        each = clips / step["clips_per_second"] / 3600
        hours += each * len(found.seeds)
        lines.append(f"  {name:24} {each:10.3g} h a run")
    runs = len(found.arms) * len(found.seeds)
    total = f"{runs} runs, predicted {hours:.3g} h on {gpus} x {device}: {hours * gpus:.3g} hours"
    total += f" of a device, {hours * gpus * price:.0f} at {price:g} an hour" if price else ""
    return "\n".join([total + "; loading and judging not included", *lines])
