"""One process or several: torchrun's environment, DDP, and what ranks tell each other."""

import contextlib
import gc
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from mae_fast.errors import ConfigError


class World(NamedTuple):
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def writer(self) -> bool:
        """Whether this process writes the run's files: exactly one does."""
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the group that torchrun describes (gloo on CPU, NCCL on CUDA), or run alone."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch sees no CUDA device")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        where = torch.device("cuda", torch.cuda.current_device())
    else:
        where = torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return World(int(os.environ.get("RANK", 0)), size, where)


def finish() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        gc.collect()  # a model in a cycle would keep the group's threads, which abort at exit
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The model as its ranks train it."""
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Leave gradients unreduced in all but the last micro-step."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def gather(value: Any, world: World) -> list[Any]:
    """`value` of every rank, in order of rank, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
