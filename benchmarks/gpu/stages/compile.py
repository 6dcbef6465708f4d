"""What takes a compiler a minute, while the tests run: torch.compile of the baselines that `steps`
times, which stays in torch's cache on disk, and the CUDA kernels of csrc/cuda, where nvcc is."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils import cpp_extension

from benchmarks.gpu import ROOT
from benchmarks.gpu.engines import BAR, build
from benchmarks.gpu.records import Declined, Item
from benchmarks.gpu.setting import Setting

CLIPS = 64
LOG = ROOT / "build/csrc-cuda.log"
JOBS = 4  # of nvcc and the C++ compiler, beside the tests


def items(setting: Setting) -> Iterator[Item]:
    nvcc = "the rehearsal builds nothing" if setting.tiny else start_nvcc()
    yield Item(f"vit_large {BAR}", partial(compiled, setting, "vit_large"))
    yield Item("csrc/cuda by nvcc", partial(ended, nvcc))


def items_of_base(setting: Setting) -> Iterator[Item]:
    yield Item(f"vit_base {BAR}", partial(compiled, setting, "vit_base"))


def compiled(setting: Setting, model: str) -> dict:
    cfg = setting.cfg(model)
    engine, inputs = build(BAR, cfg, setting), setting.inputs(cfg, setting.batch(CLIPS))
    began = time.perf_counter()
    engine.step(*inputs)
    seconds = time.perf_counter() - began
    return {"first_step_seconds": seconds, "told": f"its first step took {seconds:.1f} s"}


def start_nvcc() -> subprocess.Popen | str:
    """setup.py's build of the CUDA library alone, into the checkout, without pip; or why not."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "there is no nvcc"
    if importlib.util.find_spec("setuptools") is None:
        return "setuptools is not installed"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = {**os.environ, "MAX_JOBS": str(JOBS), "MAE_FAST_ONLY_CUDA": "1"}
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)


def ended(nvcc: subprocess.Popen | str) -> dict:
    """The record of a build; Declined where there was none."""
    if isinstance(nvcc, str):
        raise Declined(nvcc)
    code, output = nvcc.wait(), LOG.read_text(errors="replace")[-4000:]
    assert code == 0, f"setup.py ended with {code}: {output}"
    return {"output": output, "told": (output.strip().splitlines() or ["built"])[-1]}
