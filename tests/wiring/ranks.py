"""Runs of any number of gloo ranks, one after another: python ranks.py CASES.pickle OUT/

It sets what torchrun would set, and forks, so that torch is imported once. CASES is a list of
(name, task, configuration, ranks, the step before which rank 0 is told to stop, or 0). Each rank
writes what came of each case to OUT/NAME.RANK.json: its last row or error, and what it drew. `run`
does that for a test.
"""

import hashlib
import importlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from base_run import BASE

from mae_fast import metrics, train
from mae_fast.config import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig
from mae_fast.ops.source import COLUMNS, Source
from mae_fast.sharded import local
from mae_fast.tasks import classify

TASKS = {"pretrain": train.Pretraining, "finetune": classify.FinetuneRun}
MODEL = BASE["model"]


def config(index, output, **train) -> Config:
    how = dict(batch_size=3, steps=9, warmup_steps=2, log_every=1, save_every=99, blr=0.1)
    return Config(
        output=str(output),
        model=ModelConfig(**MODEL),
        mask=MaskConfig(ratio=0.5),
        data=DataConfig(index=index, repeat_aug=2, workers=0, sampling_rate=2, short_side=32),
        train=TrainConfig(**{**how, "clip_grad": 1.0, "device": "cpu", **train}),
    )


def run(folder: Path, cases) -> dict[str, list[dict]]:
    """What came of each case, by rank; a name's last word is not its folder's."""
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    command = [sys.executable, __file__, str(folder / "cases.pickle"), str(folder)]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path.cwd())]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [json.loads((folder / f"{name}.{i}.json").read_text()) for i in range(n)]
        for name, _, _, n, _ in cases
    }


def drawn(*results) -> dict:
    """{(step, sample): digests of its clip and mask} of all ranks of some cases; none twice."""
    found = {}
    for result in results:
        for each in result:
            for step, sample, *digests in each["drawn"]:
                assert (step, sample) not in found
                found[step, sample] = digests
    return found


def losses(folder) -> list[float]:
    rows = [r for r in metrics.read(Path(folder) / "metrics.jsonl") if r["step"]]
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    return [r["loss"] for r in rows]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(ranks: int) -> dict[str, str]:
    """What all ranks of a new group have in common."""
    port = str(free_port())
    return {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def digest(t: torch.Tensor) -> str:
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]


def held(run) -> int:
    """Bytes of weights and of the optimizer's state that a rank has."""
    states = (t for s in run.optimizer.state.values() for t in s.values())
    return sum(local(t).numel() * t.element_size() for t in (*run.model.parameters(), *states))


def clips_of(run, flat, table, *ids):
    """Frames, box and flip, and masks, wherever in the batch's buffer a clip lies."""
    frames = Source(flat, table, run.cfg.model.img_size).rgb()
    return frames, table[:, :COLUMNS], *ids


def watched(task: str, stop: int, drawn: list, held_bytes: list):
    """The task's Run, which notes its draws, and is told to stop before a step."""

    class Watched(TASKS[task]):
        def train(self):
            try:
                return super().train()
            finally:
                held_bytes.append(held(self))

        def _inputs(self, batch):
            inputs = super()._inputs(batch)
            noted = inputs if task == "finetune" else clips_of(self, *inputs)
            for i, sample in enumerate(batch.samples.tolist()):
                drawn.append([self.step, sample, *(digest(t[i]) for t in noted)])
            return inputs

        def _one_step(self, batches, window):
            if stop and self.step == stop and self.world.writer:
                os.kill(os.getpid(), signal.SIGTERM)
            super()._one_step(batches, window)

    return Watched


def rank(i: int, task: str, cfg, stop: int, out: Path, name: str) -> None:
    os.environ |= {"RANK": str(i), "LOCAL_RANK": str(i)}
    drawn, bytes_ = [], [0]
    try:
        result = {"row": train.run(watched(task, stop, drawn, bytes_), cfg)}
    except Exception as e:
        result = {"error": type(e).__name__, "words": str(e), "trace": traceback.format_exc()}
    (out / f"{name}.{i}.json").write_text(
        json.dumps({**result, "drawn": drawn, "held": bytes_[-1]})
    )


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
