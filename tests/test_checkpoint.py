"""Checkpoints: whole or not at all, the last good one found, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from mae_fast import TrainConfig, checkpoint
from mae_fast.errors import CheckpointError, NonFiniteError
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


def _flip(path, at: int) -> None:
    """Flip one bit of the byte at `at`; from the end if negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def _save(folder, step, keep=3, run="mine", steps=2):
    return checkpoint.save(str(folder), step, *_trained(steps), {"run": run}, keep)


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_users_copies_are_neither_counted_nor_deleted_nor_resumed(tmp_path):
    first = _save(tmp_path, 1)
    names = ["best", "zz-mine", "00000001-good", "1", "000000001", "0000000²"]
    copies = [f"checkpoint-{name}.safetensors" for name in names]
    for name in copies:
        shutil.copy(first, tmp_path / name)
    for step in (2, 3, 4):
        path = _save(tmp_path, step, keep=2)
        assert path.exists() and checkpoint.latest(tmp_path)[0]["step"] == step
    left = ["checkpoint-00000003.safetensors", "checkpoint-00000004.safetensors"]
    assert _names(tmp_path) == sorted(copies + left)


def test_another_runs_files_are_never_deleted(tmp_path, caplog):
    """Also where they have the very name that is written now: they are renamed."""
    for step in (1, 2, 5):
        _save(tmp_path, step, run="older")
    other = (tmp_path / "checkpoint-00000005.safetensors").read_bytes()
    for step in (3, 4, 5, 6):
        _save(tmp_path, step, keep=1, run="mine")
    assert _names(tmp_path) == [
        "checkpoint-00000001.safetensors",
        "checkpoint-00000002.safetensors",
        "checkpoint-00000005.safetensors.other",
        "checkpoint-00000006.safetensors",
    ]
    assert (tmp_path / "checkpoint-00000005.safetensors.other").read_bytes() == other


def test_what_was_just_written_is_kept_beside_later_steps(tmp_path):
    """After a resume from an older one; by name the later ones are the last."""
    for step in (1, 2, 7, 8, 9):
        _save(tmp_path, step, keep=9)
    path = _save(tmp_path, 3, keep=1)
    assert path.exists()
    assert [p.name[11:19] for p in checkpoint.checkpoints(tmp_path)] == [
        "00000003",
        "00000007",
        "00000008",
        "00000009",
    ]


@pytest.mark.parametrize("where", ["weights", "last", "step", "crc", "name"])
def test_a_flipped_bit_is_seen(where, tmp_path, caplog):
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    content = path.read_bytes()
    start = int.from_bytes(content[:8], "little") + 8
    text = {"step": b'step\\": ', "crc": b'"crc32":"', "name": b'"model.'}
    at = {"weights": start + 100, "last": len(content) - 2}.get(where)
    _flip(path, content.index(text[where]) + len(text[where]) if at is None else at)
    broken = []
    assert checkpoint.latest(tmp_path, broken)[0]["step"] == 1
    assert broken == [path] and len(caplog.records) == 1


def test_a_checkpoint_without_a_checksum_is_read(tmp_path):
    path = _save(tmp_path, 2)
    state, tensors = checkpoint.read(path)
    checkpoint.write_tensors(path, tensors, {"mae_fast": json.dumps(state)})
    assert checkpoint.latest(tmp_path)[0]["step"] == 2


def test_a_checkpoint_named_for_another_step_is_passed_over(tmp_path, caplog):
    """And is not broken: whoever renamed it may want it back."""
    path = _save(tmp_path, 1)
    shutil.move(path, tmp_path / "checkpoint-00000009.safetensors")
    _save(tmp_path, 2)
    broken = []
    assert checkpoint.latest(tmp_path, broken)[0]["step"] == 2 and broken == []
    assert "named for another step than its 1" in caplog.text


def test_a_state_that_is_not_finite_is_not_saved_and_deletes_nothing(tmp_path):
    _save(tmp_path, 1, keep=1)
    model, optimizer = _trained()
    optimizer.state[model.bias]["exp_avg"][3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"exp_avg\.bias is not finite after step 2.*00000001"):
        checkpoint.save(tmp_path, 2, model, optimizer, {"run": "mine"}, 1)
    assert _names(tmp_path) == ["checkpoint-00000001.safetensors"]


def test_a_state_that_is_not_finite_is_passed_over(tmp_path, caplog):
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    state, tensors = checkpoint.read(path)
    tensors["model.weight"][0, 0] = float("nan")
    checkpoint.write_tensors(path, tensors, {"mae_fast": json.dumps(state)})
    assert checkpoint.latest(tmp_path)[0]["step"] == 1
    assert "model.weight is not finite" in caplog.text


def test_what_a_kill_leaves_half_written_is_swept(tmp_path):
    for name in ("checkpoint-00000003.safetensors.tmp", "checkpoint-best.safetensors.tmp", "a.tmp"):
        (tmp_path / name).touch()
    checkpoint.sweep(tmp_path)
    assert _names(tmp_path) == ["a.tmp", "checkpoint-best.safetensors.tmp"]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_run(tmp_path, monkeypatch):
    _save(tmp_path, 1, keep=1)

    def unlink(self, missing_ok=False):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(type(tmp_path), "unlink", unlink)
    assert _save(tmp_path, 2, keep=1).exists()


def test_a_file_is_synced_before_and_its_folder_after_the_rename(tmp_path, monkeypatch):
    """Or a power cut could leave the new name on an empty file, or no name at all."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(fd):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def renamed(old, new):
        done.append(f"{os.path.basename(old)} -> {os.path.basename(new)}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint.write_tensors(tmp_path / "a", {"x": torch.ones(2, 2).T}, {"k": "v"})
    assert done == ["a.tmp", "a.tmp -> a", tmp_path.name]
    done.clear()
    checkpoint.write_text(tmp_path / "b", "words")
    assert done[:2] == ["b.tmp", "b.tmp -> b"]
    assert (tmp_path / "b").read_text() == "words"
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_restoring_copies_and_needs_every_tensor(tmp_path):
    model, optimizer = _trained()
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=1)
    _, tensors = checkpoint.latest(tmp_path)
    again, other = _trained(steps=0)
    checkpoint.restore(tensors, again)
    assert torch.equal(again.weight, model.weight) and not other.state
    checkpoint.restore(tensors, again, other)
    tensors["optim.exp_avg.weight"].fill_(7)
    assert torch.equal(
        other.state[again.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"]
    )
    del tensors["model.bias"]
    with pytest.raises(RuntimeError, match="bias"):
        checkpoint.restore(tensors, again)


def test_what_is_set_aside_takes_the_first_free_name_and_says_it(tmp_path):
    names = []
    for content in ("one", "two", "three"):
        (tmp_path / "a").write_text(content)
        names.append(checkpoint.set_aside(tmp_path / "a", "broken").name)
    assert names == ["a.broken", "a.broken2", "a.broken3"]
    assert [(tmp_path / name).read_text() for name in names] == ["one", "two", "three"]
    assert not (tmp_path / "a").exists()


def _slow_write(monkeypatch):
    """Writing waits for this event; and (path, whether it was set when the write began)."""
    go, begun, true = threading.Event(), [], checkpoint.write_tensors

    def slow(path, *rest):
        begun.append((path, go.is_set()))
        assert go.wait(30)
        true(path, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    return go, begun


def test_what_is_written_aside_is_the_state_of_its_step(tmp_path, monkeypatch):
    """Steps go on meanwhile, and the next save waits for this one."""
    model, optimizer = _trained()
    whole = {k: v.clone() for k, v in checkpoint.taken(model, optimizer).items()}
    go, begun = _slow_write(monkeypatch)
    aside = checkpoint.Aside(pinned=False)
    checkpoint.save(tmp_path, 5, model, optimizer, {"run": "mine"}, 3, aside)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
        for state in optimizer.state.values():
            state["exp_avg"].fill_(8.0)
    while not begun:
        assert not aside.pending.done()
        time.sleep(0.01)
    assert checkpoint.checkpoints(tmp_path) == []
    go.set()
    checkpoint.save(tmp_path, 6, model, optimizer, {"run": "mine"}, 3, aside)
    assert next(p.name[11:19] for p in checkpoint.checkpoints(tmp_path)) == "00000005"
    aside.wait()
    assert [at for _, at in begun] == [False, True]
    state, tensors = checkpoint.read(checkpoint.file(tmp_path, 5))
    assert state == {"run": "mine", "step": 5} and tensors.keys() == whole.keys()
    assert all(torch.equal(whole[k], tensors[k]) for k in whole)
    later = checkpoint.read(checkpoint.file(tmp_path, 6))[1]
    assert all((v == 7).all() for k, v in later.items() if k.startswith("model."))


def test_what_cannot_be_written_aside_is_said_by_the_next_save_and_by_the_end(
    tmp_path, monkeypatch
):
    model, optimizer = _trained()
    aside = checkpoint.Aside(pinned=False)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    checkpoint.save(tmp_path, 1, model, optimizer, {}, 3, aside)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path, 2, model, optimizer, {}, 3, aside)
    checkpoint.save(tmp_path, 3, model, optimizer, {}, 3, aside)
    with pytest.raises(CheckpointError, match="No space left"):
        aside.wait()
    aside.wait()  # said once
    assert list(tmp_path.iterdir()) == []
