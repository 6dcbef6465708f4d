"""The engines that take training steps beside each other, and the first step that they must share.

The baselines are those of benchmarks/baselines, one improvement a rung, in the precision that the
name says. `official_fp32` is what the official script runs; `official_sdpa_compile` is the bar.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.records import free
from benchmarks.gpu.setting import Setting
from mae_fast.bench.baselines import Official
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.ours import Ours
from mae_fast.config import ModelConfig

T = TypeVar("T")
OURS, EAGER = "mae_fast", "mae_fast_without_graph"
ENCODE_ALL, BAR = "mae_fast_encode_all", "official_sdpa_compile"
LOSS_TOLERANCE = 1e-2  # relative: bf16 against fp32, on the same weights and mask
# What builds an engine, and what it computes in; tf32: fp32 whose products tensor cores make.
ENGINES = {
    OURS: (Ours(graph=True), "bf16"),
    EAGER: (Ours(), "bf16"),
    ENCODE_ALL: (Ours(encode_all=True, graph=True), "bf16"),
    "official_fp32": (Official("eager"), "fp32"),
    "official_tf32": (Official("eager"), "tf32"),
    "official_bf16": (Official("eager"), "bf16"),
    "official_sdpa": (Official("sdpa", "sdpa"), "bf16"),
    "official_compile": (Official("compile", compiled=True), "bf16"),
    BAR: (Official("bar", "sdpa", compiled=True), "bf16"),
    f"{BAR}_fused_adamw": (Official("fused", "sdpa", fused_adamw=True, compiled=True), "bf16"),
}


def build(name: str, cfg: ModelConfig, setting: Setting, ratio: float = 0.9) -> Built:
    """An engine on the setting's device. step(clips, noise) -> loss."""
    (maker, precision), device = ENGINES[name], setting.device
    if getattr(maker, "compiled", False):
        # Dynamo gives up after eight models that share their code.
        torch._dynamo.reset()
        maker = replace(maker, compiler=setting.compiler)
    torch.manual_seed(0)
    with torch.device(device):  # starting values of 600 M parameters take a CPU seconds
        if precision == "bf16":
            return maker.build(cfg, ratio, device, precision)
        built = maker.build(cfg, ratio, device)
    return built._replace(step=products_in(tf32=precision == "tf32")(built.step))


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
        assert abs(losses[name] / expected - 1) <= LOSS_TOLERANCE, (
            f"{name} gives loss {losses[name]}, expected {expected}: not timed"
        )
    return losses


def fitting(run: Callable[[int], T], batch: int) -> tuple[int, T]:
    """The greatest of batch, batch / 2, ... whose run(batch) fits into the device's memory, and
    what that gives."""
    while True:
        try:
            return batch, run(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        free()
        batch //= 2
