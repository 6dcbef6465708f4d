"""The engines that take training steps beside each other, and the first step that they must share.

The baselines are those of benchmarks/baselines, one improvement a rung, in the precision that the
name says. `official_fp32` is what the official script runs; `official_sdpa_compile` is the bar.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.records import free
from benchmarks.gpu.setting import Setting
from mae_fast.bench.baselines import Official
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.ours import Ours
from mae_fast.config import ModelConfig

OURS, EAGER = "mae_fast", "mae_fast_without_graph"
LOSS_TOLERANCE = 1e-2  # relative: bf16 against fp32, on the same weights and mask


@dataclass(frozen=True)
class Engine:
    """What builds an engine, and what it computes in. tf32: fp32 products by tensor cores."""

    maker: Ours | Official
    precision: str = "bf16"
    tf32: bool = False


ENGINES = {
    OURS: Engine(Ours(graph=True)),
    EAGER: Engine(Ours()),
    "mae_fast_encode_all": Engine(Ours(encode_all=True, graph=True)),
    "official_fp32": Engine(Official("eager"), "fp32"),
    "official_tf32": Engine(Official("eager"), "fp32", tf32=True),
    "official_bf16": Engine(Official("eager")),
    "official_sdpa": Engine(Official("sdpa", "sdpa")),
    "official_compile": Engine(Official("compile", compiled=True)),
    "official_sdpa_compile": Engine(Official("sdpa_compile", "sdpa", compiled=True)),
    "official_sdpa_compile_fused_adamw": Engine(
        Official("sdpa_compile_fused_adamw", "sdpa", fused_adamw=True, compiled=True)
    ),
}


def build(name: str, cfg: ModelConfig, setting: Setting, ratio: float = 0.9) -> Built:
    """An engine on the setting's device. step(clips, noise) -> loss."""
    engine, device = ENGINES[name], setting.device
    maker = engine.maker
    if isinstance(maker, Official) and maker.compiled:
        # Dynamo gives up after eight models that share their code.
        torch._dynamo.reset()
        maker = replace(maker, compiler=setting.compiler)
    torch.manual_seed(0)
    with torch.device(device):  # starting values of 600 M parameters take a CPU seconds
        built = maker.build(cfg, ratio, device, engine.precision)
    step = built.step
    if engine.precision == "fp32":

        def step(clips: Tensor, noise: Tensor) -> float:
            with products_in(tf32=engine.tf32):
                return built.step(clips, noise)

    return built._replace(step=step)


@contextlib.contextmanager
def products_in(tf32: bool) -> Iterator[None]:
    """fp32 products and convolutions in TF32, or not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def first_losses(
    built: dict[str, Built], clips: Tensor, noise: Tensor, state: dict[str, Tensor]
) -> dict[str, float]:
    """The loss of each engine's first step from the weights `state`, which also warms it up.
    AssertionError where one is not that of the first."""
    losses = {}
    for name, engine in built.items():
        engine.model.load_state_dict(state)
        losses[name] = float(engine.step(clips, noise))
    expected = next(iter(losses.values()))
    for name, loss in losses.items():
        assert abs(loss / expected - 1) <= LOSS_TOLERANCE, (
            f"{name} gives loss {loss}, expected {expected}: not timed"
        )
    return losses


def fitting(run: Callable[[int], object], batch: int) -> int:
    """The greatest of batch, batch / 2, ... whose run(batch) fits into the device's memory."""
    while True:
        try:
            run(batch)
            return batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        free()
        batch //= 2
