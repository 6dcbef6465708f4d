"""Steps at masking ratios from 0 to 95%, each beside the same engine at 90%.

0% is an encoder that sees every token: the decoder and the loss stay those of the 90% mask, since
0% leaves nothing to predict (mae_fast_encode_all).
"""

import statistics
from collections.abc import Iterator

from benchmarks.gpu.engines import LOSS_TOLERANCE, OURS, build
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages.steps import STEPS_A_SAMPLE, several, warmed
from mae_fast.bench.flops import step_flop
from mae_fast.bench.timing import interleave, ratio
from mae_fast.ops import OPS, dispatch

BATCH, BASE = 64, 0.9
ROUNDS = 4
BESIDE = f"mae_fast at {BASE:.0%}"
RATIOS = (0.0, 0.75, 0.95, 0.5, 0.8, 0.25)
MODELS = ("vit_large", "vit_base")


def items(setting: Setting) -> Iterator[Item]:
    for masked in RATIOS:
        for model in setting.some(MODELS):
            run = lambda model=model, masked=masked: measure(setting, model, masked)  # noqa: E731
            yield Item(f"{model} {masked:.0%}", run)


def measure(setting: Setting, model: str, masked: float) -> dict:
    cfg, dense = setting.cfg(model), masked == 0
    name = "mae_fast_encode_all" if dense else OURS
    engine = build(name, cfg, setting, BASE if dense else masked)
    base = build(OURS, cfg, setting, BASE)
    asked = setting.batch(BATCH)
    clips, noise = setting.clips(cfg, asked), setting.noise(cfg, asked)
    checked(engine, clips[:2], noise[:2])
    warmed(base, clips, noise)
    batch = warmed(engine, clips, noise)
    functions = {
        "this": several(engine, clips[:batch], noise[:batch]),
        "base": several(base, clips, noise),
    }
    seconds = interleave(functions, setting.rounds(ROUNDS), timer=setting.device.time)
    a_clip = {
        "this": [s / STEPS_A_SAMPLE / batch for s in seconds["this"]],
        "base": [s / STEPS_A_SAMPLE / asked for s in seconds["base"]],
    }
    flop = {
        "this": step_flop(cfg, batch, BASE if dense else masked, encode_all=dense) / batch,
        "base": step_flop(cfg, asked, BASE) / asked,
    }
    times, work = ratio(a_clip["this"], a_clip["base"]), flop["this"] / flop["base"]
    rate = 1 / statistics.median(a_clip["this"])
    return {
        "kind": "steps",
        "model": model,
        "ratio": masked,
        "batch_clips": batch,
        "precision": "bf16",
        "device": setting.device.type,
        "engines": {OURS: {"clips": batch}, BESIDE: {"clips": asked}},
        "seconds": {
            OURS: [batch * s for s in a_clip["this"]],
            BESIDE: [asked * s for s in a_clip["base"]],
        },
        "flop_a_clip": flop,
        "times_the_base": times,
        "times_the_base_in_flop": work,
        "told": f"{rate:.1f} clips/s; a clip takes {times:.2f}x that of {BASE:.0%}"
        f" ({work:.2f}x in FLOP)",
    }


def checked(engine, clips, noise) -> None:
    """AssertionError where the loss is not that of plain torch on the same weights."""
    state = {k: v.clone() for k, v in engine.model.state_dict().items()}
    ours = float(engine.step(clips, noise))
    engine.model.load_state_dict(state)
    with dispatch.backends(**dict.fromkeys(OPS, "reference")):
        plain = float(engine.step(clips, noise))
    assert abs(ours / plain - 1) <= LOSS_TOLERANCE, f"loss {ours}, plain torch gives {plain}"
