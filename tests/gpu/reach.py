"""Every item of every stage of `make gpu`, with its real plan, up to what only a GPU can answer.

python tests/gpu/reach.py RECORDS    prints "stage | item | where it stopped" a line

torch.cuda says that there is a device; models are tiny, and a process that an item starts is not
started. An import that is missing, a wrong name or argument stops an item before the device does.
"""

import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, ".")

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import records, setting
from benchmarks.gpu.stages import compile
from mae_fast.bench import calls

# Of a build with CUDA, of one without, of NCCL, and of Triton.
NO_DEVICE = ("Found no NVIDIA driver", "not compiled with CUDA", "no GPUs found", "libcuda.so")
NO_DEVICE += ("requires at least one CUDA device",)  # since torch 2.15
POPEN = subprocess.Popen


class Setting(setting.Setting):
    def cfg(self, model):
        setting.model_of(model)
        return setting.TINY

    def batch(self, clips):
        return 2

    def limits(self) -> dict:
        return {}


class StartedError(Exception):
    """A Python would have been started."""


class Popen(POPEN):
    def __init__(self, command, *args, **kwargs) -> None:
        if command[0] == sys.executable:
            raise StartedError(" ".join(map(str, command[1:4])))
        super().__init__(command, *args, **kwargs)


def reached(item: records.Item) -> str:
    try:
        item.run()
    except (StartedError, records.Declined) as e:
        return f"{type(e).__name__}: {e}"
    except Exception as e:
        return "the device" if any(words in str(e) for words in NO_DEVICE) else repr(e)
    return "its end"


def main(path: Path) -> None:
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *of: True
    torch.cuda.current_device, torch.cuda.get_device_capability = lambda: 0, lambda *of: (9, 0)
    calls.Call.real = lambda self, device: torch.empty(0, device=device)
    compile.start_nvcc, subprocess.Popen = lambda: "it is not started", Popen
    made = Setting("cuda", records.Records(path, "sources", ()), False, float("inf"))
    for stage in (*gpu.BESIDE, *gpu.STAGES):
        for item in stage.items(made):
            print(stage.name, item.name, reached(item), sep=" | ", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
