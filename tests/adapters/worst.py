"""Random models of every family: the greatest relative errors of loss, outputs and every gradient.

python tests/adapters/worst.py --count 20 --compiled 20 --backend aot_eager [families ...]

Against the model's own forward in fp64: the fused one in fp64; and in fp32 the model's own and the
fused one, eager and compiled. A gradient below a thousandth of a model's greatest one
is held to that size: a key's bias has none but rounding.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

import test_mae_st as mae_st
import test_slowfast as slowfast
import test_transformers as transformers
import test_videomae as videomae
import torch
from compare import Run, differences, results, scattered
from foreign import clips, make
from torch import nn

import mae_fast

WAYS = "fp64 fused eager", "fp32 own eager", "fp32 fused eager", "fp32 fused compiled"


def _mae_st(count: int) -> Iterator[tuple[nn.Module, Run]]:
    for cfg in mae_st._configs(count, seed=5):
        video, ratio = clips(cfg, 3, torch.float64), min(0.75, 1 - 1.5 / cfg.num_patches)
        yield make(cfg), lambda m, v=video, r=ratio: m(v.to(_dtype(m)), r)


def _slowfast(count: int) -> Iterator[tuple[nn.Module, Run]]:
    for seed in range(count):
        model = slowfast.stand_in(seed, **slowfast.random_settings(seed))
        yield model, slowfast.run_with(*slowfast.batch(model))


def _videomae(count: int, family: str = "videomae") -> Iterator[tuple[nn.Module, Run]]:
    for seed in range(count):
        model = videomae.stand_in(family, seed, **videomae.random_settings(seed))
        *_, run = videomae.every_run(model, family, seed)  # of V2 that with two masks
        yield model, run


def _videomae_v2(count: int) -> Iterator[tuple[nn.Module, Run]]:
    return _videomae(count, "videomae_v2")


def _transformers(count: int) -> Iterator[tuple[nn.Module, Run]]:
    from transformers.models.videomae import VideoMAEConfig, VideoMAEForPreTraining

    for seed in range(count):
        torch.manual_seed(seed)
        config = VideoMAEConfig(**transformers.random_settings(seed))
        model = scattered(VideoMAEForPreTraining(config), seed).train()
        yield model, transformers.run_with(*transformers.batch(model, seed))


FAMILIES = {f.__name__[1:]: f for f in (_mae_st, _slowfast, _videomae, _videomae_v2, _transformers)}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def errors(model: nn.Module, run: Run, backend: str | None) -> dict[str, dict[str, float]]:
    """By way of running it: the greatest errors of loss, outputs, gradients."""
    exact = {n: t.double() for n, t in results(copy.deepcopy(model).double(), run).items()}
    found = {}
    for name in WAYS:
        dtype, who, how = name.split()
        if how == "compiled" and backend is None:
            continue
        each = copy.deepcopy(model).to(torch.float64 if dtype == "fp64" else torch.float32)
        each = mae_fast.accelerate(each) if who == "fused" else each
        if how == "compiled":
            torch.compiler.reset()
            each.compile(backend=backend)
        got = {n: t.double() for n, t in results(each, run).items()}
        found[name] = greatest(differences(got, exact, least=1e-3))
    return found


def greatest(found: dict[str, float]) -> dict[str, float]:
    outputs = [d for n, d in found.items() if n.startswith("output")]
    gradients = max(d for n, d in found.items() if not n.startswith("output"))
    return dict(loss=outputs[0], outputs=max(outputs[1:]), gradients=gradients)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--compiled", type=int, default=20, help="as many of them, compiled too")
    parser.add_argument("--backend", default="aot_eager")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 64
    for family in args.families:
        worst: dict[str, dict[str, float]] = {}
        for i, (model, run) in enumerate(FAMILIES[family](args.count), 1):
            print(f"{family} {i} of {args.count}", file=sys.stderr)
            backend = args.backend if i <= args.compiled else None
            for name, error in errors(model, run, backend).items():
                kept = worst.setdefault(name, dict.fromkeys(error, 0.0))
                worst[name] = {part: max(e, kept[part]) for part, e in error.items()}
        print(f"{family}, {args.count} models, {args.compiled} of them by {args.backend}")
        for name, error in worst.items():
            columns = "  ".join(f"{part} {e:.1e}" for part, e in error.items())
            print(f"  {name:20} {columns}", flush=True)
