"""RandAugment's operations, C++ beside PIL, on one core: `python -m benchmarks.randaugment`.

A clip is 16 frames of 256 x 340; times are CPU time. Each result is held against PIL's first, to
the bit.
--out appends the record, of all operations and of the policy of VideoMAE's recipe.
"""

import argparse
import statistics

import numpy as np
import torch

from mae_fast.bench.records import append
from mae_fast.bench.timing import cpu_time, interleave
from mae_fast.environment import environment
from mae_fast.tasks import randaugment

SHAPE = (16, 256, 340, 3)
POLICY = "rand-m7-n4-mstd0.5-inc1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
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
        runs[f"{name} cpp"] = lambda call=call: kernel(*call)
        runs[f"{name} PIL"] = lambda call=call: randaugment.reference(*call)
    seconds = interleave(runs, args.rounds, timer=cpu_time)
    sums = {"cpp": 0.0, "PIL": 0.0}
    print(f"{'ms a clip':24} {'C++':>8} {'PIL':>8}")
    for name in randaugment.OPS:
        cpp, pil = (1e3 * statistics.median(seconds[f"{name} {x}"]) for x in sums)
        sums["cpp"] += cpp
        sums["PIL"] += pil
        print(f"{name:24} {cpp:8.1f} {pil:8.1f}")
    each = 4 * 0.5 / len(randaugment.OPS)  # so often is an operation done by the policy, on a mean
    cpp, pil = (1e3 / (each * ms) for ms in sums.values())
    print(f"{POLICY}: {cpp:.1f} clips/s a core, PIL {pil:.1f}: {cpp / pil:.1f} times")
    if args.out:
        what = {"what": "RandAugment of 16 x 256 x 340, one core", "op": "randaugment"}
        record = {"kind": "augment", **what, "shape": str(list(SHAPE)), "seconds": seconds}
        append(args.out, {**record, "environment": environment()})


if __name__ == "__main__":
    main()
