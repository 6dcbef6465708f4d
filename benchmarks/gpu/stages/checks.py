"""Whether it computes the right thing on this device, before anything is timed."""

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import ROOT
from benchmarks.gpu.calls import calls
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.engines import products_in
from benchmarks.gpu.records import Declined, Item
from benchmarks.gpu.setting import Setting
from mae_fast.bench.calls import Call
from mae_fast.config import ModelConfig
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS, dispatch

GOLDEN = ("mae_st_tiny", "mae_st_tiny_all_frames_raw_pixels")
SANITIZER_SECONDS = 60.0
# Its table of addresses holds for one batch: it refuses to be captured.
NOT_IN_A_GRAPH = {"crop_resize_patchify_gather"}
AFTER_TESTS = 20.0  # seconds left to what follows the tests
# What the rehearsal runs of the op tests, in Triton's interpreter.
REHEARSED = ("tests/ops/test_layer_norm.py", "-k", "f32 and (one_row or prime)")
OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", re.M)


def items(setting: Setting) -> Iterator[Item]:
    for name in setting.some(GOLDEN):
        yield Item(f"golden {name}", lambda name=name: golden(setting, name))
    yield Item("two runs give the same bits", lambda: equal_bits(setting))
    yield Item("tests of the ops", lambda: op_tests(setting))
    for call in calls(setting, "vit_base", 2):
        if call.op in NOT_IN_A_GRAPH:
            continue
        name = f"CUDA graph of {call.op} {call.shape}"
        yield Item(name, lambda call=call: graphed(setting, call))
    yield Item("compute-sanitizer", lambda: sanitizer(setting))


def golden(setting: Setting, name: str) -> dict:
    """Loss and gradients of the official code, from its weights, in fp32."""
    metadata, tensors = read_safetensors(ROOT / f"tests/golden/{name}.safetensors")
    values = json.loads(metadata["config"])
    ratio = values.pop("mask_ratio")
    for key in ("pixel_mean", "pixel_std", "norm_eps"):  # those of every model
        values.pop(key)
    model = MaskedAutoencoder(ModelConfig(**values))
    model.load_state_dict({k[6:]: t for k, t in tensors.items() if k.startswith("state.")})
    model.to(setting.device.type)
    video, noise = (tensors[k].to(setting.device.type) for k in ("video_u8", "noise"))
    with products_in(tf32=False):
        loss, _, mask = model(video, ratio, noise=noise)
        loss.backward()
    assert torch.equal(mask.cpu(), tensors["mask"]), "another mask"
    errors = {"loss": abs(float(loss.detach()) / float(tensors["loss"]) - 1)}
    for key, p in model.named_parameters():
        theirs = tensors[f"grad.{key}"]
        # A key's bias changes no softmax: its gradient is 0, and both hold roundings.
        scale = 1e-3 if key.endswith("attn.k.bias") else float(theirs.norm())
        errors[key] = float((p.grad.cpu() - theirs).norm()) / scale
    worst = max(errors, key=errors.get)
    assert errors["loss"] < 1e-5, f"the loss differs by {errors['loss']:.1e}"
    assert errors[worst] < 1e-4, f"the gradient of {worst} differs by {errors[worst]:.1e}"
    return {"errors": errors, "told": f"worst is {worst}, {errors[worst]:.1e}"}


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a file; the package may not be installed."""
    dtypes = {"F32": torch.float32, "U8": torch.uint8, "I64": torch.int64, "I32": torch.int32}
    content = path.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:length])
    metadata, tensors = header.pop("__metadata__"), {}
    for name, entry in header.items():
        begin, end = (length + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(content[begin:end]), dtype=dtypes[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return metadata, tensors


def equal_bits(setting: Setting) -> dict:
    """Loss and every gradient of two bf16 steps from the same weights."""
    cfg = setting.cfg("vit_tiny")
    with torch.device(setting.device.type):
        model = MaskedAutoencoder(cfg)
    batch = setting.batch(8)
    clips, noise = setting.clips(cfg, batch), setting.noise(cfg, batch)
    found = []
    for _ in range(2):
        with setting.autocast():
            loss = model(clips, 0.9, noise=noise)[0]
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
        model.zero_grad()
    differ = [name for name, t in found[0].items() if not torch.equal(t, found[1][name])]
    assert not differ, f"two runs differ in {', '.join(differ)}"
    return {"tensors": len(found[0]), "told": f"{len(found[0])} tensors are equal"}


def graphed(setting: Setting, call: Call) -> dict:
    """An op's forward and backward, captured and replayed, give what they give without a graph."""
    call = call.real()
    backend = own_backend(setting, call)
    run = call.both(call.function(backend))
    with setting.autocast():
        expected = [t.clone() for t in run()]
        replay = setting.device.graphed(run)
        for _ in range(2):
            got = replay()
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(g, e), f"result {i} differs by {float((g - e).norm()):.1e}"
    return {"backend": backend, "told": f"{backend}: {len(expected)} tensors are equal"}


def own_backend(setting: Setting, call: Call) -> str:
    """The op's Triton backend; Declined where it does not take the call."""
    if "triton" not in OPS[call.op].backends:
        raise Declined(f"{call.op} has no triton backend")
    try:
        with setting.autocast():
            call.forward(call.function("triton"))()
    except dispatch.BackendError as e:
        raise Declined(str(e)) from e
    return "triton"


def sanitizer(setting: Setting) -> dict:
    """The golden model's kernels under compute-sanitizer's memcheck, in a process of its own."""
    command = shutil.which("compute-sanitizer")
    if not command:
        raise Declined("compute-sanitizer is not installed")
    tool = [command, "--tool", "memcheck", "--error-exitcode", "9"]
    stage = [sys.executable, "-m", "benchmarks.gpu", "--stage", "checks", "--only", GOLDEN[0]]
    if setting.tiny:
        stage.append("--rehearse")
    left = min(SANITIZER_SECONDS, setting.deadline - time.time())
    with tempfile.TemporaryDirectory() as folder:  # its records are not ours
        env = {**os.environ, "OUT": folder}
        run = subprocess.run(
            [*tool, *stage], cwd=ROOT, env=env, capture_output=True, text=True, timeout=left
        )
    text = (run.stdout + run.stderr)[-4000:]
    assert run.returncode == 0, f"exit code {run.returncode}: {text}"
    found = re.findall(r"ERROR SUMMARY: .*", text) or ["no summary"]
    return {"output": text, "told": found[0]}


def op_tests(setting: Setting) -> dict:
    """tests/ops with the Triton kernels on this device: as many processes as there are cores."""
    if importlib.util.find_spec("pytest") is None:
        raise Declined("pytest is not installed")
    shards = 2 if setting.tiny else max(2, len(os.sched_getaffinity(0)) - 3)
    # What launches its own Python, which would not find the kernels of a bare checkout, and what
    # wants more than the ops.
    what = REHEARSED if setting.tiny else ("tests/ops", "--ignore", "tests/ops/test_dispatch.py")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "benchmarks.gpu.shards"]
    command += ["-p", "no:cacheprovider", "--confcutdir", "tests/ops", *what]
    env = dict(os.environ)
    if not isinstance(setting.device, Cpu):
        env["MAE_FAST_TEST_DEVICE"] = setting.device.type
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.txt" for i in range(shards)]
        running = []
        for i, file in enumerate(files):
            with file.open("w") as out:
                shard = [*command, "--shard", f"{i}/{shards}"]
                running.append(subprocess.Popen(shard, cwd=ROOT, env=env, stdout=out, stderr=out))
        late = end_by(running, setting.deadline - AFTER_TESTS)
        texts = [file.read_text() for file in files]
    outcomes = {test: outcome for text in texts for test, outcome in OUTCOME.findall(text)}
    counts = dict(Counter(outcomes.values()))
    failed = sorted(t for t, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    broken = [  # 1: a test failed, 5: a shard holds no test, -9: ended above
        text[-2000:]
        for text, process in zip(texts, running, strict=True)
        if process.returncode not in (0, 1, 5, -9)
    ]
    told = f"{counts}, {late} of {shards} processes did not end in time"
    if failed or broken or not outcomes:
        tails = "\n".join(text[-6000:] for text in texts if "FAILED" in text or "ERROR" in text)
        raise AssertionError(f"{told}; failed: {failed}\n{broken}\n{tails}")
    return {"counts": counts, "processes": shards, "not_ended": late, "told": told}


def end_by(running: list[subprocess.Popen], deadline: float) -> int:
    """Wait for processes until `deadline`, end the rest; how many these were."""
    late = 0
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    return late
