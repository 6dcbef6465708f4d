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
import re
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from mae_fast import cost, metrics, plan, sweep_judge, sweep_page
from mae_fast.bench.table import text_table
from mae_fast.checkpoint import checkpoints
from mae_fast.config import Config
from mae_fast.config_file import config_from_dict, load_config, to_dict
from mae_fast.data import read_index
from mae_fast.errors import ConfigError, NonFiniteError, OutOfMemory
from mae_fast.fields import positive, require, typed, unknown
from mae_fast.files import write
from mae_fast.sweep_judge import Judge
from mae_fast.sweep_ready import PAPER, READY, Arm
from mae_fast.train import pretrain

# Of Student's t, two-sided 95%, by degrees of freedom from 1 on.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_KEYS = {"config": str, "output": str, "seeds": list, "ready": list}
_KEYS |= {"arms": dict, "grid": dict, "judge": dict}


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
        dataset: of the prediction, where the configuration names no index: k400, ssv2, or a number
            of videos.
        price: of one device for an hour, in any currency.
    """
    positive(gpus=gpus, price=price or None)
    found = paper() if plan_only and file == "paper" else read(file)
    configs = found.configs()
    try:
        print(_prediction(found, configs, device, gpus, dataset, price))
    except ConfigError as e:  # a GPU that is none of those
        if plan_only:
            raise
        print(f"no prediction: {e}")
    if plan_only:
        return
    judge = sweep_judge.read(found.judge, found.config(None, found.seeds[0]))
    sweep_judge.check(judge)
    runs = list({cfg.output: cfg for cfg in configs.values()}.values())
    mine, failed = _part(runs, part), None
    for number, cfg in enumerate(mine, 1):
        print(f"{cfg.output} ({number} of {len(mine)})", flush=True)
        try:
            _run(cfg, judge)
        except (NonFiniteError, OutOfMemory) as e:  # the arm's own: the others go on
            print(f"failed: {e}", flush=True)
            failed = failed or e.with_traceback(None)
    results = {run: _result(cfg, judge) for run, cfg in configs.items()}
    missing = len({configs[run].output for run, result in results.items() if result is None})
    if missing:
        print(f"{missing} of {len(runs)} runs are still to be done: no table yet")
        if failed:
            raise failed
        return
    rows = table(found, results, judge)
    page = sweep_page.page(rows, judge, len(found.seeds), lambda arm: _hours(found.arms[arm]))
    write(found.output / "sweep.json", jsonlib.dumps(rows, indent=2) + "\n")
    write(found.output / "index.html", page.html())
    print(text_table(sweep_page.head(judge), [sweep_page.cells(row, judge) for row in rows]))
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
    found, arms = load_config(path, build=_checked)
    tree = load_config(path.parent / found["config"], build=dict)
    output = Path(found.get("output") or f"runs/{path.stem}")
    return Sweep(tree, arms, tuple(found.get("seeds", [0])), output, found.get("judge", {}))


def _checked(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Arm]]:
    """A sweep's keys, held to their kinds, and its arms."""
    if isinstance(tree.get("ready"), str):
        tree = tree | {"ready": [tree["ready"]]}
    for key, value in tree.items():
        if key not in _KEYS:
            raise ConfigError(unknown("key", key, _KEYS))
        require(isinstance(value, _KEYS[key]), f"{key} must be {_KEYS[key].__name__}", value)
    if not tree.get("config"):
        raise ConfigError("config is missing: the TOML file of a run")
    seeds = [typed("seeds", seed, int) for seed in tree.get("seeds", [0])]
    require(len(seeds) == len({*seeds}) > 0, "seeds must be different", seeds)
    arms: dict[str, Arm] = {}
    names = tree.get("ready", [])
    for name in names:
        if name not in READY:
            raise ConfigError(unknown("ready sweep", name, READY))
        prefix = f"{name} " if len(names) > 1 else ""
        arms |= {f"{prefix}{arm}": READY[name][arm] for arm in READY[name]}
    for name, overrides in tree.get("arms", {}).items():
        require(isinstance(overrides, dict), f"[arms.{name}] must be a table", overrides)
        arms[name] = Arm(_nested(overrides))
    grid = tree.get("grid", {})
    for values in grid.values():
        require(isinstance(values, list) and values, "[grid] has lists of values", values)
    for values in itertools.product(*grid.values()) if grid else ():
        changed = dict(zip(grid, values, strict=True))
        name = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in changed.items())
        arms[name] = Arm(_nested(changed))
    if not arms:
        raise ConfigError("there are no arms: give ready, [arms.NAME] or [grid]")
    for name, arm in arms.items():
        own = "output" in arm.overrides or "seed" in arm.overrides.get("train", {})
        require(not own, "output and train.seed are the sweep's own, not an arm's", name)
    require(len({*map(_folder, arms)}) == len(arms), "arms of one folder", sorted(arms))
    return tree, arms


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
    found = re.fullmatch(r"(\d+)/(\d+)", part or "0/1")
    i, n = map(int, found.groups()) if found else (0, 0)
    require(i < n, "--part must be I/N with 0 <= I < N", part)
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
    here = {"config": to_dict(cfg), "judge": judge.settings()}
    for key, words in (("config", "is of other settings"), ("judge", "was judged otherwise")):
        if result[key] != jsonlib.loads(jsonlib.dumps(here[key])):
            raise ConfigError(f"{path} {words}: give the sweep another output")
    return result


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval over seeds; nan for one seed)."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), _t95(n - 1) * statistics.stdev(values) / math.sqrt(n)


def _t95(freedom: int) -> float:
    """Student's t: of the table, and beyond it by its expansion in 1 / freedom (Abramowitz and
    Stegun 26.7.5), to 1e-3."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


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
        t, of_each = cfg.train, cfg.data.repeat_aug * cfg.mask.per_clip
        drawn = t.steps * t.batch_size * t.accum_steps * gpus if t.steps else t.epochs * videos
        batch = min(64, t.batch_size * of_each)
        step = cost.Step(cfg.model, batch, cfg.mask.ratio, where, gpus=gpus)
        each = drawn * of_each / step.clips_per_second / 3600
        names[cfg.output], hours[cfg.output] = name, each
        lines.append(f"  {name:32} {each:8.3g} h a run of steps of {batch} clips a device")
    runs, total = len(hours) * seeds, sum(hours.values()) * seeds
    same = len(found.arms) - len(hours)
    also = f" ({len(found.arms)} arms, {same} of which are the run of another)" if same else ""
    paid = f", {total * gpus * price:.0f} at {price:g} an hour" if price else ""
    words = (
        f"{runs} runs{also}, predicted {total:.3g} h on {gpus} x {device}: {total * gpus:.3g} "
        f"hours of a device{paid}; loading and judging not included"
    )
    return "\n".join([words, *lines])
