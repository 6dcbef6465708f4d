"""The main job: resume, signals, several processes, broken data, what a run leaves behind."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mae_fast import checkpoint, distributed, graph, metrics, resume, step, train
from mae_fast.config import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig
from mae_fast.data import VideoReader, build_index
from mae_fast.distributed import PeerLost, World
from mae_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    NonFiniteError,
)
from mae_fast.masking import STRATEGIES
from mae_fast.optim import total_steps
from mae_fast.signals import Signals
from mae_fast.train import Run, Window, pretrain

MODEL = dict(
    img_size=32,
    patch_size=16,
    num_frames=4,
    pred_t_dim=2,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=2,
)
TRAIN = dict(
    batch_size=2, steps=20, warmup_steps=2, log_every=5, save_every=10, blr=0.1, clip_grad=1.0
)


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "index.jsonl"
    build_index([folder], out, progress=False)
    return str(out)


def _config(index, output, **train) -> Config:
    return Config(
        output=str(output),
        model=ModelConfig(**MODEL),
        mask=MaskConfig(ratio=0.5),
        data=DataConfig(index=index, repeat_aug=2, workers=0, sampling_rate=2),
        train=TrainConfig(**{**TRAIN, **train}),
    )


def _toml(cfg: Config, path: Path) -> str:
    lines = [f"output = {json.dumps(cfg.output)}"]
    for section in ("model", "mask", "data", "train"):
        lines.append(f"[{section}]")
        for key, value in vars(getattr(cfg, section)).items():
            value = list(value) if isinstance(value, tuple) else value
            lines.append(f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines))
    return str(path)


def _command(cfg: Config, path: Path) -> list[str]:
    return [sys.executable, "-m", "mae_fast", "pretrain", _toml(cfg, path)]


def _weights(folder) -> dict[str, torch.Tensor]:
    return checkpoint.latest(folder)[1]


def _same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _wait_for(path: Path, seconds=60) -> None:
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_a_run_leaves_what_it_should(index, tmp_path):
    cfg = _config(index, tmp_path / "run", keep=1)
    cfg = Config(**{**vars(cfg), "data": DataConfig(**{**vars(cfg.data), "val_index": index})})
    last = pretrain(cfg)
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {
        "config.json",
        "environment.jsonl",
        "metrics.jsonl",
        "curves.png",
        "checkpoint-00000020.safetensors",
    }
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 5, 10, 15, 20] and rows[-1] == last
    keys = {"loss", "lr", "grad_norm", "clips_per_s", "data_wait", "memory_mb", "seconds_left"}
    assert keys < set(last)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    environment = json.loads((tmp_path / "run" / "environment.jsonl").read_text())
    assert environment["torch"] == torch.__version__ and environment["cpu"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["blr"] == 0.1
    # Called again, a finished run is left alone.
    assert pretrain(cfg)["step"] == 20


def test_kill_9_and_resume_is_bit_exact(index, tmp_path):
    whole = _config(index, tmp_path / "whole")
    subprocess.run(_command(whole, tmp_path / "whole.toml"), check=True)
    parts = _config(index, tmp_path / "parts", save_every=5)
    command = _command(parts, tmp_path / "parts.toml")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _wait_for(tmp_path / "parts" / "checkpoint-00000005.safetensors")
    process.send_signal(signal.SIGKILL)
    process.wait()
    at = checkpoint.latest(tmp_path / "parts")[0]["step"]
    assert at < 20, "the run ended before it could be killed"
    subprocess.run(command, check=True)
    assert _same(_weights(tmp_path / "whole"), _weights(tmp_path / "parts"))
    # Metrics of steps done twice appear once.
    steps = [r["step"] for r in metrics.read(tmp_path / "parts" / "metrics.jsonl")]
    assert steps == [5, 10, 15, 20]


def test_workers_and_log_settings_do_not_change_the_result(index, tmp_path):
    a, b = _config(index, tmp_path / "a"), _config(index, tmp_path / "b", log_every=3)
    b = Config(**{**vars(b), "data": DataConfig(**{**vars(b.data), "workers": 2})})
    pretrain(a)
    pretrain(b)
    assert _same(_weights(tmp_path / "a"), _weights(tmp_path / "b"))


def test_a_signal_saves_and_leaves_with_75(index, tmp_path):
    signum = signal.SIGINT
    cfg = _config(index, tmp_path / "run", steps=100_000, save_every=90_000, log_every=1)
    process = subprocess.Popen(
        _command(cfg, tmp_path / "run.toml"), stderr=subprocess.PIPE, text=True
    )
    _wait_for(tmp_path / "run" / "metrics.jsonl")
    while not metrics.read(tmp_path / "run" / "metrics.jsonl"):
        time.sleep(0.02)
    process.send_signal(signum)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 75, text
    step = checkpoint.latest(tmp_path / "run")[0]["step"]
    assert f"{signum.name} after step {step}" in text and "Traceback" not in text


def test_two_processes_are_one_with_twice_the_batch(index, tmp_path):
    one = _config(index, tmp_path / "one", batch_size=4, steps=10)
    two = _config(index, tmp_path / "two", batch_size=2, steps=10)
    pretrain(one)
    python, *command = _command(two, tmp_path / "two.toml")
    run = subprocess.run(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    a, b = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for key in a:
        if key.startswith("model.") and not key.endswith("attn.k.bias"):
            # k.bias has no true gradient, so Adam makes steps of its rounding.
            error = (a[key] - b[key]).norm() / a[key].norm().clamp(min=1e-6)
            assert error < 1e-3, (key, error)
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["lr"] == pytest.approx(second["lr"])


def test_accumulation_is_a_larger_batch(index, tmp_path):
    one = _config(index, tmp_path / "one", batch_size=4, steps=5)
    two = _config(index, tmp_path / "two", batch_size=2, accum_steps=2, steps=5)
    losses = [pretrain(cfg)["loss"] for cfg in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_keeps_fp32_weights_and_learns_the_same(index, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        cfg = _config(index, tmp_path / precision, precision=precision)
        losses.append(pretrain(cfg)["loss"])
        weights = _weights(tmp_path / precision)
        assert {v.dtype for v in weights.values()} == {torch.float32}
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_tensorboard_gets_every_number(index, tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    pretrain(_config(index, tmp_path / "run", tensorboard=True))
    assert any("tfevents" in p.name for p in (tmp_path / "run").iterdir())


def test_a_changed_setting_is_refused_on_resume(index, tmp_path):
    pretrain(_config(index, tmp_path / "run", steps=5))
    with pytest.raises(ConfigError, match=r"train\.blr: 0\.1 -> 0\.2"):
        pretrain(_config(index, tmp_path / "run", steps=5, blr=0.2))


def test_a_broken_checkpoint_falls_back_to_the_one_before(index, tmp_path, caplog):
    cfg = _config(index, tmp_path / "run")
    pretrain(cfg)
    wanted = _weights(tmp_path / "run")
    newest = checkpoint.checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    pretrain(cfg)
    assert "using the one before" in caplog.text
    assert _same(wanted, _weights(tmp_path / "run"))


def test_an_unwritable_folder_is_one_clear_line(index, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write into .*file"):
        pretrain(_config(index, tmp_path / "file" / "run"))


def test_a_disk_that_fills_up_is_one_clear_line_and_loses_nothing(index, tmp_path, monkeypatch):
    true = metrics.Metrics.write

    def write(self, row):
        if row["step"] > 10:
            raise OSError(28, "No space left on device")
        true(self, row)

    monkeypatch.setattr(metrics.Metrics, "write", write)
    with pytest.raises(CheckpointError, match="No space left"):
        pretrain(_config(index, tmp_path / "run"))
    assert checkpoint.latest(tmp_path / "run")[0]["step"] == 10
    monkeypatch.undo()
    assert pretrain(_config(index, tmp_path / "run"))["step"] == 20


class _Poisoned(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def _poison(monkeypatch, at):
    calls, true = [], train.Run._loss

    def loss(self, *inputs):
        calls.append(self.step)
        value = true(self, *inputs)
        return _Poisoned.apply(value) if self.step in at else value

    monkeypatch.setattr(train.Run, "_loss", loss)


def test_non_finite_steps_are_skipped_counted_and_named(index, tmp_path, monkeypatch):
    _poison(monkeypatch, at={3, 7})
    last = pretrain(_config(index, tmp_path / "run"))
    assert last["nonfinite"] == 2
    lines = (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["step"] for r in rows] == [3, 7]
    assert all(r["videos"] and r["videos"][0].endswith(".mp4") for r in rows)
    assert all(v.isfinite().all() for v in _weights(tmp_path / "run").values())
    steps = {int(v) for k, v in _weights(tmp_path / "run").items() if k.startswith("optim.step")}
    assert steps == {18}


def test_too_many_non_finite_steps_stop_the_run_and_keep_checkpoints(index, tmp_path, monkeypatch):
    _poison(monkeypatch, at=set(range(12, 20)))
    with pytest.raises(NonFiniteError, match="max_nonfinite 2"):
        pretrain(_config(index, tmp_path / "run", max_nonfinite=2))
    assert checkpoint.latest(tmp_path / "run")[0]["step"] == 10


def test_bad_videos_are_replaced_listed_and_too_many_stop(folder, video, tmp_path):
    mine = tmp_path / "videos"
    mine.mkdir()
    for i in range(4):
        video.write(mine / f"v{i}.mp4", 30)
    index = tmp_path / "index.jsonl"
    build_index([mine], index, progress=False)
    (mine / "v2.mp4").write_bytes(b"")
    cfg = _config(str(index), tmp_path / "run")
    allowed = DataConfig(**{**vars(cfg.data), "max_bad_share": 0.3})
    last = pretrain(Config(**{**vars(cfg), "data": allowed}))
    assert last["bad_videos"] == 1 and last["step"] == 20
    listed = (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()
    assert len(listed) == 1 and "v2.mp4" in listed[0]
    with pytest.raises(DataError, match=r"v2\.mp4"):
        pretrain(Config(**{**vars(cfg), "output": str(tmp_path / "strict")}))
    # What was learned until then is saved.
    assert checkpoint.latest(tmp_path / "strict")[0]["step"] >= 5


def test_epochs_count_passes_over_the_videos():
    cfg = Config(train=TrainConfig(batch_size=2, accum_steps=2, epochs=3, warmup_epochs=1))
    assert total_steps(cfg.train, videos=100, world=4) == 18


@pytest.mark.parametrize(
    "changes", [{}, {"accum_steps": 2}, {"precision": "bf16"}], ids=["plain", "accum", "bf16"]
)
def test_a_run_with_graphs_is_the_run_without(changes, index, tmp_path, monkeypatch):
    graphs, true, closed = [], step.Graphed, []
    monkeypatch.setattr(graph, "why_not", lambda *args: None)
    monkeypatch.setattr(step.Step, "close", lambda self: closed.append(self))
    monkeypatch.setattr(step, "Graphed", lambda *a: graphs.append(true(*a)) or graphs[-1])
    runs = []
    for how in ("off", "on"):
        out = tmp_path / how
        pretrain(_config(index, out, steps=10, cuda_graph=how, **changes))
        losses = [row["loss"] for row in metrics.read(out / "metrics.jsonl")]
        runs.append((losses, _weights(out)))
    captured = [g.graph is not None for g in graphs]  # alone, no micro-step adds up others'
    assert captured == [False, True, False, "accum_steps" in changes, True]
    assert len(closed) == 2
    assert runs[0][0] == runs[1][0] and _same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_makes_no_host_wait(strategy, index, tmp_path):
    """From the batch's arrival to the update. On a CPU this sees operators, not copies."""
    cfg = _config(index, tmp_path / "run", accum_steps=2, steps=2)
    mask = MaskConfig(strategy=strategy, ratio=0.5)
    world, cfg = World(0, 1, torch.device("cpu")), Config(**{**vars(cfg), "mask": mask})
    run, waits = Run(cfg, world, Signals(alone=True)), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if graph.waits(operator, args):
                waits.append(operator)
            return operator(*args, **(kwargs or {}))

    batches = iter(list(run._loader()))
    with Watch():
        torch.ones(1).item()  # seen
        run._one_step(batches, Window())
    assert waits == [torch.ops.aten._local_scalar_dense.default]


@pytest.mark.parametrize("keep", [False, True])
def test_a_model_is_told_what_its_run_keeps(keep, index, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "_keep", lambda self: keep)
    world = World(0, 1, torch.device("cpu"))
    assert Run(_config(index, tmp_path / "run"), world, Signals(alone=True)).model.spec.keep is keep


def test_a_run_says_why_it_has_no_graph(index, tmp_path, caplog):
    pretrain(
        _config(index, tmp_path / "run", steps=1, warmup_steps=0, device="cpu", cuda_graph="on")
    )
    assert "train.cuda_graph is not used: the run is on the cpu" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": DataConfig()}, "mae-fast index"),
        ({"mask": MaskConfig(ratio=0)}, "nothing to predict"),
        ({"train": TrainConfig(device="cuda")}, "no CUDA device"),
    ],
    ids=["no_index", "ratio_0", "no_cuda"],
)
def test_what_cannot_work_is_said_at_the_start(index, tmp_path, changes, words):
    if "CUDA" in words and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    cfg = _config(index, tmp_path / "run")
    with pytest.raises(ConfigError, match=words):
        pretrain(Config(**{**vars(cfg), **changes}))


# What goes wrong from outside: signals, lost workers, full disks, two runs, another index.


def _at(monkeypatch, step, do):
    """Call do() once, in the middle of the step numbered `step` from 0."""
    true, done = train.Run._loss, []

    def loss(self, *inputs):
        if self.step == step and not done:
            done.append(step)
            do()
        return true(self, *inputs)

    monkeypatch.setattr(train.Run, "_loss", loss)


def _with(cfg: Config, **data) -> Config:
    return Config(**{**vars(cfg), "data": DataConfig(**{**vars(cfg.data), **data})})


def _saved(folder) -> int:
    return checkpoint.latest(folder)[0]["step"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_every_signal_saves_whatever_log_every_is_and_goes_on_the_same(
    name, index, tmp_path, monkeypatch
):
    before = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    signal.signal(signal.Signals[name], before)  # the tests may run under nohup
    cfg = _config(index, tmp_path / "run", log_every=1000, save_every=1000)
    _at(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.Signals[name]))
    with pytest.raises(Interrupted, match=f"{name} after step 8"):
        pretrain(cfg)
    assert _saved(tmp_path / "run") == 8
    assert signal.getsignal(signal.Signals[name]) is before
    if name == "SIGTERM":
        pretrain(cfg)
        pretrain(_config(index, tmp_path / "whole"))
        assert _same(_weights(tmp_path / "run"), _weights(tmp_path / "whole"))
        steps = [r["step"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl")]
        assert steps == [8, 20]


def test_a_run_under_nohup_outlives_its_session(index, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda s: signal.SIG_IGN)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert pretrain(_config(index, tmp_path / "run"))["step"] == 20
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_is_heard_while_the_loader_waits(workers, index, tmp_path, monkeypatch):
    """A read that does not return, stopped workers: a network file system that is gone."""
    cfg = _with(_config(index, tmp_path / "run"), workers=workers)
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
    _at(monkeypatch, 12, stop)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="SIGTERM after step 1"):
        pretrain(cfg)
    assert time.monotonic() - began < 30 and _saved(tmp_path / "run") >= 13
    assert not multiprocessing.active_children()


def test_a_signal_is_heard_in_the_held_out_loss(index, tmp_path, monkeypatch):
    cfg = _with(_config(index, tmp_path / "run"), val_index=index)
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
    _at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        pretrain(_config(index, tmp_path / "run"))
    del pauses[0]
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "save", save)
    _at(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pretrain(_config(index, tmp_path / "run"))
    assert _saved(tmp_path / "run") == 4


def test_a_signal_while_saving_is_answered_when_it_is_written(index, tmp_path, monkeypatch):
    written, true = [], checkpoint.save

    def save(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        written.append(true(*args))
        return written[-1]

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Interrupted, match="SIGUSR1 after step 10, which is saved"):
        pretrain(_config(index, tmp_path / "run"))
    assert len(written) == 1 and _saved(tmp_path / "run") == 10


def test_a_killed_worker_loses_no_step_and_tears_none(index, tmp_path, monkeypatch):
    cfg = _with(_config(index, tmp_path / "run"), workers=2)

    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.3)  # a handler of SIGCHLD would raise here

    _at(monkeypatch, 7, kill)
    with pytest.raises(DataError, match="a data worker was lost") as caught:
        pretrain(cfg)
    assert caught.value.exit_code == 65 and _saved(tmp_path / "run") >= 8
    pretrain(cfg)
    pretrain(_config(index, tmp_path / "whole"))
    assert _same(_weights(tmp_path / "run"), _weights(tmp_path / "whole"))


def test_an_error_within_an_update_saves_no_torn_state(index, tmp_path, monkeypatch):
    true = step.clipped_step

    def torn(*args):
        true(*args)
        raise RuntimeError("lost in the update")

    for where, saved in (("_loss", 11), ("clipped_step", 10)):
        if where == "_loss":
            _at(monkeypatch, 11, lambda: (_ for _ in ()).throw(RuntimeError("lost")))
        else:
            _at(monkeypatch, 11, lambda: monkeypatch.setattr(step, "clipped_step", torn))
        with pytest.raises(RuntimeError, match="lost"):
            pretrain(_config(index, tmp_path / where))
        assert _saved(tmp_path / where) == saved
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
    cfg = _config(str(tmp_path / "index.jsonl"), tmp_path / "run", **settings)
    _poison(monkeypatch, at={3})
    _at(monkeypatch, 7, lambda: [path.unlink() for path in mine.iterdir()])
    with pytest.raises(DataError, match="3 of 3 videos are bad"):
        pretrain(cfg)
    folder = tmp_path / "run"
    assert _saved(folder) == 8
    rows = metrics.read(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == ([8] if log_every == 50 else list(range(1, 9)))
    assert rows[-1]["nonfinite"] == 1
    assert [r["step"] for r in metrics.read(folder / "nonfinite.jsonl")] == [3]
    listed = (folder / "bad_videos.jsonl").read_text()
    assert all(f"v{i}.mp4" in listed for i in range(3))


def test_non_finite_steps_are_not_listed_twice_after_a_kill(index, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    _poison(monkeypatch, at={2, 12})
    _at(monkeypatch, 15, killed)
    cfg = _config(index, tmp_path / "run", log_every=1)
    with pytest.raises(Killed):
        pretrain(cfg)
    assert pretrain(cfg)["nonfinite"] == 2
    rows = metrics.read(tmp_path / "run" / "nonfinite.jsonl")
    assert [r["step"] for r in rows] == [2, 12]


def test_a_kill_before_the_first_checkpoint_leaves_no_row_of_it(index, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    cfg = _with(_config(index, tmp_path / "run", log_every=1), val_index=index)
    _at(monkeypatch, 5, killed)
    with pytest.raises(Killed):
        pretrain(cfg)
    pretrain(cfg)
    steps = [r["step"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(21))


def test_a_run_speaks_after_its_first_step_and_then_by_time(index, tmp_path, monkeypatch, capsys):
    """Twenty steps of a large model on two cores are twenty minutes."""
    monkeypatch.setattr(metrics, "SILENCE", 1e9)
    pretrain(_config(index, tmp_path / "a", steps=4, log_every=99))
    monkeypatch.setattr(metrics, "SILENCE", 0.0)
    pretrain(_config(index, tmp_path / "b", steps=4, log_every=3))
    said = re.findall(r"^step (\d)/4  (in|loss)", capsys.readouterr().err, re.MULTILINE)
    words = [("1", "in"), ("4", "loss"), ("1", "in"), ("2", "in"), ("3", "loss"), ("4", "loss")]
    assert said == words


def test_a_damaged_line_of_metrics_is_left_out_alone(index, tmp_path, caplog):
    path = tmp_path / "run" / "metrics.jsonl"
    pretrain(_config(index, tmp_path / "run", steps=10, log_every=1))
    lines = path.read_bytes().split(b"\n")
    lines[2], lines[4], lines[6] = b"\x00\xff\x00", b'{"step": 5, "lo', b"7"
    path.write_bytes(b"\n".join(lines) + b'{"step": 11, "lo')
    assert [r["step"] for r in metrics.read(path)] == [1, 2, 4, 6, 8, 9, 10]
    assert "metrics.jsonl: damaged, left out: line 3, 5, 7" in caplog.text
    path.unlink()
    assert pretrain(_config(index, tmp_path / "run", steps=10, log_every=1)) == {"step": 10}


@pytest.mark.parametrize("stderr", ["pipe", "/dev/full", "closed"])
def test_a_run_goes_on_without_its_stderr(stderr, index, tmp_path):
    command = _command(_config(index, tmp_path / "run", steps=4), tmp_path / "run.toml")
    if stderr == "closed":
        run = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], capture_output=True)
        code, out = run.returncode, run.stdout
    elif stderr == "pipe":
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stderr.close()
        out, code = process.stdout.read(), process.wait()
    else:
        with open(stderr, "w") as full:
            run = subprocess.run(command, stderr=full, stdout=subprocess.PIPE)
        code, out = run.returncode, run.stdout
    assert code == 0 and out == b"" and _saved(tmp_path / "run") == 4
    for path in (tmp_path / "run").glob("*.json*"):
        assert all(line.startswith(("{", "}", " ")) for line in path.read_text().splitlines())


def test_a_second_run_in_the_folder_is_refused(index, tmp_path):
    (tmp_path / "run").mkdir()
    first = resume.lock(tmp_path / "run" / "environment.jsonl")
    with pytest.raises(CheckpointError, match="in use: another run writes into it"):
        pretrain(_config(index, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["environment.jsonl"]
    # A data worker outlives a run that is killed, and holds nothing.
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    time.sleep(0.2)
    first.close()
    pretrain(_config(index, tmp_path / "run", steps=2))
    worker.kill()
    worker.join()


def test_a_refused_resumption_leaves_the_folder_as_it_was_and_free(index, tmp_path):
    """A broken checkpoint keeps its name, and the lock is given back while its error lives."""
    folder = tmp_path / "run"
    pretrain(_config(index, folder))
    path = checkpoint.checkpoints(folder)[-1]
    path.write_bytes(path.read_bytes()[:-1])
    left = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"train\.blr") as refused:
        pretrain(_config(index, folder, blr=0.2))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == left
    with resume.lock(folder / "environment.jsonl"):
        assert refused.value.exit_code == 2


def test_a_run_gives_its_folder_back_and_sweeps_what_a_kill_left(index, tmp_path, monkeypatch):
    folder, runs, init = tmp_path / "run", [], train.Run.__init__
    monkeypatch.setattr(train.Run, "__init__", lambda self, *a: runs.append(self) or init(self, *a))
    folder.mkdir()
    (folder / "checkpoint-00000003.safetensors.tmp").touch()
    pretrain(_config(index, folder, steps=2))
    assert runs and not list(folder.glob("*.tmp"))
    resume.lock(folder / "environment.jsonl").close()


def test_a_file_system_without_locks_is_said_and_used(index, tmp_path, monkeypatch, caplog):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(resume.fcntl, "flock", flock)
    assert pretrain(_config(index, tmp_path / "run", steps=2))["step"] == 2
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_run_in_a_thread_has_no_signals_and_trains(index, tmp_path):
    got = []
    thread = threading.Thread(
        target=lambda: got.append(pretrain(_config(index, tmp_path / "run", steps=2)))
    )
    thread.start()
    thread.join(60)
    assert got and got[0]["step"] == 2


def _edited(index, path, edit) -> str:
    folder = Path(index).parent
    rows = [json.loads(line) for line in Path(index).read_text().splitlines()]
    for row in rows:
        row["path"] = str(folder / row["path"])
    path.write_text("".join(json.dumps(row) + "\n" for row in edit(rows)))
    return str(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda rows: rows[1:],
        lambda rows: rows[::-1],
        lambda rows: rows + rows[:1],
        lambda rows: [{**rows[0], "frames": 39}, *rows[1:]],
        lambda rows: [{**rows[0], "fps": 24.0}, *rows[1:]],
        lambda rows: [{**rows[0], "start": 1, "total": 41}, *rows[1:]],
        lambda rows: [*rows[:-1], {**rows[-1], "error": "empty: 0 bytes"}],
    ],
    ids=["removed", "reversed", "grown", "frames", "fps", "segment", "broken"],
)
def test_another_index_is_refused_on_resume(edit, index, tmp_path):
    cfg = _with(_config(index, tmp_path / "run", steps=5), val_index=index)
    pretrain(cfg)
    other = _edited(index, tmp_path / "other.jsonl", edit)
    words = r"not the data\.index .* digest .* choose another output"
    with pytest.raises(ConfigError, match=words):
        pretrain(_with(cfg, index=other))
    with pytest.raises(ConfigError, match=r"not the data\.val_index"):
        pretrain(_with(cfg, val_index=other))
    assert pretrain(_with(cfg, val_index=""))["step"] == 5


def test_the_same_videos_elsewhere_are_the_same_index(index, tmp_path):
    def moved(rows):
        for row in rows:
            shutil.copy(row["path"], tmp_path)
            row["path"] = str(tmp_path / Path(row["path"]).name)
        return rows

    cfg = _config(index, tmp_path / "run", steps=5)
    pretrain(cfg)
    assert pretrain(_with(cfg, index=_edited(index, tmp_path / "i.jsonl", moved)))["step"] == 5


def test_other_videos_a_step_are_refused_on_resume(index, tmp_path):
    """Of 2 processes a step has 4 videos, and one process with the same settings makes up for it;
    of 2 1/2 none can."""
    cfg = _config(index, tmp_path / "run", steps=5)
    pretrain(cfg)
    with pytest.raises(ConfigError, match=r"of 2 videos a step.*be 3 videos.*with 1 or 2 proc"):
        pretrain(_config(index, tmp_path / "run", steps=5, batch_size=3))


def test_a_run_of_an_older_version_goes_on(index, tmp_path):
    """Its checkpoints name no run, processes or index, and have no checksum."""
    cfg, folder = _config(index, tmp_path / "run", save_every=5, keep=2), tmp_path / "run"
    _ = pretrain(cfg)
    whole = _weights(folder)
    for path in checkpoint.checkpoints(folder):
        state, tensors = checkpoint.read(path)
        old = {key: state[key] for key in ("config", "nonfinite", "step")}
        checkpoint.write_tensors(path, tensors, {"mae_fast": json.dumps(old)})
    checkpoint.checkpoints(folder)[-1].unlink()
    pretrain(cfg)
    assert _same(whole, _weights(folder))
    assert len(checkpoint.checkpoints(folder)) == 2


def test_broken_checkpoints_push_no_good_ones_out(index, tmp_path, caplog):
    """Steps 20 and 15 are damaged: what was good then, and is good since, is what stays."""
    cfg, folder = _config(index, tmp_path / "run", save_every=5), tmp_path / "run"
    pretrain(cfg)
    for path in checkpoint.checkpoints(folder)[1:]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    cfg = _config(index, tmp_path / "run", save_every=7, keep=2)
    pretrain(cfg)
    assert [r.message for r in caplog.records if "using the one before" in r.message][1:] != []
    names = sorted(p.name[11:] for p in folder.glob("checkpoint-*"))
    assert names == [
        "00000014.safetensors",
        "00000015.safetensors.broken",
        "00000020.safetensors",
        "00000020.safetensors.broken",
    ]


def test_weights_that_are_not_finite_stop_the_run_and_leave_the_good(index, tmp_path, monkeypatch):
    def ruin():
        with torch.no_grad():
            runs[0].model.mask_token.fill_(float("nan"))

    runs, init = [], train.Run.__init__
    monkeypatch.setattr(train.Run, "__init__", lambda self, *a: runs.append(self) or init(self, *a))
    _at(monkeypatch, 12, ruin)
    with pytest.raises(NonFiniteError, match=r"not finite after step 20.*00000010"):
        pretrain(_config(index, tmp_path / "run", keep=1, max_nonfinite=100))
    assert _saved(tmp_path / "run") == 10


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
        pretrain(_config(index, tmp_path / "run"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


_RANK = """
import os, sys
from pathlib import Path
from mae_fast import cli, train

def loss(self, *inputs, true=train.Run._loss):
    if self.step == 2:
        Path(__file__).with_name("ready" + os.environ["RANK"]).touch()
    return true(self, *inputs)

train.Run._loss = loss
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
    cfg = _config(index, tmp_path / "run", steps=90_000, log_every=80_000, save_every=80_000)
    (tmp_path / "rank.py").write_text(_RANK)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    toml = _toml(cfg, tmp_path / "run.toml")
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, str(tmp_path / "rank.py"), "pretrain", toml],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGUSR2"},
    )
    for rank in (0, 1):
        _wait_for(tmp_path / f"ready{rank}", 120)
    process.send_signal(signal.Signals[name])
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    step = _saved(tmp_path / "run")
    assert text.count(f"error: stopped by {name} after step {step}, which is saved") == 2
    assert [r["step"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl")] == [step]
    assert len(checkpoint.checkpoints(tmp_path / "run")) == 1
