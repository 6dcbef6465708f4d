"""What is asked of a GPU while something is timed, on a stand-in of torch.cuda."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.gpu import setting
from benchmarks.gpu.records import Records
from mae_fast.bench import timing


@pytest.fixture
def fake(monkeypatch):
    """torch.cuda with the real signatures, and nothing behind them."""
    found = mock.create_autospec(torch.cuda)
    found.Event.return_value.elapsed_time.return_value = 5.0
    found.max_memory_allocated.return_value = 3 << 20
    monkeypatch.setattr(torch, "cuda", found)
    return found


def made(tiny: bool) -> setting.Setting:
    records = Records(Path("a.jsonl"), "sources", ())
    return setting.Setting("cpu" if tiny else "cuda", records, tiny, 0.0)


def test_cuda_times_by_events_from_a_cold_cache(fake):
    calls, flush = [], torch.ones(4, dtype=torch.uint8)
    assert timing.event_clock(flush)(lambda: calls.append(1)) == 0.005
    assert calls == [1] and not flush.any()
    fake._sleep.assert_called_once()
    assert fake.Event.call_args == mock.call(enable_timing=True)


def test_only_a_gpu_is_timed_from_cold_caches(monkeypatch):
    monkeypatch.setattr(setting, "clock", lambda *how: how)
    assert made(False).clock(cold=True) == ("cuda", True)
    assert made(False).clock() == ("cuda", False)
    assert made(True).clock(cold=True) == ("cpu", False)


def test_peak_memory_is_that_of_the_call(fake):
    calls = []
    assert made(False).peak_mb(lambda: calls.append(fake.mock_calls[-1])) == 3.0
    assert calls == [mock.call.reset_peak_memory_stats()]
    assert fake.synchronize.call_count == 2
    fake.reset_mock()
    made(True).peak_mb(lambda: None)
    fake.synchronize.assert_not_called()


def test_conditions_are_those_of_nvidia_smi(tools, monkeypatch):
    assert setting.smi()["clocks.sm"] == "1980 MHz"
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho no permission; exit 4\n")
    assert setting.smi() == {"nvidia-smi": "no permission"}
    monkeypatch.setenv("PATH", "")
    assert setting.smi() == {}
