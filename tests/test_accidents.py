"""Five kills at drawn moments, and a run as if nothing had been; accidents.py does the rest."""

import multiprocessing
import random
import signal
import sys
from pathlib import Path

from mae_fast import metrics

sys.path.append(str(Path(__file__).parent))
from accidents import STEPS, command, kill, prepare, pretrain_in, same

SEED, KILLS = 20220518, 5


class _Process:
    """A run in a process of a server that has imported all there is: quick to start."""

    def __init__(self, context, folder, name):
        path = command(folder, name, workers=0)[-1]
        self._process = context.Process(target=pretrain_in, args=(folder, path))
        self._process.start()

    def poll(self):
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def wait(self):
        self._process.join()
        return self._process.exitcode


def test_five_kills_change_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mae_fast.train", "mae_fast.data"])
    prepare(tmp_path)
    assert _Process(context, tmp_path, "whole").wait() == 0
    draw = random.Random(SEED)
    for _ in range(KILLS):
        process = _Process(context, tmp_path, "killed")
        print(kill(process, tmp_path / "killed", draw))
        assert process.poll() == -signal.SIGKILL, "it ended before it could be killed"
    assert _Process(context, tmp_path, "killed").wait() == 0
    assert same(tmp_path / "killed", tmp_path / "whole")
    rows = metrics.read(tmp_path / "killed" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
