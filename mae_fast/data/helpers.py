"""Processes that answer for one file after another: a file that kills its process, or takes longer
than it may, costs its own answer and nothing else."""

import contextlib
import importlib
import json
import os
import queue
import select
import subprocess
import sys
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

from mae_fast.errors import DataError

# A film of two hours takes many minutes to decode, and is not stuck.
_BYTES_A_SECOND = 100_000


def answers(
    tasks: Iterable[tuple[Hashable, tuple]], function: str, workers: int, timeout: float
) -> Iterator[tuple[Any, dict]]:
    """(key, answer) of each (key, arguments) as they are done, from `workers` processes.

    function, "module:name", gives a dict; arguments, of which the first is a path, and answer go
    as JSON. {"error": reason} where it raises BadVideo, dies or takes more than timeout seconds,
    and one for each 100 kB. Raises OSError where it cannot write.
    """
    idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
    helpers = [_Helper(function, timeout) for _ in range(workers)]
    for helper in helpers:
        idle.put(helper)

    def one(key, arguments):
        helper = idle.get()
        try:
            return key, helper.ask(*arguments)
        finally:
            idle.put(helper)

    pool = ThreadPoolExecutor(workers)
    pending = set()
    try:
        # Few at a time: a long list costs no memory, and Ctrl-C has little left to cancel.
        waiting = iter(tasks)
        while True:
            while len(pending) < 4 * workers and (task := next(waiting, None)):
                pending.add(pool.submit(one, *task))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda f: f.exception() is not None):
                yield future.result()  # an answer that is there is not lost to another's error
    finally:
        for future in pending:
            future.cancel()
        for helper in helpers:
            helper.stop()
        pool.shutdown()


class _Helper:
    """A process that answers for one file after another; replaced when it dies or is too slow."""

    def __init__(self, function: str, timeout: float):
        self.function, self.timeout = function, timeout
        self.process, self.stopped = None, False

    def ask(self, path: str, *arguments) -> dict:
        if self.stopped:
            return {"error": "stopped"}
        if not os.path.exists(path):
            return {"error": "missing: no such file"}
        if self.process is None:
            self.process = self._start()
        try:
            self.process.stdin.write(json.dumps([path, *arguments]) + "\n")
            self.process.stdin.flush()
            timeout = round(self.timeout + os.path.getsize(path) / _BYTES_A_SECOND, 1)
            ready, _, _ = select.select([self.process.stdout], [], [], timeout)
            line = self.process.stdout.readline() if ready else ""
        except (OSError, ValueError):
            ready, line = True, ""
        if line:
            answer = json.loads(line)
            if "errno" in answer:
                raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
            return answer
        code = self._end()
        if not ready:
            return {"error": f"timeout: not done within {timeout:g} s"}
        return {"error": f"crash: the decoder died with exit status {code}"}

    def stop(self) -> None:
        self.stopped = True
        self._end()

    def _start(self) -> subprocess.Popen:
        # Not multiprocessing: that would import the caller's script again in each process.
        call = f"from mae_fast.data.helpers import answer; answer({self.function!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", call],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if process.stdout.readline() != "ready\n":
            raise DataError(f"a helping process ends at once: exit status {process.wait()}")
        return process

    def _end(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.kill()
        code = process.wait()
        process.stdout.close()
        with contextlib.suppress(OSError):
            process.stdin.close()
        return code


def answer(function: str) -> None:
    """The loop of a process: arguments as a JSON list a line in, a JSON object a line out."""
    from mae_fast.data.container import BadVideo

    module, name = function.split(":")
    function = getattr(importlib.import_module(module), name)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            facts = function(*json.loads(line))
        except BadVideo as e:
            facts = {"error": e.reason}
        except OSError as e:  # it cannot write: what it reads gives BadVideo
            facts = {"errno": e.errno, "file": e.filename}
        except Exception as e:
            facts = {"error": f"failed: {type(e).__name__}: {e}"}
        print(json.dumps(facts), flush=True)
