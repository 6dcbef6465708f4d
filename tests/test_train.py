"""The main job: resume, signals, several processes, broken data, what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mae_fast import checkpoint, graph, metrics
from mae_fast.config import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig
from mae_fast.data import build_index
from mae_fast.distributed import World
from mae_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from mae_fast.masking import STRATEGIES
from mae_fast.train import Run, Window, pretrain, total_steps

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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_signals_save_and_leave_with_75(index, tmp_path, signum):
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
    command = _command(two, tmp_path / "two.toml")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command[1:]],
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
    from mae_fast import train

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
    assert total_steps(cfg, videos=100, world=4) == 18


@pytest.mark.parametrize(
    "changes", [{}, {"accum_steps": 2}, {"precision": "bf16"}], ids=["plain", "accum", "bf16"]
)
def test_a_run_with_graphs_is_the_run_without(changes, index, tmp_path, monkeypatch):
    graphs, true = [], graph.GraphedStep
    monkeypatch.setattr(graph, "why_not", lambda *args: None)
    monkeypatch.setattr(graph, "GraphedStep", lambda *a: graphs.append(true(*a)) or graphs[-1])
    runs = []
    for name in ("eager", "graphed"):
        out = tmp_path / name
        pretrain(_config(index, out, steps=10, cuda_graph=name == "graphed", **changes))
        losses = [row["loss"] for row in metrics.read(out / "metrics.jsonl")]
        runs.append((losses, _weights(out)))
    assert graphs[0].graph is not None
    assert runs[0][0] == runs[1][0] and _same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_makes_no_host_wait(strategy, index, tmp_path):
    """From the batch's arrival to the update. On a CPU this sees operators, not copies."""
    cfg = _config(index, tmp_path / "run", accum_steps=2, steps=2)
    mask = MaskConfig(strategy=strategy, ratio=0.5)
    run, waits = Run(Config(**{**vars(cfg), "mask": mask}), World(0, 1, torch.device("cpu"))), []

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


def test_a_run_says_why_it_has_no_graph(index, tmp_path, caplog):
    pretrain(
        _config(index, tmp_path / "run", steps=1, warmup_steps=0, device="cpu", cuda_graph=True)
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
