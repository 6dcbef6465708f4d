"""A model whose parameters lie apart on its ranks (FSDP2), and its checkpoints: a folder of
safetensors files, one a rank, by torch.distributed.checkpoint.

`checkpoint-<step>.dcp/` holds them and `state.json`: what one file has as metadata, and a CRC of
each. Any number of ranks reads it, and so does one process: `read` gives what one file gives.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mae_fast.distributed import World, gather
from mae_fast.files import sync

STATE = "state.json"


def shard(model: nn.Module, world: World, how: str) -> None:
    """Part the model among the ranks, block by block. `full`: a block's weights are whole while it
    computes; `optimizer`: from its first use in a step to its last. Gradients and the optimizer's
    state are parted in both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in (*model.blocks, *model.decoder_blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=how == "full")
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def like(value: Tensor, p: Tensor) -> Tensor:
    """`value`, which every rank has whole, where p is, and parted as p is. No rank is asked."""
    value = value.to(p.device)
    if isinstance(p, DTensor) and value.dim():
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return value


def local(value: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def write(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], world: World) -> None:
    """Write a checkpoint whole or not at all; every rank calls it. OSError where one cannot."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    tmp = path.with_name(path.name + ".tmp")

    def begin() -> None:
        if world.writer:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir()

    def save() -> None:
        writer = dcp.HuggingFaceStorageWriter(str(tmp), save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer)
        except CheckpointException as e:  # of all ranks, and no Exception
            raise OSError("; ".join(str(each[0]) for each in e.failures.values())) from e

    def mine() -> dict[str, str]:
        files = tmp.glob(f"shard-{world.rank + 1:05d}-*")
        return {f.name: _crc(f) for f in files}

    _together(begin, world)
    _together(save, world)
    sums = {k: v for each in _together(mine, world) for k, v in each.items()}

    def end() -> None:
        if world.writer:
            _synced(tmp / STATE, json.dumps({"mae_fast": state, "crc32": sums}))
            os.replace(tmp, path)
            sync(path.parent)

    _together(end, world)


def read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(the state's JSON, whole tensors on the CPU). OSError or ValueError of what is damaged."""
    import torch.distributed.checkpoint as dcp

    found = json.loads((path / STATE).read_text())
    for name, crc in found["crc32"].items():
        if _crc(path / name) != crc:
            raise ValueError(f"the checksum of {name} is not {crc}")
    shapes = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {
        k: torch.empty(v.size, dtype=v.properties.dtype, device="cpu") for k, v in shapes.items()
    }
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    return json.dumps(found["mae_fast"]), tensors


def state_of(path: Path) -> str:
    """The state's JSON alone; "" where there is none."""
    try:
        return json.dumps(json.loads((path / STATE).read_text())["mae_fast"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _together(do: Callable[[], Any], world: World) -> list[Any]:
    """do() of every rank, and what each gives; an OSError of one is raised by all."""
    value, wrong = None, ""
    try:
        value = do()
    except OSError as e:
        wrong = str(e)
    found = gather((value, wrong), world)
    if wrong := next((w for _, w in found if w), ""):
        raise OSError(wrong)
    return [value for value, _ in found]


def _crc(path: Path) -> str:
    crc = 0
    with path.open("rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _synced(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)
