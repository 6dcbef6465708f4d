"""Checkpoints: whole or not at all, the last good one found, nothing lost."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from mae_fast import TrainConfig, checkpoint
from mae_fast.errors import CheckpointError
from mae_fast.optim import clipped_step, make_optimizer


def _trained(steps=2):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = make_optimizer(model, TrainConfig())
    for _ in range(steps):
        model(torch.ones(1, 8)).sum().backward()
        clipped_step(optimizer, 1e-2, 1.0)
    return model, optimizer


def test_round_trip_is_bit_equal_and_training_goes_on_alike(tmp_path):
    model, optimizer = _trained()
    checkpoint.save(tmp_path, 2, model, optimizer, {"config": {"a": 1}}, keep=3)
    state, tensors = checkpoint.latest(tmp_path)
    assert state == {"config": {"a": 1}, "step": 2}
    again, other = _trained(steps=0)
    checkpoint.restore(tensors, again, other)
    for m, o in ((model, optimizer), (again, other)):
        m(torch.full((1, 8), 0.5)).sum().backward()
        clipped_step(o, 1e-2, 1.0)
    assert torch.equal(model.weight, again.weight)
    assert optimizer.state[model.weight]["step"] == other.state[again.weight]["step"] == 3


def test_only_the_last_are_kept(tmp_path):
    model, optimizer = _trained()
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, model, optimizer, {}, keep=2)
    names = [p.name for p in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-00000004.safetensors", "checkpoint-00000005.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names  # and no temporary file


@pytest.mark.parametrize("size", [0, 7, 100, -1], ids=["empty", "header", "half", "one_byte"])
def test_a_cut_checkpoint_is_passed_over(tmp_path, size, caplog):
    model, optimizer = _trained()
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=3)
    path = checkpoint.save(tmp_path, 2, model, optimizer, {}, keep=3)
    content = path.read_bytes()
    path.write_bytes(content[:size])
    state, _ = checkpoint.latest(tmp_path)
    assert state["step"] == 1 and "00000002" in caplog.text


def test_only_broken_checkpoints_are_an_error(tmp_path):
    (tmp_path / "checkpoint-00000001.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="none of the 1"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_foreign_weights_are_not_a_run(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "checkpoint-00000001.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of a run"):
        checkpoint.read(tmp_path / "checkpoint-00000001.safetensors")


def test_a_full_disk_loses_nothing(tmp_path):
    # A file size limit stands in for a full disk: the write fails half-way, with the errno's text.
    model, optimizer = _trained()
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=1)
    before = (tmp_path / "checkpoint-00000001.safetensors").read_bytes()
    code = f"""
        import resource, signal, torch
        from mae_fast import TrainConfig, checkpoint
        from mae_fast.optim import make_optimizer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        model = torch.nn.Linear(99, 99)
        try:
            optimizer = make_optimizer(model, TrainConfig())
            checkpoint.save({str(tmp_path)!r}, 2, model, optimizer, {{}}, 1)
        except checkpoint.CheckpointError as e:
            print(e)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert "cannot write" in run.stdout and "00000001" in run.stdout, run.stdout + run.stderr
    assert os.listdir(tmp_path) == ["checkpoint-00000001.safetensors"]
    assert (tmp_path / "checkpoint-00000001.safetensors").read_bytes() == before


def test_a_missing_folder_is_an_error(tmp_path):
    model, optimizer = _trained()
    with pytest.raises(CheckpointError, match=r"cannot write .*none yet"):
        checkpoint.save(tmp_path / "gone", 1, model, optimizer, {}, keep=1)
