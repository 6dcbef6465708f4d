"""What a run chooses on a GPU, without one: CUDA graphs, and whether activations are kept."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mae_fast import memory
from mae_fast.config import Config, DataConfig, MaskConfig, TrainConfig, preset
from mae_fast.train import Run

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def a_run(device: torch.device, processes: int = 1, apart: bool = False, **train) -> Run:
    """A run that has read its settings, and nothing else."""
    run = Run.__new__(Run)
    settings = TrainConfig(batch_size=16, **{"precision": "bf16", **train})
    run.cfg = Config("run", preset("vit_large"), data=DataConfig(repeat_aug=4), train=settings)
    run.world, run.apart = SimpleNamespace(device=device, size=processes), apart
    return run


def test_a_parted_model_is_no_graph(caplog):
    assert not a_run(GPU, 2, apart=True, cuda_graph="on")._graph()
    assert "parted weights" in caplog.text


@pytest.mark.parametrize(
    ("device", "processes", "how", "graph", "says"),
    [
        (GPU, 1, "auto", True, ""),
        (GPU, 1, "on", True, ""),
        (GPU, 1, "off", False, ""),
        (GPU, 2, "auto", False, "2 processes it is untried"),
        (GPU, 2, "on", True, ""),
        (GPU, 2, "off", False, ""),
        (CPU, 1, "auto", False, ""),
        (CPU, 1, "on", False, "the run is on the cpu"),
    ],
)
def test_a_gpu_replays_graphs_by_itself(device, processes, how, graph, says, caplog):
    assert a_run(device, processes, cuda_graph=how)._graph() == graph
    assert says in caplog.text and bool(says) == bool(caplog.text)


def test_a_gpu_keeps_activations_where_its_memory_holds_them(monkeypatch):
    needs = memory.memory(preset("vit_large"), 64, 0.9, 2, keep=True).peak / memory.USABLE
    for has, kept in ((needs * 1.01, True), (needs * 0.99, False)):
        found = SimpleNamespace(total_memory=has)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, f=found: f)
        assert a_run(GPU)._keep() is kept
        assert not a_run(CPU)._keep()
        run = a_run(GPU)  # each changes how much is needed
        for section, change in (("data", {"repeat_aug": 8}), ("mask", {"per_clip": 2})):
            wider = dataclasses.replace(getattr(run.cfg, section), **change)
            more = a_run(GPU)
            more.cfg = dataclasses.replace(run.cfg, **{section: wider})
            assert not more._keep(), change
        assert not a_run(GPU, precision="fp32")._keep()
        less = a_run(GPU)
        less.cfg = dataclasses.replace(run.cfg, mask=MaskConfig(ratio=0.95))
        assert less._keep()
