"""What train.py imports and a bare machine may lack: av and rich, of which nothing is used there,
and safetensors, of which enough is here to write a checkpoint and read it back."""

import contextlib
import json
import struct
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "U8": torch.uint8, "I64": torch.int64, "I32": torch.int32}
DTYPES |= {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "BOOL": torch.bool}
INSTALLED: list[str] = []


def install() -> list[str]:
    """Put stand-ins where a package is absent; which these are."""
    for name in ("av", "rich", "safetensors"):
        with contextlib.suppress(ImportError):
            import_module(name)
            continue
        found = mock.MagicMock()  # whatever is asked of it, it is
        if name == "safetensors":
            found = SimpleNamespace(
                SafetensorError=ValueError, safe_open=safe_open, save_file=save_file
            )
        parts = ("console", "progress", "table") if name == "rich" else ("torch",)
        sys.modules |= {name: found} | {f"{name}.{part}": found for part in parts}
        INSTALLED.append(name)
    return INSTALLED


def save_file(tensors: dict[str, Tensor], path, metadata: dict[str, str]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end, parts = {"__metadata__": metadata}, 0, []
    for key, t in tensors.items():
        parts.append(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        offsets = [end, end := end + len(parts[-1])]
        header[key] = {
            "dtype": names[t.dtype],
            "shape": list(t.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a file."""
    content = Path(path).read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:length])
    metadata, tensors = header.pop("__metadata__"), {}
    for name, entry in header.items():
        begin, end = (length + offset for offset in entry["data_offsets"])
        dtype, data = DTYPES[entry["dtype"]], bytearray(content[begin:end])
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry["shape"])
    return metadata, tensors


@contextlib.contextmanager
def safe_open(path, framework: str):
    """As mae_fast/checkpoint.py uses it."""
    metadata, tensors = read_safetensors(path)
    yield SimpleNamespace(
        metadata=lambda: metadata, keys=tensors.keys, get_tensor=tensors.__getitem__
    )
