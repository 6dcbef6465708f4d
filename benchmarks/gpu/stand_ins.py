"""What train.py imports and a bare machine may lack: av and rich, of which nothing is used there,
and safetensors, of which enough is here to write a checkpoint and read it back."""

import contextlib
import json
import struct
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "U8": torch.uint8, "I64": torch.int64, "I32": torch.int32}
DTYPES |= {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "BOOL": torch.bool}
INSTALLED: list[str] = []


class Nothing(ModuleType):
    """A module, a class, a progress bar: whatever is asked of it, it is."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


def install() -> list[str]:
    """Put stand-ins where a package is absent; which these are."""
    for name in ("av", "rich", "safetensors"):
        with contextlib.suppress(ImportError):
            import_module(name)
            continue
        sys.modules[name] = Nothing(name)
        if name == "rich":
            for part in ("console", "progress", "table"):
                sys.modules[f"rich.{part}"] = sys.modules[name]
        if name == "safetensors":
            found = sys.modules[name] = sys.modules[f"{name}.torch"] = ModuleType(name)
            found.SafetensorError, found.safe_open, found.save_file = ValueError, Open, save_file
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


class Open:
    """safetensors.safe_open, as mae_fast/checkpoint.py uses it."""

    def __init__(self, path, framework: str):
        self._metadata, self._tensors = read_safetensors(path)
        self.metadata, self.keys = lambda: self._metadata, self._tensors.keys
        self.get_tensor = self._tensors.__getitem__

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None
