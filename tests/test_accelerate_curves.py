"""20 steps in other people's loops: tests/adapters/curves.py prints the differences."""

import functools

import curves
import pytest

from mae_fast.adapters import transformers as adapter

# fp32: PyTorch sums in another order once a forward is fused. bf16: that order shows in the third
# digit of a loss, and AdamW passes it on.
LIMITS = {"fp32": 1e-4, "no": 1e-4, "32-true": 1e-4}


@pytest.mark.parametrize("name", curves.LOOPS)
def test_a_curve_is_the_own_forwards(name, monkeypatch):
    if library := curves.missing(name):
        pytest.skip(f"{library} is not installed")
    calls, forward = [], adapter.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(adapter, "forward", counted)
    own, fused = curves.curves(name)
    assert len(own) == len(fused) >= curves.STEPS // 2 and own[-1] < 0.9 * own[0]
    assert curves.difference(own, fused) < LIMITS.get(name.split()[1], 2e-2)
    # In bf16 throughout, the two curves may be one.
    compiled = "compile" in name
    assert len(calls) >= (1 if compiled else len(fused)), "the one line did nothing"
