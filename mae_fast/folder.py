"""A run's folder: one run has it at a time, and goes on with what is in it."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from torch import Tensor

from mae_fast import checkpoint, metrics, resume
from mae_fast.config import Config
from mae_fast.config_file import to_dict
from mae_fast.environment import environment
from mae_fast.errors import CheckpointError, MaeFastError
from mae_fast.fields import defaults


class Taken(NamedTuple):
    """A folder that is this run's, and what it goes on with."""

    lock: TextIO
    found: tuple[dict[str, Any], dict[str, Tensor]] | None  # the last good checkpoint
    parts: tuple[resume.Parts, resume.Parts]  # of a step when the run began, and now


def take(
    folder: Path, cfg: Config, state: dict[str, Any], begun: resume.Parts, mixed: bool, packs: Any
) -> Taken:
    """Lock the folder for the run that would begin with `state`, and look what is in it.

    `mixed`: see `resume.parted`. Raises ConfigError where another run is in it.
    """
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = resume.lock(folder / "environment.jsonl")
        checkpoint.sweep(folder)
        broken: list[Path] = []
        found, parts = checkpoint.latest(folder, broken), (begun, begun)
        if found:
            files = {"index": cfg.data.index, "val_index": cfg.data.val_index}
            resume.check(folder, found[0], state, files, defaults(cfg))
            parts = resume.parted(folder, found[0], begun, mixed)
        for path in broken:
            checkpoint.set_aside(path, "broken")
        config, step = folder / "config.json", found[0]["step"] if found else 0
        if found is None or not config.exists():
            how = {"packs": packs} if packs else {}
            checkpoint.write_text(config, json.dumps({**to_dict(cfg), **how}, indent=2))
        metrics.forget(folder / "nonfinite.jsonl", lambda row: row["step"] < step)
        where = {"processes": begun.world}
        lock.write(json.dumps({"step": step, **where, **environment()}) + "\n")
        lock.flush()
        return Taken(lock, found, parts)
    except OSError as e:
        leave(lock)
        raise CheckpointError(f"cannot write into {folder}: {e.strerror or e}") from e
    except MaeFastError:
        leave(lock)
        raise


def leave(lock: TextIO | None) -> None:
    """Another run may have the folder."""
    if lock:
        with contextlib.suppress(OSError):  # of a full disk
            lock.close()
