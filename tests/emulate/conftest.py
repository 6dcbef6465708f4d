"""The emulated GPU: csrc/cuda compiled by g++ with shim/ in place of CUDA, also under sanitizers;
and by nvcc where there is a GPU to run it."""

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc/cuda"
CODES = [torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float16]
CXX = os.environ.get("CXX", "c++").split()[0]
STRICT = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
EMULATED = ["-std=c++20", "-O1", "-g", *STRICT, "-ffp-contract=off", "-fno-strict-aliasing"]
BUILDS = {
    "plain": EMULATED,
    "thread": [*EMULATED, "-fsanitize=thread"],
    "address": [
        *EMULATED,
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ],
    "gpu": ["-x", "cu", "-std=c++17", "-O3", "-arch=native", "-Werror", "all-warnings"],
}


def find_nvcc() -> str:
    """nvcc: CUDA_HOME's, PATH's, or that of its wheels (nvidia-cuda-nvcc and what it needs), which
    unpack beside the CUDA libraries of torch's. Skips a test where there is none."""
    wheels = sorted(Path(torch.__file__).parent.parent.glob("nvidia/cu*"))
    homes = [os.environ.get("CUDA_HOME"), *wheels]
    found = [Path(home, "bin/nvcc") for home in homes if home and Path(home, "bin/nvcc").exists()]
    return shutil.which("nvcc") or (str(found[0]) if found else pytest.skip("there is no nvcc"))


@pytest.fixture(scope="session")
def nvcc() -> str:
    return find_nvcc()


def compiler(build: str) -> str:
    """Skips a test where the build's compiler, or the GPU that its program needs, is not there."""
    if build != "gpu":
        return shutil.which(CXX) or pytest.skip(f"there is no C++ compiler ({CXX})")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return find_nvcc()


def compile_run(build: str, kernels: Path = KERNELS) -> Path:
    """The program run.cpp over the kernels in a folder; made once for the same sources."""
    command = [compiler(build), *BUILDS[build]]
    files = sorted([*HERE.glob("shim/*.h"), HERE / "run.cpp", *kernels.glob("*.cuh")])
    sources = b"".join(f.read_bytes() for f in files)
    key = hashlib.sha256(repr(command).encode() + sources).hexdigest()[:16]
    program = ROOT / f"build/emulate/{build}-{key}"
    program.parent.mkdir(parents=True, exist_ok=True)
    shim = [] if build == "gpu" else [f"-I{HERE / 'shim'}"]
    with open(program.parent / f"{build}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in two processes
        if not program.exists():
            part = program.with_suffix(".part")
            includes = [*shim, f"-I{kernels}"]
            made = subprocess.run(
                [*command, *includes, str(HERE / "run.cpp"), "-o", str(part)],
                capture_output=True,
                text=True,
            )
            assert made.returncode == 0, made.stderr
            part.rename(program)
    return program


@dataclass(frozen=True)
class Emulator:
    """A build of run.cpp."""

    program: Path
    folder: Path

    def start(self, op: str, tensors, scalars) -> subprocess.CompletedProcess:
        """Run one op. A tensor travels with the memory that it spans, and not a byte more."""
        case = [struct.pack("<q", len(tensors))]
        for t in tensors:
            size, stride = (list(n) + [0] * (5 - t.dim()) for n in (t.shape, t.stride()))
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            memory = t.as_strided([last + 1 if t.numel() else 0], [1]).contiguous()
            data = memory.view(torch.uint8).numpy().tobytes()
            # As far from 16-byte alignment as it is here.
            shift = t.data_ptr() % 16
            header = [CODES.index(t.dtype), t.dim(), *size, *stride, shift, shift + len(data)]
            case += [struct.pack(f"<{len(header)}q", *header), bytes(shift), data]
        case += [struct.pack("<q", len(scalars)), struct.pack(f"<{len(scalars)}d", *scalars)]
        (self.folder / "case").write_bytes(b"".join(case))
        return subprocess.run(
            [self.program, op, self.folder / "case", self.folder / "outputs"],
            env={
                **os.environ,
                "ASAN_OPTIONS": "detect_leaks=0",
                "TSAN_OPTIONS": "atexit_sleep_ms=0",
            },
            capture_output=True,
            text=True,
        )

    def __call__(self, op: str, tensors, scalars, *outputs: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of one op, of the shapes and dtypes of `outputs`."""
        run = self.start(op, tensors, scalars)
        assert run.returncode == 0, f"exit {run.returncode}\n{run.stderr}"
        data = (self.folder / "outputs").read_bytes()
        assert len(data) == sum(o.numel() * o.element_size() for o in outputs)
        found, at = [], 0
        for o in outputs:
            bits = bytearray(data[at : at + o.numel() * o.element_size()])
            at += len(bits)
            values = (
                torch.frombuffer(bits, dtype=o.dtype) if bits else torch.empty(0, dtype=o.dtype)
            )
            found.append(values.view(o.shape))
        return found


@pytest.fixture(params=BUILDS)
def emulate(request, tmp_path) -> Emulator:
    """Each build in turn."""
    return Emulator(compile_run(request.param), tmp_path)


@pytest.fixture
def planted(tmp_path):
    """Builds and runs an op over sources in which `old` of a kernel file has become `new`."""

    def run(build: str, file: str, old: str, new: str, *case) -> subprocess.CompletedProcess:
        kernels = tmp_path / "kernels"
        shutil.copytree(KERNELS, kernels)
        source = (kernels / file).read_text()
        assert source.count(old) == 1, f"{file} has {source.count(old)} times: {old}"
        (kernels / file).write_text(source.replace(old, new))
        return Emulator(compile_run(build, kernels), tmp_path).start(*case)

    return run
