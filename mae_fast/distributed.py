"""One process or several: torchrun's environment, and what ranks tell each other."""

import ctypes
import datetime
import gc
import itertools
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mae_fast.errors import ConfigError, Interrupted
from mae_fast.watch import TELL, Watch, describe

log = logging.getLogger("mae_fast")

# Seconds that a rank which was told to stop waits for the others to come and agree; torchrun
# kills all of them after 30.
PATIENCE = 10.0
# And without being told: as long as torch's collectives wait.
GIVE_UP = 1800.0
# How often a rank that waits looks whether another is gone.
_LOOK = 1.0
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h, bytes


class PeerLost(Exception):
    """Another rank died, or did not come in time to agree on going on."""


class World(NamedTuple):
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def writer(self) -> bool:
        """Whether this process writes the run's files: exactly one does."""
        return self.rank == 0


_watch: Watch | None = None  # of this process's group


def check_device(device: str, option: str = "device") -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{option} is cuda, but torch sees no CUDA device")


def start(device: str = "auto", give_up: float = GIVE_UP) -> World:
    """Join the group that torchrun or srun describes (gloo on CPU, NCCL on CUDA), or run alone.

    A rank waits `give_up` seconds for another that is alive.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device, "train.device")
    os.environ.update(srun(os.environ))
    size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        where = torch.device("cuda", torch.cuda.current_device())
    else:
        where = torch.device("cpu")
        _keep_memory()
    world = World(int(os.environ.get("RANK", 0)), size, where)
    if size > 1 and not dist.is_initialized():
        # NCCL ends a process whose collective is late: later than the rank gives up by itself.
        late = datetime.timedelta(seconds=give_up + 60 * (device == "cuda"))
        kind = "nccl" if device == "cuda" else "gloo"
        store, how = _store(world, give_up), dict(rank=world.rank, world_size=size, timeout=late)
        dist.init_process_group(kind, store=store, **how)
        _tell_others(world, give_up)
    return world


def _keep_memory() -> None:
    """Have the C library keep what a step frees. It gives most back to the system, and the next
    step's first touch of each page takes a tenth of its time (ViT-B, bf16). What the environment
    says of either (MALLOC_...) stays."""
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform == "linux" and not told:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, least: None)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**30)


def _store(world: World, give_up: float) -> dist.Store:
    """What brings the ranks together, under a name of this group's own. torchrun's store outlives
    its workers, and a group that it starts again would read addresses of the one before (pytorch
    issue 135712: connection refused, or a wait without end)."""
    patience = datetime.timedelta(seconds=give_up)
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=patience))
    return dist.PrefixStore(f"mae_fast/{_group_name(store, world, give_up)}", store)


def _group_name(store: dist.Store, world: World, give_up: float) -> str:
    """One that rank 0 makes. It answers each rank's own question: what another group has left in
    the store is no answer."""
    rank, me, end = world.rank, uuid.uuid4().hex, time.monotonic() + give_up
    if not rank:
        for other in range(1, world.size):
            while not store.check([f"{me}/here{other}"]):
                store.set(f"answer{other}", f"{_read(store, f'ask{other}')} {me}")
                _pause(end, other, give_up)
        return me
    store.set(f"ask{rank}", me)
    while True:
        asked, _, name = _read(store, f"answer{rank}").partition(" ")
        if asked == me:
            store.set(f"{name}/here{rank}", "")
            return name
        _pause(end, 0, give_up)


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(end: float, rank: int, give_up: float) -> None:
    if time.monotonic() > end:
        raise Interrupted(f"rank {rank} did not come within {give_up:g} s")
    time.sleep(0.005)


def _tell_others(world: World, give_up: float) -> None:
    """Begin to tell the other ranks what this one does."""
    global _watch
    store = dist.distributed_c10d._get_default_store()
    _watch = Watch(store, world.rank, world.size, give_up)


def srun(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those that srun gives each task of a step; {} where there are
    torchrun's, or no other task."""
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in env or size == 1:
        return {}
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]
    # node[03-07,11]-ib or a1,a2: the first of them
    first = re.match(r"(?:[^\[,]|\[.*?\])+", nodes)[0]
    first = re.sub(r"\[(\w+).*?\]", r"\1", first)
    job = int(env["SLURM_JOB_ID"]) * 10 + int(env.get("SLURM_STEP_ID", 0))
    local = env["SLURM_LOCALID"]
    if torch.cuda.is_available() and torch.cuda.device_count() == 1:
        local = "0"  # --gpus-per-task shows each task its own alone
    found = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": str(size), "LOCAL_RANK": local}
    where = {"MASTER_ADDR": first, "MASTER_PORT": str(15000 + job % 16000)}
    return found | {k: env.get(k, v) for k, v in where.items()}


def at(what: str | Callable[[], str]) -> None:
    """Tell the other ranks what this one does from now on."""
    if _watch:
        _watch.at(what)


def answers(device: torch.device) -> bool:
    """Whether a device ends its work in PATIENCE: one that waits for a lost rank does not."""
    if device.type != "cuda":
        return True
    done, began = torch.cuda.Event(), time.monotonic()
    done.record()
    while not done.query():
        if time.monotonic() - began > PATIENCE:
            return False
        time.sleep(0.05)
    return True


def finish() -> None:
    """Leave the group, if there is one."""
    global _watch
    if _watch:
        _watch.close()
        _watch = None
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


_meetings = itertools.count()


def _meet(store: dist.Store, stop: bool, world: World, told: Callable[[], bool]) -> bool:
    number, watch = next(_meetings), _watch
    give_up = watch.give_up if watch else GIVE_UP
    name, result = f"meeting{number}", f"meeting{number} held"
    if watch:
        watch.came(number)
    # Who came is counted in the low digits, who said stop in the high ones.
    votes = store.add(name, 1 + (stop << 32))
    if votes & 0xFFFFFFFF == world.size:
        store.set(result, str(votes >> 32))
        for old in (f"meeting{number - 1}", f"meeting{number - 1} held"):
            store.delete_key(old)  # who is here has read it
    began, since, pause, look, tell = time.monotonic(), None, 1e-4, _LOOK, TELL
    while not store.check([result]):
        time.sleep(pause)
        pause = min(1.5 * pause, 0.02)
        since = since or (time.monotonic() if told() else None)
        waited, missing = time.monotonic() - began, {}
        if watch and waited > look:
            look, missing = waited + _LOOK, watch.missing(number)
            if words := watch.lost(missing):
                raise PeerLost(words)
        words = "; ".join(describe(*each) for each in missing.items())
        if waited > tell and missing:
            tell += TELL
            if world.rank == min({*range(world.size)} - {*missing}):  # one of those that wait
                log.warning("waiting %.0f s for %s", waited, words)
        if since and time.monotonic() - since > PATIENCE:
            raise PeerLost(_late(f"within {PATIENCE:g} s to agree on stopping", watch, number))
        if waited > give_up:
            raise PeerLost(_late(f"to its next step within {give_up:g} s", watch, number))
    return store.get(result) != b"0"


def _late(words: str, watch: Watch | None, number: int) -> str:
    missing = watch.missing(number) if watch else {}
    who = "; ".join(describe(*each) for each in missing.items())
    return f"not every process came {words}{who and ', not '}{who}"


def lost_peer(error: BaseException) -> bool:
    """Whether another process was lost, or a collective failed for it: gloo has no class for it."""
    return isinstance(error, (PeerLost, dist.DistError)) or "gloo" in str(error)
