"""Processes that make batches: lost, stuck, suspended, without memory; how a batch travels."""

import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import reduction

import pytest
import torch
from batches import clips, config, load

from mae_fast.data import decode, workers
from mae_fast.data.index import build_index
from mae_fast.data.loader import ClipDataset, make_loader
from mae_fast.errors import ConfigError, DataError
from mae_fast.ops.source import COLUMNS

LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_killed_worker_is_seen_where_a_batch_is_waited_for(rows, step, which):
    """Not by a signal handler, which would raise in the middle of a step; whichever it is, and
    whether it was to be given a task or to give a batch."""
    before = signal.getsignal(signal.SIGCHLD)
    options = {"num_frames": 8, "batch_size": 2, "seed": 0, "steps": 500}
    batches = iter(make_loader(rows, config(workers=2), **options))
    for _ in range(step + 1):
        next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before
    pids = sorted(worker.pid for worker in multiprocessing.active_children())
    os.kill(pids[which], signal.SIGKILL)
    time.sleep(0.2)  # nothing is raised here
    with pytest.raises(DataError, match=r"worker was lost .*: killed by SIGKILL"):
        for _ in range(10):
            next(batches)
    assert not multiprocessing.active_children()


@LINUX
def test_what_is_sent_to_a_whole_job_ends_no_worker(rows):
    """By a scheduler to every process, by a terminal to its group: the run answers, and ends them.
    A stopped one too."""
    options = {"num_frames": 8, "batch_size": 2, "seed": 0, "steps": 9}
    batches = iter(make_loader(rows, config(workers=2), **options))
    next(batches)
    for worker in multiprocessing.active_children():
        assert os.getsid(worker.pid) == worker.pid
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            os.kill(worker.pid, getattr(signal, name))
    for _ in range(7):
        next(batches)
    stopped = multiprocessing.active_children()
    for worker in stopped:
        os.kill(worker.pid, signal.SIGSTOP)
    batches.close()
    assert len(stopped) == 2 and not multiprocessing.active_children()


@pytest.mark.parametrize("n", [0, 2])
def test_a_wait_can_be_left(rows, n, monkeypatch):
    """Workers that do not answer, or the thread in their place: a file system that is gone."""

    class Told(Exception):
        pass

    def waiting():
        calls.append(time.monotonic())
        if len(calls) > 3:
            raise Told

    calls, stuck = [], threading.Event()
    batches = make_loader(rows, config(workers=n), num_frames=8, batch_size=2, seed=0, steps=9)
    batches._waiting = waiting
    monkeypatch.setattr(ClipDataset, "__getitem__", lambda self, g: stuck.wait(60))
    with pytest.raises(Told):
        list(batches)
    assert calls[-1] - calls[0] < 2 and not multiprocessing.active_children()
    stuck.set()


def test_whoever_makes_no_batch_for_long_is_given_up(rows, monkeypatch):
    monkeypatch.setattr(workers, "_STUCK", 0.3)
    stuck = threading.Event()
    monkeypatch.setattr(ClipDataset, "__getitem__", lambda self, g: stuck.wait(60))
    with pytest.raises(DataError, match=r"no batch for 0\.3 s"):
        load(rows)
    stuck.set()


def test_a_job_that_was_suspended_goes_on():
    """By Ctrl-Z or a scheduler, for longer than a batch may take, while it waits for one."""

    def run():
        workers._STUCK = 0.5
        stop = iter([lambda: os.kill(os.getpid(), signal.SIGSTOP)])
        make = lambda task: time.sleep(0.3) or task  # noqa: E731
        waiting = lambda: next(stop, lambda: None)()  # noqa: E731
        assert list(workers.produce(make, [3], 0, waiting)) == [3]

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    time.sleep(0.8)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("n", [0, 1])
def test_a_decoder_that_is_not_there_is_a_wrong_configuration(rows, monkeypatch, n):
    monkeypatch.setattr(decode, "_unusable", lambda name: "not installed")
    with pytest.raises(ConfigError, match=r"^decoder torchcodec: not installed$"):
        load(rows, config(workers=n, decoder="torchcodec"))


def test_an_error_in_a_worker_says_where(rows, monkeypatch):
    monkeypatch.setattr(ClipDataset, "__getitem__", lambda self, g: 1 / 0)
    with pytest.raises(RuntimeError, match=r"in a data worker:(.|\n)*ZeroDivisionError"):
        load(rows, config(workers=1))


def test_without_memory_for_a_batch_it_is_said(rows, monkeypatch):
    def write(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(DataError, match=r"cannot hand over its batch: .*No space left"):
        load(rows, config(workers=1))


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # the second is Python 3.14's
def test_workers_end_with_a_program_that_is_killed_or_leaves(tmp_path, folder, method):
    """And not before: they may wait for a task. A program that leaves does not wait for them."""
    build_index([folder], tmp_path / "index.jsonl", progress=False)
    code = f"""
import multiprocessing, os, signal, sys, time
from mae_fast.config import DataConfig
from mae_fast.data import make_loader, read_index
rows, cfg = read_index({str(tmp_path / "index.jsonl")!r}), DataConfig(workers=2, repeat_aug=1)
batches = iter(make_loader(rows, cfg, num_frames=8, batch_size=2, seed=0, steps=500))
multiprocessing.set_start_method({method!r})
next(batches)
time.sleep(1.5)
for _ in range(9): next(batches)
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for how in ("kill", "leave"):
        command = [sys.executable, "-c", code, how]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
        pids = run.stdout.split()
        assert len(pids) == 2 and run.returncode == (-signal.SIGKILL if how == "kill" else 0)
        end = time.time() + 20
        while any(os.path.exists(f"/proc/{pid}/exe") for pid in pids):
            assert time.time() < end, "workers are left"
            time.sleep(0.1)


@LINUX
def test_no_file_descriptors_are_left(rows):
    """Not by passes that end, nor by passes given up."""

    def passes(n):
        options = {"num_frames": 8, "batch_size": 2, "seed": 0, "steps": 4}
        for _ in range(n):
            list(make_loader(rows, config(workers=2), **options))
            next(iter(make_loader(rows, config(workers=2), **options)))
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before, after = passes(1), passes(4)
    # Queues of the last pass may still be closing in their threads.
    assert after <= before + 3


@LINUX
def test_a_batch_travels_in_one_descriptor(rows):
    """One for each clip would exhaust a process's limit at the batch sizes of training."""
    (batch,) = load(rows, batch_size=6, steps=1)
    ours, theirs = multiprocessing.Pipe()
    before = len(os.listdir("/proc/self/fd"))
    answer, fd = workers._answer(lambda task: batch, None)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    theirs.send(answer)
    reduction.send_handle(theirs, fd, os.getpid())
    os.close(fd)
    got = workers._receive(ours)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # of the mapping
    assert clips([got]) == clips([batch]) and got.bad == batch.bad
    del got
    assert len(os.listdir("/proc/self/fd")) == before


def test_batch_moves_as_one_block(rows):
    (batch,) = load(rows, steps=1)
    moved = batch.to("cpu")
    assert clips([moved]) == clips([batch])
    assert moved.flat.data_ptr() == batch.flat.data_ptr()  # not copied again
    source = batch.to("meta").source(16)
    assert (source.flat.device.type, source.table.device.type) == ("meta", "meta")
    assert batch.to("meta").boxes.device.type == "cpu"


@pytest.mark.parametrize("clips_each", [1, 3])
def test_a_frame_of_several_clips_travels_once(rows, clips_each):
    """As planes: one and a half bytes a pixel."""
    (batch,) = load(rows, config(repeat_aug=clips_each, short_side=0), batch_size=1, steps=1)
    begins = batch.table[:, COLUMNS:]
    height, width = batch.frames[0].shape[1:3]
    assert batch.flat.numel() == len(begins.unique()) * height * width * 3 // 2
    assert batch.flat.numel() <= batch.capacity


def test_a_buffer_on_a_gpu_has_the_size_of_the_largest_batch(rows, monkeypatch):
    """So that the step's inputs keep their shapes, whatever the sizes of the clips."""
    batches, real = load(rows, steps=5), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: real(*a, **k))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self)
    moved = [batch.to("cuda") for batch in batches]
    assert {m.flat.numel() for m in moved} == {batches[0].capacity}
    assert len({b.capacity for b in batches}) == 1 < len({b.flat.numel() for b in batches})
    assert clips(moved) == clips(batches)


@LINUX
def test_memory_of_a_worker_is_flat_over_2000_decodes(tmp_path, video):
    """In a process of its own, as in a worker: growth over the last 1500 decodes under 8 MB."""
    path = video.write(tmp_path / "a.mp4", 12)
    code = f"""
import gc, re, sys
import torch
from mae_fast.config import DataConfig
from mae_fast.data.index import VideoRow
from mae_fast.data.loader import ClipDataset
torch.set_num_threads(1)
rows = [VideoRow({str(path)!r}, frames=12, fps=25.0)]
dataset = ClipDataset(rows, DataConfig(repeat_aug=1, sampling_rate=1), 4, 0)
def rss():
    with open("/proc/self/status") as f:
        return int(re.search(r"VmRSS:\\s+(\\d+)", f.read())[1])
for g in range(2000):
    if g == 500:
        before = rss()
    dataset[g]
print(rss() - before)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 8192, f"grew by {out.stdout.strip()} kB"
