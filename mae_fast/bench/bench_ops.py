"""`make bench`: the chosen backend of every op on the calls of a step, under pytest-benchmark, each
checked before; `mae-fast bench ops` has all backends in turn. Where benchmarks are disabled (CI),
they are run once, on a tiny model.
"""

import pytest

from mae_fast.bench.engines import QUICK
from mae_fast.bench.ops import Plan, prepared, smallest
from mae_fast.ops import OPS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is bench_call:
        metafunc.parametrize("op", OPS)
        return
    quick = metafunc.config.getoption("benchmark_disable", False)
    plan = Plan(model=QUICK, rounds=2) if quick else Plan()
    items = [pytest.param(plan.rounds, ready, id=name) for name, ready in prepared(plan)]
    metafunc.parametrize(("rounds", "ready"), items)


def bench_op(benchmark, rounds, ready):
    runs, fields = ready()
    assert not fields["wrong"]
    benchmark.pedantic(next(iter(runs.values())), rounds=rounds, warmup_rounds=1)


def bench_call(benchmark, op):
    benchmark(smallest(op)["public"])
