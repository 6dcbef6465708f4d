"""One process or several: torchrun's environment, and what ranks tell each other."""

import gc
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mae_fast.errors import ConfigError

# Seconds that a rank which was told to stop waits for the others to come and agree; torchrun
# kills all of them after 30.
PATIENCE = 10.0
# And without being told: as long as torch's collectives wait.
GIVE_UP = 1800.0


class PeerLost(Exception):
    """Another rank died, or did not come within PATIENCE to agree on stopping."""


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


def gather(value: Any, world: World) -> list[Any]:
    """`value` of every rank, in order of rank, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def agree(stop: bool, world: World, told: Callable[[], bool]) -> bool:
    """Whether any rank said `stop`: every rank calls this at the same place and hears the same.

    Hosts meet in the store that brought the ranks together; no device is waited for, and told() is
    asked all the while. Raises PeerLost once it has been true for PATIENCE, or without the store.
    """
    if world.size == 1:
        return stop
    try:
        return _meet(dist.distributed_c10d._get_default_store(), stop, world, told)
    except dist.DistError as e:
        raise PeerLost(_without_store(e)) from e


def _without_store(error: dist.DistError) -> str:
    """torchrun has the store, and dies of a signal that it does not hand on to its ranks."""
    heard = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")  # set by torchrun, whatever it was
    if not heard:
        return f"the ranks' store is gone: {error}"
    return (
        f"torchrun is gone, and the ranks' store with it; it hands on {heard} and ends at once by "
        f"any other signal: see its --signals-to-handle"
    )


_meetings = itertools.count()  # of this process: a store may outlive a run


def _meet(store: dist.Store, stop: bool, world: World, told: Callable[[], bool]) -> bool:
    number = next(_meetings)
    name, result = f"mae_fast/meeting{number}", f"mae_fast/meeting{number} held"
    # Who came is counted in the low digits, who said stop in the high ones.
    votes = store.add(name, 1 + (stop << 32))
    if votes & 0xFFFFFFFF == world.size:
        store.set(result, str(votes >> 32))
        for old in (f"mae_fast/meeting{number - 1}", f"mae_fast/meeting{number - 1} held"):
            store.delete_key(old)  # who is here has read it
    began, since, pause = time.monotonic(), None, 1e-4
    while not store.check([result]):
        time.sleep(pause)
        pause = min(1.5 * pause, 0.02)
        since = since or (time.monotonic() if told() else None)
        if since and time.monotonic() - since > PATIENCE:
            raise PeerLost(f"not every process came within {PATIENCE:g} s to agree on stopping")
        if time.monotonic() - began > GIVE_UP:
            raise PeerLost(f"not every process came to its next step within {GIVE_UP:g} s")
    return store.get(result) != b"0"


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because of another process. gloo has no class for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
