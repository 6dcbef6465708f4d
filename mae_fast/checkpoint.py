"""Checkpoints: one safetensors file each, written whole or not at all, and read without pickle.

A file holds `model.<name>` and `optim.<state>.<name>` tensors and, as metadata, the run's state
in JSON and a CRC of it all. Writing goes to a temporary file that is synced and then renamed.
Only `checkpoint-<eight digits>.safetensors` is a run's, or `.dcp`, the folder of a model that lies
apart on its ranks (sharded.py); every other name is its owner's.
"""

import functools
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_fast import distributed, sharded
from mae_fast.distributed import World
from mae_fast.errors import CheckpointError, NonFiniteError
from mae_fast.files import sync

log = logging.getLogger("mae_fast")
_NAME = "checkpoint-{:08d}.{}"
_NAMES = re.compile(r"checkpoint-([0-9]{8})\.(safetensors|dcp)")
LAST_STEP = 99_999_999  # the last that has a name


class BrokenCheckpoint(CheckpointError):
    """A checkpoint whose content cannot be what was written: cut, flipped, or not finite."""


class Aside:
    """Writes checkpoints while steps go on: what was copied to the host, in a thread. One at a
    time: a save waits for the one before it, and raises what that one met."""

    def __init__(self, pinned: bool) -> None:
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        # Pinned buffers are kept for the next copy; there is never a second one at work.
        self.stager = BlockingAsyncStager(cache_staged_state_dict=pinned)
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None

    def begin(self, tensors: dict[str, Tensor], write: Callable[[dict[str, Tensor]], Path]) -> None:
        """Copy the tensors, which may change afterwards, and begin write(the copies)."""
        self.wait()
        self.pending = self.pool.submit(write, self.stager.stage(tensors))

    def wait(self) -> None:
        """Until the last is written. Raises CheckpointError where it could not be."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    aside: Aside | None = None,
    ranks: World | None = None,
) -> Path:
    """Write the checkpoint of `step`, now or aside, then drop all but the last `keep` that this run
    wrote. Of a model that lies apart on `ranks` each of them calls this, and it is written now.

    A run's checkpoints have the same state["run"]. Raises CheckpointError when it cannot be
    written, NonFiniteError for a state that no run could go on from; earlier checkpoints are left
    as they were.
    """
    tensors = taken(model, optimizer)
    odd = _not_finite({name: sharded.local(value) for name, value in tensors.items()})
    if ranks:
        odd = next(filter(None, distributed.gather(odd, ranks)), "")
    if odd:
        raise NonFiniteError(
            f"{odd} is not finite after step {step}, so that step is not saved; {_last(folder)}"
        )
    path = Path(folder) / _NAME.format(step, "dcp" if ranks else "safetensors")
    write = functools.partial(_write, path, {**state, "step": step}, keep, ranks)
    if aside and not ranks:
        aside.begin(tensors, write)
    else:
        write(tensors)
    return path


def taken(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds of a model and its optimizer, where they are."""
    tensors = {f"model.{name}": p.detach() for name, p in model.state_dict().items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optim.{key}.{name}"] = value.detach()
    return tensors


def _write(
    path: Path,
    state: dict[str, Any],
    keep: int,
    ranks: World | None,
    tensors: dict[str, Tensor],
) -> Path:
    folder, writer = path.parent, ranks is None or ranks.writer
    try:
        if writer and path.exists() and not _written_by(path, state.get("run")):
            set_aside(path, "other")
        if ranks:
            sharded.write(path, tensors, state, ranks)
        else:
            text = json.dumps(state)
            tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
            write_tensors(path, tensors, {"mae_fast": text, "crc32": _crc(text, tensors)})
    except OSError as e:
        raise CheckpointError(f"cannot write {path}: {e}; nothing was lost, {_last(folder)}") from e
    if not writer:
        return path
    # Those of later steps are left over from before a resume: they count when they come again.
    own = [p for p in checkpoints(folder) if p <= path and _written_by(p, state.get("run"))]
    for old in own[:-keep]:
        try:
            _remove(old)
        except OSError as e:
            log.warning("cannot remove %s: %s", old, e.strerror)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is; or would be, in one file."""
    found = [p for p in checkpoints(folder) if int(_NAMES.fullmatch(p.name)[1]) == step]
    return found[-1] if found else Path(folder) / _NAME.format(step, "safetensors")


def checkpoints(folder: str | Path) -> list[Path]:
    """The files in a run's folder that have a checkpoint's name, oldest first."""
    return sorted(p for p in Path(folder).glob("checkpoint-*") if _NAMES.fullmatch(p.name))


def set_aside(path: Path, word: str) -> Path:
    """Rename a file that is in the way to `<name>.<word>`, or `<name>.<word>2` and so on."""
    names = (path.with_name(f"{path.name}.{word}{n or ''}") for n in (0, *range(2, 10**6)))
    free = next(p for p in names if not p.exists())
    os.replace(path, free)
    return free


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all. OSError where it cannot."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.touch()
        mode = tmp.stat().st_mode  # of any file here; safetensors keeps its own to their owner
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, metadata)
        tmp.chmod(mode)
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    except (OSError, SafetensorError) as e:
        tmp.unlink(missing_ok=True)
        raise e if isinstance(e, OSError) else OSError(str(e)) from e


def write_text(path: str | Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    sync(tmp)
    os.replace(tmp, path)


def sweep(folder: str | Path) -> None:
    """Remove what a kill left of checkpoints half written."""
    for tmp in Path(folder).glob("checkpoint-*.tmp"):
        if _NAMES.fullmatch(tmp.name.removesuffix(".tmp")):
            _remove(tmp)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state, tensors) of one checkpoint, on the CPU. CheckpointError on a foreign or damaged file.

    Files from before there was a checksum are read without one.
    """
    path = Path(path)
    if path.is_dir():
        return _read_apart(path)
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            # Cloned: they would lie in the mapped file, and die with whoever cuts it short.
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    except SafetensorError as e:
        raise BrokenCheckpoint(f"cannot read {path}: {e}") from e
    if "mae_fast" not in metadata:
        raise CheckpointError(f"{path} holds weights but is not a checkpoint of a run")
    text, crc = metadata["mae_fast"], metadata.get("crc32")
    if crc is not None and crc != _crc(text, tensors):
        raise BrokenCheckpoint(f"{path} is damaged: its checksum is not {crc}")
    state = _state(text)
    if state is None:
        raise BrokenCheckpoint(f"{path} is damaged: its state cannot be read")
    return state, tensors


def _read_apart(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        text, tensors = sharded.read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        raise BrokenCheckpoint(f"{path} is damaged: {e}") from e
    state = _state(text)
    if state is None:
        raise BrokenCheckpoint(f"{path} is damaged: its state cannot be read")
    return state, tensors


def latest(
    folder: str | Path, broken: list[Path] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The newest good checkpoint: readable, finite, of the step in its name; None without any.

    Another one is warned of and passed over; damaged ones are added to `broken`. CheckpointError
    when none is good.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            state, tensors = read(path)
            odd = _not_finite(tensors)
            if odd:
                raise BrokenCheckpoint(f"{path}: {odd} is not finite")
            if not _is_of(path, state):
                raise CheckpointError(f"{path} is named for another step than its {state['step']}")
            return state, tensors
        except CheckpointError as e:
            log.warning("%s; using the one before", e)
            if broken is not None and isinstance(e, BrokenCheckpoint):
                broken.append(path)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} can be read (or is of the step in "
            f"its name): move them away to start anew, or choose another output"
        )
    return None


def restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a checkpoint's tensors into the model and, where given, the optimizer."""
    have = model.state_dict()
    given = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(
        {k: sharded.like(v, have[k]) if k in have else v for k, v in given.items()}
    )
    if optimizer is None:
        return
    params = dict(model.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optim."):
            _, kind, name = key.split(".", 2)
            p = params[name]
            optimizer.state[p][kind] = sharded.like(value.clone(), p)


def _crc(text: str, tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the state and of every tensor's name, kind and bytes: any flipped bit shows."""
    crc = zlib.crc32(text.encode())
    for name, value in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), crc)
        if value.numel():
            crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def _not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of a tensor that holds a NaN or an infinity, or "". Waits for the device once."""
    if not tensors:
        return ""
    finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
    return next((name for name, ok in zip(tensors, finite, strict=True) if not ok), "")


def _state(text: str) -> dict[str, Any] | None:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("step"), int) else None


def _is_of(path: Path, state: dict[str, Any]) -> bool:
    """Whether a file is named for its state's step."""
    return int(_NAMES.fullmatch(path.name)[1]) == state["step"]


def _written_by(path: Path, run: str | None) -> bool:
    """Whether the run called `run` wrote this file (None: a run of before runs had names)."""
    try:
        if path.is_dir():
            state = _state(sharded.state_of(path))
        else:
            with safe_open(path, "pt") as f:
                state = _state((f.metadata() or {}).get("mae_fast", ""))
    except (OSError, SafetensorError):
        return False
    return bool(state) and state.get("run") == run and _is_of(path, state)


def newest(folder: str | Path) -> str:
    """The name of the last checkpoint in a folder, or words that there is none."""
    left = [p.name for p in checkpoints(folder)]
    return left[-1] if left else "the start: there is no checkpoint yet"


def _last(folder: str | Path) -> str:
    left = [p.name for p in checkpoints(folder)]
    return f"the last good checkpoint is {left[-1] if left else 'none yet'}"
