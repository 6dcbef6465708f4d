"""What a run computes and leaves behind; what is wrong with its data and its numbers."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small_runs import at, command, config, poison, same, saved, weights
from torch.utils._python_dispatch import TorchDispatchMode

from mae_fast import checkpoint, choices, graph, metrics, step
from mae_fast.config import Config, DataConfig, MaskConfig, TrainConfig
from mae_fast.data import build_index
from mae_fast.distributed import World
from mae_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
)
from mae_fast.masking import STRATEGIES
from mae_fast.optim import total_steps
from mae_fast.remade import kept
from mae_fast.run import Run
from mae_fast.signals import Signals
from mae_fast.train import Pretraining, pretrain
from mae_fast.window import Window


def test_a_run_leaves_what_it_should(index, tmp_path):
    cfg = config(index, tmp_path / "run", keep=1)
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


def test_workers_and_log_settings_do_not_change_the_result(index, tmp_path):
    a, b = config(index, tmp_path / "a"), config(index, tmp_path / "b", log_every=3)
    b = Config(**{**vars(b), "data": DataConfig(**{**vars(b.data), "workers": 2})})
    pretrain(a)
    pretrain(b)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_two_processes_are_one_with_twice_the_batch(index, tmp_path):
    one = config(index, tmp_path / "one", batch_size=4, steps=10)
    two = config(index, tmp_path / "two", batch_size=2, steps=10)
    pretrain(one)
    python, *argv = command(two, tmp_path / "two.toml")
    run = subprocess.run(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
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
    one = config(index, tmp_path / "one", batch_size=4, steps=5)
    two = config(index, tmp_path / "two", batch_size=2, accum_steps=2, steps=5)
    losses = [pretrain(cfg)["loss"] for cfg in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_keeps_fp32_weights_and_learns_the_same(index, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        cfg = config(index, tmp_path / precision, precision=precision)
        losses.append(pretrain(cfg)["loss"])
        found = weights(tmp_path / precision)
        assert {v.dtype for v in found.values()} == {torch.float32}
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_tensorboard_gets_every_number(index, tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    pretrain(config(index, tmp_path / "run", tensorboard=True))
    assert any("tfevents" in p.name for p in (tmp_path / "run").iterdir())


def test_an_unwritable_folder_is_one_clear_line(index, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write into .*file"):
        pretrain(config(index, tmp_path / "file" / "run"))


def test_non_finite_steps_are_skipped_counted_and_named(index, tmp_path, monkeypatch):
    poison(monkeypatch, at={3, 7})
    last = pretrain(config(index, tmp_path / "run"))
    assert last["nonfinite"] == 2
    lines = (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["step"] for r in rows] == [3, 7]
    assert all(r["videos"] and r["videos"][0].endswith(".mp4") for r in rows)
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())
    steps = {int(v) for k, v in weights(tmp_path / "run").items() if k.startswith("optim.step")}
    assert steps == {18}


def test_too_many_non_finite_steps_stop_the_run_and_keep_checkpoints(index, tmp_path, monkeypatch):
    poison(monkeypatch, at=set(range(12, 20)))
    with pytest.raises(NonFiniteError, match="max_nonfinite 2"):
        pretrain(config(index, tmp_path / "run", max_nonfinite=2))
    assert checkpoint.latest(tmp_path / "run")[0]["step"] == 10


def test_bad_videos_are_replaced_listed_and_too_many_stop(folder, video, tmp_path, caplog):
    mine = tmp_path / "videos"
    mine.mkdir()
    for i in range(4):
        video.write(mine / f"v{i}.mp4", 30)
    index = tmp_path / "index.jsonl"
    build_index([mine], index, progress=False)
    (mine / "v2.mp4").write_bytes(b"")
    cfg = config(str(index), tmp_path / "run")
    allowed = DataConfig(**{**vars(cfg.data), "max_bad_share": 0.3, "val_index": str(index)})
    last = pretrain(Config(**{**vars(cfg), "data": allowed}))
    assert last["bad_videos"] == 1 and last["step"] == 20
    listed = (tmp_path / "run" / "bad_videos.jsonl").read_text().splitlines()
    assert len(listed) == 1 and "v2.mp4" in listed[0]
    assert "held out: 1 videos do not decode, replaced by others: " in caplog.text
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
        pretrain(config(index, out, steps=10, cuda_graph=how, **changes))
        losses = [row["loss"] for row in metrics.read(out / "metrics.jsonl")]
        runs.append((losses, weights(out)))
    captured = [g.graph is not None for g in graphs]  # alone, no micro-step adds up others'
    assert captured == [False, True, False, "accum_steps" in changes, True]
    assert len(closed) == 2
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_makes_no_host_wait(strategy, index, tmp_path):
    """From the batch's arrival to the update. On a CPU this sees operators, not copies."""
    cfg = config(index, tmp_path / "run", accum_steps=2, steps=2)
    mask = MaskConfig(strategy=strategy, ratio=0.5)
    world, cfg = World(0, 1, torch.device("cpu")), Config(**{**vars(cfg), "mask": mask})
    run, waits = Pretraining(cfg, world, Signals(alone=True)), []

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
def test_a_run_keeps_what_its_machine_holds(keep, index, tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "keep", lambda *a: keep)
    world = World(0, 1, torch.device("cpu"))
    run = Pretraining(config(index, tmp_path / "run"), world, Signals(alone=True))
    found = []
    run.model.forward = lambda *args, **kwargs: found.append(kept()) or (None,)
    run._loss(*run._inputs(next(iter(run._loader()))))
    assert found == [keep] and not kept()


def test_a_run_says_why_it_has_no_graph(index, tmp_path, caplog):
    pretrain(
        config(index, tmp_path / "run", steps=1, warmup_steps=0, device="cpu", cuda_graph="on")
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
    cfg = config(index, tmp_path / "run")
    with pytest.raises(ConfigError, match=words):
        pretrain(Config(**{**vars(cfg), **changes}))


def test_a_run_speaks_after_its_first_step_and_then_by_time(index, tmp_path, monkeypatch, capsys):
    """Twenty steps of a large model on two cores are twenty minutes."""
    monkeypatch.setattr(metrics, "SILENCE", 1e9)
    pretrain(config(index, tmp_path / "a", steps=4, log_every=99))
    monkeypatch.setattr(metrics, "SILENCE", 0.0)
    pretrain(config(index, tmp_path / "b", steps=4, log_every=3))
    said = re.findall(r"^step (\d)/4  (in|loss)", capsys.readouterr().err, re.MULTILINE)
    words = [("1", "in"), ("4", "loss"), ("1", "in"), ("2", "in"), ("3", "loss"), ("4", "loss")]
    assert said == words


def test_weights_that_are_not_finite_stop_the_run_and_leave_the_good(index, tmp_path, monkeypatch):
    def ruin():
        with torch.no_grad():
            runs[0].model.mask_token.fill_(float("nan"))

    runs, init = [], Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, *a: runs.append(self) or init(self, *a))
    at(monkeypatch, 12, ruin)
    with pytest.raises(NonFiniteError, match=r"not finite after step 20.*00000010"):
        pretrain(config(index, tmp_path / "run", keep=1, max_nonfinite=100))
    assert saved(tmp_path / "run") == 10


def test_what_is_left_is_told_in_minutes():
    row = dict(loss=1.0, lr=1e-3, grad_norm=2.0, clips_per_s=3.0, data_wait=0.25, memory_mb=4.0)
    words = "loss 1.0000  lr 1.00e-03  norm 2  3.00 clips/s  data 25%  4 MB  1.5 min left"
    assert metrics._line(row | {"seconds_left": 90.0}) == words


def test_tensorboard_has_each_number_at_its_step(tmp_path, monkeypatch):
    written = []
    writer = SimpleNamespace(add_scalar=lambda *row: written.append(row), close=None)
    fake = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    add, _ = metrics._tensorboard(tmp_path)
    add({"step": 20, "loss": 0.5, "lr": 0.1})
    assert written == [("loss", 0.5, 20), ("lr", 0.1, 20)]


@pytest.mark.parametrize(("step", "kept"), [(3, [0, 1, 2, 3]), (0, [])])
def test_rows_of_steps_that_come_again_are_dropped(step, kept, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(6)))
    with metrics.Metrics(Config(output=str(tmp_path)), 9, step):
        assert [row["step"] for row in metrics.read(path)] == kept
