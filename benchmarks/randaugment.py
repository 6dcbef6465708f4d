"""RandAugment's operations, C++ beside PIL, on one core: `python -m benchmarks.randaugment`.

A clip is 16 frames of 256 x 340; times are CPU time. Each result is held against PIL's first, to
the bit. --out appends the record, of all operations and of the policy of VideoMAE's recipe.
"""

import statistics
from functools import partial

import numpy as np
import torch
import tyro

from mae_fast.bench.records import append
from mae_fast.bench.timing import cpu_time, interleave
from mae_fast.environment import environment
from mae_fast.tasks import randaugment

SHAPE = (16, 256, 340, 3)
POLICY = "rand-m7-n4-mstd0.5-inc1"


def main(rounds: int = 5, out: str = "") -> None:
    torch.set_num_threads(1)
    coarse = np.random.default_rng(0).integers(0, 256, (16, 32, 43, 3), dtype=np.uint8)
    clip = torch.from_numpy(coarse.repeat(8, 1).repeat(8, 2)[:, :, :340].copy())
    kernel, runs = randaugment._kernel(), {}
    if kernel is randaugment.reference:
        raise SystemExit("the C++ kernels are not built: there is nothing to compare")
    for name, planned in randaugment.OPS.items():
        call = (clip, *planned(0.7, 1, *SHAPE[1:3]))
        if not torch.equal(kernel(*call), randaugment.reference(*call)):
            raise SystemExit(f"{name} is not PIL's: nothing is timed")
        runs[f"{name} cpp"] = partial(kernel, *call)
        runs[f"{name} PIL"] = partial(randaugment.reference, *call)
    seconds = interleave(runs, rounds, timer=cpu_time)
    ms = {name: 1e3 * statistics.median(samples) for name, samples in seconds.items()}
    print(f"{'ms a clip':24} {'C++':>8} {'PIL':>8}")
    for name in randaugment.OPS:
        print(f"{name:24} {ms[f'{name} cpp']:8.1f} {ms[f'{name} PIL']:8.1f}")
    each = 4 * 0.5 / len(randaugment.OPS)  # so often is an operation done by the policy, on a mean
    cpp, pil = (
        1e3 / each / sum(ms[f"{name} {who}"] for name in randaugment.OPS) for who in ("cpp", "PIL")
    )
    print(f"{POLICY}: {cpp:.1f} clips/s a core, PIL {pil:.1f}: {cpp / pil:.1f} times")
    if out:
        what = {"what": "RandAugment of 16 x 256 x 340, one core", "op": "randaugment"}
        record = {"kind": "augment", **what, "shape": str(list(SHAPE)), "seconds": seconds}
        append(out, {**record, "environment": environment()})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
