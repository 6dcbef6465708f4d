"""Memory-bound operators move hardly more bytes than they must, as the committed table says."""

from dataclasses import replace

import pytest
import triton
from cases import DTYPES
from traffic import AT_MOST, MEMORY_BOUND, committed, rows

from mae_fast.ops import dispatch

if not dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1 runs it, in a process of its own", allow_module_level=True)

dispatch.load_triton()
TRITON = "3.8"  # whose interpreter the table is of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", MEMORY_BOUND)
def test_bytes_are_few_and_as_in_the_table(op, dtype):
    found = rows(op, dtype)
    for row in found:
        ratio = row.moved / row.least
        assert ratio <= AT_MOST, f"{row.operator} {row.case} {dtype}: {ratio:.2f} of the least"
    table = [r for r in committed()[0] if (r.op, r.dtype) == (op, dtype)]
    if not triton.__version__.startswith(TRITON):  # its library may load a mask's lanes otherwise
        found, table = ([replace(r, requested=0) for r in rows] for rows in (found, table))
    assert found == table, "python tests/kernels/report.py writes the table again"


def test_the_table_has_every_op():
    table, eager = committed()
    assert {row.op for row in table} == {e.op for e in eager} == set(MEMORY_BOUND)
