"""Record the ops: interleaved, from cold caches, beside the machine's limits of the same rounds.

python -m benchmarks.ops --out benchmarks/results/ops.jsonl
python -m benchmarks.ops --ops masked_mse attention
"""

import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.ops.bench_overhead import WAYS, call
from benchmarks.ops.case import CLIPS, MODEL, Case
from mae_fast.bench import machine
from mae_fast.bench.records import append
from mae_fast.bench.timing import interleave, ratio, share, spread
from mae_fast.config import preset
from mae_fast.environment import environment
from mae_fast.ops import OPS

OVERHEAD_CALLS = 300  # a sample


@dataclass(frozen=True)
class Args:
    """Time the ops, forward and backward, and the overhead of one call.

    Args:
        ops: which ones; all, and the overhead, when none is named.
        rounds: timed calls of each backend.
        out: append the records to this file.
        quick: a tiny model and two rounds, to see that the harness works.
    """

    ops: tuple[str, ...] = ()
    rounds: int = 15
    out: str = ""
    quick: bool = False


def main(args: Args) -> int:
    here = Path(__file__).parent
    known = sorted(p.stem.removeprefix("bench_") for p in here.glob("bench_*.py"))
    known.remove("overhead")
    unknown = set(args.ops) - set(known)
    if unknown:
        raise SystemExit(f"unknown ops {sorted(unknown)} (known: {', '.join(known)})")
    cfg = preset("vit_tiny", img_size=32) if args.quick else preset(MODEL)
    rounds, failed = 2 if args.quick else args.rounds, []
    for op in args.ops or known:
        for make in getattr(
            importlib.import_module(f"benchmarks.ops.bench_{op}"), f"bench_{op}"
        ).cases:
            torch.manual_seed(0)
            case = make(cfg, CLIPS)
            try:
                record = time_case(case, rounds, args.quick)
            except AssertionError as e:
                failed.append(op)
                print(f"not timed: {e}", file=sys.stderr)
                continue
            show(record)
            if args.out:
                append(args.out, record)
    if not args.ops:
        record = time_overhead(rounds)
        for op, ways in record["ops"].items():
            print(op, {way: f"{1e6 * statistics.median(s):.1f} us" for way, s in ways.items()})
        if args.out:
            append(args.out, record)
    return bool(failed)


def time_case(case: Case, rounds: int, quick: bool = False) -> dict:
    """The record of one op at one shape. AssertionError, and no time, where results differ."""
    runs, limits = case.check(), machine.limits(quick)
    functions = {**runs, **{name: limit.run for name, limit in limits.items()}}
    seconds = interleave(functions, rounds, cold=True)
    return {
        "what": "op, forward + backward, interleaved, caches cold",
        "op": case.op,
        "shape": case.shape,
        "model": "quick" if quick else MODEL,
        "clips": CLIPS,
        "dtype": "fp32",
        "baseline": case.baseline_name,
        "chosen": next(iter(runs)),
        "bytes": case.bytes,
        "flop": case.flop,
        "seconds": {name: seconds[name] for name in runs},
        "declined": case.declined,
        "limits": machine.as_record(limits, seconds),
        "environment": environment(),
    }


def show(record: dict) -> None:
    """One line for each backend."""
    for name, samples in record["seconds"].items():
        faster = ratio(record["seconds"][record["baseline"]], samples)
        reached = share(record["limits"], record, samples)
        print(
            f"{record['op']:16} {record['shape']:32} {name:10} "
            f"{1e3 * statistics.median(samples):9.3f} ms (spread {spread(samples):.0%}), "
            f"{faster:6.2f}x {record['baseline']}, {reached:.0%} of the machine"
        )


def repeated(function: Callable[[], object]) -> Callable[[], None]:
    """OVERHEAD_CALLS calls, for a clock that is coarser than one."""

    def many() -> None:
        for _ in range(OVERHEAD_CALLS):
            function()

    return many


def time_overhead(rounds: int) -> dict:
    """Seconds of one call of each op on its smallest input, by way."""
    ops = {}
    for op in OPS:
        calls = {way: function for way in WAYS if (function := call(op, way))}
        seconds = interleave({way: repeated(function) for way, function in calls.items()}, rounds)
        ops[op] = {way: [s / OVERHEAD_CALLS for s in samples] for way, samples in seconds.items()}
    return {
        "what": "one call of an op on its smallest input, forward",
        "calls_a_sample": OVERHEAD_CALLS,
        "ops": ops,
        "environment": environment(),
    }


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
