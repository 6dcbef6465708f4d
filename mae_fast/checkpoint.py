"""Checkpoints: one safetensors file each, written whole or not at all, and read without pickle.

A file holds `model.<name>` and `optim.<state>.<name>` tensors and, as metadata, the run's state
in JSON. Writing goes to a temporary file that is synced and then renamed.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_fast.errors import CheckpointError

log = logging.getLogger("mae_fast")
_NAME = "checkpoint-{:08d}.safetensors"


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, then drop all but the last `keep`.

    Raises CheckpointError when it cannot be written; earlier checkpoints are left as they were.
    """
    folder = Path(folder)
    tensors = {f"model.{name}": p.detach() for name, p in model.state_dict().items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optim.{key}.{name}"] = value.detach()
    path = folder / _NAME.format(step)
    try:
        write_tensors(path, tensors, {"mae_fast": json.dumps({**state, "step": step})})
    except (OSError, SafetensorError) as e:
        left = [p.name for p in checkpoints(folder)]
        raise CheckpointError(
            f"cannot write {path}: {e}; nothing was lost, the last good checkpoint is "
            f"{left[-1] if left else 'none yet'}"
        ) from e
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return sorted(Path(folder).glob("checkpoint-*.safetensors"))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all. OSError or SafetensorError where it cannot."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, metadata)
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    except (OSError, SafetensorError):
        tmp.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """fsync a file, or a folder so that a rename in it lasts."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    sync(tmp)
    os.replace(tmp, path)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state, tensors) of one checkpoint, on the CPU. CheckpointError on a cut or foreign file."""
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            # Cloned: they would lie in the mapped file, and die with whoever cuts it short.
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    if "mae_fast" not in metadata:
        raise CheckpointError(f"{path} holds weights but is not a checkpoint of a run")
    return json.loads(metadata["mae_fast"]), tensors


def latest(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The newest checkpoint that can be read, or None where there is none.

    A broken one is warned of and passed over. CheckpointError when all of them are broken.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return read(path)
        except CheckpointError as e:
            log.warning("%s; using the one before", e)
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} can be read")
    return None


def restore(
    tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a checkpoint's tensors into the model and, where given, the optimizer."""
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    if optimizer is None:
        return
    params = dict(model.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optim."):
            _, kind, name = key.split(".", 2)
            p = params[name]
            optimizer.state[p][kind] = value.to(p.device, copy=True)
