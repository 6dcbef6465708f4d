"""The pytest-benchmark suite of the ops: `mae-fast bench ops` with its options, or `make bench` as
it is. Where benchmarks are disabled (CI), they are checked and run once, on a tiny model.
"""

import pytest

from mae_fast.bench import machine
from mae_fast.bench.engines import QUICK, config_of
from mae_fast.bench.ops import DIRECTIONS, Plan, Planned, adamw, measure, time_smallest
from mae_fast.ops import OPS


def planned(config: pytest.Config) -> Planned:
    """What `mae-fast bench ops` asks for, or what is run without it."""
    quick = Plan(model=QUICK, rounds=2) if config.getoption("benchmark_disable", False) else Plan()
    plugins = config.pluginmanager.get_plugins()
    return next((p for p in plugins if isinstance(p, Planned)), Planned(quick, []))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    plan = planned(metafunc.config).plan
    if metafunc.function is bench_op:
        items = [
            pytest.param(pair, direction, id=f"{pair[0].op}-{pair[0].shape}-{direction}")
            for pair in plan.cases()
            for direction in DIRECTIONS[: 1 + pair[0].differentiable]
        ]
        metafunc.parametrize(("pair", "direction"), items)
    elif metafunc.function is bench_call:
        metafunc.parametrize("op", [] if plan.ops else list(OPS))
    else:
        metafunc.parametrize("part", ["decoder_blocks"] if plan.ops in ((), ("adamw",)) else [])


@pytest.fixture(scope="session")
def plan(pytestconfig):
    return planned(pytestconfig).plan


@pytest.fixture(scope="session")
def limits(plan):
    return machine.limits(plan.model == QUICK, plan.device, plan.dtype)


@pytest.fixture
def finish(pytestconfig, benchmark):
    """Keep a record; fail where it says that something is wrong."""

    def keep(record: dict) -> None:
        benchmark.extra_info.update({k: record[k] for k in ("op", "seconds")})
        planned(pytestconfig).records.append(record)
        assert not record.get("wrong"), record["wrong"]

    return keep


def bench_op(benchmark, plan, limits, finish, pair, direction):
    finish(measure(plan, *pair, direction, limits, benchmark=benchmark))


def bench_adamw(benchmark, plan, limits, finish, part):
    finish(adamw(plan, config_of(plan.model), limits, benchmark=benchmark, part=part))


def bench_call(benchmark, plan, finish, op):
    finish(time_smallest(op, plan.rounds, benchmark))
