"""Fine-tuning and its test as two ranks: python two_tuning_ranks.py CASE.pickle

CASE is (configuration, options of the test). What comes of it lies in the run's folder.
"""

import os
import pickle
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from two_ranks import start

from mae_fast import metrics
from mae_fast.tasks.finetune import finetune
from mae_fast.tasks.score import test


def main(case: str) -> int:
    torch.set_num_threads(1)
    metrics.draw_curves = lambda *args: None
    cfg, options = pickle.loads(Path(case).read_bytes())
    other = start()
    with mock.patch.object(dist, "destroy_process_group"):  # one group for both
        finetune(cfg)
        test(cfg.output, **options)
    dist.destroy_process_group()
    return os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
