"""`make gpu` without a GPU: the rehearsal runs its stages whole, and what only a GPU would run is
run against stand-ins."""

import json
import math
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import device, engines, predict, records, tables
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages import attention, checks, compile, profile, steps, tune
from mae_fast.bench.calls import Call
from mae_fast.kernels import configs

ROOT = Path(__file__).resolve().parents[1]
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

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)

sys.meta_path.insert(0, Blocker())
"""
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
    stand_ins = train["train.py with and without a CUDA graph"]["stand_ins"]
    assert stand_ins == ["av", "rich", "safetensors"]
    assert train["train.py saves and resumes"]["tensors"] > 100
    assert train["train.py with one rank of NCCL"]["backend"] == "gloo"
    taken = [*by_stage["steps"].values(), *by_stage["rungs"].values()]
    assert {r["engine"] for r in taken} == engines.ENGINES.keys() - {"mae_fast_encode_all"}
    for row in taken:
        assert len(row["seconds"][row["engine"]]) == 2
        assert abs(row["losses"][row["engine"]] / row["losses"]["mae_fast"] - 1) < 1e-2
        assert row["conditions"][0]["power.draw"] == "351.20 W"
    for row in by_stage["attention"].values():
        assert {"triton", "sdpa", "reference"} <= row["seconds"].keys()
        assert row["declined"]["flash_attn_4"]
    table = json.loads(path.with_name("measured_attention.json").read_text())["90"]
    assert table.keys() == {f"d32-s{n}-bfloat16-{d}" for n in (4, 32) for d in ("forward", "both")}
    assert json.loads(path.with_name("measured.json").read_text())[configs.TRITON]["90"]
    (steps_profile,) = by_stage["profile"].values()
    assert sum(steps_profile["shares"].values()) == pytest.approx(1)


def test_every_item_of_the_real_plans_reaches_the_device(tmp_path):
    """Of a bare checkout, where torch says that there is a GPU: no import, name or argument stops
    an item before that GPU would be asked."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(BLOCKER)
    command = [sys.executable, "tests/gpu_reach.py", str(tmp_path / "records.jsonl")]
    run = subprocess.run(
        command,
        cwd=bare_checkout(tmp_path / "checkout"),
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path / "site"),
            "PATH": os.path.dirname(sys.executable),
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
    found = records.open_records(device.Cpu.NAME, rehearsal=True, alone=True)
    found.add("profile", "vit_base 64 clips", records.MEASURED)
    run = run_gpu("--rehearse", "--stage", "profile", OUT=str(tmp_path))
    assert "vit_base 64 clips: recorded before" in run.stdout, run.stdout + run.stderr
    assert len(list(found.all())) == 1


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


def test_what_decides_comes_first():
    names = [s.name for s in gpu.STAGES]
    assert names[:5] == ["smoke", "steps", "profile", "attention", "tune"]
    first = [(m, b, e) for m, b, engines in steps.PLAN for e in engines]
    assert [e for m, b, e in first if (m, b) == ("vit_large", 64)] == list(steps.FIRST)
    assert "official_sdpa_compile" in steps.FIRST


def test_an_item_that_fails_does_not_lose_the_others(tmp_path):
    def fail():
        raise ValueError("wrong\nat length")

    def decline():
        raise records.Declined("not here")

    ran = []

    def items():
        yield records.Item("fails", fail)
        yield records.Item("declines", decline)
        yield records.Item("works", lambda: ran.append("works") or {"value": 1})

    found = records.Records(tmp_path / "a.jsonl", "sources", ())
    records.work("stage", items(), found, math.inf)
    records.work("stage", items(), found, math.inf)  # nothing is left
    assert ran == ["works"]
    rows = {r["item"]: r for r in found.all()}
    assert rows["fails"]["reason"] == "ValueError: wrong\nat length"
    assert "in fail" in rows["fails"]["traceback"]
    assert str(records.ROOT) not in (tmp_path / "a.jsonl").read_text()
    assert [r["status"] for r in rows.values()] == ["failed", "declined", "measured"]
    other = records.Records(tmp_path / "a.jsonl", "other sources", ())
    assert other.done("stage") == set()


def test_tables_say_how_much_faster_ours_is():
    """By clips a second, round by round: another batch and a slower step."""
    record = {"engine": "official_bf16", "seconds": {"official_bf16": [3.0, 6.0]}}
    record["seconds"]["mae_fast"] = [1.0, 2.0]
    record["engines"] = {"official_bf16": {"clips": 32}, "mae_fast": {"clips": 64}}
    assert tables.faster(record) == 6.0


def test_what_was_not_reached_is_run_next_time(tmp_path):
    found = records.Records(tmp_path / "a.jsonl", "sources", ())
    item = records.Item("late", dict)
    records.work("stage", iter([item]), found, deadline=0.0)
    (tmp_path / "a.jsonl").open("a").write('{"cut short by a cra')
    records.work("stage", iter([item]), found, math.inf)
    assert [r["status"] for r in found.all()] == ["not reached", "measured"]


def test_a_batch_that_does_not_fit_is_halved():
    tried = []

    def run(batch):
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError("too much")

    assert engines.fitting(run, 12) == 3 and tried == [12, 6, 3]
    with pytest.raises(torch.OutOfMemoryError):
        engines.fitting(lambda batch: run(4), 2)


def test_an_engine_with_another_loss_is_not_timed():
    model = torch.nn.Linear(1, 1)
    same, other = (
        mock.Mock(model=model, step=lambda clips, noise, loss=loss: loss) for loss in (1.0, 1.02)
    )
    state = model.state_dict()
    with pytest.raises(AssertionError, match=r"other gives loss 1\.02, expected 1\.0: not timed"):
        engines.first_losses({"mae_fast": same, "other": other}, None, None, state)


def test_cuda_kernels_are_built_where_nvcc_is(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "ROOT", tmp_path)
    setup = tmp_path / "setup.py"
    setup.write_text("import sys, os; print(*sys.argv[1:], os.environ['MAX_JOBS'])")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(records.Declined, match="is built without CUDA"):
        compile.ended(compile.start_nvcc())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(compile.cpp_extension, "CUDA_HOME", None)
    assert compile.start_nvcc() == "there is no nvcc"
    monkeypatch.setattr(compile.cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    assert compile.ended(compile.start_nvcc())["told"] == "-q build_ext --inplace 4"
    setup.write_text("raise SystemExit('error: no kernel')")
    with pytest.raises(AssertionError, match="ended with 1: error: no kernel"):
        compile.ended(compile.start_nvcc())


def test_a_kernel_that_is_wrong_is_a_failure(tmp_path):
    """Its item is: what else was timed is kept."""
    setting = Setting.make(True, math.inf, tmp_path / "a.jsonl", alone=True)
    item = records.Item("an op", lambda: {"wrong": {"triton": "result 0"}})
    records.work("kernels", iter([item]), setting.records, math.inf)
    (row,) = setting.records.all()
    assert row["status"] == records.FAILED and row["reason"].startswith("wrong, and not timed")


def test_costs_are_those_of_the_table():
    """facts of docs/results.md: the bytes and FLOP of an op in fp32."""
    x, w, b = torch.randn(2, 3, 16), torch.ones(16), torch.zeros(16)

    def both(call):
        forward, backward = call.work()
        return forward.bytes + backward.bytes

    assert both(Call("layer_norm", (x, w, b, 1e-6))) == 5 * 4 * x.numel()
    assert both(Call("add_layer_norm", (x, x, w, b, 1e-6))) == 8 * 4 * x.numel()
    assert both(Call("bias_gelu", (x, b))) == 5 * 4 * x.numel()
    q = torch.randn(2, 5, 3, 16)
    assert sum(w.flop for w in Call("attention", (q, q, q)).work()) == 12 * 2 * 5**2 * 48


def test_the_fastest_candidate_is_that_of_the_whole_step():
    def record(count, **seconds):
        kernel = {"kernel": "k", "shape_class": "any"}
        kernel["seconds"] = {json.dumps({"BLOCK": int(n[1:])}): [s] for n, s in seconds.items()}
        return {"stage": "tune", "architecture": 90, "calls_a_step": count, "kernels": [kernel]}

    # 16 is best in most calls of a step, 8 does not launch everywhere.
    found = [record(1, b8=1.0, b16=3.0, b32=1.0), record(24, b16=1.0, b32=2.0)]
    assert tune.fastest(found) == {("90", "k", "any"): {"BLOCK": 16}}
    assert tune.fastest([{"stage": "steps"}]) == {}


def test_attention_is_ordered_by_all_calls_of_a_row():
    def record(count, **seconds):
        times = {name: [s] for name, s in seconds.items()}
        of = {"stage": "attention", "status": "measured", "architecture": 90, "width": 32}
        of |= {"direction": "forward", "seconds": times}
        return {**of, "keys": 1569, "calls_a_step": count}

    # xformers did not take the second call.
    found = attention.rows([record(3, triton=1.0, xformers=0.5), record(1, triton=2.0, torch=9.0)])
    assert found == {"90": {"d32-s2048-bfloat16-forward": {"triton": 5000.0}}}


@pytest.mark.parametrize(
    ("kernel", "op"),
    [
        ("_add_layer_norm_fwd_kernel", "add_layer_norm"),
        ("_layer_norm_bwd_kernel", "layer_norm"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("void cutlass::device_kernel<flash::enable_sm90>", "products"),
        ("fmha_cutlassF_bf16", "products"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add>", "elementwise"),
        ("vectorized_elementwise_kernel<4, at::native::FillFunctor<float>", "fills"),
        ("Memset (Device)", "fills"),
        ("vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda", "copies"),
        ("(anonymous namespace)::CatArrayBatchedCopy_vectorized<", "copies"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16", "sums"),
        ("_sum_parts_kernel", "sums"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>", "adamw"),
        ("at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16, int>", "indexing"),
        ("void at::native::vectorized_gather_kernel<16, int>", "indexing"),
        ("_crop_resize_patchify_gather_fwd_kernel", "crop_resize_patchify_gather"),
        ("void some_library::kernel", "other"),
    ],
)
def test_kernels_go_to_their_ops(kernel, op):
    assert profile.op_of(kernel) == op


def test_every_kernel_of_ours_has_a_kind():
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    names = re.findall(r"^def (_\w+_kernel)\(", text, re.M)
    assert len(names) > 20
    assert [name for name in names if profile.op_of(name) == "other"] == []


def test_spans_of_the_host_are_no_kernels():
    """On an H200 the shadows of our labels were two fifths of a step's time."""

    def event(key, microseconds, on, annotation=False):
        kind = mock.Mock()
        kind.name = on
        times = {"self_device_time_total": microseconds, "is_user_annotation": annotation}
        return mock.Mock(key=key, count=1, device_type=kind, **times)

    found = [
        event("_bias_gelu_fwd_kernel", 5.0, "CUDA"),
        event("mae_fast label:|bias_gelu", 5.0, "CUDA", annotation=True),
        event("Optimizer.step#AdamW.step", 7.0, "CUDA", annotation=True),
        event("mae_fast label:|bias_gelu", 5.0, "CPU", annotation=True),
        event("Memset (Device)", 6.0, "CUDA"),
    ]
    rows = profile.kernels_of(found, "cuda")
    assert [row["kernel"] for row in rows] == ["Memset (Device)", "_bias_gelu_fwd_kernel"]


class Stub:
    """torch.cuda with the real signatures, and nothing behind them."""

    def __init__(self) -> None:
        self.calls = []
        self.fake = mock.create_autospec(torch.cuda)
        self.fake.Event.return_value.elapsed_time.return_value = 5.0
        self.fake.max_memory_allocated.return_value = 3 << 20
        self.fake.memory_allocated.return_value = 1 << 20
        self.fake.get_device_name.return_value = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def cuda(monkeypatch):
    """A device.Cuda on a stand-in of torch.cuda."""
    stub = Stub()
    monkeypatch.setattr(torch, "cuda", stub.fake)
    with mock.patch.object(device.Cuda, "__init__", lambda self: None):
        found = device.Cuda()
    found.flush = torch.ones(4, dtype=torch.uint8)
    return found, stub.fake


def test_cuda_times_by_events_from_a_cold_cache(cuda):
    found, fake = cuda
    calls = []
    assert found.time(lambda: calls.append(1), cold=True) == 0.005
    assert calls == [1] and not found.flush.any()
    fake._sleep.assert_called_once()
    assert fake.Event.call_args == mock.call(enable_timing=True)
    found.flush.fill_(1)
    found.time(lambda: None)
    assert found.flush.all()  # only when asked


def test_cuda_graph_replays_into_the_same_outputs(cuda):
    found, fake = cuda
    calls = []

    def call():
        calls.append(1)
        return [torch.ones(1)]

    replay = found.graphed(call)
    assert len(calls) == 3
    assert replay() is replay()
    assert fake.CUDAGraph.return_value.replay.call_count == 2


def test_cuda_tells_its_memory_and_name(cuda):
    found, fake = cuda
    assert (found.name(), found.allocated_mb()) == ("NVIDIA H100 80GB HBM3", 1.0)
    assert found.peak_mb(lambda: None) == 3.0
    fake.reset_peak_memory_stats.assert_called_once()
    found.synchronize()


def test_conditions_are_those_of_nvidia_smi(tools, monkeypatch):
    assert device.smi()["clocks.sm"] == "1980 MHz"
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho no permission; exit 4\n")
    assert device.smi() == {"nvidia-smi": "no permission"}
    monkeypatch.setenv("PATH", "")
    assert device.smi() == {}


def test_record_files_have_plain_names(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    path = records.open_records("NVIDIA H100 80GB HBM3", rehearsal=False).path
    assert path.parent == tmp_path / "NVIDIA-H100-80GB-HBM3"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[0-9a-z-]+\.jsonl", path.name)


def test_predictions_are_those_of_the_model():
    """docs/gpu.md: python -m benchmarks.gpu.predict writes it again."""
    assert predict.tables() in predict.DOC.read_text()
    for model in predict.TARGETS:
        terms = predict.terms(predict.model_of(model), predict.CLIPS, 0.9, predict.H100)
        assert all(t.amount > 0 for t in terms)
