"""Training steps of mae_fast beside each baseline, and at masking ratios beside itself at 90%:
interleaved, on synthetic uint8 clips. `rungs` and `ratios` are stages of their own.

A step is forward, backward, clip and AdamW. A cell whose batch does not fit into memory takes the
greatest half of it that does; both are compared in clips a second. 0% is an encoder that sees every
token: the decoder and the loss stay those of the 90% mask, since 0% leaves nothing to predict.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.gpu.engines import BAR, EAGER, ENCODE_ALL, OURS, build, first_losses, fitting
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting, smi
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.flops import BASE_RATIO, official_step_flop, step_flop
from mae_fast.bench.machine import as_record
from mae_fast.bench.timing import interleave, ratio
from mae_fast.config import ModelConfig
from mae_fast.ops import OPS, dispatch

FIRST, FP32 = (OURS, BAR, EAGER), ("official_fp32", "official_tf32")
LADDER = ("official_sdpa", "official_bf16", *FP32)
SHORT = (OURS, "official_sdpa", "official_bf16")
REST = ("official_compile", f"{BAR}_fused_adamw")
# What to measure, the most valuable first: (model, clips, engines); then `rungs`.
PLAN = (("vit_base", 64, FIRST), ("vit_large", 64, FIRST))
BOTH = ("vit_large", "vit_base")
RUNGS = (
    *((model, 64, LADDER) for model in BOTH),
    ("vit_huge16", 64, SHORT),
    *((model, batch, SHORT) for batch in (8, 128) for model in BOTH),
    *((model, 64, REST) for model in BOTH),
    *((m, batch, engines) for engines in ((BAR,), FP32, REST) for batch in (8, 128) for m in BOTH),
    ("vit_huge16", 64, (BAR, *FP32)),
    *(("vit_huge16", batch, (*SHORT, BAR)) for batch in (8, 128)),
)
RATIOS = (0.0, 0.75, 0.95, 0.5, 0.8, 0.25)
STEPS_A_SAMPLE = 3  # one after another, so that the host may run ahead
SECONDS_AN_ITEM = 4.0
ROUNDS = (3, 10)  # at least and at most


class Reference:
    """mae_fast, its step as CUDA graphs, at 90%, and as many of the clips that were asked for as
    fit; kept while others take turns beside it."""

    def __init__(self, setting: Setting, model: str, asked: int) -> None:
        self.model, self.asked, self.cfg = model, asked, setting.cfg(model)
        clips, noise = setting.inputs(self.cfg, asked)
        self.engine, fits, self.used_mb = opened(setting, OURS, self.cfg, clips, noise)
        self.clips, self.noise = clips[:fits], noise[:fits]
        self.state = copy.deepcopy(self.engine.model.state_dict())
        several(self.engine, self.clips, self.noise)()  # the graphs are captured: they take no more


Lazy = Callable[[], Reference]  # built within the first item that needs it


def items(setting: Setting, plan: Sequence[tuple] = PLAN) -> Iterator[Item]:
    limits = setting.limits()
    for model, batch, engines in setting.some(plan):
        reference = cache(partial(Reference, setting, model, setting.batch(batch)))
        for name in engines:
            run = partial(measure, setting, reference, name, limits)
            yield Item(f"{model} {batch} clips {name}", run)


def items_of_rungs(setting: Setting) -> Iterator[Item]:
    """The other rungs and sizes, as `items` takes those that decide."""
    every = (("vit_base", 64, (*LADDER, *REST)),)  # each engine once
    return items(setting, every if setting.tiny else RUNGS)


def items_by_ratio(setting: Setting) -> Iterator[Item]:
    """Masking ratios from 0 to 95%, each beside mae_fast at 90%."""
    models, batch = setting.some(BOTH), setting.batch(64)
    references = {model: cache(partial(Reference, setting, model, batch)) for model in models}
    for masked in RATIOS:
        for model in models:
            run = partial(measure_ratio, setting, references[model], masked)
            yield Item(f"{model} {masked:.0%}", run)


def measure(setting: Setting, lazy: Lazy, name: str, limits: dict) -> dict:
    """The record of one engine: mae_fast's with the device's limits, others' with mae_fast's."""
    reference = lazy()
    clips, noise, used_mb = reference.clips, reference.noise, reference.used_mb
    engines = {OURS: (reference.engine, len(clips))}
    if name != OURS:
        engine, batch, used_mb = opened(setting, name, reference.cfg, clips, noise)
        engines, limits = {name: (engine, batch)} | engines, {}
    engine, batch = engines[name]
    pair = {OURS: reference.engine, name: engine}
    losses = first_losses(pair, clips[:batch], noise[:batch], reference.state)
    record = taken_in_turn(setting, reference, engines, limits)
    record["engines"][name]["peak_memory_mb"] = used_mb
    rate, flop = record["clips_per_second"], official_step_flop(reference.cfg, 1)
    told = f"{rate[name]:.1f} clips/s, {rate[name] * flop / 1e12:.1f} TFLOP/s of the official count"
    if name != OURS:
        told += f", mae_fast {rate[OURS] / rate[name]:.2f}x"
    of = {"engine": name, "ratio": BASE_RATIO, "losses": losses, "official_flop_a_clip": flop}
    return {**record, **of, "told": told}


def measure_ratio(setting: Setting, lazy: Lazy, masked: float) -> dict:
    """The record of mae_fast at one masking ratio, beside itself at 90%."""
    reference, dense = lazy(), masked == 0
    cfg, clips, noise = reference.cfg, reference.clips, reference.noise
    engine = build(ENCODE_ALL if dense else OURS, cfg, setting, masked or BASE_RATIO)
    by_reference = dispatch.backends(**dict.fromkeys(OPS, "reference"))
    pair = {"it": engine, "plain torch": engine._replace(step=by_reference(engine.step))}
    first_losses(pair, clips[:2], noise[:2], copy.deepcopy(engine.model.state_dict()))
    (batch, _), base = warmed(setting, engine, clips, noise), f"{OURS} at {BASE_RATIO:.0%}"
    engines = {OURS: (engine, batch), base: (reference.engine, len(clips))}
    record = taken_in_turn(setting, reference, engines, {})
    flop = step_flop(cfg, batch, masked or BASE_RATIO, encode_all=dense)
    base_flop = step_flop(cfg, len(clips))
    record["engines"][OURS]["flop"], record["engines"][base]["flop"] = flop, base_flop
    times = ratio(*(record["seconds"][n] for n in (OURS, base))) * len(clips) / batch
    work = flop / batch / (base_flop / len(clips))
    told = f"{record['clips_per_second'][OURS]:.1f} clips/s; a clip takes {times:.2f}x that of "
    return {
        **record,
        "ratio": masked,
        "times_the_base": times,
        "times_the_base_in_flop": work,
        "told": f"{told}{BASE_RATIO:.0%} ({work:.2f}x in FLOP)",
    }


def taken_in_turn(
    setting: Setting, reference: Reference, engines: dict[str, tuple[Built, int]], limits: dict
) -> dict:
    """Steps of {name: (engine, clips)} and the device's limits in turn, as a record."""
    clips, noise, timer = reference.clips, reference.noise, setting.clock()
    functions = {n: several(e, clips[:batch], noise[:batch]) for n, (e, batch) in engines.items()}
    functions |= {limit: found.run for limit, found in limits.items()}
    before = smi()
    once = sum(map(timer, functions.values()))
    rounds = setting.rounds(int(min(max(SECONDS_AN_ITEM / once, ROUNDS[0]), ROUNDS[1])))
    found = interleave(functions, rounds, timer)
    seconds = {n: [s / STEPS_A_SAMPLE for s in found[n]] for n in engines}
    rates = {n: batch / statistics.median(seconds[n]) for n, (_, batch) in engines.items()}
    return {
        "kind": "steps",
        "model": reference.model,
        "batch_asked": reference.asked,
        "batch_clips": len(clips),
        "precision": "bf16",
        "device": setting.device,
        "engines": {n: {"clips": batch} for n, (_, batch) in engines.items()},
        "seconds": seconds,
        "clips_per_second": rates,
        "limits": as_record(limits, found),
        "conditions": [before, smi()],
    }


def opened(
    setting: Setting, name: str, cfg: ModelConfig, clips: Tensor, noise: Tensor
) -> tuple[Built, int, float]:
    """(an engine, the number of these clips that fits, MB that a step of them takes)."""
    before_mb = torch.cuda.memory_allocated() / 2**20
    engine = build(name, cfg, setting)
    batch, peak_mb = warmed(setting, engine, clips, noise)
    return engine, batch, peak_mb - before_mb


def warmed(setting: Setting, engine: Built, clips: Tensor, noise: Tensor) -> tuple[int, float]:
    """(the greatest batch that fits, after two steps of it; peak MB of the second)."""

    def run(batch: int) -> float:
        engine.optimizer.zero_grad()  # what a step that ran out of memory left
        one = several(engine, clips[:batch], noise[:batch], steps=1)
        one()
        return setting.peak_mb(one)

    return fitting(run, len(clips))


def several(
    engine: Built, clips: Tensor, noise: Tensor, steps: int = STEPS_A_SAMPLE
) -> Callable[[], None]:
    """A call that takes steps, one after another."""

    def run() -> None:
        for _ in range(steps):
            engine.step(clips, noise)

    return run
