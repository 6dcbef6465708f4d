"""Runs of any number of gloo ranks, one after another: python ranks.py CASES.pickle OUT/

It sets what torchrun would set, and forks, so that torch is imported once. CASES is a list of
(name, task, configuration, ranks, the step before which rank 0 is told to stop, or 0). Each rank
writes what came of each case to OUT/NAME.RANK.json: its last row or error, and what it drew.
"""

import hashlib
import importlib
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch

from mae_fast import metrics, train
from mae_fast.tasks import classify

TASKS = {"pretrain": train.Run, "finetune": classify.FinetuneRun}


def environment(ranks: int) -> dict[str, str]:
    """What all ranks of a new group have in common."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def digest(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def watched(task: str, stop: int, drawn: list):
    """The task's Run, which notes its draws, and is told to stop before a step."""

    class Watched(TASKS[task]):
        def _inputs(self, batch):
            inputs = super()._inputs(batch)
            for i, sample in enumerate(batch.samples.tolist()):
                drawn.append([self.step, sample, *(digest(t[i]) for t in inputs)])
            return inputs

        def _one_step(self, batches, window):
            if stop and self.step == stop and self.world.writer:
                os.kill(os.getpid(), signal.SIGTERM)
            super()._one_step(batches, window)

    return Watched


def rank(i: int, task: str, cfg, stop: int, out: Path, name: str) -> None:
    os.environ |= {"RANK": str(i), "LOCAL_RANK": str(i)}
    drawn: list = []
    try:
        result = {"row": train.run(watched(task, stop, drawn), cfg)}
    except Exception as e:
        result = {"error": type(e).__name__, "words": str(e), "trace": traceback.format_exc()}
    (out / f"{name}.{i}.json").write_text(json.dumps({**result, "drawn": drawn}))


def forked(ranks: int, do) -> list[int]:
    """Exit codes of do(rank), each in a process of its own."""
    os.environ |= environment(ranks)
    children = []
    for i in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                do(i)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(cases: str, out: str) -> int:
    torch.set_num_threads(1)
    metrics.draw_curves = lambda *args: None
    for name in ("torch._dynamo", "av", "rich.progress", "torch.distributed.checkpoint"):
        importlib.import_module(name)  # once, and not in every rank
    for name, task, cfg, ranks, stop in pickle.loads(Path(cases).read_bytes()):
        codes = forked(ranks, lambda i, a=(task, cfg, stop, Path(out), name): rank(i, *a))
        if any(codes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
