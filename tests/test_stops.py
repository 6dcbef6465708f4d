"""How a run ends: signals, kills, a worker, a disk or memory that is gone. Nothing is lost."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from small_runs import at, command, config, poison, same, saved, toml, wait_for, weights, with_data

from mae_fast import checkpoint, distributed, endings, metrics, step, train
from mae_fast.data import VideoReader, build_index
from mae_fast.distributed import PeerLost, World
from mae_fast.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    OutOfMemory,
)
from mae_fast.train import pretrain


def test_a_signal_saves_and_leaves_with_75(index, tmp_path):
    signum = signal.SIGINT
    cfg = config(index, tmp_path / "run", steps=100_000, save_every=90_000, log_every=1)
    process = subprocess.Popen(
        command(cfg, tmp_path / "run.toml"), stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "run" / "metrics.jsonl")
    while not metrics.read(tmp_path / "run" / "metrics.jsonl"):
        time.sleep(0.02)
    process.send_signal(signum)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 75, text
    step = checkpoint.latest(tmp_path / "run")[0]["step"]
    assert f"{signum.name} after step {step}" in text and "Traceback" not in text


def test_kill_9_and_resume_is_bit_exact(index, tmp_path):
    whole = config(index, tmp_path / "whole")
    subprocess.run(command(whole, tmp_path / "whole.toml"), check=True)
    parts = config(index, tmp_path / "parts", save_every=5)
    argv = command(parts, tmp_path / "parts.toml")
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "parts" / "checkpoint-00000005.safetensors")
    process.send_signal(signal.SIGKILL)
    process.wait()
    at = checkpoint.latest(tmp_path / "parts")[0]["step"]
    assert at < 20, "the run ended before it could be killed"
    subprocess.run(argv, check=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    # Metrics of steps done twice appear once.
    steps = [r["step"] for r in metrics.read(tmp_path / "parts" / "metrics.jsonl")]
    assert steps == [5, 10, 15, 20]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_every_signal_saves_whatever_log_every_is_and_goes_on_the_same(
    name, index, tmp_path, monkeypatch
):
    before = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    signal.signal(signal.Signals[name], before)  # the tests may run under nohup
    cfg = config(index, tmp_path / "run", log_every=1000, save_every=1000)
    at(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.Signals[name]))
    with pytest.raises(Interrupted, match=f"{name} after step 8"):
        pretrain(cfg)
    assert saved(tmp_path / "run") == 8
    assert signal.getsignal(signal.Signals[name]) is before
    if name == "SIGTERM":
        pretrain(cfg)
        pretrain(config(index, tmp_path / "whole"))
        assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
        steps = [r["step"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl")]
        assert steps == [8, 20]


def test_a_run_under_nohup_outlives_its_session(index, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda s: signal.SIG_IGN)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert pretrain(config(index, tmp_path / "run"))["step"] == 20
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_is_heard_while_the_loader_waits(workers, index, tmp_path, monkeypatch):
    """A read that does not return, stopped workers: a network file system that is gone."""
    cfg = with_data(config(index, tmp_path / "run"), workers=workers)
    gone, read = threading.Event(), VideoReader.pictures

    def stop():
        if workers:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGSTOP)
        gone.set()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def blocked(self, *args):
        if gone.is_set() and not workers:
            threading.Event().wait(60)
        return read(self, *args)

    monkeypatch.setattr(VideoReader, "pictures", blocked)
    at(monkeypatch, 12, stop)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="SIGTERM after step 1"):
        pretrain(cfg)
    assert time.monotonic() - began < 30 and saved(tmp_path / "run") >= 13
    assert not multiprocessing.active_children()


def test_a_signal_is_heard_in_the_held_out_loss(index, tmp_path, monkeypatch):
    cfg = with_data(config(index, tmp_path / "run"), val_index=index)
    true = train.held_out_loss

    def loss(model, *args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return true(model, *args)

    monkeypatch.setattr(train, "held_out_loss", loss)
    with pytest.raises(Interrupted, match="SIGUSR1 before the first step"):
        pretrain(cfg)


def test_only_a_second_ctrl_c_leaves_at_once(index, tmp_path, monkeypatch):
    """In the middle of a save. What torchrun hands on of one press is no second one."""
    pauses, true = [0.1, 0.7], checkpoint.save

    def save(*args):
        time.sleep(pauses[0])
        os.kill(os.getpid(), signal.SIGINT)
        return true(*args)

    monkeypatch.setattr(checkpoint, "save", save)
    at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        pretrain(config(index, tmp_path / "run"))
    del pauses[0]
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "save", save)
    at(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(index, tmp_path / "run"))
    assert saved(tmp_path / "run") == 4


def test_a_signal_while_saving_is_answered_when_it_is_written(index, tmp_path, monkeypatch):
    written, true = [], checkpoint.save

    def save(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        written.append(true(*args))
        return written[-1]

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Interrupted, match="SIGUSR1 after step 10, which is saved"):
        pretrain(config(index, tmp_path / "run"))
    assert len(written) == 1 and saved(tmp_path / "run") == 10


def test_a_killed_worker_loses_no_step_and_tears_none(index, tmp_path, monkeypatch):
    cfg = with_data(config(index, tmp_path / "run"), workers=2)

    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.3)  # a handler of SIGCHLD would raise here

    at(monkeypatch, 7, kill)
    with pytest.raises(DataError, match="a data worker was lost") as caught:
        pretrain(cfg)
    assert caught.value.exit_code == 65 and saved(tmp_path / "run") >= 8
    pretrain(cfg)
    pretrain(config(index, tmp_path / "whole"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_an_error_within_an_update_saves_no_torn_state(index, tmp_path, monkeypatch):
    true = step.clipped_step

    def torn(*args):
        true(*args)
        raise RuntimeError("lost in the update")

    for where, wanted in (("_loss", 11), ("clipped_step", 10)):
        if where == "_loss":
            at(monkeypatch, 11, lambda: (_ for _ in ()).throw(RuntimeError("lost")))
        else:
            at(monkeypatch, 11, lambda: monkeypatch.setattr(step, "clipped_step", torn))
        with pytest.raises(RuntimeError, match="lost"):
            pretrain(config(index, tmp_path / where))
        assert saved(tmp_path / where) == wanted
        monkeypatch.undo()


@pytest.mark.parametrize("log_every", [50, 1])
def test_when_data_ends_what_was_met_until_then_is_written(log_every, video, tmp_path, monkeypatch):
    """Also where no step is since the last row, but bad videos are."""
    mine = tmp_path / "videos"
    mine.mkdir()
    for i in range(3):
        video.write(mine / f"v{i}.mp4", 30)
    build_index([mine], tmp_path / "index.jsonl", progress=False)
    settings = dict(log_every=log_every, save_every=50)
    cfg = config(str(tmp_path / "index.jsonl"), tmp_path / "run", **settings)
    poison(monkeypatch, at={3})
    at(monkeypatch, 7, lambda: [path.unlink() for path in mine.iterdir()])
    with pytest.raises(DataError, match="3 of 3 videos are bad"):
        pretrain(cfg)
    folder = tmp_path / "run"
    assert saved(folder) == 8
    rows = metrics.read(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == ([8] if log_every == 50 else list(range(1, 9)))
    assert rows[-1]["nonfinite"] == 1
    assert [r["step"] for r in metrics.read(folder / "nonfinite.jsonl")] == [3]
    listed = (folder / "bad_videos.jsonl").read_text()
    assert all(f"v{i}.mp4" in listed for i in range(3))


@pytest.mark.parametrize("stderr", ["pipe", "/dev/full", "closed"])
def test_a_run_goes_on_without_its_stderr(stderr, index, tmp_path):
    argv = command(config(index, tmp_path / "run", steps=4), tmp_path / "run.toml")
    if stderr == "closed":
        run = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *argv], capture_output=True)
        code, out = run.returncode, run.stdout
    elif stderr == "pipe":
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stderr.close()
        out, code = process.stdout.read(), process.wait()
    else:
        with open(stderr, "w") as full:
            run = subprocess.run(argv, stderr=full, stdout=subprocess.PIPE)
        code, out = run.returncode, run.stdout
    assert code == 0 and out == b"" and saved(tmp_path / "run") == 4
    for path in (tmp_path / "run").glob("*.json*"):
        assert all(line.startswith(("{", "}", " ")) for line in path.read_text().splitlines())


def test_a_run_in_a_thread_has_no_signals_and_trains(index, tmp_path):
    got = []
    thread = threading.Thread(
        target=lambda: got.append(pretrain(config(index, tmp_path / "run", steps=2)))
    )
    thread.start()
    thread.join(60)
    assert got and got[0]["step"] == 2


def _vote(folder, rank, stop, queue):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    world = World(rank, 2, torch.device("cpu"))
    quiet = [distributed._meet(store, False, world, lambda: False) for _ in range(3)]
    queue.put((quiet, distributed._meet(store, stop, world, lambda: False)))


def test_one_rank_that_is_told_to_stop_is_heard_by_all(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    ranks = [
        context.Process(target=_vote, args=(tmp_path, rank, rank == 1, queue)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    assert [queue.get() for _ in ranks] == [([False] * 3, True)] * 2
    for rank in ranks:
        rank.join()


def test_a_rank_that_is_told_to_stop_does_not_wait_for_ever(tmp_path, monkeypatch):
    store, world = torch.distributed.HashStore(), World(0, 2, torch.device("cpu"))
    monkeypatch.setattr(distributed, "PATIENCE", 0.2)
    with pytest.raises(PeerLost, match=r"within 0\.2 s to agree"):
        distributed._meet(store, True, world, lambda: True)
    monkeypatch.setattr(distributed, "GIVE_UP", 0.2)
    with pytest.raises(PeerLost, match="next step"):
        distributed._meet(store, False, world, lambda: False)


def test_a_signal_before_the_first_step_is_heard_when_it_comes(index, tmp_path, monkeypatch):
    """While the model is made, or a checkpoint read: killed there, a rank takes others along."""
    real = train.make_optimizer

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, "make_optimizer", signalled)
    with pytest.raises(Interrupted, match="SIGTERM before the first step"):
        pretrain(config(index, tmp_path / "run"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


_RANK = """
import os, sys
from pathlib import Path
from mae_fast import cli, train

def loss(self, *inputs, true=train.Pretraining._loss):
    if self.step == 2:
        Path(__file__).with_name("ready" + os.environ["RANK"]).touch()
    return true(self, *inputs)

train.Pretraining._loss = loss
code = cli.main(sys.argv[1:])
Path(__file__).with_name("code" + os.environ["RANK"]).write_text(str(code))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SIGTERM", []),
        ("SIGUSR1", ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2"]),
    ],
    ids=["SIGTERM", "SIGUSR1"],
)
def test_torchrun_hands_signals_on_and_both_ranks_save(name, options, index, tmp_path):
    """Long before the ranks would meet to log, and before it kills them, after 30 s: they leave
    codes. TORCHELASTIC_SIGNALS_TO_HANDLE is no way to ask for it: torchrun writes its own over it.
    """
    cfg = config(index, tmp_path / "run", steps=90_000, log_every=80_000, save_every=80_000)
    (tmp_path / "rank.py").write_text(_RANK)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    path = toml(cfg, tmp_path / "run.toml")
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, str(tmp_path / "rank.py"), "pretrain", path],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGUSR2"},
    )
    for rank in (0, 1):
        wait_for(tmp_path / f"ready{rank}", 120)
    process.send_signal(signal.Signals[name])
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    step = saved(tmp_path / "run")
    assert text.count(f"error: stopped by {name} after step {step}, which is saved") == 2
    assert [r["step"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl")] == [step]
    assert len(checkpoint.checkpoints(tmp_path / "run")) == 1


def test_a_disk_that_fills_up_is_one_clear_line_and_loses_nothing(index, tmp_path, monkeypatch):
    true = metrics.Metrics.write

    def write(self, row):
        if row["step"] > 10:
            raise OSError(28, "No space left on device")
        true(self, row)

    monkeypatch.setattr(metrics.Metrics, "write", write)
    with pytest.raises(CheckpointError, match="No space left"):
        pretrain(config(index, tmp_path / "run"))
    assert checkpoint.latest(tmp_path / "run")[0]["step"] == 10
    monkeypatch.undo()
    assert pretrain(config(index, tmp_path / "run"))["step"] == 20


def test_too_little_memory_is_one_line_that_says_what_is_smaller(index, tmp_path, monkeypatch):
    """And the step before it is saved, from which the same videos a step go on."""

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    at(monkeypatch, 13, full)
    words = r"rank 0 .* step 14 \(.*20 GiB\).*batch_size than 2, .*accum_steps than 1.*-00000013"
    with pytest.raises(OutOfMemory, match=words) as caught:
        pretrain(config(index, tmp_path / "run"))
    assert caught.value.exit_code == 71 and "more)" not in str(caught.value)
    monkeypatch.undo()
    assert saved(tmp_path / "run") == 13
    smaller = config(index, tmp_path / "run", batch_size=1, accum_steps=2)
    assert pretrain(smaller)["step"] == 20


def test_a_last_checkpoint_that_cannot_be_written_is_no_good_end(index, tmp_path, monkeypatch):
    """It is written aside, when no step comes after it."""
    true = checkpoint.write_tensors

    def full(path, *rest):
        if "00000020" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        true(path, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"00000020.*No space left.*-00000010"):
        pretrain(config(index, tmp_path / "run"))
    assert saved(tmp_path / "run") == 10


@pytest.mark.parametrize("where", ["agree", "gather"])
def test_a_lost_rank_takes_no_row_along(where, index, tmp_path, monkeypatch):
    """Before step 13, or with its numbers of the steps 6 to 10: the row is of who is left."""
    true, calls = getattr(distributed, where), []
    at_call = 13 if where == "agree" else 3  # once a step; once, and then once a row

    def lost(*args):
        calls.append(args)
        again = where == "gather" and len(calls) > at_call and args[1] is calls[0][1]
        if len(calls) == at_call or again:  # whoever is asked with the same ranks
            raise PeerLost("it died") if where == "agree" else RuntimeError("[gloo] closed by peer")
        return true(*args)

    monkeypatch.setattr(distributed, where, lost)
    with pytest.raises(Interrupted, match="another process was lost"):
        pretrain(config(index, tmp_path / "run", save_every=99))
    step = 12 if where == "agree" else 10
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert saved(tmp_path / "run") == step
    assert [r["step"] for r in rows] == sorted({5, 10, step})
    monkeypatch.undo()
    pretrain(config(index, tmp_path / "whole"))
    whole = metrics.read(tmp_path / "whole" / "metrics.jsonl")
    assert [r["loss"] for r in rows[:2]] == [r["loss"] for r in whole[:2]]


def test_what_is_not_saved_goes_on_from_what_is(tmp_path):
    said = str(endings.interrupted(tmp_path, 3, 0, "rank 1 is gone", saved=False))
    start = "goes on from the start: there is no checkpoint yet"
    assert said == f"rank 1 is gone after step 3, and the same command {start}"
    (tmp_path / "checkpoint-00000002.safetensors").touch()
    said = str(endings.interrupted(tmp_path, 3, 15, "", saved=False))
    assert said.startswith("stopped by SIGTERM after step 3, and the same command goes on from ")
    assert said.endswith("checkpoint-00000002.safetensors")
