"""How a run ends before its last step: what is said, and from where it goes on."""

import signal
from pathlib import Path

from mae_fast import checkpoint
from mae_fast.config import TrainConfig
from mae_fast.errors import Interrupted, NonFiniteError, OutOfMemory


class Stop(Exception):
    """Raised on every rank before the same step: one of them was told to stop, or cannot go on."""


def interrupted(folder: Path, step: int, told: int, lost: str, saved: bool) -> Interrupted:
    """What ended a run after a step: a signal, a lost process, or both, of which one may be the
    cause. `saved`: the step is in the folder, or will be."""
    stopped = f"stopped by {signal.Signals(told).name}" if told else ""
    why = ", and ".join(filter(None, [stopped, lost]))
    if not step:
        return Interrupted(f"{why} before the first step")
    words = "which is saved; the same command goes on from there"
    if not saved:
        words = f"and the same command goes on from {checkpoint.newest(folder)}"
    return Interrupted(f"{why} after step {step}, {words}")


def out_of_memory(
    folder: Path, step: int, rank: int, train: TrainConfig, error: Exception
) -> OutOfMemory:
    """In the step after `step`."""
    return OutOfMemory(
        f"rank {rank} has too little memory in step {step + 1} ({str(error).splitlines()[0]}). "
        f"With a smaller train.batch_size than {train.batch_size}, and as much more of "
        f"train.accum_steps than {train.accum_steps}, the same run goes on from "
        f"{checkpoint.newest(folder)}"
    )


def non_finite(folder: Path, steps: int, most: int) -> NonFiniteError | None:
    """Where more steps than `most` were skipped."""
    if steps <= most:
        return None
    return NonFiniteError(
        f"{steps} steps were not finite (train.max_nonfinite {most}); every checkpoint is kept, "
        f"see {folder / 'nonfinite.jsonl'}"
    )
