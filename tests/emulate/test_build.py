"""setup.py's build of csrc/cuda for torch, with the nvcc that is here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from pathlib import Path
import setuptools
from distutils.core import run_setup

arguments = ["-q", "build_ext", "-b", sys.argv[1], "-t", sys.argv[1]]
built = run_setup("setup.py", arguments, stop_after="commandline")
built.ext_modules = [e for e in built.ext_modules if e.name == "mae_fast._cuda"]
assert built.ext_modules, "setup.py would not build the CUDA kernels"
if sys.argv[2:]:
    sys.exit(0)
built.run_commands()

import torch, mae_fast.ops
torch.ops.load_library(str(Path(sys.argv[1], "mae_fast/_cuda.so")))
print("runs here:", torch.ops.mae_fast_cuda.runs_here())
"""


def build(folder, *arguments, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MAE_FAST_CUDA_ARCHS": "90", **environment}
    command = [sys.executable, "-c", BUILD, str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_the_cuda_library_compiles_links_and_loads(nvcc, tmp_path):
    home = str(Path(nvcc).resolve().parent.parent)
    run = build(tmp_path, CUDA_HOME=home)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"runs here: {torch.cuda.is_available()}" in run.stdout


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_a_build_that_cannot_link_says_so_before_it_compiles(nvcc, tmp_path):
    """A toolkit without the runtime, and a torch that brings none."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").symlink_to(Path(nvcc).resolve())
    patched = BUILD.replace(
        "import setuptools",
        "import setuptools\nreal = Path.glob\n"
        "Path.glob = lambda p, what: [] if 'libcudart' in what else real(p, what)",
    )
    command = [sys.executable, "-c", patched, str(tmp_path), "only"]
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode and "would not build" in run.stderr
    line = f"mae_fast: there is no libcudart to link with in {tmp_path}: the CUDA kernels are not"
    assert line in run.stdout
