"""The made set of `mae-fast demo --downstream` over seeds, with masked fine-tuning beside:
`python -m benchmarks.downstream VIDEOS OUT`.

Each seed makes its own set, pre-trains, chooses its rates and leaves OUT/SEED/; a seed that is
there already is not done again. The table is of all seeds that are there: means, and half of
Student's 95% interval over seeds.
"""

import json
import logging
from pathlib import Path

import tyro

from mae_fast import demo_downstream as made
from mae_fast.checkpoint import checkpoints
from mae_fast.sweep import interval

ROWS = ("chance", "single_frame", "scratch", "pretrained", "masked", "knn", "linear", "attentive")


def one(source: Path, folder: Path, minutes: float, steps: int, seed: int) -> dict[str, float]:
    """The demo's results of a seed, and `masked`: fine-tuned with half of the patches at first."""
    kept = folder / "all.json"
    if kept.exists():
        return json.loads(kept.read_text())
    found = made.demo(source, folder, minutes, steps, seed)
    sets, last = folder / "set", checkpoints(folder / "pretrain")[-1]
    rate = json.loads((folder / "runs/pretrained/config.json").read_text())["train"]["blr"]
    made.tune("masked", str(last), rate, sets / "train.jsonl", folder, seed, masked=0.5)
    found["masked"] = made.tested_on(folder / "runs/masked", sets / "test.jsonl")
    kept.write_text(json.dumps(found))
    return found


def main(videos: Path, out: Path, /, seeds: int = 3, minutes: float = 3.5, steps: int = 0) -> None:
    logging.getLogger("mae_fast").setLevel(logging.WARNING)
    found = [one(videos, out / str(s), minutes, steps, s) for s in range(seeds)]
    print(f"| top-1 of {made.TEST} clips, {len(found)} seeds | mean | 95% |\n|---|---|---|")
    for name in ROWS:
        mean, half = interval([100 * r[name] for r in found])
        print(f"| {name} | {mean:.1f}% | ± {half:.1f} |")
    gain = interval([100 * (r["pretrained"] - r["scratch"]) for r in found])
    print(f"| pretrained - scratch | {gain[0]:.1f} | ± {gain[1]:.1f} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
