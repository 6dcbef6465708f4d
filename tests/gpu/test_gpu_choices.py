"""What a run chooses on a GPU, without one: CUDA graphs, and whether activations are kept."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mae_fast import choices, memory
from mae_fast.config import Config, DataConfig, MaskConfig, TrainConfig, preset
from mae_fast.distributed import World

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def settings(**train) -> Config:
    train = TrainConfig(batch_size=16, **{"precision": "bf16", **train})
    return Config("run", preset("vit_large"), data=DataConfig(repeat_aug=4), train=train)


def test_a_parted_model_is_no_graph(caplog):
    assert not choices.cuda_graph(settings(cuda_graph="on"), World(0, 2, GPU), apart=True)
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
    world = World(0, processes, device)
    assert choices.cuda_graph(settings(cuda_graph=how), world, apart=False) == graph
    assert says in caplog.text and bool(says) == bool(caplog.text)


def test_a_gpu_keeps_activations_where_its_memory_holds_them(monkeypatch):
    needs = memory.memory(preset("vit_large"), 64, 0.9, 2, keep=True).peak / memory.USABLE
    for has, kept in ((needs * 1.01, True), (needs * 0.99, False)):
        found = SimpleNamespace(total_memory=has)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, f=found: f)
        cfg = settings()
        assert choices.keep(cfg, GPU) is kept
        assert not choices.keep(cfg, CPU)
        # Each changes how much is needed.
        for section, change in (("data", {"repeat_aug": 8}), ("mask", {"per_clip": 2})):
            wider = dataclasses.replace(getattr(cfg, section), **change)
            assert not choices.keep(dataclasses.replace(cfg, **{section: wider}), GPU), change
        assert not choices.keep(settings(precision="fp32"), GPU)
        assert choices.keep(dataclasses.replace(cfg, mask=MaskConfig(ratio=0.95)), GPU)
