"""What the benchmarks of ops share: one op at one shape, ours by backend beside a baseline.

A file bench_<op>.py makes its cases and ends in `bench_<op> = entry("<op>", case, ...)`, which
`make bench` (pytest-benchmark) and `python -m benchmarks.ops` (interleaved, for the records) find.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mae_fast.config import ModelConfig, preset
from mae_fast.masking import draw_ids
from mae_fast.ops import OPS, dispatch

MODEL, CLIPS = "vit_base", 2
MEAN, STD, EPS = 0.45, 0.225, 1e-6
# Of the norm: fp32 sums of the official expressions, taken in other orders.
TOLERANCE = 1e-4

Run = Callable[[], Sequence[Tensor]]


@dataclass
class Case:
    """One op at one shape: `ours` under each backend, against `baseline` under its name.

    A run gives all outputs and gradients. `bytes` is what must move at the least, `flop` what must
    be computed; give the one that bounds the op. `project` brings the baseline's results into the
    form of ours. `ours` may be one run for each backend, where runs have a state.
    """

    op: str
    shape: str
    ours: Run | dict[str, Run]
    baseline: Run
    baseline_name: str
    bytes: int = 0
    flop: int = 0
    project: Callable[..., Sequence[Tensor]] = lambda *results: results
    declined: dict[str, str] = field(default_factory=dict)

    def runs(self) -> dict[str, Run]:
        """{backend: run}, the baseline last."""
        ours = self.ours
        if not isinstance(ours, dict):
            ours = dict.fromkeys(OPS[self.op].backends, ours)
        found = {name: forced(self.op, name, run) for name, run in ours.items()}
        return {**found, self.baseline_name: self.baseline}

    def check(self, only: str | None = None) -> dict[str, Run]:
        """The runs that work here and give what the baseline gives; `declined` says why the others
        do not. Raises AssertionError where one gives something else."""
        runs = self.runs()
        expected = self.project(*self.baseline())
        for name in [n for n in runs if only in (None, n) and n != self.baseline_name]:
            try:
                got = runs[name]()
            except dispatch.BackendError as e:
                self.declined[name] = str(e)
                del runs[name]
                continue
            assert len(got) == len(expected), f"{self.op}: {name} gives {len(got)} results"
            greatest = max(float(e.norm()) for e in expected)
            for i, (g, e) in enumerate(zip(got, expected, strict=True)):
                error, allowed = (
                    float((g - e).norm()),
                    TOLERANCE * float(e.norm()) + 1e-6 * greatest,
                )
                assert error <= allowed, (
                    f"{self.op}, {self.shape}: {name} differs from {self.baseline_name}, "
                    f"result {i}: {error:.1e} > {allowed:.1e}"
                )
        return runs


def forced(op: str, backend: str, run: Run) -> Run:
    """`run` with the op's backend forced."""

    def forced_run() -> Sequence[Tensor]:
        with dispatch.backends(**{op: backend}):
            return run()

    return forced_run


def forward_backward(
    function: Callable[[], Tensor | tuple[Tensor, ...]],
    leaves: Sequence[Tensor] = (),
    dout: Tensor | None = None,
) -> Run:
    """A run of `function` and of its backward into `leaves`: [outputs, gradients].

    The outputs' gradient is `dout`, or 1 for a scalar, or random numbers, the same every time.
    """
    douts = [] if dout is None else [dout]
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> list[Tensor]:
        outs = function()
        outs = outs if isinstance(outs, tuple) else (outs,)
        if not leaves:
            return list(outs)
        if not douts:
            g = torch.Generator().manual_seed(0)
            douts.extend(torch.randn(o.shape, generator=g) if o.dim() else o * 0 + 1 for o in outs)
        grads = torch.autograd.grad(outs, leaves, [d.detach() for d in douts])
        return [*(o.detach() for o in outs), *grads]

    return run


def entry(op: str, *cases: Callable[[ModelConfig, int], Case], baseline: str) -> Callable:
    """The pytest-benchmark function of an op: every case, under every backend and the baseline."""

    @pytest.mark.parametrize("case", cases, ids=lambda c: c.__name__)
    @pytest.mark.parametrize("variant", [*OPS[op].backends, baseline])
    def bench(benchmark, case, variant):
        torch.manual_seed(0)
        made = case(preset(MODEL), CLIPS)
        runs = made.check(only=variant)
        if variant in made.declined:
            pytest.skip(made.declined[variant])
        benchmark.extra_info.update(model=MODEL, clips=CLIPS, shape=made.shape)
        benchmark(runs[variant])

    bench.cases = cases
    return bench


def clip_and_ids(cfg: ModelConfig, clips: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(uint8 video, the same normalised as the official loader does, ids_keep, ids_mask) at 90%."""
    size = (clips, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
    video = torch.randint(0, 256, size, dtype=torch.uint8)
    ids = draw_ids("random", cfg.grid, 0.9, seed=0, step=0, samples=torch.arange(clips))
    return video, (video.float() / 255 - MEAN) / STD, *ids


def rows(x: Tensor, ids: Tensor) -> Tensor:
    """x [B, N, D], ids [B, K] -> x[b, ids[b]]."""
    return x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[-1]))


def decoder_shape(cfg: ModelConfig, clips: int) -> tuple[int, int, int]:
    """The decoder's tokens [B, N, E], which is most of what a step moves."""
    return clips, cfg.num_patches + int(cfg.cls_embed), cfg.decoder_embed_dim
