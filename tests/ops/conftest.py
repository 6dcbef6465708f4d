"""What the tests of ops share: the backends that run here, and outputs that start poisoned."""

import pytest
import torch
from op_checks import BACKENDS, DEVICE

from mae_fast.ops import dispatch


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that an op allocates and does not write holds NaN, or the greatest integer."""
    torch.manual_seed(0)
    if DEVICE != "cpu":  # a mode, which torch.compile sees
        torch.set_default_device(DEVICE)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def cpp():
    """Skips a test where the C++ kernels are not built."""
    reason = dispatch.load_cpp()
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend by name; a test forces it with `dispatch.backends`."""
    if request.param == "cpp":
        request.getfixturevalue("cpp")
    return request.param
