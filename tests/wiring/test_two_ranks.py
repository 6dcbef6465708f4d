"""Two ranks do what one process does with all of the batch."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import by_hand
import numpy as np
import pytest
import torch
from base_run import config, copies, observed

from mae_fast.data import read_index, write_index


@pytest.fixture(scope="module")
def two(rows, index, tmp_path_factory):
    """Runs of two ranks in one pair of processes: {name: (cfg, rank 0's result, rank 1's)}."""
    folder = tmp_path_factory.mktemp("two")
    bad = folder / "videos"
    bad.mkdir()
    write_index(copies(rows, bad), folder / "bad.jsonl")
    (bad / "v2.mp4").write_bytes(b"")
    write_index(rows[5:], folder / "v.jsonl")
    short = {"train.steps": 2, "train.warmup_steps": 1}
    epochs = {"train.steps": 0, "train.epochs": 3.0, "train.warmup_epochs": 1.2}
    rare = {"train.log_every": 2, "train.save_every": 99}
    changes = {
        "plain": {"data.val_index": str(folder / "v.jsonl"), "data.repeat_aug": 1},
        "epochs": {**epochs, "train.accum_steps": 1, "train.batch_size": 3},
        "bad": {**short, "data.index": str(folder / "bad.jsonl"), "data.max_bad_share": 0.2},
        "nan": {},
        "too many nan": {"train.max_nonfinite": 0},
        "signal": rare,
        "signal again": rare,
        "fault": rare,
        "rare": {"train.log_every": 3, "train.save_every": 99},
        "features": {"model.target": "features", "train.ema_momentum": 0.7},
        "bad before": {"data.index": str(folder / "bad.jsonl"), "data.max_bad_share": 0.2},
    }
    (folder / "bad before").mkdir()
    (folder / "bad before" / "bad_videos.jsonl").write_text('{"path": "a.mp4", "reason": "x"}\n')
    cases = []
    for name, change in changes.items():
        output = folder / name.removesuffix(" again")
        what = {"too many nan": "nan"}.get(name, name)
        cases.append((name, config(index, output, **change), what))
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    script = Path(by_hand.__file__).with_name("two_ranks.py")
    command = [sys.executable, str(script), str(folder / "cases.pickle"), str(folder)]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path.cwd())]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return {
        name: (cfg, *(json.loads((folder / f"{name}.{r}.json").read_text()) for r in (0, 1)))
        for name, cfg, _ in cases
    }


def test_two_ranks_are_the_gradient_of_the_whole_batch(two, rows):
    cfg, zero, one = two["plain"]
    by_hand.check(cfg, rows, world=2, val_rows=read_index(cfg.data.val_index))
    assert zero["row"]["loss"] == one["row"]["loss"] and zero["left"] == one["left"] == 1
    assert "val_loss" in zero["row"] and "val_loss" not in one["row"]  # the writer's work alone


def test_two_ranks_reduce_at_the_last_micro_step_only(two):
    for rank in two["plain"][1:]:
        assert rank["reduced"] == [False, True] * 4
    for rank in two["epochs"][1:]:
        assert rank["reduced"] == [True] * 3


def test_two_ranks_average_one_encoder(two, rows):
    """The running average is of what both ranks trained, and no rank's own."""
    cfg, zero, one = two["features"]
    by_hand.check(cfg, rows, world=2)
    assert zero["row"]["loss"] == one["row"]["loss"]


def test_two_ranks_share_epochs_and_rates(two, rows):
    """3 epochs of 7 videos, 6 a step: 3 steps; a warm-up of 1.2 epochs is 1.4 steps."""
    cfg = two["epochs"][0]
    by_hand.check(cfg, rows, world=2)
    assert by_hand.rows_of(cfg.output)[-1]["epoch"] == pytest.approx(18 / 7)


def test_two_ranks_gather_what_a_row_says(two):
    cfg = two["rare"][0]
    each = by_hand.rows_of(two["nan"][0].output)
    found = by_hand.rows_of(cfg.output)
    assert [r["step"] for r in found] == [3, 4]
    assert found[0]["loss"] != each[2]["loss"]
    for row in found:
        assert row["clips_per_s"] * row["step_seconds"] == pytest.approx(16)


def test_two_ranks_list_each_other_s_bad_videos(two):
    cfg, zero, one = two["bad"]
    rows, broken = read_index(cfg.data.index), str(Path(cfg.data.index).parent / "videos/v2.mp4")
    draws = range(2 * by_hand.videos_a_step(cfg, 2))
    who = {
        (g // cfg.train.batch_size) % 2 for g in draws if rows[_video(cfg, rows, g)].path == broken
    }
    assert 1 in who
    by_hand.check(cfg, rows, world=2, bad={broken})
    assert zero["row"]["bad_videos"] == one["row"]["bad_videos"] == 1
    listed = (Path(cfg.output) / "bad_videos.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in listed] == [broken]


def test_two_ranks_know_alike_what_was_bad_before(two):
    """A file that was listed before a resume, and one met now: too many on both ranks."""
    words = [r["words"] for r in two["bad before"][1:]]
    assert words[0] == words[1] and "2 of 7 videos are bad" in words[0]


def _video(cfg, rows, g):
    epoch, place = divmod(g, len(rows))
    return np.random.default_rng((cfg.train.seed, epoch)).permutation(len(rows))[place]


def test_two_ranks_hear_a_signal_of_one(two, rows):
    cfg, *ranks = two["signal"]
    assert [r["error"] for r in ranks] == ["Interrupted"] * 2
    ranks_words = ranks[1]["words"]
    assert "SIGTERM" in ranks_words
    _, *ranks = two["signal again"]
    assert [r["row"]["step"] for r in ranks] == [4, 4]
    steps = [r["step"] for r in by_hand.rows_of(cfg.output)]
    assert steps[0] in (1, 2) and steps[-1] == 4
    assert f"step {steps[0]}" in ranks_words
    end, plain = (by_hand.checkpoint(c.output, 4)[1] for c in (cfg, two["rare"][0]))
    assert plain.keys() == end.keys() and all(torch.equal(plain[k], end[k]) for k in plain)


def test_two_ranks_stop_where_one_has_no_data(two):
    """What was learned until then is saved, and both say why."""
    cfg, *ranks = two["fault"]
    assert [(r["error"], "planted" in r["words"]) for r in ranks] == [("DataError", True)] * 2
    assert [r["step"] for r in by_hand.rows_of(cfg.output)] == observed(cfg.output)["saved"] == [1]


def test_two_ranks_skip_a_step_together(two, rows):
    """Rank 1's first micro-step of step 1 is not finite: named with both ranks' videos."""
    cfg, *ranks = two["nan"]
    assert [r["row"]["nonfinite"] for r in ranks] == [1, 1]
    (line,) = (Path(cfg.output) / "nonfinite.jsonl").read_text().splitlines()
    _, _, paths = by_hand.gradients(cfg, rows, by_hand.new_model(cfg), 1, 2)
    assert json.loads(line)["step"] == 1 and json.loads(line)["videos"] == sorted(set(paths))
    before, after = (by_hand.checkpoint(cfg.output, n)[1] for n in (1, 2))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [r["error"] for r in two["too many nan"][1:]] == ["NonFiniteError"] * 2
