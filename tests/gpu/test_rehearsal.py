"""`make gpu` without a GPU: the rehearsal runs its stages whole, and what a run starts ends."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import engines, records
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages import accelerate, checks
from mae_fast.kernels import configs

ROOT = Path(__file__).resolve().parents[2]
# What a machine with a GPU may lack, and what nothing there may import.
ABSENT = (
    "av",
    "matplotlib",
    "pyarrow",
    "rich",
    "safetensors",
    "torchcodec",
    "transformers",
    "tyro",
)
BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in {ABSENT!r}
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_gpu(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST", "OUT"))}
    return subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True)


def bare_checkout(folder: Path) -> Path:
    """The files that git has, alone: nothing is built, nothing installed."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_rehearsal_runs_every_stage(tmp_path, tools):
    """Every stage, of a bare checkout, on a machine with torch, triton, numpy and pytest; OUT is
    not set."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(BLOCKER)
    checkout = bare_checkout(tmp_path / "checkout")
    run = run_gpu("--rehearse", cwd=checkout, PYTHONPATH=str(tmp_path / "site"))
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]

    out = checkout / "build/gpu-rehearsal"
    files = [p.relative_to(out) for p in out.rglob("*") if p.is_file()]
    assert len(files) <= 8
    assert all(len(f.parts) <= 3 and re.fullmatch("[A-Za-z0-9._-]+", f.name) for f in files)
    (path,) = out.rglob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_stage: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], {})[row["item"]] = row
    assert by_stage.keys() == {s.name for s in (*gpu.STAGES, *gpu.BESIDE)}
    for row in rows:
        assert row["status"] in (records.MEASURED, records.DECLINED), row
        assert row["environment"]["torch"] and row["sources"]
    checked = by_stage["checks"]
    assert checked["tests of the ops"]["counts"]["passed"] >= 2
    # What the smoke has recorded is run again under it, not passed over as "recorded before".
    assert checked["compute-sanitizer"]["told"].startswith("1 item ran, ")
    assert "0 errors" in checked["compute-sanitizer"]["told"]
    assert by_stage["smoke"]["golden mae_st_tiny"]["errors"]["loss"] < 1e-5
    train = by_stage["train"]
    # Nothing is built in a bare checkout, and plain torch is no graph.
    assert train["train.py with and without a CUDA graph"]["status"] == records.DECLINED
    assert train["train.py saves and resumes"]["tensors"] > 100
    assert train["train.py with one rank of NCCL"]["backend"] == "gloo"
    taken = [*by_stage["steps"].values(), *by_stage["rungs"].values()]
    assert {r["engine"] for r in taken} == engines.ENGINES.keys() - {engines.ENCODE_ALL}
    for row in taken:
        assert len(row["seconds"][row["engine"]]) == 2
        assert abs(row["losses"][row["engine"]] / row["losses"]["mae_fast"] - 1) < 1e-2
        assert row["conditions"][0]["power.draw"] == "351.20 W"
    by_ratio = sorted(by_stage["ratios"].values(), key=lambda row: row["ratio"])
    work = [row["times_the_base_in_flop"] for row in by_ratio]
    assert work[0] > 1 > work[-1] and work == sorted(work, reverse=True)
    for row in by_stage["attention"].values():
        assert {"triton", "sdpa", "reference"} <= row["seconds"].keys()
        assert row["declined"]["flash_attn_4"]
    table = json.loads(path.with_name("measured_backends.json").read_text())["90"]
    shapes = "d32-s4", "d32-s32"
    assert table.keys() == {f"{s}-bfloat16-{d}" for s in shapes for d in ("forward", "both")}
    assert json.loads(path.with_name("measured.json").read_text())[configs.TRITON]["90"]
    (steps_profile,) = by_stage["profile"].values()
    assert sum(steps_profile["shares"].values()) == pytest.approx(1)


def test_every_item_of_the_real_plans_reaches_the_device(tmp_path):
    """Of a bare checkout, where torch says that there is a GPU: no import, name or argument stops
    an item before that GPU would be asked."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(BLOCKER)
    command = [sys.executable, "tests/gpu/reach.py", str(tmp_path / "records.jsonl")]
    checkouts = [name for _, name, *_ in accelerate.PLAN if name]
    run = subprocess.run(
        command,
        cwd=bare_checkout(tmp_path / "checkout"),
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path / "site"),
            "PATH": os.path.dirname(sys.executable),
            **dict.fromkeys(checkouts, ""),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    ends: dict[str, Counter] = {}
    for line in run.stdout.splitlines():
        if line.count(" | ") == 2:
            stage, _, end = line.split(" | ")
            ends.setdefault(stage, Counter())[end] += 1
    others = {
        ("compile", "Declined: it is not started"): 1,
        ("tune", "StartedError: -m benchmarks.gpu.stages.tune 0"): 1,
        ("accelerate", "Declined: transformers is not installed"): 2,
        **{("accelerate", f"Declined: {name} names no checkout"): 1 for name in checkouts},
        ("checks", "StartedError: -m pytest -q"): 1,
        ("checks", "Declined: compute-sanitizer is not installed"): 1,
    }
    for (stage, end), count in others.items():
        assert ends[stage].pop(end, 0) == count, (stage, end, ends[stage])
    assert ends.keys() == {s.name for s in (*gpu.STAGES, *gpu.BESIDE)}
    assert {end for of in ends.values() for end in of} == {"the device"}, ends
    assert sum(of.total() for of in ends.values()) > 150
    print({stage: of.total() for stage, of in ends.items()})


def test_a_second_run_skips_what_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    found = records.open_records(rehearsal=True)
    found.add("profile", "vit_base 64 clips", records.MEASURED)
    run = run_gpu("--rehearse", "--stage", "profile", OUT=str(tmp_path))
    assert "vit_base 64 clips: recorded before" in run.stdout, run.stdout + run.stderr
    assert found.path.read_text().count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    run = run_gpu(OUT=str(tmp_path))
    assert run.returncode == 0 and "skipped: no CUDA device" in run.stdout
    assert not list(tmp_path.iterdir())


def test_times_of_all_stages_fit_into_eight_minutes():
    last = gpu.end_of(gpu.STAGES[-1], began=0.0, rehearse=False)
    assert last + gpu.KILL_AFTER < 480
    for stage in gpu.BESIDE:
        assert gpu.end_of(stage, 0.0, False) <= gpu.end_of(gpu.STAGES[0], 0.0, False)


def test_a_stage_that_hangs_is_ended_and_recorded(tmp_path):
    found = records.Records(tmp_path / "a.jsonl", "sources", ())
    began = time.time()
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    with mock.patch.object(gpu, "KILL_AFTER", 0.1):
        gpu.wait(process, gpu.STAGES[0], began, found)
    (row,) = found.all()
    assert time.time() - began < 10 and process.poll() is not None
    assert (row["stage"], row["status"]) == (gpu.STAGES[0].name, records.NOT_REACHED)
    gpu.wait(subprocess.Popen(["false"]), gpu.STAGES[1], time.time() + 10, found)
    assert [r["status"] for r in found.all()] == [records.NOT_REACHED, records.FAILED]


def ends(pid: int) -> bool:
    """Whether a process is gone, or waits for nothing but its parent, within ten seconds."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if state.read_text().rsplit(") ", 1)[1][0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_what_a_stage_started_ends_with_it():
    """A tool in a process group of its own would stay on the GPU."""
    code = (
        "import os, subprocess, time;"
        "print(subprocess.Popen(['sleep', '100'], preexec_fn=os.setpgrp).pid, flush=True);"
        "time.sleep(100)"
    )
    command = [sys.executable, "-c", code]
    stage = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    child = int(stage.stdout.readline())
    gpu.end_session(stage)
    assert ends(child)


def test_a_process_that_is_late_ends_with_what_it_started():
    code = "import subprocess; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True)"
    command = [sys.executable, "-c", code + "; p.wait()"]
    process = subprocess.Popen(command, preexec_fn=os.setpgrp, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    assert checks.end_by([process], 0.0) == 1
    assert ends(child)


OP_TESTS = """
import time
def test_its_fixture_is_absent(golden): pass
def test_it_fails(): assert 1.5 < 1.25, "number 0: 1.5 > 1.25"
def test_it_matches_fp64(): pass
def test_it_waits(): time.sleep(100)
"""


OP_NAMES = ("it_matches_fp64", "its_fixture_is_absent", "it_fails")


def test_failures_are_told_of_a_process_that_is_killed(tmp_path):
    """pytest itself tells them when all tests have ended."""
    (tmp_path / "test_op.py").write_text(OP_TESTS)
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.shards", "test_op.py"]
    command += ["-p", "no:cacheprovider", "--outcomes", str(path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True)
    until = time.time() + 60
    while time.time() < until and not (path.exists() and path.read_text().count("\n") >= 3):
        time.sleep(0.1)
    gpu.end_session(process)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    first, absent, fails = (f"test_op.py::test_{n}" for n in OP_NAMES)
    assert rows[0]["test"] == first  # what holds an op to its reference
    found = checks.told_of(rows, 1, 1, {"process 2": "Segmentation fault"})
    assert found["counts"] == {"passed": 1, "failed": 2}
    assert found["wrong"].keys() == {absent, fails, "process 2"}
    assert "fixture 'golden' not found" in found["wrong"][absent]
    assert found["wrong"][fails].startswith("AssertionError: number 0: 1.5 > 1.25")
    assert found["told"].endswith("1 of 1 processes did not end in time")
    assert found["reason"].startswith(found["told"]) and absent in found["reason"]


def test_op_tests_need_nothing_from_above(tmp_path):
    """There is no av for tests/conftest.py on a machine with a GPU."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/ops", "--confcutdir", "tests/ops", "--setup-plan"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_a_sanitizer_under_which_nothing_runs_is_a_failure(tmp_path, tools):
    (tools / "compute-sanitizer").write_text("#!/bin/sh\necho 'ERROR SUMMARY: 0 errors'\n")
    setting = Setting.make(True, time.time() + 60, tmp_path / "a.jsonl")
    with pytest.raises(AssertionError, match="nothing ran under it"):
        checks.sanitizer(setting)
