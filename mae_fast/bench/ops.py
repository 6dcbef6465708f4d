"""`mae-fast bench ops`: each op on the calls that a training step makes, by every backend, beside
what it replaces, against the machine's limits of the same rounds. `make bench` has the chosen ones
under pytest-benchmark (bench_ops.py), `make gpu` what else there is to compare with. A variant
whose error against fp64 is more than twice plain torch's is not timed.
"""

import importlib
import json as jsonlib
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_fast.bench import machine
from mae_fast.bench.baselines import training
from mae_fast.bench.baselines.ops import baseline
from mae_fast.bench.calls import Call, Run, calls, check
from mae_fast.bench.engines import QUICK, config_of
from mae_fast.bench.records import append, check_appends, conditions
from mae_fast.bench.table import text_table
from mae_fast.bench.timing import Timer, clock, interleave, ratio, share, spread
from mae_fast.config import ModelConfig, TrainConfig
from mae_fast.distributed import check_device
from mae_fast.environment import environment
from mae_fast.errors import BackendError, ConfigError
from mae_fast.fields import positive
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS, dispatch
from mae_fast.ops.work import ADAMW_BYTES
from mae_fast.optim import clipped_step, make_optimizer

DIRECTIONS = ("forward", "forward_backward")
SMALL = 2  # clips on which a backend is checked in fp64
DIFFER = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the norm, from plain torch, on all clips
CALLS_A_SAMPLE = 300  # of the smallest input, for a clock that is coarser than one
# The smallest input of every op: two patches of two pixels, tokens of one value.
ONE = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
SMALLEST = ModelConfig(
    img_size=2, patch_size=2, num_frames=2, t_patch_size=1, pred_t_dim=2, **dict.fromkeys(ONE, 1)
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

    def __post_init__(self) -> None:
        positive(batch=self.clips, rounds=self.rounds)
        check_device(self.device)

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


class Ready(NamedTuple):
    """What is to be timed, the run that is chosen first, and what else its record says. `wrong`
    tells what gave wrong results."""

    runs: dict[str, Run]
    fields: dict[str, Any]


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
    also what one call costs on the smallest input.

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
    check_appends(out)
    model, rounds = (QUICK, 2) if quick else (model, rounds)
    plan = Plan(ops, model, batch, ratio, precision, device, rounds)
    limits, found, wrong = machine.limits(quick, device, plan.dtype), [], []
    for name, ready in prepared(plan):
        print(name, file=sys.stderr, flush=True)
        try:
            found.append(measure(plan, ready(), limits))
        except AssertionError as e:
            wrong.append(str(e))
    found += [] if ops else [time_smallest(op, rounds) for op in OPS]
    for record in found if out else ():
        append(out, record)
    print(jsonlib.dumps(found, indent=1) if json else table(found))
    wrong += [text for record in found for text in record.get("wrong", {}).values()]
    if wrong:
        raise ConfigError(f"an op is wrong, and was not timed: {'; '.join(wrong)}")


def prepared(plan: Plan) -> Iterator[tuple[str, Callable[[], Ready]]]:
    """(name, what makes it ready) of everything that a plan asks for."""
    for call, small in plan.cases():
        for direction in DIRECTIONS[: 1 + call.differentiable]:
            name = f"{call.op}-{call.shape}-{direction}"
            yield name, partial(ready_call, plan, call, small, direction)
    if not plan.ops or "adamw" in plan.ops:
        yield "adamw", partial(ready_adamw, plan, config_of(plan.model), "decoder_blocks")


def measure(
    plan: Plan, ready: Ready, limits: dict[str, machine.Limit], timer: Timer | None = None
) -> dict[str, Any]:
    """The record of an op: its runs and the limits, in turn."""
    timer = timer or clock(plan.device, cold=plan.model != QUICK)
    functions = ready.runs | {name: limit.run for name, limit in limits.items()}
    with plan.autocast():
        for function in functions.values():
            function()
        seconds = interleave(functions, plan.rounds, timer)
    return {
        "kind": "op",
        **conditions(plan.model, plan.clips, plan.ratio, plan.precision, plan.device),
        "chosen": next(iter(ready.runs)),
        **ready.fields,
        "seconds": {name: seconds[name] for name in ready.runs},
        "limits": machine.as_record(limits, seconds),
    }


def ready_call(
    plan: Plan,
    call: Call,
    small: Call,
    direction: str,
    beside: dict[str, Callable] | None = None,
) -> Ready:
    """One call in one direction: by backend, and by what it replaces, or by the functions `beside`
    in its place."""
    call, small = call.real(plan.device), small.real(plan.device)
    run_of = call.forward if direction == "forward" else call.both
    with plan.autocast():
        usable, declined, wrong = _usable(plan, call, small, beside or {})
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
    fields = {
        "what": f"op, {direction.replace('_', ' + ')}, interleaved, caches cold",
        "op": call.op,
        "shape": call.shape,
        "direction": direction,
        "calls_a_step": call.count,
        "baseline": base,
    }
    fields |= {"flop": amount.flop, "bytes": amount.bytes, "declined": declined, "wrong": wrong}
    return Ready(runs, fields)


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


def ready_adamw(plan: Plan, cfg: ModelConfig, part: str = "") -> Ready:
    """Clipping and the step by each backend and by the official loop."""
    with torch.device("meta"):
        shapes = [p.shape for p in MaskedAutoencoder(cfg).get_submodule(part).parameters()]
    torch.manual_seed(0)
    values, grads = ([torch.randn(s, device=plan.device) for s in shapes] for _ in range(2))

    def made(
        optimizer_of: Callable[[nn.ParameterList], torch.optim.Optimizer],
        step: Callable[[torch.optim.Optimizer, nn.ParameterList], object],
        backend: str = "reference",
    ) -> tuple[nn.ParameterList, Run]:
        params = nn.ParameterList(nn.Parameter(v.clone()) for v in values)
        optimizer = optimizer_of(params)

        def run() -> None:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            with dispatch.backends(adamw=backend):
                step(optimizer, params)

        return params, run

    def official(optimizer: torch.optim.Optimizer, params: nn.ParameterList) -> None:
        nn.utils.clip_grad_norm_(params, training.CLIP_GRAD)
        optimizer.step()

    ours = (
        lambda params: make_optimizer(params, TrainConfig()),
        lambda optimizer, _: clipped_step(optimizer, training.LR, training.CLIP_GRAD),
    )
    expected, plain = made(*ours)
    plain()
    runs, declined, wrong = {}, {}, {}
    for backend in OPS["adamw"].backends:
        params, run = made(*ours, backend)
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
    _, runs["official"] = made(training.make_optimizer, official)
    count = sum(v.numel() for v in values)
    fields = {
        "what": "op, clip and step, interleaved, caches cold",
        "op": "adamw",
        "shape": f"{part} {count / 1e6:.1f} M parameters".strip(),
        "direction": "step",
        "calls_a_step": 1,
        "baseline": "official",
    }
    amount = {"flop": 0.0, "bytes": ADAMW_BYTES * count}
    return Ready(runs, fields | amount | {"declined": declined, "wrong": wrong})


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
        bare = optimizer.step
    else:
        call = next(c for c in calls(SMALLEST, 1, 0.5, torch.float32) if c.op == op)
        args, _ = call.real().leaves()
        with _Bare() as seen:
            public(*args)
        operator, given, options = seen.called or (None, (), {})
        bare = operator and partial(operator, *given, **options)
    ways = {"public": partial(public, *args), "reference": partial(reference, *args)}
    return ways | ({"bare": bare} if bare else {})


def time_smallest(op: str, rounds: int) -> dict[str, Any]:
    """The record of what one call costs before it computes anything, by way."""

    def timer(function: Callable[[], object]) -> float:
        return timeit.timeit(function, number=CALLS_A_SAMPLE) / CALLS_A_SAMPLE

    return {
        "kind": "call",
        "what": "one call of an op on its smallest input, forward",
        "op": op,
        "precision": "fp32",
        "device": "cpu",
        "calls_a_sample": CALLS_A_SAMPLE,
        "baseline": "reference",
        "seconds": interleave(smallest(op), rounds, timer),
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
