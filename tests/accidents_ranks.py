"""What befalls one rank of several, done to real runs by hand: python tests/accidents_ranks.py
[SEED] [CASE ...]. Cases: kills (20), hung, nodes. See accidents.py; tests/test_watch.py does two.
"""

import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from accidents import children, command, main, rows, same, start, wait_for

from mae_fast import metrics


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def gone(pid: int) -> bool:
    """It has ended; whether anybody has asked for its code or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    return True


class Ranks:
    """A run of two ranks by torchrun, which starts both again when one is lost; or one agent of
    several that find each other at `port`."""

    def __init__(self, folder, name, *options, restarts=0, total=24, port=0):
        self.run, self.total = folder / name, total
        launch = ("--standalone", "--nproc-per-node=2")
        if port:
            where = f"127.0.0.1:{port}"
            launch = ("--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d")
            launch += (f"--rdzv-endpoint={where}", "--rdzv-id=nodes", "--local-addr=127.0.0.1")
            launch += ("--rdzv-conf=last_call_timeout=3",)
        launch += (f"--max-restarts={restarts}", "--monitor-interval=0.2")
        argv = command(
            folder, name, "--train.steps", str(total), *options, workers=0, launch=launch
        )
        self.log = open(folder / f"{name}.{os.urandom(3).hex()}.log", "w+")
        # A node that returns waits for ever for a store that torchrun shares (docs/scale.md).
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if port else {}
        self.process = start(argv, folder, stderr=self.log, env=env)

    def ranks(self) -> list[int]:
        return children(self.process.pid)

    def wait_for(self, more: int) -> None:
        """Until there are so many rows."""
        wait_for(lambda: self.process.poll() is not None or rows(self.run) >= more, 300)
        assert self.process.poll() is None, self.text()[-3000:]

    def hurt(self, rank: int, sign: int) -> float:
        """Send a rank a signal; seconds until the other has left."""
        pids = self.ranks()
        began = time.monotonic()
        os.kill(pids[rank], sign)
        wait_for(lambda: gone(pids[1 - rank]), 300)
        return time.monotonic() - began

    def wait(self) -> int:
        return self.process.wait(600)

    def steps(self) -> list[int]:
        return [r["step"] for r in metrics.read(self.run / "metrics.jsonl")]

    def text(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def end(self) -> None:
        """Nothing is left, stopped ranks neither."""
        if self.process.poll() is None:
            for pid in [*self.ranks(), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()


def kills(folder: Path, seed: int, n: int = 20) -> Iterator[tuple[str, bool]]:
    """n SIGKILLs of one of two ranks, at drawn moments of one run; torchrun goes on by itself."""
    draw, longest = random.Random(seed), 0.0
    whole = Ranks(folder, "whole", total=120)
    yield "two ranks that nothing befalls", whole.wait() == 0
    run = Ranks(folder, "killed", "--train.keep", "4", restarts=n, total=120)
    for i in range(n):
        pids = run.ranks()
        before = rows(run.run)
        more = draw.randrange(1, 5)
        wait_for(lambda b=before, m=more: rows(run.run) not in range(b, b + m), 300)
        if rows(run.run) < before:  # it has begun again, from a checkpoint
            b = rows(run.run)
            wait_for(lambda b=b, m=more: rows(run.run) >= b + m, 300)
        time.sleep(draw.random() * 0.3)
        rank = draw.randrange(2)
        waited = run.hurt(rank, signal.SIGKILL)
        longest = max(longest, waited)
        wait_for(lambda p=pids: len(run.ranks()) == 2 and not {*p} & {*run.ranks()}, 120)
        yield f"kill {i + 1}: rank {rank} after {rows(run.run)} rows; {waited:.1f} s", waited < 30
    good = run.wait() == 0 and run.steps() == list(range(1, 121))
    yield "the run ended, each row once", good
    yield "with the weights of the other", same(run.run, whole.run)
    yield f"the longest that a survivor took to leave: {longest:.1f} s", longest < 30
    run.end()
    whole.end()


def hung(folder: Path, seed: int) -> Iterator[tuple[str, bool]]:
    """A rank is stopped, as by a file system that does not answer: torchrun kills it 30 s after
    the other has left, and starts both again."""
    run = Ranks(folder, "hung", "--train.give-up", "10", restarts=1)
    run.wait_for(5)
    waited = run.hurt(1, signal.SIGSTOP)
    yield f"a rank is stopped: the other left after {waited:.1f} s", waited < 75
    yield "and said for whom it waited", "another process was lost" in run.text()
    yield "the run went on to its end", run.wait() == 0 and run.steps() == [*range(1, 25)]
    run.end()


def nodes(folder: Path, seed: int) -> Iterator[tuple[str, bool]]:
    """Two agents on loopback; the second is killed with its rank, and comes back."""
    whole = Ranks(folder, "whole", total=80)
    yield "two ranks that nothing befalls", whole.wait() == 0
    port, options = free_port(), ("--train.give-up", "20")
    agents = [Ranks(folder, "nodes", *options, restarts=9, total=80, port=port)]
    time.sleep(2.0)  # so that it has the store
    agents.append(Ranks(folder, "nodes", *options, restarts=9, total=80, port=port))
    try:
        agents[0].wait_for(8)
        lost = [*agents[1].ranks(), agents[1].process.pid]
        for pid in lost:
            os.kill(pid, signal.SIGKILL)
        agents[1].process.wait()
        before, began = rows(agents[0].run), time.monotonic()
        alone = agents[0].run / "environment.jsonl"
        wait_for(lambda: '"processes": 1' in alone.read_text(), 300)
        took = time.monotonic() - began
        yield f"a node is lost after {before} rows: one goes on alone {took:.0f} s later", True
        agents[0].wait_for(before + 4)
        agents[1] = Ranks(folder, "nodes", *options, restarts=9, total=80, port=port)
        wait_for(lambda: alone.read_text().rstrip().count('"processes": 2') >= 2, 300)
        yield f"it is back: two go on after {rows(agents[0].run)} rows", True
        codes = [agent.wait() for agent in agents]
        yield f"codes {codes}, each row once", agents[0].steps() == [*range(1, 81)]
        a, b = (metrics.read(r.run / "metrics.jsonl") for r in (whole, agents[0]))
        worst = max(abs(x["loss"] / y["loss"] - 1) for x, y in zip(a, b, strict=True))
        yield f"losses of two undisturbed ranks, to {worst:.0e}", worst < 1e-4
    finally:
        for agent in (*agents, whole):
            print(agent.text()[-1500:]) if agent.process.poll() else None
            agent.end()


CASES = {f.__name__: f for f in (kills, hung, nodes)}


if __name__ == "__main__":
    sys.exit(main(CASES, *map(int, sys.argv[1:2]), *sys.argv[2:]))
