"""Stand-ins of a GPU's tools."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks is not installed

TOOLS = {
    "nvidia-smi": "echo 'NVIDIA H100, 580.1, 1980 MHz, 2619 MHz, 1980 MHz, 351.20 W, 700.00 W,"
    " 41, 0x0000000000000000'",
    "compute-sanitizer": 'shift 4; "$@" && echo "========= ERROR SUMMARY: 0 errors"',
}


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """Stand-ins of nvidia-smi and compute-sanitizer, first in PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, line in TOOLS.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder
