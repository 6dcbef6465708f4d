"""Each op by itself on this device: its tests, in a CUDA graph, and under compute-sanitizer."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import ROOT
from benchmarks.gpu.records import Declined, Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages.kernels import calls
from mae_fast.bench.calls import Call
from mae_fast.errors import BackendError, ConfigError
from mae_fast.graph import Side

AFTER_TESTS = 22.0  # seconds left to what follows the tests: 20 on an H200
# What the rehearsal runs of the op tests, in Triton's interpreter.
REHEARSED = ("tests/ops/test_layer_norm.py", "-k", "f32 and (one_row or prime)")


def items(setting: Setting) -> Iterator[Item]:
    yield Item("tests of the ops", partial(op_tests, setting))
    for call in setting.some(calls(setting, "vit_base", 2), 4):
        name = f"CUDA graph of {call.op} {call.shape}"
        yield Item(name, partial(graphed, setting, call))
    yield Item("compute-sanitizer", partial(sanitizer, setting))


def graphed(setting: Setting, call: Call) -> dict:
    """An op's forward and backward, captured and replayed, give what they give without a graph."""
    call = call.real(setting.device)
    run, side = call.both(by_triton(setting, call)), Side(torch.device(setting.device))
    with setting.autocast():
        with side.beside():
            run()
            expected = [t.clone() for t in run()]
        graph, block = side.capture()
        with block:
            got = run()
    for _ in range(2):
        graph.replay()
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(g, e), f"result {i} differs by {float((g - e).norm()):.1e}"
    return {"backend": "triton", "told": f"triton: {len(expected)} tensors are equal"}


def by_triton(setting: Setting, call: Call) -> Callable:
    """The op by its Triton backend; Declined where it does not take the call."""
    function = call.function("triton")
    try:
        setting.autocast()(call.forward(function))()
    except (BackendError, ConfigError) as e:
        raise Declined(str(e)) from e
    return function


def sanitizer(setting: Setting) -> dict:
    """The golden models' kernels under compute-sanitizer's memcheck, in a process of its own."""
    if shutil.which("compute-sanitizer") is None:
        raise Declined("compute-sanitizer is not installed")
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    command += ["-m", "benchmarks.gpu.stages.smoke", *["--rehearse"] * setting.tiny]
    # The interpreter of the rehearsal's other checks would take minutes.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        run = begin(command, log, env)
        late = end_by([run], setting.deadline)
        text = log.read_text()[-4000:]
    assert not late, f"it did not end in time: {text}"
    assert run.returncode == 0, f"exit code {run.returncode}: {text}"
    ran = len(re.findall("^golden .*: worst is", text, re.M))
    assert ran, f"nothing ran under it: {text}"
    found = re.findall(r"ERROR SUMMARY: .*", text) or ["no summary"]
    return {"output": text, "items": ran, "told": f"{ran} item ran, {found[0]}"}


def op_tests(setting: Setting) -> dict:
    """tests/ops with the Triton kernels on this device, in a process for each core but one."""
    if importlib.util.find_spec("pytest") is None:
        raise Declined("pytest is not installed")
    shards = 2 if setting.tiny else max(2, len(os.sched_getaffinity(0)) - 1)
    # What launches its own Python, which would not find the kernels of a bare checkout, and what
    # wants more than the ops.
    what = REHEARSED if setting.tiny else ("tests/ops", "--ignore", "tests/ops/test_dispatch.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.shards"]
    command += ["-p", "no:cacheprovider", "--confcutdir", "tests/ops", *what]
    # A Python that a test starts must find the checkout too.
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if not setting.tiny:
        env["MAE_FAST_TEST_DEVICE"] = setting.device
    with tempfile.TemporaryDirectory() as folder:
        logs, running = [Path(folder) / f"{i}.txt" for i in range(shards)], []
        for i, log in enumerate(logs):
            shard = ["--shard", f"{i}/{shards}", "--outcomes", f"{folder}/{i}.jsonl"]
            running.append(begin([*command, *shard], log, env))
        late = end_by(running, setting.deadline - AFTER_TESTS)
        texts = [log.read_text()[-2000:] for log in logs]
        rows = [json.loads(line) for f in Path(folder).glob("*.jsonl") for line in f.open()]
    codes = enumerate(process.returncode for process in running)
    # 1: a test failed, 5: a shard holds no test, -9: ended above
    broken = {f"process {i}": texts[i] for i, code in codes if code not in (0, 1, 5, -9)}
    if not rows:
        broken["process 0"] = texts[0]
    found = told_of(rows, late, shards, broken)
    for test, error in found.get("wrong", {}).items():
        print(f"  {test}: {error}", flush=True)
    return {"processes": shards, "not_ended": late, **found}


def told_of(rows: list[dict], late: int, shards: int, broken: dict[str, str]) -> dict:
    """What there is to record of the tests' outcomes; `wrong`: each that failed, in a line."""
    counts = dict(Counter(row["outcome"] for row in rows))
    seconds: Counter = Counter()
    for row in rows:
        seconds[row["test"].split("::")[0]] += row["seconds"]
    wrong = {row["test"]: row["error"] for row in rows if row["outcome"] == "failed"} | broken
    told = f"{counts}, {late} of {shards} processes did not end in time"
    found = {"counts": counts, "seconds_by_file": dict(seconds.most_common()), "told": told}
    if wrong:
        found |= {"wrong": wrong, "reason": f"{told}: {', '.join(wrong)}"}
    return found


def begin(command: list[str], log: Path | None = None, env: dict | None = None) -> subprocess.Popen:
    """A process in a group of its own, which writes into a file."""
    with log.open("w") if log else nullcontext() as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=out, preexec_fn=os.setpgrp
        )


def end_by(running: list[subprocess.Popen], deadline: float) -> int:
    """Wait for processes that `begin` began, until `deadline`; end the rest and what they
    started; how many these were."""
    late = 0
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.wait()
            late += 1
    return late
