"""Every operator that has Triton kernels, forward and backward, under the sanitizer: no race, no
overrun, every output stored once, and the same bits in whatever order programs run."""

import pytest
import torch
from cases import CASES, DTYPES, ON_TRITON, calls, op_of
from traffic import run, watched

from mae_fast.kernels import launchers
from mae_fast.ops import dispatch

if not dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1 runs it, in a process of its own", allow_module_level=True)

dispatch.load_triton()
LAUNCHERS = launchers(dispatch.LIBRARY._op_defs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["vit_b_cut_down", "odd"])
@pytest.mark.parametrize("op", ON_TRITON)
def test_operators_are_clean(op, model, dtype):
    for case, made in calls(op, model, dtype, "cpu", watched).items():
        assert op_of(made[0].operator) == op
        for operator, args in made:
            first, record = run(operator, args, seed=0)
            assert record.launches, f"{operator} {case}: no kernel was launched"
            second, _ = run(operator, args, seed=1)
            for a, b in zip(first, second, strict=True):
                assert torch.equal(a, b), f"{operator} {case}: the order of programs shows"


def test_every_op_with_triton_kernels_has_cases():
    assert set(ON_TRITON) <= CASES.keys()
    assert {op_of(o.split("::")[1]) for o in LAUNCHERS} == set(ON_TRITON) - {"adamw"}
