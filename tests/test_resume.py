"""Which runs go on, and what a resumed one finds and leaves."""

import errno
import fcntl
import json
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import at, config, poison, same, weights, with_data

from mae_fast import checkpoint, metrics, resume
from mae_fast.config import Config, TrainConfig, preset
from mae_fast.config_file import to_dict
from mae_fast.errors import (
    CheckpointError,
    ConfigError,
)
from mae_fast.fields import defaults
from mae_fast.run import Run
from mae_fast.tasks.config import FinetuneConfig
from mae_fast.train import pretrain


def go_on(old: dict, cfg: Config | FinetuneConfig) -> None:
    states = [{"config": config, "world": 1, "step": 3} for config in (old, to_dict(cfg))]
    resume.check(Path("run"), *states, {}, defaults(cfg))


@pytest.mark.parametrize("kind", [Config, FinetuneConfig])
def test_a_run_of_before_a_setting_goes_on_with_its_default(kind):
    cfg = kind(output="run", model=preset("vit_tiny"))
    old = to_dict(cfg)
    go_on(old, cfg)
    del old["train"]["eps" if kind is Config else "ema"], old["model"]["target"]
    del old["train"]["backends"], old["data"]["crop_area"]
    for section in ("eval", "task", "ava"):
        old.pop(section, None)
    go_on(old, cfg)
    with pytest.raises(ConfigError, match=r"model\.target: pixels -> hog"):
        go_on(old, replace(cfg, model=replace(cfg.model, target="hog")))


def test_a_setting_that_is_not_its_default_is_not_what_was_done_before():
    old = to_dict(Config(output="run", model=preset("vit_tiny")))
    del old["train"]["eps"]
    with pytest.raises(ConfigError, match=r"train\.eps: 1e-08 -> 0\.001"):
        go_on(old, Config(output="run", model=preset("vit_tiny"), train=TrainConfig(eps=1e-3)))


def test_a_changed_setting_is_refused_on_resume(index, tmp_path):
    pretrain(config(index, tmp_path / "run", steps=5))
    with pytest.raises(ConfigError, match=r"train\.blr: 0\.1 -> 0\.2"):
        pretrain(config(index, tmp_path / "run", steps=5, blr=0.2))


def test_a_broken_checkpoint_falls_back_to_the_one_before(index, tmp_path, caplog):
    cfg = config(index, tmp_path / "run")
    pretrain(cfg)
    wanted = weights(tmp_path / "run")
    newest = checkpoint.checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    pretrain(cfg)
    assert "using the one before" in caplog.text
    assert same(wanted, weights(tmp_path / "run"))


def test_non_finite_steps_are_not_listed_twice_after_a_kill(index, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    poison(monkeypatch, at={2, 12})
    at(monkeypatch, 15, killed)
    cfg = config(index, tmp_path / "run", log_every=1)
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

    cfg = with_data(config(index, tmp_path / "run", log_every=1), val_index=index)
    at(monkeypatch, 5, killed)
    with pytest.raises(Killed):
        pretrain(cfg)
    pretrain(cfg)
    steps = [r["step"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(21))


def test_a_damaged_line_of_metrics_is_left_out_alone(index, tmp_path, caplog):
    path = tmp_path / "run" / "metrics.jsonl"
    pretrain(config(index, tmp_path / "run", steps=10, log_every=1))
    lines = path.read_bytes().split(b"\n")
    lines[2], lines[4], lines[6] = b"\x00\xff\x00", b'{"step": 5, "lo', b"7"
    path.write_bytes(b"\n".join(lines) + b'{"step": 11, "lo')
    assert [r["step"] for r in metrics.read(path)] == [1, 2, 4, 6, 8, 9, 10]
    assert "metrics.jsonl: damaged, left out: line 3, 5, 7" in caplog.text
    path.unlink()
    assert pretrain(config(index, tmp_path / "run", steps=10, log_every=1)) == {"step": 10}


def test_a_second_run_in_the_folder_is_refused(index, tmp_path):
    (tmp_path / "run").mkdir()
    first = resume.lock(tmp_path / "run" / "environment.jsonl")
    with pytest.raises(CheckpointError, match="in use: another run writes into it"):
        pretrain(config(index, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["environment.jsonl"]
    # A data worker outlives a run that is killed, and holds nothing.
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    time.sleep(0.2)
    first.close()
    pretrain(config(index, tmp_path / "run", steps=2))
    worker.kill()
    worker.join()


def test_a_refused_resumption_leaves_the_folder_as_it_was_and_free(index, tmp_path):
    """A broken checkpoint keeps its name, and the lock is given back while its error lives."""
    folder = tmp_path / "run"
    pretrain(config(index, folder))
    path = checkpoint.checkpoints(folder)[-1]
    path.write_bytes(path.read_bytes()[:-1])
    left = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"train\.blr") as refused:
        pretrain(config(index, folder, blr=0.2))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == left
    with resume.lock(folder / "environment.jsonl"):
        assert refused.value.exit_code == 2


def test_a_run_gives_its_folder_back_and_sweeps_what_a_kill_left(index, tmp_path, monkeypatch):
    folder, runs, init = tmp_path / "run", [], Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, *a: runs.append(self) or init(self, *a))
    folder.mkdir()
    (folder / "checkpoint-00000003.safetensors.tmp").touch()
    pretrain(config(index, folder, steps=2))
    assert runs and not list(folder.glob("*.tmp"))
    resume.lock(folder / "environment.jsonl").close()


def test_a_file_system_without_locks_is_said_and_used(index, tmp_path, monkeypatch, caplog):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert pretrain(config(index, tmp_path / "run", steps=2))["step"] == 2
    assert "cannot be locked (No locks available)" in caplog.text


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
    cfg = with_data(config(index, tmp_path / "run", steps=5), val_index=index)
    pretrain(cfg)
    other = _edited(index, tmp_path / "other.jsonl", edit)
    words = r"not the data\.index .* digest .* choose another output"
    with pytest.raises(ConfigError, match=words):
        pretrain(with_data(cfg, index=other))
    with pytest.raises(ConfigError, match=r"not the data\.val_index"):
        pretrain(with_data(cfg, val_index=other))
    assert pretrain(with_data(cfg, val_index=""))["step"] == 5


def test_the_same_videos_elsewhere_are_the_same_index(index, tmp_path):
    def moved(rows):
        for row in rows:
            shutil.copy(row["path"], tmp_path)
            row["path"] = str(tmp_path / Path(row["path"]).name)
        return rows

    cfg = config(index, tmp_path / "run", steps=5)
    pretrain(cfg)
    assert pretrain(with_data(cfg, index=_edited(index, tmp_path / "i.jsonl", moved)))["step"] == 5


def test_other_videos_a_step_are_refused_on_resume(index, tmp_path):
    """Of 2 processes a step has 4 videos, and one process with the same settings makes up for it;
    of 2 1/2 none can."""
    cfg = config(index, tmp_path / "run", steps=5)
    pretrain(cfg)
    with pytest.raises(ConfigError, match=r"of 2 videos a step.*be 3 videos.*with 1 or 2 proc"):
        pretrain(config(index, tmp_path / "run", steps=5, batch_size=3))


def test_a_run_of_an_older_version_goes_on(index, tmp_path):
    """Its checkpoints name no run, processes or index, and have no checksum."""
    cfg, folder = config(index, tmp_path / "run", save_every=5, keep=2), tmp_path / "run"
    _ = pretrain(cfg)
    whole = weights(folder)
    for path in checkpoint.checkpoints(folder):
        state, tensors = checkpoint.read(path)
        old = {key: state[key] for key in ("config", "nonfinite", "step")}
        checkpoint.write_tensors(path, tensors, {"mae_fast": json.dumps(old)})
    checkpoint.checkpoints(folder)[-1].unlink()
    pretrain(cfg)
    assert same(whole, weights(folder))
    assert len(checkpoint.checkpoints(folder)) == 2


def test_broken_checkpoints_push_no_good_ones_out(index, tmp_path, caplog):
    """Steps 20 and 15 are damaged: what was good then, and is good since, is what stays."""
    cfg, folder = config(index, tmp_path / "run", save_every=5), tmp_path / "run"
    pretrain(cfg)
    for path in checkpoint.checkpoints(folder)[1:]:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    cfg = config(index, tmp_path / "run", save_every=7, keep=2)
    pretrain(cfg)
    assert [r.message for r in caplog.records if "using the one before" in r.message][1:] != []
    names = sorted(p.name[11:] for p in folder.glob("checkpoint-*"))
    assert names == [
        "00000014.safetensors",
        "00000015.safetensors.broken",
        "00000020.safetensors",
        "00000020.safetensors.broken",
    ]
