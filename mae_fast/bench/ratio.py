"""`mae-fast bench ratio`: what masking buys, for these models and engines on this machine.

Every cell (model, strategy, ratio, engine) is first tried in a process of its own, which gives the
batch that fits, peak memory and the loss. Then all are warmed up, which gives the parts of a step,
and steps are taken in turn, round by round, with the machine's limits among them; ratios are taken
round by round.
At 0% nothing is left to predict: the encoder sees every token, and the decoder and the loss stay
those of 90%, as in the paper's dense encoder.
"""

import itertools
import json as jsonlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from mae_fast.bench import machine
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.cell import Cell, Setting, build, in_own_process, make_clips, stepper
from mae_fast.bench.engines import QUICK, name_of, twin, why_not
from mae_fast.bench.ratio_table import assemble, print_tables, summary
from mae_fast.bench.records import append
from mae_fast.bench.timing import clock, interleave
from mae_fast.environment import environment
from mae_fast.errors import ConfigError
from mae_fast.fields import positive, require
from mae_fast.files import check_output
from mae_fast.profile.trace import trace

RATIOS = (0.0, 0.5, 0.75, 0.8, 0.9, 0.95, 0.98)
ENGINES = ("ours", "official_eager", "official_sdpa", "official_compile", "transformers")
QUICK_RATIOS, QUICK_ENGINES = (0.0, 0.9), ("ours", "official_eager")
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
WARMED, MOST_WARM = 0.95, 5  # a step that takes over 95% of the one before: nothing warms up now
ROOM = 0.8  # of the free memory, for all engines that lie there at once


def ratio(
    model: tuple[str, ...] = ("vit_base",),
    ratios: tuple[float, ...] = RATIOS,
    engines: tuple[str, ...] = ENGINES,
    strategies: tuple[str, ...] = ("random",),
    batch: int = 0,
    rounds: int = 7,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    with_data: str = "",
    workers: int = 2,
    seed: int = 0,
    out: str = "runs/ratio",
    quick: bool = False,
    json: bool = False,
) -> Path | None:
    """Time training steps (forward, backward, clip, AdamW) at masking ratios from 0%, each engine
    beside the others, and tell what masking buys and what it loses. A second call goes on where
    the first was stopped. Gives the file of records, of which the command makes a page.

    Args:
        model: vit_tiny ... vit_huge, videomae_base (transformers' default), NAME/slowfast, or a
            run's CONFIG.toml, whose [model] is taken.
        ratios: masked shares in [0, 1). 0: the encoder sees every token.
        engines: ours, mae_fast_without_SAVING, official_eager, official_sdpa,
            official_sdpa_fused_adamw, official_compile, official_sdpa_compile, transformers
            (VideoMAE of the same sizes), transformers_eager, official_repository@PATH (a checkout
            of facebookresearch/mae_st); or MODULE:FUNCTION[@PATH] that gives (model, loss_of) for
            a model of yours, accelerated or not (benchmarks/families.py has others'). NAME_fp32
            is one in fp32, whatever the precision of the others.
        strategies: random, tube, frame, block, running_cell.
        batch: clips a step; 0: 2 on a CPU, 64 on a GPU. Less where a cell does not fit, and told.
        rounds: timed steps of each cell.
        precision: fp32, or bf16 by autocast with fp32 weights.
        device: where the models run.
        with_data: a folder of videos, an index or a pack; steps are timed once more with decoding
            and augmentation.
        workers: processes that decode, with with_data.
        seed: of clips, masks, weights and the order of every round.
        out: folder of the samples, and of ratio.jsonl, the records.
        quick: a tiny model and two rounds, to see that all works; the numbers say nothing.
        json: print one JSON document, and nothing else on stdout.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    lists = {"model": model, "ratios": ratios, "engines": engines, "strategies": strategies}
    for option, values in lists.items():
        require(len(values) > 0, f"--{option} must name at least one", values)
    if quick:
        model, rounds = (QUICK,), 2
        ratios = QUICK_RATIOS if ratios == RATIOS else ratios
        engines = QUICK_ENGINES if engines == ENGINES else engines
    run = Run(Setting(device, precision, seed), batch, rounds, Path(out))
    cells = list(run.plan(model, strategies, ratios, engines))
    found, path = run.measure(cells, with_data, workers), run.folder / "ratio.jsonl"
    if run.measured or not path.exists():
        for record in found:
            append(path, record)
    told = run.told(found)
    if json:
        print(jsonlib.dumps(told, indent=1))
    else:
        print_tables(told)
        if found:
            print(f"records: {path}")
            return path
    return None


class Run:
    """The samples of a run in FOLDER/samples.jsonl: what is there is not measured again."""

    def __init__(self, setting: Setting, clips: int, rounds: int, folder: Path) -> None:
        positive(batch=clips or None)
        require(rounds >= 2, "rounds must be 2 or more", rounds)
        clips = clips or (64 if setting.device == "cuda" else 2)
        self.setting, self.clips, self.rounds, self.folder = setting, clips, rounds, folder
        self.path, self.measured = folder / "samples.jsonl", False
        now = {"setting": asdict(setting), "clips": clips, "environment": environment()}
        self.commit = now["environment"]["commit"]
        if self.path.exists():
            lines = [jsonlib.loads(line) for line in self.path.read_text().splitlines() if line]
            self._same_conditions(lines[0], now)
        else:
            check_output(self.path)
            folder.mkdir(parents=True, exist_ok=True)
            lines = [now]
            self._write(now)
        self.log: dict[str, Any] = {"probe": {}, "data": {}, "parts": {}, **lines[0]}
        self.log |= {"rounds": [], "skipped": {}}
        for line in lines[1:]:
            self._take(line)

    def _same_conditions(self, *both: dict) -> None:
        before, now = ({**line, **line["environment"]} for line in both)
        for key in ("setting", "clips", "torch", "cpu"):
            if before[key] != now[key]:
                raise ConfigError(
                    f"{self.path} holds another run ({key} {before[key]}, not {now[key]}): "
                    "name another --out"
                )

    def _take(self, line: dict) -> None:
        for kind in {"probe", "data", "parts"} & line.keys():
            self.log[kind][line["cell"]] = line[kind]
        if "seconds" in line:
            self.log["rounds"].append(line)

    def _write(self, line: dict) -> None:
        with self.path.open("a") as f:
            f.write(jsonlib.dumps(line) + "\n")

    def _add(self, line: dict) -> None:
        line["commit"] = self.commit
        self._write(line)
        self._take(line)
        self.measured = True

    def plan(self, models, strategies, ratios, names) -> Iterable[Cell]:
        """The cells that there are; why others are not goes into the log."""
        for each in itertools.product(models, strategies, ratios, map(name_of, names)):
            cell = Cell(*each)
            try:
                reason = why_not(cell.engine, cell.cfg, cell.masking)
            except ConfigError:
                raise
            except ValueError as e:  # a mask that keeps nothing
                reason = str(e)
            if reason:
                self.log["skipped"][cell.key] = reason
            else:
                yield cell

    def measure(self, cells: list[Cell], folder: str = "", workers: int = 0) -> list[dict]:
        """The records of the cells; `folder`: of videos, whose loading is timed too, each cell
        alone with its loader."""
        self._each("probe", cells, self._probe)
        reasons = {cell.key: reason for cell in cells if (reason := self._wrong(cell))}
        self.log["skipped"] |= reasons
        cells = [cell for cell in cells if cell.key not in reasons]
        if folder:

            def load(cell: Cell) -> dict[str, Any]:
                how = {"clips": self.log["probe"][cell.key]["clips"], "folder": folder}
                return in_own_process("with_data", cell, self.setting, workers=workers, **how)

            self._each("data", cells, load)
        for name in dict.fromkeys(cell.model for cell in cells):
            for group in self.groups([cell for cell in cells if cell.model == name]):
                self.time_group(group)
        return assemble(self.log, cells)

    def told(self, found: list[dict]) -> dict[str, Any]:
        """What the records say, and why cells are not there."""
        return summary(found) | {"skipped": self.log["skipped"]}

    def _each(self, kind: str, cells: list[Cell], measure: Callable[[Cell], dict]) -> None:
        """Log what is measured, in a process of its own, of each of these that has it not yet."""
        todo = [cell for cell in cells if cell.key not in self.log[kind]]
        for number, cell in enumerate(todo, 1):
            tell(f"{kind}, {number} of {len(todo)}: {cell.key}")
            self._add({"cell": cell.key, kind: measure(cell)})

    def _probe(self, cell: Cell) -> dict[str, Any]:
        """Peak memory and loss, at the largest batch that fits."""
        clips = self.clips
        while True:
            try:
                found = in_own_process("probe", cell, self.setting, clips=clips)
            except ConfigError as e:
                return {"failed": str(e)}
            if "memory" not in found:
                return found
            if clips == 1:
                return {"failed": f"one clip does not fit in memory: {found['memory']}"}
            clips //= 2

    def _wrong(self, cell: Cell) -> str | None:
        """Why a cell's numbers say nothing: engines of one model must give one loss."""
        found = self.log["probe"][cell.key]
        if "failed" in found:
            return found["failed"]
        key = Cell(cell.model, cell.strategy, cell.ratio, twin(cell.engine) or "").key
        base = self.log["probe"].get(key, {})
        if base.get("clips") != found["clips"]:  # it failed, or took another batch
            return None
        if abs(found["loss"] / base["loss"] - 1) <= LOSS_TOLERANCE[self.setting.precision]:
            return None
        return f"its loss is {found['loss']}, that of {key} {base['loss']}: not timed"

    def groups(self, cells: list[Cell]) -> list[list[Cell]]:
        """The cells of one model, by engines that lie in memory at once: all, if they fit."""
        probes = self.log["probe"]
        state = {c.engine: probes[c.key]["state_mb"] for c in cells}
        peak = max((probes[c.key]["peak_memory_mb"] for c in cells), default=0.0)
        room, groups = ROOM * machine.free_mb(self.setting.device) - peak, []
        for name in state:
            if not groups or sum(state[n] for n in [*groups[-1], name]) > room:
                groups.append([])
            groups[-1].append(name)
        return [[c for c in cells if c.engine in group] for group in groups]

    def time_group(self, cells: list[Cell]) -> None:
        """Rounds of these cells, each in an order drawn anew, until each has all its samples."""
        taken = Counter(key for line in self.log["rounds"] for key in line["seconds"])
        parts, probes = self.log["parts"], self.log["probe"]
        cells = [c for c in cells if taken[c.key] < self.rounds or c.key not in parts]
        if not cells:
            return
        timer, built, steps, update = clock(self.setting.device), {}, {}, {}
        for cell in cells:
            tell(f"warming up {cell.key}")
            if cell.engine not in built:
                built[cell.engine] = build(cell, self.setting)
            clips = make_clips(cell.cfg, probes[cell.key]["clips"], self.setting)
            step = stepper(cell, built[cell.engine], clips, self.setting)
            steps[cell.key] = until_update(built[cell.engine], step, cell.key, update)
            warm_up(step, timer)
            if cell.key not in parts:
                seen = trace(built[cell.engine], step, self.setting.device)
                self._add({"cell": cell.key, "parts": seen.phases()})
        how = self.setting.device, self.setting.dtype
        limits = machine.limits(cells[0].model == QUICK, *how)
        while cells := [c for c in cells if taken[c.key] < self.rounds]:
            number = min(taken[c.key] for c in cells)
            left = sum((self.rounds - taken[c.key]) * probes[c.key]["step_seconds"] for c in cells)
            tell(f"round {number + 1} of {self.rounds}, {left / 60:.1f} min left")
            random.seed(f"{self.setting.seed} {number}")
            functions = {name: limit.run for name, limit in limits.items()}
            functions |= {c.key: steps[c.key] for c in cells}
            samples = interleave(functions, 1, timer=timer)
            line = {"model": cells[0].model, "limits": machine.as_record(limits, samples)}
            line["until_update"] = {c.key: update[c.key] for c in cells}
            self._add(line | {"seconds": {c.key: samples[c.key][0] for c in cells}})
            taken.update(c.key for c in cells)


def tell(now: str) -> None:
    """What is going on."""
    print(now, file=sys.stderr, flush=True)


def until_update(
    built: Built, step: Callable[[], object], key: str, found: dict[str, float]
) -> Callable[[], object]:
    """A step that leaves in found[key] the seconds before its optimizer began, on the host."""
    began = [0.0]
    built.optimizer.register_step_pre_hook(lambda *_: began.__setitem__(0, time.perf_counter()))

    def timed() -> object:
        begin = time.perf_counter()
        out = step()
        found[key] = began[0] - begin
        return out

    return timed


def warm_up(step: Callable[[], object], timer: Callable[..., float]) -> None:
    """Steps until one is hardly faster than the one before."""
    seconds = [timer(step)]
    while len(seconds) < MOST_WARM:
        seconds.append(timer(step))
        if seconds[-1] > WARMED * seconds[-2]:
            break
