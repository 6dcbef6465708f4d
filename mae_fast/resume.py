"""What must be the same for a run to go on: its settings, its videos, the videos of a step."""

import functools
import hashlib
import json
import logging
import os
import weakref
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mae_fast.data import VideoRow
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.fields import either
from mae_fast.files import locked

log = logging.getLogger("mae_fast")

# Settings of the machine, which may change between the start of a run and its resumption: none of
# them changes what is computed. The rest are the run's. The index may lie elsewhere; what is in it
# is compared by itself. How a step's videos are parted is judged by `parted`.
OF_THE_MACHINE = {
    "output",
    "data.workers",
    "data.max_bad_share",
    "data.index",
    "data.val_index",
    "train.device",
    "train.batch_size",
    "train.accum_steps",
    "train.shard",
    "train.give_up",
    "train.cuda_graph",
    "train.log_every",
    "train.save_every",
    "train.async_save",
    "train.keep",
    "train.max_nonfinite",
    "train.tensorboard",
    "train.wandb",
    "eval.probe",
    "eval.train_index",
    "eval.test_index",
    "test.temporal",
    "test.spatial",
    "test.short_side",
    "ava.train_csv",  # as of the index: what is in these files is compared
    "ava.val_csv",
    "ava.labels",
    "ava.excluded",
    "ava.train_excluded",
    "ava.train_detections",
    "ava.val_detections",
    "ava.frames",
    "ava.box_extend",  # of a test, as these
    "ava.times_detection",
    "ava.val_every",
}


def draws(rows: list[VideoRow]) -> dict[str, Any] | None:
    """What decides the draws from an index: the number of its usable videos, and a digest of their
    names, frames, rates, segments and weights in their order, and of what a pack holds of each; not
    of their folders, which may move."""
    digest = hashlib.sha256()
    for r in rows:
        name = os.path.basename(r.path)
        packed = f"\0{r.crc}" if r.at >= 0 else ""
        packed += f"\0{float(r.weight)!r}" if r.weight != 1 else ""
        line = f"{name}\0{r.start}\0{r.frames}\0{float(r.fps)!r}{packed}\n"
        digest.update(os.fsencode(line))
    return {"videos": len(rows), "digest": digest.hexdigest()[:16]} if rows else None


def check(
    folder: Path,
    old: dict[str, Any],
    new: dict[str, Any],
    indexes: dict[str, str],
    defaults: dict[str, Any],
) -> None:
    """Raise ConfigError, with the way out, where the run of state `old` would not go on as it was.

    Both hold `config` and the draws of each of `indexes` (key -> file). What a state of an older
    version lacks is not compared; a setting that there was not yet had its default.
    """
    changed = changed_settings(_filled(old["config"], defaults), new["config"])
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): "
            f"choose another output"
        )
    for key, path in indexes.items():
        was, now = old.get(key), new[key]
        if was and now and was != now:
            raise ConfigError(
                f"{path} is not the data.{key} that the run in {folder} began with: "
                f"{now['videos']} videos, digest {now['digest']}; then {was['videos']} videos, "
                f"digest {was['digest']} (of names, order, frames, rates, segments and weights). "
                f"Resume with that index, or choose another output"
            )
    if old.get("labels") != new.get("labels"):
        raise ConfigError(f"{folder} holds a run with other labels: choose another output")
    was, now = old.get("tokenizer"), new.get("tokenizer")
    if was != now:
        raise ConfigError(
            f"model.tokenizer {new['config']['model']['tokenizer']} has other weights than in the "
            f"run in {folder}: digest {now}, then {was}"
        )


class Parts(NamedTuple):
    """How a step's videos are parted: micro-steps of `batch` videos in each of `world` ranks."""

    batch: int
    accum: int
    world: int

    @property
    def videos(self) -> int:
        """All of a step."""
        return self.batch * self.accum * self.world

    def __str__(self) -> str:
        """In the names of its settings."""
        return (
            f"{self.videos} videos a step: train.batch_size {self.batch} x train.accum_steps "
            f"{self.accum} x {self.world} process{'es' * (self.world > 1)}"
        )


def parted(folder: Path, old: dict[str, Any], asked: Parts, mixed: bool) -> tuple[Parts, Parts]:
    """(how the run of state `old` parted a step when it began, how it goes on with the settings and
    processes of now).

    A step has the videos that it has had. Where the settings stand and the number of processes does
    not, micro-steps make up for it, of as many videos as before, or of the most that fit. `mixed`:
    a micro-step is one draw (mixup), so that its videos stay together. ConfigError with the numbers
    where there is no way.
    """
    train = old["config"]["train"]
    begun = Parts(train["batch_size"], train["accum_steps"], old.get("world", asked.world))
    stand = [asked.batch, asked.accum] == old.get("asked", [begun.batch, begun.accum])
    if asked.videos == begun.videos and (not mixed or asked.batch == begun.batch):
        return begun, asked
    mine, left = divmod(begun.videos, asked.world)
    if stand and not left and (not mixed or mine % begun.batch == 0):
        batch = next(n for n in range(min(asked.batch, mine), 0, -1) if mine % n == 0)
        return begun, Parts(batch, mine // batch, asked.world)
    unit = begun.batch if mixed else 1
    fit = [n for n in range(1, begun.videos + 1) if begun.videos % (n * unit) == 0]
    kept = f"train.batch_size {begun.batch}, and " if mixed else ""
    raise ConfigError(
        f"{folder} holds a run of {begun}; now it would be {asked}. Resume it with "
        f"{either(fit[:8])} process{'es' * (fit != [1])} and {kept}settings of the same product, "
        f"or choose another output"
    )


def _filled(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found = dict(old)
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(old.get(key, {}), dict):
            found[key] = _filled(old.get(key, {}), value)
        else:
            found.setdefault(key, value)
    return found


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for each setting that decides what is computed and is not the same."""
    changed = []
    for key in sorted({*old, *new}):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += changed_settings(a, b, name + ".")
        elif name not in OF_THE_MACHINE and json.dumps(a) != json.dumps(b):
            changed.append(f"{name}: {a} -> {b}")
    return changed


def moved(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings `old` of a run, but those of the machine as in `new`."""
    found = dict(old)
    for key, value in new.items():
        name = prefix + key
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            found[key] = moved(old[key], value, name + ".")
        elif name in OF_THE_MACHINE:
            found[key] = value
    return found


_locked: weakref.WeakSet = weakref.WeakSet()


def lock(path: Path) -> TextIO:
    """Open a file to append to, for this run alone while it is open: a crash closes it too.

    CheckpointError where another run has it; where a file system has no locks it says so.
    """
    f = path.open("a")
    if not locked(f):
        f.close()
        raise CheckpointError(
            f"{path.parent} is in use: another run writes into it. Wait for its end, or choose "
            f"another output"
        )
    _watch_forks()
    _locked.add(f)
    return f


@functools.cache
def _watch_forks() -> None:
    """A data worker may outlive a run that is killed, and must not hold its lock."""
    os.register_at_fork(after_in_child=lambda: [f.close() for f in list(_locked)])
