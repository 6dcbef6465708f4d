"""csrc/cuda by nvcc alone, where there is one: no warnings, no spills, accesses of 16 bytes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc/cuda"
# Kernels on aligned rows, and the registers that leave an SM the warps which hide memory's latency.
REGISTERS = {
    "patchify_gather_kernel<__nv_bfloat16, 8>": 64,
    "masked_mse_fwd_kernel<__nv_bfloat16, 8>": 80,
    "masked_mse_bwd_kernel<__nv_bfloat16, 8>": 32,
    "decoder_tokens_fwd_kernel<__nv_bfloat16, __nv_bfloat16, 8>": 40,
    "decoder_tokens_bwd_kernel<__nv_bfloat16, 8>": 128,
}


def tool(name: str) -> str:
    """A program of CUDA, or Triton's copy of it."""
    found = shutil.which(name)
    if not found:
        triton = pytest.importorskip("triton")
        copy = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        found = str(copy) if copy.exists() else None
    return found or pytest.skip(f"there is no {name}")


@pytest.fixture(scope="module", params=[80, 90, 100])
def cubin(request, nvcc, tmp_path_factory):
    """(The file, ptxas's words) of run.cpp for one architecture."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{request.param}" not in known.split():
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    out = tmp_path_factory.mktemp("nvcc") / "kernels.cubin"
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Wno-unknown-pragmas"]
    options = [*strict, "-std=c++17", "-O3", "-Xptxas", "-v,-warn-spills", f"-I{KERNELS}"]
    source = ["-x", "cu", f"-arch=sm_{request.param}", "-cubin", str(HERE / "run.cpp")]
    run = subprocess.run(
        [nvcc, *options, *source, "-o", str(out)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return out, run.stderr


def test_nvcc_compiles_without_a_warning_or_a_spill(cubin):
    _, words = cubin
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", words)
    assert len(stacks) > 30 and set(stacks) == {("0", "0")}
    names = re.findall(r"Compiling entry function '(\S+)'", words)
    names = subprocess.run(["c++filt", *names], capture_output=True, text=True).stdout.splitlines()
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", words)]
    for kernel, limit in REGISTERS.items():
        (used,) = (n for name, n in zip(names, registers, strict=True) if f"::{kernel}(" in name)
        assert used <= limit, f"{kernel}: {used} registers"


@pytest.mark.parametrize("kernel", REGISTERS)
def test_global_memory_is_read_and_written_16_bytes_at_a_time(cubin, kernel):
    file, _ = cubin
    listing = subprocess.run([tool("nvdisasm"), "-c", file], capture_output=True, text=True).stdout
    found = {}
    for part in listing.split(".section\t.text.")[1:]:
        name = subprocess.run(["c++filt", part.split(",")[0]], capture_output=True, text=True)
        found[name.stdout] = re.findall(r"\b(LDG|STG)\.E(\.\w+)*?\.(128|256)\b", part)
    (wide,) = (ops for name, ops in found.items() if f"::{kernel}(" in name)
    kinds = {op for op, *_ in wide}
    assert kinds == {"LDG", "STG"}, wide
