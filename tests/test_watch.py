"""Who is waited for, on what video, and how long; a rank that is killed or stopped."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mae_fast import distributed, watch
from mae_fast.distributed import PeerLost, World
from mae_fast.watch import Watch

sys.path.append(str(Path(__file__).parent))
from accidents import prepare
from accidents_ranks import Ranks

CPU = torch.device("cpu")


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """watches(rank): of two ranks in one store; closed at the end."""
    monkeypatch.setattr(watch, "BEAT", 0.02)
    made = []

    def make(rank, give_up=60.0):
        store = dist.FileStore(str(tmp_path / "store"), 2)
        made.append(Watch(store, rank, 2, give_up))
        return made[-1]

    yield make
    for each in made:
        each.close()


def _gone(word) -> None:
    """The words of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    word["pid"] = process.pid


def test_a_rank_tells_what_it_is_at(pair):
    zero, one = pair(0), pair(1)
    one.at(lambda: "loading a.mp4")
    time.sleep(0.1)
    missing = zero.missing(0)
    assert list(missing) == [1] and missing[1]["pid"] == os.getpid()
    assert "loading a.mp4, for 0 s" in watch.describe(1, missing[1])
    one.came(0)
    time.sleep(0.1)
    assert zero.missing(0) == {} and list(zero.missing(1)) == [1]
    assert zero.lost(zero.missing(1)) == ""


def test_a_rank_that_is_gone_is_lost_at_once_and_a_silent_one_after_a_while(pair, monkeypatch):
    zero, one = pair(0), pair(1)
    one.at("step 7")
    time.sleep(0.1)
    one.close()
    monkeypatch.setattr(watch, "SILENT", 0.2)
    assert zero.lost(zero.missing(0)) == ""  # it is alive, and was just heard
    time.sleep(0.3)
    assert "rank 1" in zero.lost(zero.missing(0)) and "step 7" in zero.lost(zero.missing(0))
    assert "nothing was heard of it for 0.2 s" in zero.lost(zero.missing(0))
    word = zero.missing(0)
    _gone(word[1])
    assert zero.lost(word).endswith("its process is gone")
    word[1]["numbers"] += "0"  # of another machine or container, however its host is called
    zero.heard.clear()
    assert zero.lost(word) == ""


def _meet(zero, monkeypatch, give_up, told=lambda: False):
    monkeypatch.setattr(distributed, "_watch", zero)
    monkeypatch.setattr(distributed, "_LOOK", 0.1)
    monkeypatch.setattr(distributed, "_meetings", itertools.count(3))
    zero.give_up = give_up
    return distributed._meet(zero.store, False, World(0, 2, CPU), told)


def test_who_waits_says_for_whom_and_on_what_video(pair, monkeypatch, caplog):
    zero, one = pair(0), pair(1)
    one.at(lambda: "loading slow.mp4 for step 4")
    monkeypatch.setattr(distributed, "TELL", 0.2)
    with pytest.raises(PeerLost, match=r"within 1 s, not rank 1 .*slow\.mp4"):
        _meet(zero, monkeypatch, 1.0)
    told = [r.message for r in caplog.records]
    assert 1 <= len(told) <= 5 and all("for rank 1" in m and "slow.mp4" in m for m in told)


def test_who_waits_for_a_dead_rank_does_not_wait_long(pair, monkeypatch):
    zero = pair(0)
    told = zero._told
    word = {"count": 1, "host": "x", "meeting": 2, "at": "x", "seconds": 0}
    word["numbers"] = watch._numbers()
    _gone(word)
    monkeypatch.setattr(zero, "_told", lambda rank: word if rank else told(rank))
    began = time.monotonic()
    with pytest.raises(PeerLost, match="its process is gone"):
        _meet(zero, monkeypatch, 60.0)
    assert time.monotonic() - began < 5


def test_ranks_that_come_late_but_come_are_not_lost(pair, monkeypatch):
    """A rank in a long load goes on telling."""
    zero, one = pair(0), pair(1)
    monkeypatch.setattr(watch, "SILENT", 0.2)
    began = time.monotonic()

    def told():
        if time.monotonic() - began > 1.0 and not one.end.is_set():
            one.close()
            zero.store.add("meeting3", 1)
            zero.store.set("meeting3 held", "0")
        return False

    assert _meet(zero, monkeypatch, 60.0, told) is False


def test_a_store_that_is_gone_ends_the_thread_quietly(pair):
    zero = pair(0)

    asked = []

    class Gone:
        def set(self, *args):
            asked.append(args)
            raise dist.DistNetworkError("gone")

    zero.store = type("S", (), {"clone": lambda self: Gone()})()
    zero.thread.join(0.1)
    zero._beat()
    assert len(asked) == 1  # and never again


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_survivor_stops_in_time_and_the_run_goes_on(sign, tmp_path):
    """torchrun starts both again, and the run ends as if nothing had been. A stopped rank counts
    as lost after train.give_up, and torchrun kills it 30 s later: not waited for here."""
    prepare(tmp_path, frames=12)
    run = Ranks(tmp_path, "hurt", "--train.give-up", "20", "--train.save-every", "4", restarts=1)
    try:
        run.wait_for(5)
        waited = run.hurt(1, sign)
        print(f"the survivor left after {waited:.1f} s")
        assert waited < (60 if sign == signal.SIGSTOP else 30)
        if sign == signal.SIGKILL:
            assert run.wait() == 0, run.text()
            assert run.steps() == list(range(1, run.total + 1))
    finally:
        run.end()
