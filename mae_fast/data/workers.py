"""Batches made aside: by worker processes, or without any by a thread, so that the loop that waits
for one can look up ten times a second.

Each worker has a socket of its own: it ends when the worker does, and nothing is shared that a
killed one could leave locked. Pixels come as an anonymous file in memory whose descriptor goes
through the socket: Docker gives /dev/shm 64 MB, and one batch may be larger.
"""

import contextlib
import mmap
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from mae_fast.errors import DataError, MaeFastError
from mae_fast.signals import SIGNALS

# Seconds that a step waits for its batch before whoever makes it counts as stuck.
_STUCK = 900.0
_TICK = 0.1
_AHEAD = 2  # batches asked of each worker


def produce(
    make: Callable[[Any], Any], tasks: Sequence[Any], workers: int, waiting: Callable[[], None]
) -> Iterator[Any]:
    """make(task) for each task, in order, pinned where there is CUDA. `waiting` may raise."""
    pool = _Pool(make, tasks, workers) if workers else None
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    # With workers one batch is fetched and pinned ahead; without, each is made when asked for.
    asked, ready, end = threading.Semaphore(bool(pool)), queue.SimpleQueue(), threading.Event()
    fetch = pool.fetch if pool else make
    thread = threading.Thread(
        target=_fetch_all, args=(fetch, tasks, device, asked, ready, end), daemon=True
    )
    thread.start()
    try:
        for _ in tasks:
            asked.release()
            batch = _await(ready, waiting)
            if isinstance(batch, BaseException):
                raise batch
            yield batch
            del batch
    finally:
        end.set()
        asked.release()
        if pool:
            pool.kill()
            thread.join(1.0)


def _await(ready: queue.SimpleQueue, waiting: Callable[[], None]) -> Any:
    for _ in range(round(_STUCK / _TICK)):  # not by a clock, which goes on in a suspended job
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=_TICK)
        waiting()
    raise DataError(f"no batch for {_STUCK:g} s: is the file system of the videos there?")


def _fetch_all(fetch, tasks, device, asked, ready, end) -> None:
    """The thread that fetches batches as they are asked for; the last it gives may be an error."""
    try:
        if device is not None:
            torch.cuda.set_device(device)
        for task in tasks:
            asked.acquire()
            if end.is_set():
                return
            batch = fetch(task)
            ready.put(batch if device is None else batch.pin_memory())
            del batch
    except BaseException as e:
        ready.put(e)


class _Pool:
    """Processes of which the i-th of n makes tasks i, i + n, i + 2 n, ..."""

    def __init__(self, make: Callable[[Any], Any], tasks: Sequence[Any], n: int) -> None:
        self.tasks, self.sent, self.got = tasks, 0, 0
        self.ends: list[Connection] = []
        self.processes: list[multiprocessing.Process] = []
        # Also when a program ends without closing this, and would wait for them.
        self.kill = weakref.finalize(self, _kill, self.processes)
        try:
            for _ in range(n):
                self._start(make)
        except OSError as e:
            self.kill()
            raise DataError(f"cannot start {n} data workers: {e}") from e

    def _start(self, make: Callable[[Any], Any]) -> None:
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.Process(target=_work, args=(make, theirs), daemon=True)
        worker.start()
        theirs.close()  # so that ours ends when the worker does
        self.ends.append(ours)
        self.processes.append(worker)

    def fetch(self, _: Any) -> Any:
        """The next batch in order, whatever order they are made in."""
        try:
            while self.sent < min(self.got + _AHEAD * len(self.ends), len(self.tasks)):
                at = self.sent
                self.ends[at % len(self.ends)].send(self.tasks[at])
                self.sent += 1
            at = self.got
            batch = _receive(self.ends[at % len(self.ends)])
        except (OSError, EOFError) as e:
            worker = self.processes[at % len(self.ends)]
            worker.join(10.0)  # its socket closes a while before it has ended
            raise DataError(
                f"a data worker was lost (out of memory?): {_fate(worker.exitcode)}"
            ) from e
        self.got += 1
        return batch


def _fate(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


def _kill(processes: list[multiprocessing.Process]) -> None:
    for worker in processes:
        worker.kill()  # stopped ones too
    for worker in processes:
        worker.join(1.0)
        if worker.is_alive():  # in a read that never ends: nobody should wait for it at exit
            multiprocessing.process._children.discard(worker)


def _work(make: Callable[[Any], Any], conn: Connection) -> None:
    """A worker: tasks in, batches or errors out, until the run ends it or is gone."""
    parent = os.getppid()  # the run, or the server that forks for it, which ends when it does
    os.setsid()
    for each in SIGNALS:  # sent to a whole group or job: the run answers, and ends its workers
        signal.signal(each, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, EOFError):
        while True:
            # Sockets to the run are open in other workers too: its end is seen otherwise.
            while not conn.poll(1.0):
                if os.getppid() != parent:
                    return
            answer, fd = _answer(make, conn.recv())
            conn.send(answer)
            if fd is not None:
                reduction.send_handle(conn, fd, parent)
                os.close(fd)


def _answer(make: Callable[[Any], Any], task: Any) -> tuple[tuple, int | None]:
    """What is sent for a task: (class, parts) of a batch and where its pixels are, or an error."""
    try:
        batch = make(task)
        flats, rest = batch.pack()
        return (type(batch), rest), _in_memory(flats)
    except MaeFastError as e:
        return (None, e), None
    except OSError as e:
        return (None, DataError(f"a data worker cannot hand over its batch: {e}")), None
    except Exception:
        return (None, RuntimeError(f"in a data worker:\n{traceback.format_exc()}")), None


def _in_memory(flats: Sequence[torch.Tensor]) -> int:
    """The descriptor of an anonymous file that holds uint8 vectors in a row."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("mae_fast")
    else:
        with tempfile.TemporaryFile() as f:
            fd = os.dup(f.fileno())
    try:
        for flat in flats:
            left = memoryview(flat.numpy())
            while left:
                left = left[os.write(fd, left) :]
    except OSError:
        os.close(fd)
        raise
    return fd


def _receive(conn: Connection) -> Any:
    """The batch that a worker sent; raises what it met. OSError or EOFError where it is gone."""
    kind, rest = conn.recv()
    if kind is None:
        raise rest
    fd = reduction.recv_handle(conn)
    try:
        block = mmap.mmap(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    return kind.unpack(torch.frombuffer(block, dtype=torch.uint8), rest)
