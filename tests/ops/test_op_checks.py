"""The tolerance rules see what they are for."""

import op_checks
import pytest
import torch
from op_checks import assert_as_good_as_torch, assert_rounded_once


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_second_number_is_no_rounding_of_the_first(device, monkeypatch):
    """Of a GPU's rule a CPU's numbers are enough."""
    monkeypatch.setattr(op_checks, "DEVICE", device)
    wide = torch.randn(4096)
    assert_rounded_once(wide.bfloat16(), wide)
    with pytest.raises(AssertionError):
        assert_rounded_once((wide * 1.004).bfloat16(), wide)  # half a step of bf16
    if device == "cuda":  # a sum in another order
        assert_rounded_once((wide * (1 + 3e-7)).bfloat16(), wide)


def test_one_number_may_be_off_by_two_roundings_and_no_more():
    """Plain torch's may be exact by chance."""
    exact, eps = torch.tensor([1.0], dtype=torch.float64), torch.finfo(torch.float16).eps
    plain = [exact.half()]
    assert_as_good_as_torch([(exact + eps).half()], plain, [exact])
    with pytest.raises(AssertionError, match="number 0"):
        assert_as_good_as_torch([(exact + 2 * eps).half()], plain, [exact])
    many = [exact.expand(100)]
    with pytest.raises(AssertionError, match="number 0"):
        assert_as_good_as_torch([(many[0] + eps).half()], [many[0].half()], many)
