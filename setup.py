"""What of the package is built, and from where; pyproject.toml says what it is and needs.

`kernels/` is installed as `mae_fast.kernels`: its bare name is another project's.
`benchmarks/baselines/` is installed as `mae_fast.bench.baselines`, the rest of benchmarks/ is not.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

MAPPED = {"mae_fast.kernels": "kernels", "mae_fast.bench.baselines": "benchmarks/baselines"}

HERE = Path(__file__).parent

# One library for each CPU capability, from one source, as torch builds its own kernels. The flags
# are torch's; the library that fits the CPU is chosen when it is loaded.
X86 = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
}
CAPABILITIES = X86 if platform.machine() in ("x86_64", "AMD64") else {"default": ""}


def cpu_kernels() -> dict:
    """The arguments of setup() that build csrc, or none, and a line that says why."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        print(f"mae_fast: no C++ compiler ({compiler}): the C++ kernels are not built")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as e:
        print(f"mae_fast: {e}: the C++ kernels are not built (pip needs --no-build-isolation)")
        return {}
    extensions = [
        CppExtension(
            f"mae_fast._cpu_{name}",
            ["csrc/register.cpp"],
            depends=[str(p.relative_to(HERE)) for p in HERE.glob("csrc/cpu/*.h")],
            extra_compile_args=[
                "-O3",
                "-g0",
                "-Wno-unknown-pragmas",
                "-Wno-maybe-uninitialized",
                "-Wno-uninitialized",
                "-fopenmp",
                f"-DCPU_CAPABILITY={name.upper()}",
                f"-DCPU_CAPABILITY_{name.upper()}",
                *flags.split(),
            ],
            # No Python in them: they are loaded by torch.ops.load_library.
            py_limited_api=True,
        )
        # make gpu has no use for the others, and no time.
        for name, flags in CAPABILITIES.items()
        if not os.environ.get("MAE_FAST_ONLY_CUDA")
    ]

    extensions += cuda_kernels()

    class Build(BuildExtension.with_options(no_python_abi_suffix=True)):
        def build_extension(self, ext) -> None:
            # The objects of each apart, so that a second build finds what is up to date.
            folder, self.build_temp = self.build_temp, f"{self.build_temp}/{ext.name}"
            try:
                super().build_extension(ext)
            except RuntimeError:  # of the compiler, and its words stand above
                if not ext.optional:
                    raise
                print("mae_fast: the CUDA kernels do not compile here, and are left out")
            self.build_temp = folder

    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


def cudart(toolkit: Path, wheels: Path) -> Path | None:
    """The CUDA runtime to link with: the wheels', which torch loads, or the toolkit's. A toolkit
    without its development files, and the wheels, have no libcudart.so for -lcudart to find."""
    folders = [wheels / "lib", *(toolkit / lib for lib in ("lib64", "lib", "targets/*/lib"))]
    found = (f for folder in folders for f in Path("/").glob(f"{folder}/libcudart.so*"[1:]))
    return next(found, None)


def cuda_kernels() -> list:
    """The extension of csrc/cuda, or none, and a line that says why."""
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import CUDAExtension

    # nvcc's own wheels unpack beside those of the CUDA libraries that torch depends on.
    wheels = (
        Path(torch.__file__).parent.parent / f"nvidia/cu{(torch.version.cuda or '').split('.')[0]}"
    )
    if not cpp_extension.CUDA_HOME and (wheels / "bin/nvcc").exists():
        cpp_extension.CUDA_HOME = str(wheels)
    toolkit = Path(cpp_extension.CUDA_HOME or "/nowhere")

    def nvcc(option: str) -> str:
        command = [f"{toolkit}/bin/nvcc", option]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    why_not = None
    if torch.version.cuda is None:
        why_not = "torch is built without CUDA"
    elif not (toolkit / "bin/nvcc").exists():
        why_not = "there is no nvcc"
    elif not re.search(rf"release {torch.version.cuda.split('.')[0]}\.", nvcc("--version")):
        why_not = f"nvcc is not of CUDA {torch.version.cuda}, as torch is"
    elif not cudart(toolkit, wheels):
        why_not = f"there is no libcudart to link with in {toolkit}"
    if why_not:
        print(f"mae_fast: {why_not}: the CUDA kernels are not built")
        return []
    archs = os.environ.get("MAE_FAST_CUDA_ARCHS", "").split(";")
    if archs == [""] and torch.cuda.is_available():
        devices = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = [f"{major}{minor}" for major, minor in sorted(set(devices))]
    elif archs == [""]:
        known = nvcc("--list-gpu-arch").split()
        archs = [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known]
    # Code for each, and what a driver can compile for GPUs that are newer than all of them.
    targets = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
    codes = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets]
    extension = CUDAExtension(
        "mae_fast._cuda",
        ["csrc/cuda/register.cu"],
        depends=[str(p.relative_to(HERE)) for p in HERE.glob("csrc/cuda/*.cuh")],
        extra_compile_args={"nvcc": ["-O3", "-lineinfo", f"--threads={len(codes)}", *codes]},
        extra_objects=[str(cudart(toolkit, wheels))],
        py_limited_api=True,
        optional=True,
    )
    extension.libraries.remove("cudart")  # by its path instead
    return [extension]


setup(
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["mae_fast", "mae_fast.*"]), *MAPPED],
    package_dir=MAPPED,
    package_data={"mae_fast": ["py.typed"], "mae_fast.kernels": ["*.json"]},  # measured tables
    **cpu_kernels(),
)
