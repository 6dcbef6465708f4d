"""What the tests of ops share: the backends that run here, and outputs that start poisoned."""

import os

import interpreter  # noqa: F401  rounds and multiplies bf16 as a GPU does
import pytest
import torch
from op_checks import BACKENDS, DEVICE

from mae_fast.ops import OPS, dispatch

if DEVICE != "cpu":  # without it cuBLAS refuses every product where equal bits are asked for
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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
    """Skips a test where the C++ kernels are not built, or its tensors are on a GPU."""
    reason = dispatch.load_cpp() if DEVICE == "cpu" else "the C++ kernels are the CPU's"
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def amx(cpp):
    """Skips a test where the C++ kernels multiply no tiles."""
    if dispatch.load_amx():
        pytest.skip(dispatch.load_amx())


@pytest.fixture(params=BACKENDS if DEVICE == "cpu" else [*BACKENDS, "cuda"])
def backend(request):
    """Each backend by name; a test forces it with `dispatch.backends`."""
    op = OPS[request.path.stem.removeprefix("test_")]
    if request.param not in op.backends:  # few have kernels in CUDA C++
        pytest.skip(f"{op.name} has no {request.param} backend")
    if request.param in ("cpp", "cuda"):  # built at installation, or not
        reason = dispatch.MACHINE[request.param]()
        if reason:
            pytest.skip(reason)
    return request.param
