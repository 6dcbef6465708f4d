"""Kernels start on their tensors' device, whichever is current: Triton's on the current one."""

import re
from pathlib import Path

import aot
import numpy as np
import pytest
import torch
from cases import DTYPES, ON_TRITON, calls
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.runtime.jit import JITFunction

import mae_fast
from mae_fast.kernels import adamw as kernels
from mae_fast.kernels import masked_mse
from mae_fast.ops import adamw, dispatch

if dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1: kernels are not launched", allow_module_level=True)


ROOT = Path(__file__).parents[2]


class Device:
    """torch.cuda.device where there is no CUDA: it knows the current device's number."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.index = torch.device(device).index

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.index

    def __exit__(self, *error) -> None:
        Device.current = self.before


def on_device(values, *, dtype, device, pin_memory=False):
    return torch.empty(np.shape(values), dtype=dtype, device=device)


@pytest.fixture
def launched(monkeypatch):
    """[(kernel, the device that it started on)], on fake tensors of cuda:1."""
    found = []
    with aot.compiling(90):

        def run(self, *args, **kwargs):
            assert {a.device.index for a in args if torch.is_tensor(a)} == {1}
            found.append((self.__name__, Device.current))

        monkeypatch.setattr(JITFunction, "run", run)
        monkeypatch.setattr(torch.cuda, "device", Device)
        # Of torch 2.11, a first fake tensor starts the device that is said to be there.
        monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 16, raising=False)
        # What is copied from the host, where no memory can be pinned.
        monkeypatch.setattr(kernels, "_on_host", lambda values, device: torch.empty(values.shape))
        monkeypatch.setattr(torch, "tensor", on_device)
        monkeypatch.setattr(masked_mse, "_on_device", masked_mse._on_device.__wrapped__)
        yield found
    assert Device.current == 0


def there(arg):
    """A fake tensor of cuda:1 in place of a meta tensor, also in a list."""
    if isinstance(arg, list):
        return [there(a) for a in arg]
    if not torch.is_tensor(arg):
        return arg
    return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="cuda:1")


@pytest.mark.parametrize("op", sorted({*ON_TRITON} - {"adamw"}))
def test_kernels_start_on_their_tensors_device(op, launched, monkeypatch):
    """As the operators are registered for CUDA tensors."""
    registered = {}
    monkeypatch.setattr(dispatch, "_implement", lambda n, _, f, key: registered.update({n: f}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch._load_triton() is None
    for dtype in DTYPES:
        for made in calls(op, "vit_b_cut_down", dtype, "meta").values():
            for operator, args in made:
                del launched[:]
                with FakeTensorMode():
                    registered[f"mae_fast::{operator}"](*map(there, args))
                assert launched and {device for _, device in launched} == {1}, launched


@pytest.mark.parametrize("step", [adamw.adamw, adamw.clipped_adamw])
def test_adamw_starts_on_its_parameters_device(step, launched, monkeypatch):
    monkeypatch.setitem(adamw.OP.backends, "triton", dispatch.anything)
    with FakeTensorMode(), mae_fast.backends(adamw="triton"):
        params = [torch.nn.Parameter(torch.ones(n, device="cuda:1")) for n in (40, 7)]
        optimizer = torch.optim.AdamW(params, foreach=False)
        for p in params:
            p.grad = torch.ones_like(p)
        number = torch.ones((), device="cuda:1")
        step(optimizer, *((number, number) if step is adamw.adamw else (1.0,)))
    assert {device for _, device in launched} == {1}, launched


def test_every_function_of_the_cuda_library_guards_its_device():
    """c10::cuda::CUDAGuard in each function that launches, before it does."""
    source = (ROOT / "csrc/cuda/register.cu").read_text()
    defined = re.findall(r'define\("(\w+)", mae_fast::(\w+)\)', source)
    assert len(defined) == 5
    for name, function in defined:
        (body,) = re.findall(rf"^\S.* {function}\(.*?^}}", source, re.M | re.S)
        guard, launch = body.find("CUDAGuard guard("), body.find(f"cuda::{name}<")
        assert 0 < guard < launch, name


def test_the_distributed_example_sets_its_device_first():
    """What a library starts on the current device, NCCL too, is the process's own."""
    source = (ROOT / "examples/ddp.py").read_text()
    assert 0 < source.find("torch.cuda.set_device(device)") < source.find("init_process_group")
