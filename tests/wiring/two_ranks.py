"""Several runs in one pair of ranks: python two_ranks.py CASES.pickle OUT/

It sets what torchrun would set, and forks, so that torch is imported once. CASES is a list of
(name, configuration, what happens on rank 1). Each rank writes what came of each case to
OUT/NAME.RANK.json.
"""

import contextlib
import json
import os
import pickle
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from mae_fast import metrics
from mae_fast.buckets import Buckets
from mae_fast.data import VideoReader
from mae_fast.errors import DataError
from mae_fast.model import MaskedAutoencoder
from mae_fast.train import pretrain


@contextlib.contextmanager
def happening(what: str):
    """`signal`: rank 1 gets SIGTERM as it reads its sixth video. `fault`: that video is an error.
    `nan`: its third clip's gradient is not finite.

    Gives the list of whether each micro-step's gradients were reduced."""
    reads, reduced = [], []
    read, forward, added_up = VideoReader.pictures, MaskedAutoencoder.forward, Buckets.added_up

    def counted(self, *args, **kwargs):
        reads.append(1)
        if what == "signal" and os.environ["RANK"] == "1" and len(reads) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "fault" and os.environ["RANK"] == "1" and len(reads) == 6:
            raise DataError("planted")
        return read(self, *args, **kwargs)

    def watched(self, *args, **kwargs):
        if torch.is_grad_enabled():
            reduced.append(False)
        loss, *rest = forward(self, *args, **kwargs)
        if what == "nan" and os.environ["RANK"] == "1" and len(reduced) == 3:
            loss = loss * float("nan")
        return loss, *rest

    def adding(self):
        reduced[-1] = True
        return added_up(self)

    with mock.patch.object(VideoReader, "pictures", counted):
        with mock.patch.object(MaskedAutoencoder, "forward", watched):
            with mock.patch.object(Buckets, "added_up", adding):
                yield reduced


def start() -> int:
    """Become two ranks; the other's process on rank 0, and 0 on rank 1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    other = os.fork()
    rank = "0" if other else "1"
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    return other


def main(cases: str, out: str) -> int:
    torch.set_num_threads(1)
    metrics.draw_curves = lambda *args: None
    other = start()
    # One group for all of them: each run would leave it, which is counted.
    for name, cfg, what in pickle.loads(Path(cases).read_bytes()):
        with happening(what) as reduced, mock.patch.object(dist, "destroy_process_group") as left:
            try:
                result = {"row": pretrain(cfg)}
            except Exception as e:
                result = {"error": type(e).__name__, "words": str(e)}
        result |= {"reduced": reduced, "left": left.call_count}
        (Path(out) / f"{name}.{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
    return os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
