"""What must be the same for a run to go on: its settings, its videos, its number of processes."""

import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import weakref
from pathlib import Path
from typing import Any, TextIO

from mae_fast.data import VideoRow
from mae_fast.errors import CheckpointError, ConfigError

log = logging.getLogger("mae_fast")

# Settings that may change between the start of a run and its resumption: none of them changes
# what is computed. The index may lie elsewhere; what is in it is compared by itself.
_FREE = {
    "output",
    "data.workers",
    "data.max_bad_share",
    "data.index",
    "data.val_index",
    "train.device",
    "train.cuda_graph",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.max_nonfinite",
    "train.tensorboard",
    "train.wandb",
    "eval.probe",
    "eval.train_index",
    "eval.test_index",
    "ava.train_csv",  # as of the index: what is in these files is compared
    "ava.val_csv",
    "ava.labels",
    "ava.excluded",
    "ava.train_excluded",
    "ava.train_detections",
    "ava.val_detections",
    "ava.frames",
}


def draws(rows: list[VideoRow]) -> dict[str, Any] | None:
    """What decides the draws from an index: the number of its usable videos, and a digest of their
    names, frames, rates and segments in their order, and of what a pack holds of each; not of their
    folders, which may move."""
    digest = hashlib.sha256()
    for r in rows:
        name = os.path.basename(r.path)
        packed = f"\0{r.crc}" if r.at >= 0 else ""
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

    Both hold `config`, `world` and the draws of each of `indexes` (key -> file). What a state of an
    older version lacks is not compared; a setting that there was not yet had its default.
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
                f"digest {was['digest']} (of names, order, frames, rates and segments). "
                f"Resume with that index, or choose another output"
            )
    was, now = old.get("tokenizer"), new.get("tokenizer")
    if was != now:
        raise ConfigError(
            f"model.tokenizer {new['config']['model']['tokenizer']} has other weights than in the "
            f"run in {folder}: digest {now}, then {was}"
        )
    was, now = old.get("world", new["world"]), new["world"]
    if was != now:
        raise ConfigError(
            f"{folder} holds a run of {was} processes, and now there are {now}: at step "
            f"{old['step']} its learning rate and epoch would change {now / was:g} times. Resume "
            f"it with {was} (torchrun --nproc-per-node {was}), or choose another output"
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
        elif name not in _FREE and json.dumps(a) != json.dumps(b):
            changed.append(f"{name}: {a} -> {b}")
    return changed


_locked: weakref.WeakSet = weakref.WeakSet()


def lock(path: Path) -> TextIO:
    """Open a file to append to, for this run alone while it is open: a crash closes it too.

    CheckpointError where another run has it; where a file system has no locks it says so.
    """
    f = path.open("a")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            f.close()
            raise CheckpointError(
                f"{path.parent} is in use: another run writes into it. Wait for its end, or choose "
                f"another output"
            ) from None
        log.warning(
            "%s cannot be locked (%s): no second run must write there", path.parent, e.strerror
        )
    _watch_forks()
    _locked.add(f)
    return f


@functools.cache
def _watch_forks() -> None:
    """A data worker may outlive a run that is killed, and must not hold its lock."""
    os.register_at_fork(after_in_child=lambda: [f.close() for f in list(_locked)])
