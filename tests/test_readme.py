"""The numbers of README.md and docs/results.md come from benchmarks/results, and nowhere else."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_tables_are_what_the_results_say():
    command = [sys.executable, "-m", "benchmarks.tables", "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0, (
        "run `make tables` and commit README.md and docs/results.md"
    )
