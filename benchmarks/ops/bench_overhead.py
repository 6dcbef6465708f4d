"""What one call costs before it computes anything: the smallest legal input of every op.

The public function, beside the bare registered operator that it calls and the reference.
"""

import importlib

import pytest

from mae_fast.ops import OPS

WAYS = ("public", "bare", "reference")


def call(op, way):
    """A call of one op on its smallest input; None where that way cannot be taken here."""
    *functions, args = importlib.import_module(f"benchmarks.ops.bench_{op}").smallest()
    function = functions[WAYS.index(way)]
    try:
        function(*args)
    except NotImplementedError:  # no kernel is built
        return None
    return lambda: function(*args)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", WAYS)
def bench_overhead(benchmark, op, way):
    function = call(op, way)
    if function is None:
        pytest.skip(f"{op} has no {way} operator here")
    benchmark(function)
