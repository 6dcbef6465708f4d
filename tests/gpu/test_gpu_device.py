"""benchmarks/gpu/device.py on a stand-in of torch.cuda with the real signatures."""

from unittest import mock

import pytest
import torch

from benchmarks.gpu import device


class Stub:
    """torch.cuda with the real signatures, and nothing behind them."""

    def __init__(self) -> None:
        self.calls = []
        self.fake = mock.create_autospec(torch.cuda)
        self.fake.Event.return_value.elapsed_time.return_value = 5.0
        self.fake.max_memory_allocated.return_value = 3 << 20
        self.fake.memory_allocated.return_value = 1 << 20
        self.fake.get_device_name.return_value = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def cuda(monkeypatch):
    """A device.Cuda on a stand-in of torch.cuda."""
    stub = Stub()
    monkeypatch.setattr(torch, "cuda", stub.fake)
    with mock.patch.object(device.Cuda, "__init__", lambda self: None):
        found = device.Cuda()
    found.flush = torch.ones(4, dtype=torch.uint8)
    return found, stub.fake


def test_cuda_times_by_events_from_a_cold_cache(cuda):
    found, fake = cuda
    calls = []
    assert found.time(lambda: calls.append(1), cold=True) == 0.005
    assert calls == [1] and not found.flush.any()
    fake._sleep.assert_called_once()
    assert fake.Event.call_args == mock.call(enable_timing=True)
    found.flush.fill_(1)
    found.time(lambda: None)
    assert found.flush.all()  # only when asked


def test_cuda_graph_replays_into_the_same_outputs(cuda):
    found, fake = cuda
    calls = []

    def call():
        calls.append(1)
        return [torch.ones(1)]

    replay = found.graphed(call)
    assert len(calls) == 3
    assert replay() is replay()
    assert fake.CUDAGraph.return_value.replay.call_count == 2


def test_cuda_tells_its_memory_and_name(cuda):
    found, fake = cuda
    assert (found.name(), found.allocated_mb()) == ("NVIDIA H100 80GB HBM3", 1.0)
    assert found.peak_mb(lambda: None) == 3.0
    fake.reset_peak_memory_stats.assert_called_once()
    found.synchronize()


def test_conditions_are_those_of_nvidia_smi(tools, monkeypatch):
    assert device.smi()["clocks.sm"] == "1980 MHz"
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho no permission; exit 4\n")
    assert device.smi() == {"nvidia-smi": "no permission"}
    monkeypatch.setenv("PATH", "")
    assert device.smi() == {}
