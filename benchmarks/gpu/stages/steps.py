"""Training steps of mae_fast beside each baseline: interleaved, on synthetic uint8 clips.

A step is forward, backward, clip and AdamW. A baseline whose batch does not fit into memory takes
the greatest half of it that does; both are compared in clips a second.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from benchmarks.gpu.engines import GRAPH, OURS, build, first_losses, fitting
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.flops import official_step_flop
from mae_fast.bench.machine import as_record
from mae_fast.bench.timing import interleave

BAR = "official_sdpa_compile"
FIRST = (OURS, GRAPH, BAR)
LADDER = ("official_sdpa", "official_bf16", "official_fp32", "official_tf32")
SHORT = (OURS, GRAPH, "official_sdpa", "official_bf16")
REST = ("official_compile", "official_sdpa_compile_fused_adamw")
# What to measure, the most valuable first: (model, clips, engines); then `rungs`.
PLAN = (("vit_base", 64, FIRST), ("vit_large", 64, FIRST))
RUNGS = (
    ("vit_large", 64, LADDER),
    ("vit_base", 64, LADDER),
    ("vit_huge16", 64, SHORT),
    ("vit_large", 8, SHORT),
    ("vit_base", 8, SHORT),
    ("vit_large", 128, SHORT),
    ("vit_base", 128, SHORT),
    ("vit_large", 64, REST),
    ("vit_base", 64, REST),
    *(
        (model, batch, engines)
        for engines in ((BAR,), ("official_fp32", "official_tf32"), REST)
        for batch in (8, 128)
        for model in ("vit_large", "vit_base")
    ),
    ("vit_huge16", 64, (BAR, "official_fp32", "official_tf32")),
    ("vit_huge16", 8, (*SHORT, BAR)),
    ("vit_huge16", 128, (*SHORT, BAR)),
)
REHEARSED = PLAN[:1], (("vit_base", 64, (*LADDER, *REST)),)
STEPS_A_SAMPLE = 3  # one after another, so that the host may run ahead
SECONDS_AN_ITEM = 4.0
ROUNDS = (3, 10)  # at least and at most


@dataclass
class Reference:
    """mae_fast at one model and batch, kept while baselines take turns beside it."""

    setting: Setting
    model: str
    batch: int

    def __post_init__(self) -> None:
        self.cfg = self.setting.cfg(self.model)
        self.engine: Built | None = None

    def open(self) -> None:
        """Build it, and as many clips and masks to step on as fit."""
        if self.engine is not None:
            return
        self.before_mb = self.setting.device.allocated_mb()
        engine = build(OURS, self.cfg, self.setting)
        self.state = {k: v.clone() for k, v in engine.model.state_dict().items()}
        self.clips = self.setting.clips(self.cfg, self.batch)
        self.noise = self.setting.noise(self.cfg, self.batch)
        batch = warmed(engine, self.clips, self.noise)
        self.clips, self.noise, self.engine = self.clips[:batch], self.noise[:batch], engine


def items(setting: Setting, rungs: bool = False) -> Iterator[Item]:
    limits = setting.device.limits()
    for model, batch, engines in REHEARSED[rungs] if setting.tiny else (PLAN, RUNGS)[rungs]:
        reference = Reference(setting, model, setting.batch(batch))
        for name in engines:
            yield Item(
                f"{model} {batch} clips {name}",
                lambda reference=reference, name=name: measure(setting, reference, name, limits),
            )


def measure(setting: Setting, reference: Reference, name: str, limits: dict) -> dict:
    """The record of one engine: mae_fast's with the device's limits, others' with mae_fast's."""
    reference.open()
    cfg, clips, noise = reference.cfg, reference.clips, reference.noise
    ours = reference.engine
    before_mb = reference.before_mb if name == OURS else setting.device.allocated_mb()
    engine = ours if name == OURS else build(name, cfg, setting)
    if name == GRAPH:  # of one size; captured at the fourth call, it then allocates nothing
        batch = len(clips)
        peak_mb = setting.device.peak_mb(several(engine, clips, noise, steps=5))
    else:
        batch = warmed(engine, clips, noise)
        peak_mb = setting.device.peak_mb(several(engine, clips[:batch], noise[:batch], steps=1))
    losses = first_losses({OURS: ours, name: engine}, clips[:batch], noise[:batch], reference.state)
    functions = {name: several(engine, clips[:batch], noise[:batch])}
    if name == OURS:
        functions |= {limit: found.run for limit, found in limits.items()}
    else:
        functions[OURS] = several(ours, clips, noise)
    before = setting.device.conditions()
    once = sum(setting.device.time(run) for run in functions.values())
    rounds = setting.rounds(int(min(max(SECONDS_AN_ITEM / once, ROUNDS[0]), ROUNDS[1])))
    seconds = interleave(functions, rounds, timer=setting.device.time)
    steps_of = {n: [s / STEPS_A_SAMPLE for s in seconds[n]] for n in {name, OURS}}
    rate = {n: 1 / statistics.median(s) for n, s in steps_of.items()}
    rate = {n: r * (batch if n == name else len(clips)) for n, r in rate.items()}
    flop = official_step_flop(cfg, 1)
    told = f"{rate[name]:.1f} clips/s, {rate[name] * flop / 1e12:.1f} TFLOP/s of the official count"
    if name != OURS:
        told += f", mae_fast {rate[OURS] / rate[name]:.2f}x"
    return {
        "kind": "steps",
        "model": reference.model,
        "batch_asked": reference.batch,
        "batch_clips": len(clips),
        "engine": name,
        "ratio": 0.9,
        "precision": "bf16",
        "device": setting.device.type,
        "losses": losses,
        "seconds": steps_of,
        "engines": {
            OURS: {"clips": len(clips)},
            name: {"clips": batch, "peak_memory_mb": peak_mb - before_mb},
        },
        "clips_per_second": rate,
        "official_flop_a_clip": flop,
        "limits": as_record(limits, seconds) if name == OURS else {},
        "conditions": [before, setting.device.conditions()],
        "told": told,
    }


def warmed(engine: Built, clips: Tensor, noise: Tensor) -> int:
    """The greatest batch that fits, after two steps of it."""

    def run(batch: int) -> None:
        engine.optimizer.zero_grad()  # what a step that ran out of memory left
        several(engine, clips[:batch], noise[:batch], steps=2)()

    return fitting(run, len(clips))


def several(
    engine: Built, clips: Tensor, noise: Tensor, steps: int = STEPS_A_SAMPLE
) -> Callable[[], None]:
    """A call that takes steps, one after another."""

    def run() -> None:
        for _ in range(steps):
            engine.step(clips, noise)

    return run
