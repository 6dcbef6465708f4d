"""torch.compile of the baselines that `steps` times, while the tests run: it takes a minute a
model, and what it makes stays in torch's cache on disk."""

import time
from collections.abc import Iterator

from benchmarks.gpu.engines import build
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting

PLAN = (("vit_large", 64), ("vit_base", 64))
ENGINE = "official_sdpa_compile"


def items(setting: Setting) -> Iterator[Item]:
    for model, batch in setting.some(PLAN):
        run = lambda model=model, batch=batch: compiled(setting, model, batch)  # noqa: E731
        yield Item(f"{model} {batch} clips {ENGINE}", run)


def compiled(setting: Setting, model: str, batch: int) -> dict:
    cfg, batch = setting.cfg(model), setting.batch(batch)
    engine = build(ENGINE, cfg, setting)
    began = time.perf_counter()
    engine.step(setting.clips(cfg, batch), setting.noise(cfg, batch))
    seconds = time.perf_counter() - began
    return {"first_step_seconds": seconds, "told": f"its first step took {seconds:.1f} s"}
