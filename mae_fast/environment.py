"""Where a number came from: versions, device and commit, written beside every record and run."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "av")


def environment() -> dict[str, Any]:
    """Versions of what computes, the devices, and the commit of this checkout (None in a wheel)."""
    return {
        "mae_fast": version("mae-fast"),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        **devices(),
        **{k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},  # glibc's: page faults
        "commit": commit(),
    }


def version(distribution: str) -> str:
    """The installed version of a distribution, or 'not installed'."""
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
    if distribution == "torch":  # a wheel's metadata does not say which build it is
        with contextlib.suppress(Exception):
            import torch

            return torch.__version__
    return found


def commit() -> str | None:
    """The git commit of the checkout this package runs from, marked +changes when it has any."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip()[:12] + ("+changes" if dirty.stdout.strip() else "")


def usable_cores() -> int:
    """Those that this process may run on, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def devices() -> dict[str, str]:
    """The CPU, and each CUDA device or the reason why there is none."""
    cores = f"{os.cpu_count()} cores, {usable_cores()} usable"
    try:
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        cores += f", torch uses {torch.get_num_threads()} threads"
        from mae_fast.ops.dispatch import load_amx, load_cpp
        from mae_fast.ops.linear import why_not_onednn

        products, kernels = why_not_onednn(), load_cpp()
        capability += "" if load_amx() else ", AMX"
    except Exception as e:  # a broken torch must still be told of
        return {"cpu": f"{_cpu_model()}, {cores}", "cuda": f"none: torch does not import: {e}"}
    found = {
        "cpu": f"{_cpu_model()}, {cores}, {capability}",
        "cpu fp32 products": f"torch's default: {products}" if products else "oneDNN",
        "cpu kernels": f"plain torch: {kernels}" if kernels else "C++",
    }
    if torch.version.cuda is None:
        return {**found, "cuda": f"none: torch {torch.__version__} is built without CUDA"}
    try:
        torch.cuda.init()
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found[f"cuda:{i}"] = (
                f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
            )
    except Exception as e:
        found["cuda"] = f"none: {str(e).strip().splitlines()[0]}"
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
