"""What a process becomes by torchrun's environment: alone, one of several, on a GPU of its own."""

import contextlib

import pytest
import torch
import torch.distributed as dist

from mae_fast import distributed
from mae_fast.distributed import World
from mae_fast.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch):
    """Nothing of torchrun's in the environment, no CUDA device, and what torch is asked for."""
    calls = []
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: calls.append(("device", i)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: calls[-1][1])
    monkeypatch.setattr(dist, "init_process_group", lambda b: calls.append(("group", b)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(("left",)))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    return calls


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_alone_on_the_cpu(device, told):
    assert distributed.start(device) == distributed.start() == World(0, 1, CPU)
    assert World(0, 1, CPU).writer and told == []
    distributed.finish()
    assert told == []


def test_one_of_several_on_the_cpu(told, monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    world = distributed.start("auto")
    assert world == World(3, 4, CPU) and not world.writer and told == [("group", "gloo")]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    distributed.start("auto")
    assert told == [("group", "gloo")]  # once
    distributed.finish()
    assert told[1:] == [("left",)]


def test_one_of_several_on_gpus(told, monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.start("auto") == World(3, 4, torch.device("cuda", 1))
    assert told == [("device", 1), ("group", "nccl")]
    assert distributed.start("cpu").device == CPU and told[2:] == [("group", "gloo")]


def test_alone_on_a_gpu(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.start("cuda") == World(0, 1, torch.device("cuda", 0))
    assert told == [("device", 0)]


def test_cuda_that_is_not_there_is_refused(told):
    with pytest.raises(ConfigError, match=r"train\.device is cuda"):
        distributed.start("cuda")


def test_a_model_is_wrapped_where_there_are_others(monkeypatch):
    model, given = torch.nn.Linear(2, 2), []
    monkeypatch.setattr(
        torch.nn.parallel, "DistributedDataParallel", lambda m, **how: given.append((m, how)) or m
    )
    assert distributed.wrap(model, World(0, 1, CPU)) is model and given == []
    distributed.wrap(model, World(1, 2, CPU))
    distributed.wrap(model, World(1, 2, torch.device("cuda", 1)))
    assert [m for m, _ in given] == [model, model]
    assert [how["device_ids"] for _, how in given] == [None, [1]]
    assert all(how["gradient_as_bucket_view"] is True for _, how in given)


def test_only_the_last_micro_step_is_synchronised(monkeypatch):
    class Wrapped:
        def no_sync(self):
            return "no sync"

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapped)
    assert distributed.no_sync(Wrapped(), False) == "no sync"
    nothing = contextlib.nullcontext
    assert isinstance(distributed.no_sync(Wrapped(), True), nothing)
    assert isinstance(distributed.no_sync(torch.nn.Linear(1, 1), False), nothing)


def test_gathering_alone_is_the_value_alone():
    assert distributed.gather("x", World(0, 1, CPU)) == ["x"]
