"""`mae-fast sweep SWEEP.toml`: runs that differ in one thing, and one table of what it does.

Every arm is the same configuration with some keys changed, run once for each seed. Of one seed, all
arms start from the same random state and draw the same clips, crops and (of one strategy) masks.
One judge (sweep_judge.py): the held-out loss under the mask and the crops of the configuration
itself, whatever an arm trains with, or probes of the encoder. See docs/sweeps.md.
"""

import dataclasses
import itertools
import json as jsonlib
import math
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from mae_fast import cost, metrics, plan, sweep_judge, sweep_page
from mae_fast.checkpoint import checkpoints
from mae_fast.config import Config
from mae_fast.config_file import config_from_dict, to_dict, tomllib
from mae_fast.data import read_index
from mae_fast.errors import ConfigError
from mae_fast.fields import require, typed
from mae_fast.files import write
from mae_fast.sweep_judge import Judge
from mae_fast.sweep_ready import PAPER, READY, Arm
from mae_fast.train import pretrain

# Of Student's t, two-sided 95%, by degrees of freedom from 1 on; the normal's after them.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_KEYS = ("config", "output", "seeds", "ready", "arms", "grid", "judge")


class Sweep(NamedTuple):
    """The configuration that arms change, as TOML has it; the arms by name; seeds; the folder; the
    judge, as TOML has it."""

    tree: dict[str, Any]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    output: Path
    judge: dict[str, Any]

    def config(self, arm: str | None, seed: int) -> Config:
        """A run's configuration; that of the judge for None."""
        tree = _merged(self.tree, self.arms[arm].overrides if arm else {})
        tree = _merged(tree, {"train": {"seed": seed}})
        tree["output"] = str(self.output / _folder(arm or "judge") / f"seed-{seed}")
        try:
            return config_from_dict(tree)
        except ConfigError as e:
            raise ConfigError(f"arm {arm or 'of the configuration itself'}: {e}") from e

    def configs(self) -> dict[tuple[str, int], Config]:
        """{(arm, seed): its run's configuration}. Arms that are the same are one run, in the folder
        of the first."""
        first: dict[str, Config] = {}
        found = {}
        for run in itertools.product(self.arms, self.seeds):
            cfg = self.config(*run)
            key = jsonlib.dumps(to_dict(dataclasses.replace(cfg, output="-")))
            found[run] = first.setdefault(key, cfg)
        return found


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
        file: the sweep: `config` (a run's TOML file), `output`, `seeds`, `judge`, and arms: `ready`
            (ratio, masks, decoder_width, decoder_depth, target, crop, repeats), [arms.NAME] tables
            of keys that it changes, or [grid] of lists of values. docs/sweeps.md has examples.
            With --plan-only also `paper`: its 22 arms, ViT-L for 800 epochs.
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
    found = paper() if plan_only and file == "paper" else read(file)
    configs = found.configs()
    print(_prediction(found, configs, device, gpus, dataset, price))
    if plan_only:
        return
    judge = sweep_judge.read(found.judge, found.config(None, found.seeds[0]))
    sweep_judge.check(judge)
    first: dict[str, tuple[str, int]] = {}
    for run, cfg in configs.items():
        first.setdefault(cfg.output, run)
    runs = list(first.values())
    for number, run in enumerate(_part(runs, part)):
        print(f"{run[0]}, seed {run[1]} ({number + 1} of {len(_part(runs, part))})", flush=True)
        _run(configs[run], judge)
    results = {run: _result(cfg, judge) for run, cfg in configs.items()}
    missing = [run for run in runs if results[run] is None]
    if missing:
        print(f"{len(missing)} of {len(runs)} runs are still to be done: no table yet")
        return
    rows = table(found, results, judge)
    write(found.output / "sweep.json", jsonlib.dumps(rows, indent=2) + "\n")
    page = sweep_page.page(rows, judge, len(found.seeds), lambda arm: _hours(found.arms[arm]))
    write(found.output / "index.html", page.html())
    shown = [sweep_page.head(judge), *(sweep_page.cells(row, judge) for row in rows)]
    print("\n".join("  ".join(cells) for cells in sweep_page.padded(shown)))
    if "loss" in judge.by and not all(sweep_judge.comparable(c, judge) for c in configs.values()):
        print("a dash: a loss of another unit, or of its own encoder's targets; probes judge those")
    print(f"as a page: {found.output / 'index.html'}")


def paper() -> Sweep:
    """The paper's 22 arms as it trained them, ViT-L on K400 for 800 epochs, on 8 devices of 64
    clips each: to be planned."""
    arms = {}
    for name in PAPER:
        for arm, (overrides, result) in READY[name].items():
            clips = overrides.get("data", {}).get("repeat_aug")
            batch = {"train": {"batch_size": 64 // clips}} if clips else {}
            arms[f"{name} {arm}"] = Arm(_merged(overrides, batch), result)
    tree = {"model": {"preset": "vit_large"}, "train": {"batch_size": 16, "epochs": 200.0}}
    return Sweep(tree, arms, (0,), Path("runs/paper"), {})


def _hours(arm: Arm) -> float:
    """Of an arm in the paper's setting on 8 H100: predicted."""
    cfg = paper()._replace(arms={"it": arm}).config("it", 0)
    step = cost.Step(cfg.model, 64, cfg.mask.ratio, cost.DEVICES["h100"], gpus=8)
    return 800 * plan.VIDEOS["k400"] * cfg.mask.per_clip / step.clips_per_second / 3600


def read(file: str | Path) -> Sweep:
    """Read a sweep's TOML file. Raises ConfigError, with the file's name."""
    path = Path(file)
    tree = _toml(path)
    for key in tree:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key!r} (known: {', '.join(_KEYS)})")
    kinds = dict(config=str, output=str, arms=dict, grid=dict, judge=dict)
    for key, kind in kinds.items():
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
    judge = tree.get("judge", {})
    return Sweep(_toml(path.parent / tree["config"]), arms, tuple(seeds), Path(output), judge)


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


def _run(cfg: Config, judge: Judge) -> None:
    """Train one run, unless that is done, and judge it."""
    if _result(cfg, judge) is not None:
        return
    pretrain(cfg)
    folder = Path(cfg.output)
    rows = [row for row in metrics.read(folder / "metrics.jsonl") if "loss" in row]
    result = {
        "config": to_dict(cfg),
        "judge": judge.settings(),
        "loss": rows[-1]["loss"],
        "step_seconds": statistics.median(row["step_seconds"] for row in rows),
        "train_seconds": sum(
            row["step_seconds"] * (row["step"] - before)
            for before, row in zip([0, *(r["step"] for r in rows)], rows, strict=False)
        ),
        "judged": sweep_judge.judged(checkpoints(folder)[-1], cfg, judge, cfg.train.seed),
    }
    write(folder / "result.json", jsonlib.dumps(result, indent=2) + "\n")


def _result(cfg: Config, judge: Judge) -> dict[str, Any] | None:
    """What a run came to, if it is done. Raises ConfigError where it was another run."""
    path = Path(cfg.output) / "result.json"
    if not path.exists():
        return None
    result = jsonlib.loads(path.read_text())
    if result["config"] != jsonlib.loads(jsonlib.dumps(to_dict(cfg))):
        raise ConfigError(f"{path} is of other settings: give the sweep another output")
    if result["judge"] != jsonlib.loads(jsonlib.dumps(judge.settings())):
        raise ConfigError(f"{path} was judged otherwise: give the sweep another output")
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval over seeds; nan for one seed)."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.nan
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def table(found: Sweep, results: dict, judge: Judge) -> list[dict[str, Any]]:
    """One row an arm: means over seeds with their intervals, and by each judge the difference to
    the first arm that it judged, seed by seed."""
    rows: list[dict[str, Any]] = []
    first: dict[str, list[float]] = {}
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
            "judged": {},
            "against_first": {},
        }
        for by in judge.by:
            judged = [r["judged"][by] for r in each]
            if None in judged:
                continue
            row["judged"][by] = interval(judged)
            if by in first:
                differences = [a - b for a, b in zip(judged, first[by], strict=True)]
                row["against_first"][by] = interval(differences)
            first.setdefault(by, judged)
        rows.append(row)
    return rows


def _prediction(
    found: Sweep, configs: dict, device: str, gpus: int, dataset: str, price: float
) -> str:
    """What the sweep takes, predicted as `mae-fast plan` does, arm by arm."""
    where = plan.this_device() if device == "this" else cost.DEVICES[device]
    lines, hours, names, seeds = [], {}, {}, len(found.seeds)
    for name in found.arms:
        cfg = configs[name, found.seeds[0]]
        if cfg.output in hours:
            lines.append(f"  {name:32} the run of {names[cfg.output]}")
            continue
        videos = len(read_index(cfg.data.index)) if cfg.data.index else plan._videos(dataset)
        t = cfg.train
        clips = t.epochs * videos * cfg.data.repeat_aug
        if t.steps:
            clips = t.steps * t.batch_size * t.accum_steps * cfg.data.repeat_aug * gpus
        clips *= cfg.mask.per_clip
        batch = min(64, t.batch_size * cfg.data.repeat_aug * cfg.mask.per_clip)
        step = cost.Step(cfg.model, batch, cfg.mask.ratio, where, gpus=gpus)
        each = clips / step.clips_per_second / 3600
        names[cfg.output], hours[cfg.output] = name, each
        lines.append(f"  {name:32} {each:8.3g} h a run of steps of {batch} clips a device")
    runs, total = len(hours) * seeds, sum(hours.values()) * seeds
    same = len(found.arms) - len(hours)
    also = f" ({len(found.arms)} arms, {same} of which are the run of another)" if same else ""
    words = f"{runs} runs{also}, predicted {total:.3g} h on {gpus} x {device}: {total * gpus:.3g} "
    words += "hours of a device"
    words += f", {total * gpus * price:.0f} at {price:g} an hour" if price else ""
    return "\n".join([words + "; loading and judging not included", *lines])
