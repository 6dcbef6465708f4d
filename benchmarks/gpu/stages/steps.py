"""Training steps of mae_fast beside each baseline, and at masking ratios beside itself at 90%:
interleaved, on synthetic uint8 clips. `rungs` and `ratios` are plans of this stage.

A step is forward, backward, clip and AdamW. A cell whose batch does not fit into memory takes the
greatest half of it that does; both are compared in clips a second. 0% is an encoder that sees every
token: the decoder and the loss stay those of the 90% mask, since 0% leaves nothing to predict.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass
class Reference:
    """mae_fast, its step as CUDA graphs, at one model and batch at 90%, kept while others take
    turns beside it."""

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
        found: list[int] = []
        self.peak_mb = self.setting.device.peak_mb(
            lambda: found.append(warmed(engine, self.clips, self.noise))
        )
        self.clips, self.noise, self.engine = self.clips[: found[0]], self.noise[: found[0]], engine
        several(engine, self.clips, self.noise)()  # the graphs are captured, which take no more


Plan = Sequence[tuple[str, int, Sequence[str]]]


def items(setting: Setting, plan: Plan = PLAN) -> Iterator[Item]:
    plan = plan[:1] if setting.tiny else plan
    limits = setting.limits()
    for model, batch, engines in plan:
        reference = Reference(setting, model, setting.batch(batch))
        for name in engines:
            yield Item(
                f"{model} {batch} clips {name}",
                lambda reference=reference, name=name: measure(setting, reference, name, limits),
            )


def items_by_ratio(setting: Setting) -> Iterator[Item]:
    references = {m: Reference(setting, m, setting.batch(64)) for m in setting.some(RATIO_MODELS)}
    for masked in RATIOS:
        for model, reference in references.items():
            run = lambda r=reference, masked=masked: measure_ratio(setting, r, masked)  # noqa: E731
            yield Item(f"{model} {masked:.0%}", run)


def measure(setting: Setting, reference: Reference, name: str, limits: dict) -> dict:
    """The record of one engine: mae_fast's with the device's limits, others' with mae_fast's."""
    reference.open()
    cfg, clips, noise = reference.cfg, reference.clips, reference.noise
    ours = reference.engine
    if name == OURS:
        engine, batch, used_mb = ours, len(clips), reference.peak_mb - reference.before_mb
    else:
        before_mb = setting.device.allocated_mb()
        engine = build(name, cfg, setting)
        batch = warmed(engine, clips, noise)
        one = several(engine, clips[:batch], noise[:batch], steps=1)
        used_mb = setting.device.peak_mb(one) - before_mb
    losses = first_losses({OURS: ours, name: engine}, clips[:batch], noise[:batch], reference.state)
    beside = {name: (engine, batch)} | ({} if name == OURS else {OURS: (ours, len(clips))})
    others = limits if name == OURS else {}
    record = taken_in_turn(setting, reference, beside, others)
    record["engines"][name]["peak_memory_mb"] = used_mb
    rate, flop = record["clips_per_second"], official_step_flop(cfg, 1)
    told = f"{rate[name]:.1f} clips/s, {rate[name] * flop / 1e12:.1f} TFLOP/s of the official count"
    if name != OURS:
        told += f", mae_fast {rate[OURS] / rate[name]:.2f}x"
    of = {"engine": name, "ratio": BASE_RATIO, "losses": losses, "official_flop_a_clip": flop}
    return {**record, **of, "told": told}


def measure_ratio(setting: Setting, reference: Reference, masked: float) -> dict:
    """The record of mae_fast at one masking ratio, beside itself at 90%."""
    reference.open()
    cfg, dense = reference.cfg, masked == 0
    name = "mae_fast_encode_all" if dense else OURS
    engine = build(name, cfg, setting, masked or BASE_RATIO)
    checked(engine, reference.clips[:2], reference.noise[:2])
    batch, base = warmed(engine, reference.clips, reference.noise), f"{OURS} at {BASE_RATIO:.0%}"
    beside = {OURS: (engine, batch), base: (reference.engine, len(reference.clips))}
    record = taken_in_turn(setting, reference, beside, {})
    clips = {n: e["clips"] for n, e in record["engines"].items()}
    flop = {
        OURS: step_flop(cfg, batch, masked or BASE_RATIO, encode_all=dense),
        base: step_flop(cfg, clips[base]),
    }
    for n, engine_record in record["engines"].items():
        engine_record["flop"] = flop[n]
    times = ratio(*(record["seconds"][n] for n in (OURS, base))) * clips[base] / batch
    work = flop[OURS] / batch / (flop[base] / clips[base])
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
    clips, noise = reference.clips, reference.noise
    functions = {n: several(e, clips[:batch], noise[:batch]) for n, (e, batch) in engines.items()}
    functions |= {limit: found.run for limit, found in limits.items()}
    before = smi()
    once = sum(setting.device.time(run) for run in functions.values())
    rounds = setting.rounds(int(min(max(SECONDS_AN_ITEM / once, ROUNDS[0]), ROUNDS[1])))
    found = interleave(functions, rounds, timer=setting.device.time)
    seconds = {n: [s / STEPS_A_SAMPLE for s in found[n]] for n in engines}
    return {
        "kind": "steps",
        "model": reference.model,
        "batch_asked": reference.batch,
        "batch_clips": len(clips),
        "precision": "bf16",
        "device": setting.device.type,
        "engines": {n: {"clips": batch} for n, (_, batch) in engines.items()},
        "seconds": seconds,
        "clips_per_second": {
            n: batch / statistics.median(seconds[n]) for n, (_, batch) in engines.items()
        },
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
