"""What a process becomes by torchrun's environment: alone, one of several, on a GPU of its own."""

import itertools
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mae_fast import checkpoint, distributed
from mae_fast.distributed import World
from mae_fast.errors import ConfigError, Interrupted
from mae_fast.run import Run

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
    monkeypatch.setattr(dist, "init_process_group", lambda b, **how: calls.append(("group", b)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(("left",)))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed, "_store", lambda *args: None)
    monkeypatch.setattr(distributed, "_tell_others", lambda *args: None)
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


def test_gathering_alone_is_the_value_alone():
    assert distributed.gather("x", World(0, 1, CPU)) == ["x"]


@pytest.fixture
def meeting(monkeypatch):
    """meeting(stop, told): one rank of two comes to the same meeting, the fifth, of one store."""
    store = dist.HashStore()
    monkeypatch.setattr(distributed, "_meetings", itertools.repeat(5))
    monkeypatch.setattr(distributed, "PATIENCE", 0.2)
    monkeypatch.setattr(distributed, "GIVE_UP", 1.0)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def come(stop, told=lambda: False):
        return distributed.agree(stop, World(0, 2, CPU), told)

    come.store = store
    return come


def test_a_group_hears_nothing_of_the_one_before_it():
    """A store has served two ranks, of which the second had not heard its name yet; and three."""
    store, names = dist.HashStore(), []

    def come(world):
        return distributed._group_name(store, world, 5.0)

    store.set("ask1", "of a dead rank")
    for size in (2, 2, 3, 2):
        with ThreadPoolExecutor(size) as pool:
            first = pool.submit(come, World(size - 1, size, CPU))  # before rank 0
            time.sleep(0.05)
            rest = pool.map(come, [World(r, size, CPU) for r in range(size - 1)])
            heard = {first.result(), *rest}
        assert len(heard) == 1
        names += heard
    assert len({*names}) == 4


@pytest.mark.parametrize(("rank", "missing"), [(0, 2), (1, 0), (2, 0)])
def test_a_rank_that_does_not_come_at_all_is_named(rank, missing):
    store = dist.HashStore()
    for name in ("answer1", "answer2"):
        store.set(name, "another group")
    store.set("ask1", "a")
    if rank == 0:
        with ThreadPoolExecutor(1) as pool:
            one = pool.submit(distributed._group_name, store, World(1, 3, CPU), 5.0)
            with pytest.raises(Interrupted, match="rank 2 did not come within 1 s"):
                distributed._group_name(store, World(0, 3, CPU), 1.0)
            one.result()
        return
    with pytest.raises(Interrupted, match=f"rank {missing} did not come within 0.1 s"):
        distributed._group_name(store, World(rank, 3, CPU), 0.1)


def test_alone_one_agrees_with_oneself():
    assert distributed.agree(True, World(0, 1, CPU), lambda: False) is True
    assert distributed.agree(False, World(0, 1, CPU), lambda: True) is False


@pytest.mark.parametrize("votes", [(False, False), (True, False), (False, True), (True, True)])
def test_ranks_that_meet_hear_the_same(meeting, votes):
    for key in ("meeting4", "meeting4 held"):
        meeting.store.set(key, "old")
    with ThreadPoolExecutor(2) as pool:
        heard = list(pool.map(meeting, votes))
    assert heard == [any(votes)] * 2
    assert not meeting.store.check(["meeting4 held"])
    assert meeting.store.check(["meeting5 held"])
    assert meeting.store.num_keys() == 2  # the last meeting's only: a run has millions


def test_a_rank_told_to_stop_waits_for_the_others_a_while_only(meeting):
    began = time.monotonic()
    with pytest.raises(distributed.PeerLost, match=r"within 0\.2 s to agree"):
        meeting(True, lambda: True)
    assert 0.2 <= time.monotonic() - began < 0.9
    # From when it is told: here after 0.3 s.
    began = time.monotonic()
    with pytest.raises(distributed.PeerLost, match=r"within 0\.2 s to agree"):
        distributed._meet(
            dist.HashStore(), False, World(0, 2, CPU), lambda: time.monotonic() - began > 0.3
        )
    assert 0.5 <= time.monotonic() - began


def test_a_rank_that_is_not_told_waits_as_long_as_collectives_do(meeting):
    began = time.monotonic()

    def told():
        assert time.monotonic() - began < 3, "it waits for ever"

    with pytest.raises(distributed.PeerLost, match="next step within 1 s"):
        meeting(False, told)
    assert 1.0 <= time.monotonic() - began < 3


def test_how_long_is_waited():
    """torchrun kills after 30 s; torch's collectives give up after half an hour."""
    assert (distributed.PATIENCE, distributed.GIVE_UP) == (10.0, 1800.0)


def test_a_store_that_is_gone_is_a_lost_peer(meeting, monkeypatch):
    def gone(*args):
        raise dist.DistStoreError("gone away")

    monkeypatch.setattr(distributed, "_meet", gone)
    with pytest.raises(distributed.PeerLost, match="gone away"):
        meeting(False)


def test_torchrun_s_own_death_says_what_it_hands_on(meeting, monkeypatch):
    """It dies of SIGUSR1, which SLURM sends, unless it is told to hand that on."""

    def gone(*args):
        raise dist.DistNetworkError("recv failed")

    monkeypatch.setattr(distributed, "_meet", gone)
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT")
    words = r"hands on SIGTERM,SIGINT .*--signals-to-handle"
    with pytest.raises(distributed.PeerLost, match=words):
        meeting(False)


def test_what_counts_as_another_s_death():
    assert distributed.lost_peer(dist.DistBackendError("x"))
    assert distributed.lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc] closed"))
    assert not distributed.lost_peer(RuntimeError("shape mismatch"))


FREED = """
import resource, sys, torch
from mae_fast import checkpoint, distributed
if sys.argv[1] == "run":
    distributed.start("cpu")
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(1 << 24) for _ in range(2)]  # 64 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([step() for _ in range(16)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_a_run_on_a_cpu_keeps_what_a_step_frees():
    """Pages that a step touches for the first time again, of 32,768: none, once the heap has found
    its size; many without a run."""
    found = {}
    told = {"MALLOC_TOP_PAD_": "0"}
    for case, more in (("run", {}), ("nothing", {}), ("told", told)):
        what = "nothing" if case == "nothing" else "run"
        command, env = [sys.executable, "-c", FREED, what], {**os.environ, **more}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        found[case] = int(ran.stdout)
    assert found["run"] < 1000 < found["nothing"], found
    assert found["told"] > 1000, "what its user says of malloc stays"


@pytest.mark.parametrize("apart, writes", [(False, [0]), (True, [0, 1])])
def test_one_process_writes_a_checkpoint_and_all_write_its_parts(apart, writes, monkeypatch):
    """`apart`: every rank holds a part of the model."""
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda *args: saved.append(args[-1]))
    for rank in range(2):
        world = World(rank, 2, CPU)
        what = dict(model=None, optimizer=None, _state=dict, folder=None, aside=None)
        cfg = SimpleNamespace(train=SimpleNamespace(keep=1))
        Run._save(SimpleNamespace(world=world, apart=apart, step=1, saved=0, cfg=cfg, **what))
    assert saved == [World(rank, 2, CPU) if apart else None for rank in writes]
