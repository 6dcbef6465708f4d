"""`mae-fast bench ops`: each op on the calls that a training step makes, by every backend, beside
what it replaces, against the machine's limits of the same rounds.

pytest-benchmark drives it, through the suite mae_fast/bench/bench_ops.py, which `make bench` runs
as it is; `make gpu`, where nothing may be installed, calls `measure` itself. A variant whose error
against fp64 is more than twice plain torch's is not timed.
"""

import contextlib
import importlib
import json as jsonlib
import random
import statistics
import sys
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_fast.bench import machine
from mae_fast.bench.baselines import training
from mae_fast.bench.baselines.ops import baseline
from mae_fast.bench.calls import Call, Run, calls, check
from mae_fast.bench.engines import QUICK, config_of
from mae_fast.bench.records import append
from mae_fast.bench.table import text_table
from mae_fast.bench.timing import clock, interleave, ratio, share, spread
from mae_fast.config import ModelConfig, TrainConfig
from mae_fast.environment import environment
from mae_fast.errors import BackendError, ConfigError
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS, dispatch
from mae_fast.ops.work import ADAMW_BYTES, Work
from mae_fast.optim import clipped_step, make_optimizer

DIRECTIONS = ("forward", "forward_backward")
SMALL = 2  # clips on which a backend is checked in fp64
DIFFER = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the norm, from plain torch, on all clips
CALLS_A_SAMPLE = 300  # of the smallest input, for a clock that is coarser than one
# The smallest input of every op: two patches of two pixels, tokens of one value.
SMALLEST = ModelConfig(
    img_size=2,
    patch_size=2,
    in_chans=3,
    num_frames=2,
    t_patch_size=1,
    pred_t_dim=2,
    embed_dim=1,
    depth=1,
    num_heads=1,
    decoder_embed_dim=1,
    decoder_depth=1,
    decoder_num_heads=1,
)


@dataclass(frozen=True)
class Plan:
    """What is timed, and in what."""

    ops: tuple[str, ...] = ()
    model: str = "vit_base"
    clips: int = 2
    ratio: float = 0.9
    precision: str = "fp32"
    device: str = "cpu"
    rounds: int = 15

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def cases(self) -> list[tuple[Call, Call]]:
        """Calls of these ops, and the same on few clips; of all ops: in each phase the one that
        does most, and the loss as VideoMAE takes it."""
        cfg = config_of(self.model)
        found, small = (
            calls(cfg, clips, self.ratio, self.dtype)
            for clips in (self.clips, min(SMALL, self.clips))
        )
        pairs = list(zip(found, small, strict=True))
        if self.ops:
            return [pair for pair in pairs if pair[0].op in self.ops]
        most: dict[tuple[str, str], tuple[Call, Call]] = {}
        for pair in pairs:
            key = pair[0].phase, pair[0].op
            if key not in most or _amount(pair[0]) > _amount(most[key][0]):
                most[key] = pair
        loss = next(pair for pair in pairs if pair[0].op == "masked_mse")
        return [*most.values(), tuple(by_channel(call, cfg) for call in loss)]


@dataclass(eq=False)
class Planned:
    """What a run of the suite is given: its plan, and where its records go. A plugin of pytest."""

    plan: Plan
    records: list[dict[str, Any]]


def _amount(call: Call) -> float:
    return call.count * sum(w.seconds(1e11, 1e10) for w in call.work())


def by_channel(call: Call, cfg: ModelConfig) -> Call:
    """VideoMAE's loss: every frame is a target, each channel of a patch normalised alone."""
    pred, video, ids, *_ = call.args
    values = cfg.in_chans * cfg.t_patch_size * cfg.patch_size**2
    pred = torch.empty(*ids.shape, values, dtype=pred.dtype, device="meta")
    pixels = (tuple(range(cfg.num_frames)), cfg.t_patch_size, cfg.patch_size, 0.0, 1.0, "channel")
    return replace(call, args=(pred, video, ids, *pixels))


def ops(
    ops: tuple[str, ...] = (),
    model: str = "vit_base",
    batch: int = 2,
    ratio: float = 0.9,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 15,
    out: str = "",
    quick: bool = False,
    json: bool = False,
) -> None:
    """Time ops on the calls of a training step, forward and with backward, by every backend, beside
    what the official code or torch computes there, and against this machine's limits; of all ops
    also what one call costs on the smallest input. Runs pytest-benchmark, which must be installed.

    Args:
        ops: which ones, every different call of them; by default all, the largest calls of each.
        model: vit_tiny ... vit_huge, videomae_base, or a run's CONFIG.toml, whose [model] is taken.
        batch: clips a step.
        ratio: masked share in (0, 1).
        precision: fp32, or bf16 by autocast with fp32 weights.
        device: where they run.
        rounds: timed calls of each backend.
        out: append the records to this file.
        quick: a tiny model and two rounds, to see that all works; the numbers say nothing.
        json: print one JSON document, and nothing else on stdout.
    """
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        raise ConfigError(f"unknown op {unknown[0]!r} (known: {', '.join(OPS)})")
    model, rounds = (QUICK, 2) if quick else (model, rounds)
    plan = Plan(ops, model, batch, ratio, precision, device, rounds)
    found, code = run_suite(plan, quiet=json)
    for record in found if out else ():
        append(out, record)
    if json:
        print(jsonlib.dumps(found, indent=1))
    else:
        print(table(found))
    if code:
        raise ConfigError("an op is wrong, and was not timed: its reason stands above")


def run_suite(plan: Plan, quiet: bool) -> tuple[list[dict[str, Any]], int]:
    """(records, pytest's exit code) of the suite under this plan."""
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as e:
        raise ConfigError(
            f"bench ops needs pytest-benchmark (pip install pytest-benchmark): {e}"
        ) from e
    planned = Planned(plan, [])
    options = "-q -p no:cacheprovider -p no:xdist --benchmark-disable-gc --benchmark-quiet"
    suite = str(Path(__file__).with_name("bench_ops.py"))
    with contextlib.redirect_stdout(sys.stderr if quiet else sys.stdout):
        code = pytest.main([suite, *options.split()], plugins=[planned])
    return planned.records, int(code)


def measure(
    plan: Plan,
    call: Call,
    small: Call,
    direction: str,
    limits: dict[str, machine.Limit],
    beside: dict[str, Callable] | None = None,
    timer: Callable[[Run], float] | None = None,
    benchmark: Any = None,
) -> dict[str, Any]:
    """The record of one call in one direction: by backend, by what it replaces, or by the functions
    `beside` in its place, and the limits, in turn. `wrong` says what gave wrong results."""
    call, small = call.real(plan.device), small.real(plan.device)
    with plan.autocast():
        usable, declined, wrong = _usable(plan, call, small, beside or {})
        run_of = call.forward if direction == "forward" else call.both
        runs = {name: run_of(function) for name, function in usable.items()}
        chosen, base = next(iter(runs)), "reference"
        if beside is None:
            made = baseline(call.op, call.args)
            theirs, base = replace(call, args=made.args), made.name
            runs[base] = theirs.forward(made.function)
            if direction != "forward":
                runs[base] = theirs.both(made.function, made.theirs)
                results = made.ours(*runs[base]())
                _agree(call, base, results, runs[chosen](), plan.dtype)
        amount, backward = call.work()
        amount = amount if direction == "forward" else amount + backward
        seconds = time_runs(runs, limits, plan, timer, benchmark)
    return {
        "what": f"op, {direction.replace('_', ' + ')}, interleaved, caches cold",
        "op": call.op,
        "shape": call.shape,
        "direction": direction,
        "calls_a_step": call.count,
        "baseline": base,
        **_record(plan, amount, runs, limits, seconds),
        "declined": declined,
        "wrong": wrong,
    }


def _record(
    plan: Plan,
    work: Work,
    runs: dict[str, Run],
    limits: dict[str, machine.Limit],
    seconds: dict[str, list[float]],
) -> dict[str, Any]:
    """What the record of an op has by its plan and its times. The first run is the one chosen."""
    return {
        "kind": "op",
        "model": plan.model,
        "batch_clips": plan.clips,
        "ratio": plan.ratio,
        "precision": plan.precision,
        "device": plan.device,
        "chosen": next(iter(runs)),
        "flop": work.flop,
        "bytes": work.bytes,
        "seconds": {name: seconds[name] for name in runs},
        "limits": machine.as_record(limits, seconds),
        "environment": environment(),
    }


def _usable(
    plan: Plan, call: Call, small: Call, beside: dict[str, Callable]
) -> tuple[dict[str, Callable], dict[str, str], dict[str, str]]:
    """(the functions that run here and are right, why others decline, what others get wrong)."""
    functions = {name: call.function(name) for name in OPS[call.op].backends} | beside
    usable, declined, wrong, anchor = {}, {}, {}, None
    for name, function in functions.items():
        try:
            check(small, function)
            got = call.both(function)()
            anchor = anchor or got
            _agree(call, name, got, anchor, plan.dtype)
            usable[name] = function
        except AssertionError as e:
            wrong[name] = str(e)
        except (BackendError, RuntimeError) as e:  # also out of memory
            declined[name] = (str(e).strip().splitlines() or [type(e).__name__])[0]
    if not usable:
        raise AssertionError(f"nothing can be timed: {wrong} {declined}")
    return usable, declined, wrong


def _agree(call: Call, name: str, got: Sequence[Tensor], expected: Sequence[Tensor], dtype) -> None:
    greatest = max(float(e.float().norm()) for e in expected)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        error, norm = float((g.float() - e.float()).norm()), float(e.float().norm())
        assert error <= DIFFER[dtype] * norm + 1e-6 * greatest, (
            f"{call.op} {call.shape}: {name} differs from another, result {i}: {error:.1e}"
        )


def time_runs(
    runs: dict[str, Run],
    limits: dict[str, machine.Limit],
    plan: Plan,
    timer: Callable[[Run], float] | None = None,
    benchmark: Any = None,
) -> dict[str, list[float]]:
    """{run or limit: seconds of each round}. `benchmark`: pytest-benchmark's fixture, which times
    the first run; between its rounds all others are timed."""
    timer = timer or clock(plan.device, cold=plan.model != QUICK)
    functions = runs | {name: limit.run for name, limit in limits.items()}
    for function in functions.values():
        function()
    if benchmark is None:
        return interleave(functions, plan.rounds, timer=timer)
    first, *others = functions
    seconds: dict[str, list[float]] = {name: [] for name in functions}

    def between() -> None:
        random.shuffle(others)
        for name in others:
            seconds[name].append(timer(functions[name]))
        timer(lambda: None)

    def on_device() -> None:
        seconds[first].append(timer(functions[first]))

    on_cpu = plan.device == "cpu"
    benchmark.pedantic(functions[first] if on_cpu else on_device, setup=between, rounds=plan.rounds)
    if on_cpu:  # none where benchmarks are only run
        seconds[first] = (
            list(benchmark.stats.stats.data) if benchmark.stats else [timer(functions[first])]
        )
    return seconds


def adamw(
    plan: Plan,
    cfg: ModelConfig,
    limits: dict[str, machine.Limit],
    timer: Any = None,
    benchmark: Any = None,
    part: str = "",
) -> dict[str, Any]:
    """The record of clipping and the step on all parameters of a model, or a part of it, by each
    backend and by the official loop."""
    with torch.device("meta"):
        model = MaskedAutoencoder(cfg)
        shapes = [p.shape for p in model.get_submodule(part).parameters()]
    torch.manual_seed(0)
    values, grads = ([torch.randn(s, device=plan.device) for s in shapes] for _ in range(2))

    def ours(backend: str) -> tuple[nn.ParameterList, Run]:
        params = nn.ParameterList(nn.Parameter(v.clone()) for v in values)
        optimizer = make_optimizer(params, TrainConfig())

        def run() -> None:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            with dispatch.backends(adamw=backend):
                clipped_step(optimizer, training.LR, training.CLIP_GRAD)

        return params, run

    def official() -> Run:
        params = nn.ParameterList(nn.Parameter(v.clone()) for v in values)
        optimizer = training.make_optimizer(params)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()  # clipped in place, to the norm at which clipping leaves it

        def run() -> None:
            nn.utils.clip_grad_norm_(params, training.CLIP_GRAD)
            optimizer.step()

        return run

    expected, plain = ours("reference")
    plain()
    runs, declined, wrong = {}, {}, {}
    for backend in OPS["adamw"].backends:
        params, run = ours(backend)
        try:
            run()
        except BackendError as e:
            declined[backend] = str(e)
            continue
        pairs = zip(params, expected, strict=True)
        error = max(float((p - e).detach().abs().max()) for p, e in pairs)
        if error <= 1e-6:  # of numbers of about 1: some roundings
            runs[backend] = run
        else:
            wrong[backend] = f"adamw: {backend} differs from the reference by {error:.1e}"
    runs["official"] = official()
    count = sum(v.numel() for v in values)
    seconds = time_runs(runs, limits, plan, timer, benchmark)
    return {
        "what": "op, clip and step, interleaved, caches cold",
        "op": "adamw",
        "shape": f"{part} {count / 1e6:.1f} M parameters".strip(),
        "direction": "step",
        "calls_a_step": 1,
        "baseline": "official",
        **_record(plan, Work(0.0, ADAMW_BYTES * count), runs, limits, seconds),
        "declined": declined,
        "wrong": wrong,
    }


class _Bare(TorchDispatchMode):
    """The registered operator that a public function calls first, and its arguments."""

    called: tuple[Callable, tuple, dict] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = str(func).startswith(("mae_fast.", "mkldnn._linear"))
        if ours and self.called is None:
            self.called = func, args, kwargs or {}
        return func(*args, **(kwargs or {}))


def smallest(op: str) -> dict[str, Callable[[], object]]:
    """One call of an op on its smallest input: its public function, the bare registered operator
    that it calls (where there is one here), and the reference."""
    module = importlib.import_module(f"mae_fast.ops.{op}")
    public, reference = getattr(module, op), getattr(module, f"{op}_ref")
    if op == "adamw":
        param = nn.Parameter(torch.ones(1, device="cpu"))
        param.grad = torch.ones(1, device="cpu")
        optimizer = torch.optim.AdamW([param], lr=0.0, fused=True)
        args = optimizer, torch.ones((), device="cpu"), torch.zeros((), device="cpu")
    else:
        call = next(c for c in calls(SMALLEST, 1, 0.5, torch.float32) if c.op == op)
        args, _ = call.real().leaves()
    found = {"public": lambda: public(*args), "reference": lambda: reference(*args)}
    if op == "adamw":
        return found | {"bare": optimizer.step}
    with _Bare() as seen:
        public(*args)
    if seen.called:
        bare, given, options = seen.called
        found["bare"] = lambda: bare(*given, **options)
    return found


def time_smallest(op: str, rounds: int, benchmark: Any = None) -> dict[str, Any]:
    """The record of what one call costs before it computes anything, by way."""

    def timer(function: Callable[[], object]) -> float:
        return timeit.timeit(function, number=CALLS_A_SAMPLE) / CALLS_A_SAMPLE

    ways = smallest(op)
    if benchmark is not None:
        benchmark(ways["public"])
    seconds = interleave(ways, rounds, timer)
    return {
        "kind": "call",
        "what": "one call of an op on its smallest input, forward",
        "op": op,
        "precision": "fp32",
        "device": "cpu",
        "calls_a_sample": CALLS_A_SAMPLE,
        "baseline": "reference",
        "seconds": seconds,
        "environment": environment(),
    }


def table(found: list[dict[str, Any]]) -> str:
    """A line for each backend of each call, why others are not there, and the overhead of calls."""
    rows, notes = [], []
    for r in found:
        for name, samples in r["seconds"].items():
            median, faster = statistics.median(samples), ratio(r["seconds"][r["baseline"]], samples)
            if r["kind"] == "call":
                rows.append([r["op"], "smallest", "call", name, f"{1e3 * median:.4f}", "", "", ""])
                continue
            row = [r["op"], r["shape"], r["direction"], name, f"{1e3 * median:.3f}"]
            reached = f"{share(r['limits'], r, samples):.0%}"
            rows.append([*row, f"{spread(samples):.0%}", reached, f"{faster:.2f}x {r['baseline']}"])
        for why in ("declined", "wrong"):
            notes += [f"{r['op']}: {why}: {n}: {text}" for n, text in r.get(why, {}).items()]
    head = ["op", "on", "direction", "backend", "ms", "spread", "of limit", "speed-up"]
    return "\n".join([text_table(head, rows), *dict.fromkeys(notes)])
