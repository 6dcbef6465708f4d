"""Training steps of mae_fast beside each baseline, and at masking ratios beside itself at 90%:
interleaved, on synthetic uint8 clips. `rungs` and `ratios` are stages of their own.

A step is forward, backward, clip and AdamW. A cell whose batch does not fit into memory takes the
greatest half of it that does; both are compared in clips a second. 0% is an encoder that sees every
token: the decoder and the loss stay those of the 90% mask, since 0% leaves nothing to predict.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.gpu.device import smi
from benchmarks.gpu.engines import EAGER, LOSS_TOLERANCE, OURS, build, first_losses, fitting
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.flops import BASE_RATIO, official_step_flop, step_flop
from mae_fast.bench.machine import as_record
from mae_fast.bench.timing import interleave, ratio
from mae_fast.ops import OPS, dispatch

BAR = "official_sdpa_compile"
FIRST = (OURS, BAR, EAGER)
LADDER = ("official_sdpa", "official_bf16", "official_fp32", "official_tf32")
SHORT = (OURS, "official_sdpa", "official_bf16")
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
RATIOS, RATIO_MODELS = (0.0, 0.75, 0.95, 0.5, 0.8, 0.25), ("vit_large", "vit_base")
STEPS_A_SAMPLE = 3  # one after another, so that the host may run ahead
SECONDS_AN_ITEM = 4.0
ROUNDS = (3, 10)  # at least and at most


class Reference:
    """mae_fast, its step as CUDA graphs, at 90%, and as many of the clips that were asked for as
    fit; kept while others take turns beside it."""

    def __init__(self, setting: Setting, model: str, asked: int) -> None:
        self.model, self.asked, self.cfg = model, asked, setting.cfg(model)
        before_mb = allocated_mb()
        self.engine = build(OURS, self.cfg, setting)
        self.state = {k: v.clone() for k, v in self.engine.model.state_dict().items()}
        clips, noise = setting.clips(self.cfg, asked), setting.noise(self.cfg, asked)
        fits: list[int] = []
        peak_mb = setting.peak_mb(lambda: fits.append(warmed(self.engine, clips, noise)))
        self.used_mb = peak_mb - before_mb
        self.clips, self.noise = clips[: fits[0]], noise[: fits[0]]
        several(self.engine, self.clips, self.noise)()  # the graphs are captured: they take no more


Plan = Sequence[tuple[str, int, Sequence[str]]]
Opened = Callable[[], Reference]  # built within the first item that needs it


def items(setting: Setting, plan: Plan = PLAN) -> Iterator[Item]:
    plan = plan[:1] if setting.tiny else plan
    limits = setting.limits()
    for model, batch, engines in plan:
        opened = cache(partial(Reference, setting, model, setting.batch(batch)))
        for name in engines:
            run = partial(measure, setting, opened, name, limits)
            yield Item(f"{model} {batch} clips {name}", run)


def items_of_rungs(setting: Setting) -> Iterator[Item]:
    """The other rungs and sizes, as `items` takes those that decide."""
    every = (("vit_base", 64, (*LADDER, *REST)),)  # each engine once
    return items(setting, every if setting.tiny else RUNGS)


def items_by_ratio(setting: Setting) -> Iterator[Item]:
    """Masking ratios from 0 to 95%, each beside mae_fast at 90%."""
    models, batch = setting.some(RATIO_MODELS), setting.batch(64)
    opened = {model: cache(partial(Reference, setting, model, batch)) for model in models}
    for masked in RATIOS:
        for model in models:
            run = partial(measure_ratio, setting, opened[model], masked)
            yield Item(f"{model} {masked:.0%}", run)


def measure(setting: Setting, opened: Opened, name: str, limits: dict) -> dict:
    """The record of one engine: mae_fast's with the device's limits, others' with mae_fast's."""
    reference = opened()
    ours, clips, noise = reference.engine, reference.clips, reference.noise
    beside = {OURS: (ours, len(clips))}
    if name == OURS:
        engine, batch, used_mb = ours, len(clips), reference.used_mb
    else:
        before_mb, limits = allocated_mb(), {}
        engine = build(name, reference.cfg, setting)
        batch = warmed(engine, clips, noise)
        one = several(engine, clips[:batch], noise[:batch], steps=1)
        used_mb = setting.peak_mb(one) - before_mb
        beside = {name: (engine, batch)} | beside
    losses = first_losses({OURS: ours, name: engine}, clips[:batch], noise[:batch], reference.state)
    record = taken_in_turn(setting, reference, beside, limits)
    record["engines"][name]["peak_memory_mb"] = used_mb
    rate, flop = record["clips_per_second"], official_step_flop(reference.cfg, 1)
    told = f"{rate[name]:.1f} clips/s, {rate[name] * flop / 1e12:.1f} TFLOP/s of the official count"
    if name != OURS:
        told += f", mae_fast {rate[OURS] / rate[name]:.2f}x"
    of = {"engine": name, "ratio": BASE_RATIO, "losses": losses, "official_flop_a_clip": flop}
    return {**record, **of, "told": told}


def measure_ratio(setting: Setting, opened: Opened, masked: float) -> dict:
    """The record of mae_fast at one masking ratio, beside itself at 90%."""
    reference, dense = opened(), masked == 0
    cfg, clips, noise = reference.cfg, reference.clips, reference.noise
    name = "mae_fast_encode_all" if dense else OURS
    engine = build(name, cfg, setting, masked or BASE_RATIO)
    checked(engine, clips[:2], noise[:2])
    batch, base = warmed(engine, clips, noise), f"{OURS} at {BASE_RATIO:.0%}"
    beside = {OURS: (engine, batch), base: (reference.engine, len(clips))}
    record = taken_in_turn(setting, reference, beside, {})
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


def checked(engine: Built, clips: Tensor, noise: Tensor) -> None:
    """AssertionError where the loss is not that of plain torch on the same weights."""
    state = {k: v.clone() for k, v in engine.model.state_dict().items()}
    ours = float(engine.step(clips, noise))
    engine.model.load_state_dict(state)
    with dispatch.backends(**dict.fromkeys(OPS, "reference")):
        plain = float(engine.step(clips, noise))
    assert abs(ours / plain - 1) <= LOSS_TOLERANCE, f"loss {ours}, plain torch gives {plain}"


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


def allocated_mb() -> float:
    return torch.cuda.memory_allocated() / 2**20
