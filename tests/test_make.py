"""What `make test` runs: the CPU's tests, which see no GPU; where there is one, the ops on it."""

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# pytest's exit codes are given in $CODES, one a run.
PYTHON = """#!/bin/sh
case "$*" in *xdist*) exit 1 ;; *is_available*) exit "$NO_GPU" ;; esac
echo "ran $TRITON_INTERPRET $MAE_FAST_TEST_DEVICE $*"
echo >> "$0.count"
exit "$(echo $CODES | cut -d' ' -f"$(wc -l < "$0.count")")"
"""
RUNS = [
    "ran   -m pytest -k x",
    "ran 1  -m pytest -o testpaths=tests/ops tests/kernels tests/test_golden.py -k x",
    "ran  cuda -m pytest -o testpaths=tests/ops tests/test_accelerate_graphs.py -k x",
]


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("codes", "no_gpu", "runs", "code"),
    [
        ("0 0 0", 0, 3, 0),
        ("0 0", 1, 2, 0),
        ("0 5 5", 0, 3, 0),
        ("5 0", 1, 2, 0),
        ("5 5", 1, 2, 5),
        ("1", 0, 1, 1),
        ("0 0 1", 0, 3, 1),
        ("5 1", 1, 2, 1),
    ],
)
def test_make_test_runs_what_the_machine_has(tmp_path, codes, no_gpu, runs, code):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "ready").touch()  # nothing is set up
    given = [f"BIN={tmp_path}", f"READY={tmp_path}/ready", "ARGS=-k x"]
    hidden = ("MAKE", "MFLAGS", "TRITON_INTERPRET", "MAE_FAST_TEST_DEVICE")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    run = subprocess.run(
        ["make", "test", *given],
        cwd=ROOT,
        env=clean | {"CODES": codes, "NO_GPU": str(no_gpu)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines() == RUNS[:runs], run.stderr
    assert run.returncode == (2 if code else 0)
    assert not code or f"Error {code}" in run.stderr


@pytest.mark.parametrize(("device", "seen"), [("cpu", ""), ("cuda", "3")])
def test_tests_see_a_gpu_only_where_they_are_given_one(device, seen, monkeypatch):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("MAE_FAST_TEST_DEVICE", device)
    runpy.run_path(str(ROOT / "tests/conftest.py"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
