"""Other people's models, in the step of their own loop (benchmarks/families.py): as they are, after
mae_fast.accelerate, and so without its CUDA graphs or with what backward needs kept. A checkout is
named by a variable, as the tests name it; mae_fast's own step of the same model stands beside them.
"""

import importlib.util
import os
from collections.abc import Iterator
from functools import partial

from torch import Tensor

import mae_fast
from benchmarks.families import AFTER as AFTER_NAME
from benchmarks.gpu.engines import OURS, build, first_losses
from benchmarks.gpu.records import Declined, Item
from benchmarks.gpu.setting import Setting, smi
from benchmarks.gpu.stages.steps import STEPS_A_SAMPLE, several, warmed
from mae_fast.bench import engines as named
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.timing import interleave, ratio
from mae_fast.config import ModelConfig
from mae_fast.graph import count_launches

# (family, the variable that names its checkout, mae_fast's model of its sizes, clips)
PLAN = (
    ("transformers_sdpa", "", "videomae_base", 64),
    ("mae_st", "MAE_ST_REPOSITORY", "vit_base", 32),
    ("transformers_sdpa", "", "videomae_base", 8),
    ("videomae_v2", "VIDEOMAE_V2_REPOSITORY", "videomae_base", 64),
    ("videomae", "VIDEOMAE_REPOSITORY", "videomae_base", 64),
)
BEFORE, AFTER = "before", "accelerated"
HOW = {AFTER: {}, "keep=True": {"keep": True}, "cuda_graph=False": {"cuda_graph": False}}
ROUNDS = 6
STEPS = 6  # until all graphs are captured, and once more
SAME = 1e-3  # of the last loss, with graphs and without


def items(setting: Setting) -> Iterator[Item]:
    for family, variable, model, clips in setting.some(PLAN):
        run = partial(measure, setting, family, variable, model, clips)
        yield Item(f"{family} {clips} clips", run)


def measure(setting: Setting, family: str, variable: str, model: str, asked: int) -> dict:
    """The record of one family: its steps in turn with those of the accelerated model."""
    path = os.environ.get(variable, "")
    if variable and not path:
        raise Declined(f"{variable} names no checkout")
    if not variable and importlib.util.find_spec("transformers") is None:
        raise Declined("transformers is not installed")
    cfg = setting.cfg(model)
    clips, noise = setting.inputs(cfg, setting.batch(asked))
    own = build(OURS, cfg, setting)
    made = {name: built(setting, family, name, cfg, path) for name in (BEFORE, *HOW)}
    state = {key: t.clone() for key, t in made[BEFORE].model.state_dict().items()}
    losses = first_losses(made, clips[:2], noise[:2], state)
    later = {n: several_losses(e, clips[:2], noise[:2]) for n, e in made.items()}
    last = [later[name][-1] for name in HOW]
    assert max(last) - min(last) <= SAME * min(last), f"losses differ: {later}"
    # As it is last: it takes the most memory, and is halved until it fits beside the others.
    every = {**{name: made[name] for name in HOW}, OURS: own, BEFORE: made[BEFORE]}
    fits = {}
    for name, engine in every.items():
        fits[name] = warmed(setting, engine, clips, noise)
        several(engine, clips[: fits[name][0]], noise[: fits[name][0]], STEPS)()
    runs = {n: several(e, clips[: fits[n][0]], noise[: fits[n][0]]) for n, e in every.items()}
    before = smi()
    found = interleave(runs, setting.rounds(ROUNDS), setting.clock())
    seconds = {n: [s / STEPS_A_SAMPLE / fits[n][0] for s in of] for n, of in found.items()}
    times = {n: ratio(seconds[BEFORE], of) for n, of in seconds.items()}
    words = (f"{n} {1 / min(seconds[n]):.0f} clips/s {x:.2f}x" for n, x in times.items())
    once = {n: several(e, clips[:2], noise[:2], steps=1) for n, e in made.items()}
    return {
        "kind": "accelerate",
        "model": model,
        "family": family,
        "engines": {n: {"clips": batch, "peak_memory_mb": mb} for n, (batch, mb) in fits.items()},
        "seconds_a_clip": seconds,
        "times": times,
        "launches": {name: count_launches(one) for name, one in once.items()},
        "losses": losses,
        "later_losses": later,
        "conditions": [before, smi()],
        "told": ", ".join(words),
    }


def several_losses(engine: Built, clips: Tensor, noise: Tensor) -> list[float]:
    return [float(engine.step(clips, noise)) for _ in range(STEPS)]


def built(setting: Setting, family: str, name: str, cfg: ModelConfig, path: str) -> Built:
    """A family's engine in bf16 autocast, before or after the one line."""
    of = f"benchmarks.families:{family}{AFTER_NAME * (name != BEFORE)}" + f"@{path}" * bool(path)
    engine = named.build(of, cfg, setting.device, "bf16")
    if how := HOW.get(name):
        mae_fast.accelerate(engine.model, **how)
    return engine
