"""A model that lies apart on its ranks: the same run as on one, and checkpoints of both kinds."""

import dataclasses
import shutil

import pytest
import torch
from ranks import config, drawn, losses, run

from mae_fast import checkpoint, sharded
from mae_fast.distributed import World
from mae_fast.errors import CheckpointError
from mae_fast.model import MaskedAutoencoder
from mae_fast.optim import make_optimizer
from mae_fast.weights import load_model

STEPS = 4


@pytest.fixture(scope="module")
def kinds(index, tmp_path_factory):
    """The same run on one rank, two of DDP, and two and four that are parted; one that is parted
    differently from step 2 on; held-out videos in all."""
    folder = tmp_path_factory.mktemp("kinds")

    def cfg(name, batch, shard="none"):
        how = dict(batch_size=batch, shard=shard, steps=STEPS, save_every=2, precision="fp32")
        made = config(index, folder / name, **how)
        return dataclasses.replace(made, data=dataclasses.replace(made.data, val_index=index))

    cases = [
        ("one", "pretrain", cfg("one", 4), 1, 0),
        ("ddp", "pretrain", cfg("ddp", 2), 2, 0),
        ("full2", "pretrain", cfg("full2", 2, "full"), 2, 0),
        ("optimizer4", "pretrain", cfg("optimizer4", 1, "optimizer"), 4, 0),
        ("part a", "pretrain", cfg("parts", 2, "full"), 2, 1),
        ("part b", "pretrain", cfg("parts", 2), 1, 2),
        ("part c", "pretrain", cfg("parts", 2, "optimizer"), 4, 3),
        ("part d", "pretrain", cfg("parts", 2), 2, 0),
    ]
    return folder, run(folder, cases)


PARTED = ("full2", "optimizer4", "ddp")


def test_parted_models_learn_what_one_does(kinds):
    folder, found = kinds
    assert not any("error" in r for name in ("one", *PARTED) for r in found[name])
    one, whole = losses(folder / "one"), checkpoint.latest(folder / "one")[1]
    assert len(set(one)) == STEPS
    for name in PARTED:
        worst = max(abs(a / b - 1) for a, b in zip(losses(folder / name), one, strict=True))
        _, tensors = checkpoint.latest(folder / name)
        assert tensors.keys() == whole.keys()
        # k.bias has no true gradient, so Adam makes steps of its rounding.
        errors = {
            k: float((v - whole[k]).norm() / whole[k].norm().clamp(min=1e-6))
            for k, v in tensors.items()
            if not k.endswith("attn.k.bias")
        }
        print(f"{name}: losses to {worst:.1e}, weights and moments to {max(errors.values()):.1e}")
        assert worst < 1e-5 and max(errors.values()) < 1e-3, max(errors, key=errors.get)
        assert drawn(found[name]) == drawn(found["one"])
        row = found[name][0]["row"]
        assert row["val_loss"] == pytest.approx(found["one"][0]["row"]["val_loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(found["one"][0]["row"]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("how", ["full", "optimizer"])
def test_full_lets_go_of_a_block_s_weights_after_its_forward(how, monkeypatch):
    model = MaskedAutoencoder(config("", "run").model)
    kept = {}
    monkeypatch.setattr(
        "torch.distributed.fsdp.fully_shard",
        lambda part, mesh, reshard_after_forward: kept.update({part: reshard_after_forward}),
    )
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *args: None)
    sharded.shard(model, World(0, 2, torch.device("cpu")), how)
    blocks = [*model.blocks, *model.decoder_blocks]
    assert kept == {**dict.fromkeys(blocks, how == "full"), model: False}


def test_what_is_parted_is_not_on_every_rank(kinds):
    """Bytes of weights and of the optimizer on a rank, of those on one."""
    _, found = kinds
    one = found["one"][0]["held"]
    assert [r["held"] for r in found["ddp"]] == [one] * 2
    for name, n in (("full2", 2), ("optimizer4", 4)):
        held = [r["held"] for r in found[name]]
        print(f"{name}: {[round(h / one, 3) for h in held]} of one process's {one} bytes")
        assert one <= sum(held) < 1.05 * one and max(held) < 1.7 * one / n


def test_a_run_goes_on_whatever_it_was_parted_in(kinds):
    """Two parted, one alone, four parted, two of DDP: each resumes the kind before."""
    folder, found = kinds
    ends = [found[f"part {x}"][0].get("error") for x in "abcd"]
    assert ends == ["Interrupted"] * 3 + [None]
    parts = drawn(*(found[f"part {x}"] for x in "abcd"))
    assert parts == drawn(found["full2"])
    a, b = losses(folder / "parts"), losses(folder / "one")
    assert max(abs(x / y - 1) for x, y in zip(a, b, strict=True)) < 1e-5
    names = [p.name[18:] for p in checkpoint.checkpoints(folder / "parts")]
    assert names == ["2.safetensors", "3.dcp", "4.safetensors"]


def test_a_folder_of_shards_is_one_file_to_who_reads_it(kinds, tmp_path):
    folder, _ = kinds
    path = checkpoint.checkpoints(folder / "full2")[-1]
    assert path.name == "checkpoint-00000004.dcp" and path.is_dir()
    state, tensors = checkpoint.read(path)
    model = load_model(path)
    assert all(torch.equal(p, tensors[f"model.{n}"]) for n, p in model.named_parameters())
    # Into one file, by what resumes and saves; the other way is what the runs above do.
    own = MaskedAutoencoder(model.cfg)
    optimizer = make_optimizer(own, config("", tmp_path).train)
    checkpoint.restore(tensors, own, optimizer)
    one = checkpoint.save(tmp_path, 4, own, optimizer, state, 3)
    again = checkpoint.read(one)[1]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("what", ["flip", "cut", "lost", "state"])
def test_a_damaged_folder_is_passed_over(what, kinds, tmp_path, caplog):
    folder, _ = kinds
    run_ = tmp_path / "run"
    shutil.copytree(folder / "full2", run_)
    last = checkpoint.checkpoints(run_)[-1]
    shard = sorted(last.glob("shard-*"))[-1]
    content = bytearray(shard.read_bytes())
    if what == "flip":
        content[-3] ^= 1
        shard.write_bytes(content)
    elif what == "cut":
        shard.write_bytes(content[:-20])
    elif what == "lost":
        shard.unlink()
    else:
        (last / sharded.STATE).write_text("{")
    broken = []
    state, _ = checkpoint.latest(run_, broken)
    assert state["step"] == 2 and broken == [last] and "using the one before" in caplog.text
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read(last)


def test_what_a_kill_leaves_of_a_folder_is_swept(tmp_path):
    half = tmp_path / "checkpoint-00000003.dcp.tmp"
    half.mkdir()
    (half / "shard-00001-model-00001-of-00001.safetensors").write_text("x")
    checkpoint.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
