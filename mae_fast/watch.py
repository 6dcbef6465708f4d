"""Who of several ranks is waited for, and what it is at: each tells it in the store that brought
them together, every few seconds and from a thread, so that no step waits for it."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

log = logging.getLogger("mae_fast")

BEAT = 2.0  # seconds from one word of a rank to the next
SILENT = 60.0  # seconds without a word after which a rank counts as dead
TELL = 30.0  # seconds of waiting after which it is said for whom, and again each time


class Watch:
    """What the ranks of a group tell each other. `prefix` is of this group alone; the store may be
    one that other groups have had. give_up: seconds that a rank waits for another that is alive."""

    def __init__(self, store: dist.Store, rank: int, size: int, give_up: float):
        self.store, self.rank, self.size = store, rank, size
        self.give_up = give_up
        self.meeting, self.count = -1, 0  # the last that this rank came to; its words
        self.at("starting")
        self.heard: dict[int, tuple[int, float]] = {}  # rank -> (count, when it was first seen)
        self.end = threading.Event()
        self._tell(store)
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def at(self, what: str | Callable[[], str]) -> None:
        """What this rank does from now on; a function is called when it is told."""
        self.what, self.since = what, time.monotonic()

    def came(self, meeting: int) -> None:
        self.meeting = meeting
        self.at("waiting for the others")

    def close(self) -> None:
        self.end.set()
        self.thread.join(BEAT)

    def missing(self, meeting: int) -> dict[int, dict[str, Any]]:
        """The last words of the ranks that have not come to a meeting; {} of one that has told
        nothing."""
        told = {r: self._told(r) for r in range(self.size) if r != self.rank}
        return {r: word for r, word in told.items() if word.get("meeting", -1) < meeting}

    def lost(self, missing: dict[int, dict[str, Any]]) -> str:
        """Which of the missing are dead for sure, or silent for too long, in words; or ""."""
        now = time.monotonic()
        for rank, word in missing.items():
            count = word.get("count", 0)
            if self.heard.get(rank, (-1, 0.0))[0] != count:
                self.heard[rank] = count, now
            here = word.get("numbers") == _numbers() != ""
            if here and not os.path.exists(f"/proc/{word['pid']}"):
                return f"{describe(rank, word)}: its process is gone"
            if now - self.heard[rank][1] > SILENT:
                return f"{describe(rank, word)}: nothing was heard of it for {SILENT:g} s"
        return ""

    def _told(self, rank: int) -> dict[str, Any]:
        key = f"rank{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else {}

    def _tell(self, store: dist.Store) -> None:
        self.count += 1
        what, since = self.what, self.since
        word = {
            "count": self.count,
            "host": socket.gethostname(),
            "numbers": _numbers(),
            "pid": os.getpid(),
            "meeting": self.meeting,
            "at": what() if callable(what) else what,
            "seconds": round(time.monotonic() - since),
        }
        store.set(f"rank{self.rank}", json.dumps(word))

    def _beat(self) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):  # the store is gone
            store = self.store.clone()
            while not self.end.wait(BEAT):
                self._tell(store)


def _numbers() -> str:
    """Among whom a process's number is its own: on one machine, and in one container of it, which
    may all have the same host's name. "" where it is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def describe(rank: int, word: dict[str, Any]) -> str:
    """`rank 1 (node3, process 77): loading a.mp4, for 40 s`."""
    if not word:
        return f"rank {rank}, which has told nothing"
    where = f"{word['host']}, process {word['pid']}"
    return f"rank {rank} ({where}): {word['at']}, for {word['seconds']} s"
