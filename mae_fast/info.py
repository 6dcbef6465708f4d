"""`mae-fast info`: versions, devices, decoders, ops, and why a backend or library is not used."""

import json as jsonlib
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mae_fast.environment import PACKAGES, devices, version

# distribution -> the module that uses it for real: importing it shows whether it works.
OPTIONAL = {
    "torchcodec": "torchcodec.decoders",
    "flash-attn": "flash_attn",
    "flash-attn-4": "flash_attn.cute",
    "xformers": "xformers.ops",
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "pyarrow": "pyarrow.parquet",
    "transformers": "transformers",
}
IMPORT_SECONDS = 120  # a first import on a cold disk takes tens of seconds


def info(json: bool = False) -> None:
    """Print versions, devices, decoders, and each optional library's version or why it is not used.

    Args:
        json: print one JSON document and nothing else.
    """
    found = collect()
    if json:
        print(jsonlib.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for section, rows in found.items():
        table.add_row(Text(section, style="bold"))
        for name, value in rows.items():
            table.add_row(f"  {name}", Text(value))
    Console(highlight=False).print(table)


def collect() -> dict[str, dict[str, str]]:
    """What `info` prints. Never raises because a library is missing or broken."""
    with ThreadPoolExecutor(4) as pool:
        optional = dict(zip(OPTIONAL, pool.map(_optional, OPTIONAL), strict=True))
    return {
        "versions": {
            "mae_fast": version("mae-fast"),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "devices": devices(),
        **{of.__name__[1:]: _told(of) for of in (_decoders, _ops, _backends)},
        "optional libraries": optional,
    }


def _told(of: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return of()
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}


def _optional(distribution: str) -> str:
    """Its version, or why it is not used. Imported in a process of its own: a library built
    for another torch can end the process that imports it."""
    found = version(distribution)
    if found == "not installed":
        return found
    command = [sys.executable, "-c", f"import {OPTIONAL[distribution]}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"not used: {found} does not import: {e}"
    if run.returncode == 0:
        return found
    lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
    errors = [line for line in lines if "Error" in line]
    return f"not used: {found} does not import: {(errors or lines)[-1].strip()}"


def _reasons() -> dict[str, str | None]:
    """Why each backend that not every machine has does not run here, or None. Imports none."""
    import mae_fast.ops  # noqa: F401  every backend is known
    from mae_fast.ops.dispatch import MACHINE

    return {name: why_not() for name, why_not in MACHINE.items()}


def _ops() -> dict[str, str]:
    """The backends that each op takes on this CPU, and why others before them do not run."""
    from mae_fast.ops import OPS
    from mae_fast.ops.dispatch import PARTIAL

    reasons, found = _reasons(), {}
    for op in OPS.values():
        taken, declined = [], []
        for backend in op.backends:
            if reasons.get(backend):
                declined.append(f"not {backend}: {reasons[backend]}")
                continue
            taken.append(f"{backend} {PARTIAL.get(backend, '')}".strip())
            if backend not in PARTIAL:
                break
        found[op.name] = "; ".join([", else ".join(taken), *declined])
    return found


def _backends() -> dict[str, str]:
    """Each backend of any op: "runs here", or why it does not."""
    return {name: reason or "runs here" for name, reason in _reasons().items()}


def _decoders() -> dict[str, str]:
    from mae_fast.data.decode import decoders

    return {name: str(value) for name, value in decoders().items()}
