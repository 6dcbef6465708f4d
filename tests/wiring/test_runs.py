"""What a run writes, skips, saves and leaves, by itself."""

import dataclasses
import inspect
import itertools
import json
import math
import os
import signal
import sys
import time
import types
from pathlib import Path

import by_hand
import numpy as np
import pytest
import torch
from base_run import STEP, config, copies, labelled, observed
from small_runs import Poisoned

from mae_fast import checkpoint, distributed, metrics, probe, train
from mae_fast.config import EvalConfig
from mae_fast.data import VideoReader, read_index, write_index
from mae_fast.data.sampling import weights_of
from mae_fast.distributed import World
from mae_fast.errors import ConfigError, DataError, Interrupted, NonFiniteError
from mae_fast.train import pretrain


def test_a_row_is_of_the_steps_since_the_last(base, index, tmp_path):
    """Loss: their mean; norm and rate: the last one's. A row with every checkpoint, and the end."""
    each = by_hand.rows_of(base.output)
    cfg = config(index, tmp_path / "a", **{"train.log_every": 3, "train.save_every": 99})
    last = pretrain(cfg)
    first, second = by_hand.rows_of(cfg.output)
    assert first["loss"] == pytest.approx(sum(r["loss"] for r in each[:3]) / 3)
    assert second["loss"] == each[3]["loss"] and second == last
    for key in ("grad_norm", "lr", "epoch"):
        assert (first[key], second[key]) == (each[2][key], each[3][key])
    cfg = config(index, tmp_path / "b", **{"train.log_every": 99, "train.save_every": 2})
    pretrain(cfg)
    assert observed(cfg.output)["logged"] == observed(cfg.output)["saved"] == [2, 4]


def test_the_time_of_a_row_is_that_of_its_steps(index, tmp_path, monkeypatch):
    """Four reads of 30 ms a step: the step takes them, and waits for data as long."""
    read = VideoReader.pictures

    def slow(self, *args):
        time.sleep(0.03)
        return read(self, *args)

    monkeypatch.setattr(VideoReader, "pictures", slow)
    began = time.perf_counter()
    cfg = config(index, tmp_path / "run", **{"train.log_every": 2, "train.save_every": 99})
    pretrain(cfg)
    took = time.perf_counter() - began
    rows = by_hand.rows_of(cfg.output)
    assert 4 * 0.12 < 2 * sum(r["step_seconds"] for r in rows) < took
    for row in rows:
        assert 0.24 <= 2 * row["step_seconds"] * row["data_wait"] < 2 * row["step_seconds"]
        assert row["clips_per_s"] * row["step_seconds"] == pytest.approx(8)
        assert row["seconds_left"] == pytest.approx((4 - row["step"]) * row["step_seconds"])


def test_warm_up_and_epochs_of_a_recipe_are_in_epochs(index, rows, tmp_path):
    """7 videos, 4 a step, 2.5 epochs: 4 steps; the warm-up of half an epoch is 0.875 steps."""
    changes = {"train.steps": 0, "train.epochs": 2.5, "train.warmup_epochs": 0.5}
    cfg = config(index, tmp_path / "run", **changes, **{"train.min_lr": 1e-4})
    pretrain(cfg)
    by_hand.check(cfg, rows)
    seen, peak = by_hand.rows_of(cfg.output), 0.5 * 4 / 256
    assert [r["epoch"] for r in seen] == pytest.approx([4 / 7, 8 / 7, 12 / 7, 16 / 7])
    cosine = [(1 + math.cos(math.pi * (s - 0.875) / 3.125)) / 2 for s in (1, 2, 3)]
    rates = [0.0, *(1e-4 + (peak - 1e-4) * c for c in cosine)]
    assert [r["lr"] for r in seen] == pytest.approx(rates)


def test_no_clipping_and_no_warm_up(index, rows, tmp_path):
    changes = {"train.clip_grad": 0.0, "train.warmup_steps": 0, "train.blr": 0.05}
    cfg = config(index, tmp_path / "run", **changes)
    pretrain(cfg)
    by_hand.check(cfg, rows)


def test_a_run_is_in_its_folder(base):
    files = {p.name for p in Path(base.output).iterdir() if p.suffix != ".safetensors"}
    assert {"config.json", "environment.jsonl", "metrics.jsonl"} <= files
    wanted = json.loads(json.dumps(dataclasses.asdict(base)))
    assert json.loads((Path(base.output) / "config.json").read_text()) == wanted
    state = by_hand.checkpoint(base.output, 4)[0]
    assert state["config"] == wanted and state["step"] == 4 and state["nonfinite"] == 0
    history = (Path(base.output) / "environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [0]


def test_in_chans_is_the_model_s(index, tmp_path):
    with pytest.raises((ConfigError, ValueError), match=r"in_chans|must be \[B, 1"):
        pretrain(config(index, tmp_path / "run", **{"model.in_chans": 1}))


def test_another_index_is_another_run(base, rows, tmp_path):
    write_index(rows[:3], tmp_path / "i.jsonl")
    cfg = config(str(tmp_path / "i.jsonl"), tmp_path / "run")
    pretrain(cfg)
    by_hand.check(cfg, read_index(cfg.data.index))
    changed = {k for k, v in observed(cfg.output).items() if v != observed(base.output)[k]}
    assert changed == STEP | {"epoch"}


def test_held_out_videos_are_those_of_val_index(base, rows, tmp_path):
    """Before the first step, with each checkpoint and at the end; always the same clips and masks;
    three repeats of two videos a batch make 66 clips. Training is as without."""
    write_index(rows[5:], tmp_path / "v.jsonl")
    changes = {"data.val_index": str(tmp_path / "v.jsonl"), "data.repeat_aug": 3}
    cfg = config(base.data.index, tmp_path / "run", **changes, **{"train.steps": 2})
    pretrain(cfg)
    by_hand.check(cfg, rows, val_rows=read_index(tmp_path / "v.jsonl"))
    found = by_hand.rows_of(cfg.output)
    assert [r["step"] for r in found] == [0, 1, 2] and {r["val_clips"] for r in found} == {66}
    assert found[0]["val_loss"] == found[1]["val_loss"]  # the first step's rate is 0
    assert len({r["val_mean_patch_loss"] for r in found}) == 1


def test_held_out_batches_hold_one_video_at_least(index, rows, tmp_path):
    changes = {"data.val_index": index, "data.repeat_aug": 9, "train.batch_size": 1}
    cfg = config(index, tmp_path / "run", **changes, **{"train.steps": 1, "train.warmup_steps": 0})
    assert pretrain(cfg)["val_clips"] == 72  # 8 batches of 9, for 64
    by_hand.check(cfg, rows, val_rows=rows)


def test_max_bad_share_is_a_share_of_the_videos(rows, tmp_path):
    """Of 7 videos, one of them in two segments, one is cut to nothing after it was indexed: 1/7 is
    allowed, less is not."""
    folder = tmp_path / "videos"
    folder.mkdir()
    each = copies(rows, folder)
    write_index([*each, dataclasses.replace(each[0], frames=9)], tmp_path / "i.jsonl")
    rows = read_index(tmp_path / "i.jsonl")
    (folder / "v2.mp4").write_bytes(b"")
    cfg = config(str(tmp_path / "i.jsonl"), tmp_path / "a", **{"data.max_bad_share": 0.143})
    last = pretrain(cfg)
    by_hand.check(cfg, rows, bad={str(folder / "v2.mp4")})
    assert last["bad_videos"] == 1
    listed = (tmp_path / "a" / "bad_videos.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in listed] == [str(folder / "v2.mp4")]
    strict = config(str(tmp_path / "i.jsonl"), tmp_path / "b", **{"data.max_bad_share": 0.142})
    with pytest.raises(DataError, match="1 of 7"):
        pretrain(strict)


def _poison(monkeypatch, micros):
    """The gradients of these forward passes of the model, counted from 0, are not finite."""
    from mae_fast import model

    count, true = itertools.count(), model.MaskedAutoencoder.forward

    def forward(self, *args, **kwargs):
        loss, *rest = true(self, *args, **kwargs)
        return (Poisoned.apply(loss) if next(count) in micros else loss), *rest

    monkeypatch.setattr(model.MaskedAutoencoder, "forward", forward)


def test_non_finite_steps_count_on_after_a_resume(index, rows, tmp_path, monkeypatch):
    """Step 1 of 2 is skipped; in the second half, step 3. Two are allowed by 2, and not by 1."""
    changes = {"train.steps": 4, "train.max_nonfinite": 2}
    cfg = config(index, tmp_path / "run", **changes)
    _poison(monkeypatch, {3, 6})
    last = pretrain(cfg)
    assert last["nonfinite"] == 2 and [r["nonfinite"] for r in by_hand.rows_of(cfg.output)] == [
        *(0, 1, 1, 2)
    ]
    listed = (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in listed] == [1, 3]
    for line, step in zip(listed, (1, 3), strict=True):
        _, _, paths = by_hand.gradients(cfg, rows, by_hand.new_model(cfg), step, 1)
        assert json.loads(line)["videos"] == sorted(set(paths))
        assert json.loads(line)["grad_norm"] == "nan"
    _, tensors = by_hand.checkpoint(cfg.output, 4)
    assert {float(v) for k, v in tensors.items() if k.startswith("optim.step.")} == {2}
    for step in (3, 4):
        (tmp_path / "run" / f"checkpoint-{step:08d}.safetensors").unlink()
    assert by_hand.checkpoint(cfg.output, 2)[0]["nonfinite"] == 1
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)
    _poison(monkeypatch, {2})
    assert pretrain(cfg)["nonfinite"] == 2
    for step in (3, 4):
        (tmp_path / "run" / f"checkpoint-{step:08d}.safetensors").unlink()
    monkeypatch.undo()
    _poison(monkeypatch, {2})
    with pytest.raises(NonFiniteError, match=r"2 steps .*max_nonfinite 1"):
        pretrain(config(index, tmp_path / "run", **changes | {"train.max_nonfinite": 1}))


def test_tensorboard_and_wandb_get_the_rows(index, tmp_path, monkeypatch):
    """Every row arrives; not installed is said. Neither is on by itself."""
    import types

    got, closed = [], []
    module = types.ModuleType("wandb")

    def init(**options):
        return types.SimpleNamespace(
            log=lambda row, step: got.append((step, row)), finish=lambda: closed.append(options)
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    cfg = config(index, tmp_path / "wandb", **{"train.wandb": True})
    pretrain(cfg)
    assert [row for _, row in got] == by_hand.rows_of(cfg.output) and len(closed) == 1
    assert [step for step, _ in got] == [1, 2, 3, 4]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb"):
        pretrain(config(index, tmp_path / "none", **{"train.wandb": True}))
    scalars, board = [], types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder: types.SimpleNamespace(
        add_scalar=lambda *args: scalars.append(args), close=lambda: closed.append(folder)
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    cfg = config(index, tmp_path / "board", **{"train.tensorboard": True})
    last = pretrain(cfg)
    wanted = {(key, value, 4) for key, value in last.items() if key != "step"}
    assert wanted == {s for s in scalars if s[2] == 4} and closed[-1] == cfg.output
    pretrain(config(index, tmp_path / "neither"))
    assert len(closed) == 2


def test_backends_are_forced_for_the_run(index, tmp_path, monkeypatch):
    from mae_fast.ops import dispatch

    seen, read = [], VideoReader.pictures
    monkeypatch.setattr(
        VideoReader,
        "pictures",
        lambda self, *a: seen.append(dict(dispatch._forced)) or read(self, *a),
    )
    forced = {"layer_norm": "reference"}
    pretrain(config(index, tmp_path / "a", **{"train.backends": forced, "train.steps": 2}))
    assert seen and all(s == forced for s in seen) and dispatch._forced == {}
    with pytest.raises(ConfigError, match="no backend 'nothing'"):
        pretrain(config(index, tmp_path / "b", **{"train.backends": {"layer_norm": "nothing"}}))


def test_a_signal_saves_and_the_next_run_goes_on_as_if_nothing_was(
    base, index, rows, tmp_path, monkeypatch
):
    """Between checkpoints and rows; the handlers of before are back."""
    reads, read, before = [], VideoReader.pictures, signal.getsignal(signal.SIGTERM)

    def interrupted(self, *args):
        reads.append(1)
        if len(reads) == 6:  # four a step: in the second
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, *args)

    monkeypatch.setattr(VideoReader, "pictures", interrupted)
    cfg = config(index, tmp_path / "run", **{"train.log_every": 99, "train.save_every": 99})
    with pytest.raises(Interrupted, match=r"SIGTERM.* [12]"):
        pretrain(cfg)
    assert signal.getsignal(signal.SIGTERM) is before
    (at,) = [r["step"] for r in by_hand.rows_of(cfg.output)]
    assert observed(cfg.output)["saved"] == [at]
    assert pretrain(cfg)["step"] == 4
    assert observed(cfg.output)["end"] == observed(base.output)["end"]
    each = by_hand.rows_of(base.output)
    losses = [np.mean([r["loss"] for r in some]) for some in (each[:at], each[at:])]
    assert [r["loss"] for r in by_hand.rows_of(cfg.output)] == pytest.approx(losses)
    steps = (Path(cfg.output) / "environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [0, at]


@pytest.mark.parametrize("strict", [True, False])
def test_strict_is_the_reader_s(strict, index, tmp_path, monkeypatch):
    """tests/data/test_odd_videos.py has what it does; here, that it arrives."""
    seen, init = [], VideoReader.__init__

    def watched(self, *args, **kwargs):
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        seen.append((bound.arguments["decoder"], bound.arguments["strict"]))
        init(self, *args, **kwargs)

    monkeypatch.setattr(VideoReader, "__init__", watched)
    changes = {"data.strict": strict, "data.decoder": "pyav"}
    pretrain(config(index, tmp_path / "run", **changes, **{"train.steps": 2}))
    assert set(seen) == {("pyav", strict)}


@pytest.mark.parametrize("told", [False, True], ids=["alone", "and_a_signal"])
@pytest.mark.parametrize("after", [0, 2], ids=["at_once", "later"])
def test_a_lost_peer_leaves_what_is_whole(after, told, index, tmp_path, monkeypatch):
    """Two micro-steps a step meet; before any update there is nothing to save, and no traceback.
    A signal that came to this process too is named: it may be what the other died of."""
    meetings = itertools.count()

    def lost(stop, world, heard):
        if next(meetings) == 2 * after:
            if told:
                os.kill(os.getpid(), signal.SIGUSR1)
            raise distributed.PeerLost("it died")
        return stop

    monkeypatch.setattr(distributed, "agree", lost)
    cfg = config(index, tmp_path / "run", **{"train.save_every": 99})
    words = r"another process was lost \(it died\) " + ("after step 2, which", "before")[not after]
    with pytest.raises(Interrupted, match=("stopped by SIGUSR1, and " if told else "^") + words):
        pretrain(cfg)
    assert [p.name[11:19] for p in (tmp_path / "run").glob("checkpoint-*")] == [
        f"{after:08d}" for _ in range(after and 1)
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_who_saves_says_that_it_is_saved(rank, tmp_path):
    """A rank that lost another may have lost the one that writes."""
    run = object.__new__(train.Pretraining)
    run.step, run.world, run.folder = 7, World(rank, 2, torch.device("cpu")), tmp_path
    (tmp_path / "checkpoint-00000004.safetensors").touch()
    assert "7, which is saved" in str(run._interrupted(signal.SIGTERM))
    words = ("which is saved", "and the same command goes on from checkpoint-00000004")[rank]
    assert str(run._interrupted(0, "lost")).startswith(f"lost after step 7, {words}")


def test_a_step_is_saved_once(index, tmp_path, monkeypatch):
    """A run that must leave right after a checkpoint does not write it again."""
    written, reads, save, read = [], itertools.count(1), checkpoint.save, VideoReader.pictures

    def watched(folder, step, *rest):
        written.append(step)
        return save(folder, step, *rest)

    def interrupted(self, *args):
        if next(reads) == 9:  # four a step: the first of the third
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, *args)

    monkeypatch.setattr(checkpoint, "save", watched)
    monkeypatch.setattr(VideoReader, "pictures", interrupted)
    with pytest.raises(Interrupted, match="after step 2"):
        pretrain(config(index, tmp_path / "run"))
    assert written == [1, 2]


def test_more_steps_than_a_name_can_count_are_refused(index, tmp_path):
    with pytest.raises(ConfigError, match=r"100000000 steps.*eight digits"):
        pretrain(config(index, tmp_path / "run", **{"train.steps": 10**8}))
    assert not (tmp_path / "run").exists()


def test_probes_judge_a_run_and_change_nothing(base, index, rows, tmp_path, monkeypatch):
    """Every third step and at the end, from the encoder as it then is; the run is the base's."""
    changes = labelled(rows, tmp_path) | {"eval.probe": 3}
    cfg = config(index, tmp_path / "run", **changes, **{"train.log_every": 99})
    judge = probe.judge

    def of_whole_pictures(net, train, test, clips, **how):
        assert clips.short_side == 0 != cfg.data.short_side  # the model's own
        assert (len(train), len(test), how["seed"]) == (4, 3, cfg.train.seed)
        return judge(net, train, test, clips, **how)

    monkeypatch.setattr(probe, "judge", of_whole_pictures)
    row = pretrain(cfg)
    probed = [r["step"] for r in by_hand.rows_of(cfg.output) if "probe_knn" in r]
    assert probed == [3, 4] and row["step"] == 4
    assert all(0 <= row[key] <= 1 for key in ("probe_knn", "probe_linear"))
    before, got = observed(base.output), observed(cfg.output)
    assert {key for key in got if got[key] != before[key]} <= {"logged"}
    again = json.loads((tmp_path / "run" / "config.json").read_text())["eval"]
    assert again["probe"] == 3
    with pytest.raises(ConfigError, match=r"needs eval\.train_index and eval\.test_index"):
        EvalConfig(probe=1, train_index="x")
    bare = changes | {"eval.test_index": index}
    with pytest.raises(DataError, match="is none of the classes"):
        pretrain(config(index, tmp_path / "bare", **bare))
    assert not (tmp_path / "bare").exists()
    with pytest.raises(DataError, match="has no label"):
        pretrain(config(index, tmp_path / "bare", **changes | {"eval.train_index": index}))


def test_what_a_rank_was_loading_is_named_by_weight(index, rows, tmp_path):
    cfg = config(index, tmp_path / "run")
    run = object.__new__(train.Pretraining)
    run.cfg, run.world, run.step = cfg, World(0, 1, torch.device("cpu")), 0
    run.rows = [dataclasses.replace(r, weight=9.0 if i == 0 else 1.0) for i, r in enumerate(rows)]
    run.weights = weights_of(run.rows)
    run.total, run.signals = cfg.train.steps, types.SimpleNamespace(look_up=lambda: None)
    for micro, batch in enumerate(run._loader()):
        said = run._awaited(*divmod(micro, cfg.train.accum_steps))
        assert all(path in said for path in batch.paths), (said, batch.paths)
    assert micro == 7
