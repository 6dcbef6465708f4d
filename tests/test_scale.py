"""The same run on another number of processes: global batches, draws, losses, and refusals."""

import dataclasses
import json
from pathlib import Path

import pytest
from ranks import MODEL, config, drawn, losses, run

from mae_fast import checkpoint, metrics
from mae_fast.config import ModelConfig
from mae_fast.data import build_index, read_index, write_index
from mae_fast.errors import ConfigError
from mae_fast.resume import Parts, parted
from mae_fast.tasks.config import AugmentConfig, ClipsConfig, FinetuneConfig, HeadConfig, TuneConfig
from mae_fast.train import pretrain

STEPS = 9


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "index.jsonl"
    build_index([folder], out, progress=False)
    rows = enumerate(read_index(out))
    write_index([dataclasses.replace(r, label=f"c{i % 2}") for i, r in rows], out)
    return str(out)


@pytest.fixture(scope="module")
def changing(index, tmp_path_factory):
    """A run of two ranks, and one that goes on with three from step 3 and with one from 6; the
    same of a fine-tuning run, of two ranks and then of one."""
    folder = tmp_path_factory.mktemp("changing")
    n = len(read_index(index)) / 6  # of steps
    how = dict(steps=0, epochs=(STEPS + 0.1) / n, warmup_steps=0, warmup_epochs=2 / n)
    whole, parts = (config(index, folder / name, **how) for name in ("whole", "parts"))
    tuned = [
        FinetuneConfig(
            output=str(folder / name),
            model=ModelConfig(**MODEL),
            classifier=HeadConfig(dropout=0.3, drop_path=0.2),
            augment=AugmentConfig(mixup=0.0, cutmix=0.0, erasing=0.5),  # mixing needs timm
            data=ClipsConfig(index=index, repeat_aug=2, workers=0, sampling_rate=2, short_side=32),
            train=TuneConfig(batch_size=3, steps=4, warmup_steps=1, log_every=1, blr=0.1),
            init="scratch",
        )
        for name in ("tuned", "tuned parts")
    ]
    cases = [
        ("whole", "pretrain", whole, 2, 0),
        ("two", "pretrain", parts, 2, 3),
        ("three", "pretrain", parts, 3, 6),
        ("one", "pretrain", parts, 1, 0),
        ("tuned", "finetune", tuned[0], 2, 0),
        ("tuned two", "finetune", tuned[1], 2, 2),
        ("tuned three", "finetune", tuned[1], 3, 0),
        ("tuned one", "finetune", tuned[1], 1, 0),
    ]
    return folder, run(folder, cases)


def test_two_three_and_one_ranks_draw_what_two_do(changing):
    _, found = changing
    whole = drawn(found["whole"])
    assert len(whole) == STEPS * 2 * 3 * 2  # steps, ranks, videos, clips
    assert [found[n][0].get("error") for n in ("two", "three", "one")] == ["Interrupted"] * 2 + [
        None
    ]
    assert drawn(found["two"], found["three"], found["one"]) == whole


def test_two_three_and_one_ranks_learn_what_two_do(changing):
    folder, _ = changing
    a, b = losses(folder / "whole"), losses(folder / "parts")
    assert len(a) == len(b) == STEPS
    worst = max(abs(x / y - 1) for x, y in zip(a, b, strict=True))
    print(f"losses' greatest relative difference over {STEPS} steps: {worst:.1e}")
    assert worst < 1e-5 and len(set(a)) == STEPS
    for key in ("lr", "epoch"):
        rows = [metrics.read(folder / name / "metrics.jsonl") for name in ("whole", "parts")]
        assert [r[key] for r in rows[0]] == [r[key] for r in rows[1]]
    history = (folder / "parts" / "environment.jsonl").read_text().splitlines()
    assert [(r["step"], r["processes"]) for r in map(json.loads, history)] == [
        (0, 2),
        (3, 3),
        (6, 1),
    ]


def test_fine_tuning_on_another_number_of_ranks_mixes_the_same_clips(changing):
    """Erasing and dropout (and mixup) are drawn for the micro-steps that the run began with; three
    ranks cannot have whole ones of two."""
    folder, found = changing
    assert "train.batch_size 3" in found["tuned three"][0]["words"]
    assert "1 or 2 processes" in found["tuned three"][0]["words"]
    assert drawn(found["tuned two"], found["tuned one"]) == drawn(found["tuned"])
    a, b = losses(folder / "tuned"), losses(folder / "tuned parts")
    assert len(set(a)) == 4 and max(abs(x / y - 1) for x, y in zip(a, b, strict=True)) < 1e-5


FOLDER = Path("runs/x")


def _state(batch, accum, world, **more):
    return {"config": {"train": {"batch_size": batch, "accum_steps": accum}}, "world": world} | more


@pytest.mark.parametrize(
    ("begun", "asked", "wanted"),
    [
        ((3, 1, 2), (3, 1, 3), (2, 1, 3)),
        ((3, 1, 2), (3, 1, 1), (3, 2, 1)),
        ((4, 1, 2), (4, 1, 1), (4, 2, 1)),
        ((64, 2, 8), (64, 2, 4), (64, 4, 4)),
        ((64, 2, 8), (64, 2, 128), (8, 1, 128)),
        ((64, 1, 8), (64, 1, 3), None),
        ((5, 1, 6), (5, 1, 2), (5, 3, 2)),
        ((7, 1, 2), (7, 1, 1), (7, 2, 1)),
        ((2, 2, 1), (4, 1, 1), (4, 1, 1)),  # by hand, and the product is the same
        ((2, 2, 1), (1, 1, 4), (1, 1, 4)),
        ((2, 2, 1), (3, 2, 1), None),  # by hand, and it is another
        ((2, 2, 1), (3, 2, 2), None),
    ],
)
def test_how_a_step_is_parted(begun, asked, wanted):
    old = _state(*begun)
    if wanted:
        assert parted(FOLDER, old, Parts(*asked), False) == (Parts(*begun), Parts(*wanted))
        return
    numbers = f"{Parts(*begun).videos} videos.*would be {Parts(*asked).videos} videos.*with 1"
    with pytest.raises(ConfigError, match=numbers):
        parted(FOLDER, old, Parts(*asked), False)


def test_settings_that_were_changed_by_hand_stand_when_processes_change_again():
    old = _state(8, 1, 4, asked=[4, 2])
    assert parted(FOLDER, old, Parts(4, 2, 2), False)[1] == Parts(4, 4, 2)
    with pytest.raises(ConfigError, match="32 videos"):
        parted(FOLDER, old, Parts(8, 1, 2), False)


@pytest.mark.parametrize("asked", [(4, 1, 1), (2, 1, 3), (1, 2, 2)])
def test_mixed_clips_stay_together(asked):
    with pytest.raises(ConfigError, match=r"1 or 2 processes and train\.batch_size 2"):
        parted(FOLDER, _state(2, 1, 2), Parts(*asked), True)
    assert parted(FOLDER, _state(2, 1, 2), Parts(2, 1, 1), True)[1] == Parts(2, 2, 1)


def test_a_run_of_an_older_version_goes_on_with_another_number_of_processes(index, tmp_path):
    """Its state has the processes, and not what was asked."""
    how = dict(steps=3, save_every=1)
    cfg, by_hand = (
        config(index, tmp_path / "run", batch_size=batch, accum_steps=accum, **how)
        for batch, accum in ((2, 1), (1, 4))
    )
    pretrain(cfg)
    for path in checkpoint.checkpoints(tmp_path / "run"):
        state, tensors = checkpoint.read(path)
        del state["asked"]
        state["world"] = 2
        checkpoint.write_tensors(path, tensors, {"mae_fast": json.dumps(state)})
    for again, asked in ((cfg, [2, 1]), (by_hand, [1, 4])):
        checkpoint.checkpoints(tmp_path / "run")[-1].unlink()
        assert pretrain(again)["epoch"] == pytest.approx(3 * 4 / len(read_index(index)))
        state, _ = checkpoint.latest(tmp_path / "run")
        assert (state["world"], state["asked"]) == (2, asked)
        assert state["config"]["train"]["batch_size"] == 2
