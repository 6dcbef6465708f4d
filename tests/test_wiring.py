"""Every field of the configuration changes what it should and nothing else.

Runs are held, step by step, against tests/wiring/by_hand.py, on one process and on two. FIELDS has
a case for each field: a field without one fails.
"""

import dataclasses
import inspect
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import by_hand
import numpy as np
import pytest
import torch
from small_runs import Poisoned

from mae_fast import checkpoint, distributed, metrics, train
from mae_fast.config import Config, EvalConfig
from mae_fast.config_file import SECTIONS
from mae_fast.data import VideoReader, VideoRow, read_index, write_index
from mae_fast.distributed import World
from mae_fast.errors import ConfigError, DataError, Interrupted, NonFiniteError
from mae_fast.train import pretrain

# Four steps: the rate is 0 (so the first checkpoint holds the first weights), half, whole, half.
BASE = {
    "model": dict(
        img_size=16,
        patch_size=8,
        num_frames=4,
        t_patch_size=2,
        pred_t_dim=2,
        embed_dim=16,
        depth=1,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    ),
    "mask": dict(ratio=0.5),
    "data": dict(repeat_aug=2, sampling_rate=2, crop_area=(0.3, 0.9), crop_aspect=(0.5, 1.5)),
    "train": dict(
        batch_size=2,
        accum_steps=2,
        steps=4,
        warmup_steps=2,
        blr=0.5,
        clip_grad=0.5,
        device="cpu",
        log_every=1,
        save_every=1,
        keep=99,
        seed=3,
    ),
    "eval": {},
}


RATES = (30, 25, 15)


def _texture(k, height, width):
    """Frame k: coarse noise, so that every frame, place and side looks different."""
    coarse = np.random.default_rng(k).integers(
        20, 235, (height // 4, width // 4, 3), dtype=np.uint8
    )
    return coarse.repeat(4, 0).repeat(4, 1)


@pytest.fixture(scope="module")
def videos(video, tmp_path_factory):
    """Seven short videos, wide and tall, at three rates."""
    folder = tmp_path_factory.mktemp("wiring")
    for i in range(7):
        width, height = ((48, 32), (32, 48), (64, 32))[i % 3]
        make = lambda k, h, w, i=i: _texture(100 * i + k, h, w)  # noqa: E731
        size = dict(width=width, height=height)
        video.write(folder / f"v{i}.mp4", 20 + i, rate=RATES[i % 3], make=make, **size)
    return folder


def _index(videos, out) -> str:
    """The index of (path, frames, rate): build_index would start a process."""
    write_index([VideoRow(str(path), frames=n, fps=float(rate)) for path, n, rate in videos], out)
    return str(out)


def _copies(rows, folder) -> list[VideoRow]:
    """The same videos in another folder."""
    copies = []
    for row in rows:
        path = folder / Path(row.path).name
        path.write_bytes(Path(row.path).read_bytes())
        copies.append(dataclasses.replace(row, path=str(path)))
    return copies


@pytest.fixture(scope="module")
def index(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "index.jsonl"
    return _index([(videos / f"v{i}.mp4", 20 + i, RATES[i % 3]) for i in range(7)], out)


@pytest.fixture(scope="module")
def rows(index):
    return read_index(index)


def config(index, output, **changes) -> Config:
    """The base with changes, each named `section.field`."""
    values = {name: dict(fields) for name, fields in BASE.items()}
    values["data"]["index"] = index
    values["data"]["workers"] = 0
    for name, value in changes.items():
        section, field = name.split(".")
        values[section][field] = value
    return Config(
        output=str(output), **{name: cls(**values[name]) for name, cls in SECTIONS.items()}
    )


def observed(folder) -> dict:
    """What a run shows: two runs that differ in a field differ in some of these."""
    rows = [r for r in by_hand.rows_of(folder) if r["step"]]
    files = sorted(Path(folder).glob("checkpoint-*.safetensors"))
    numbers = [int(f.name[11:19]) for f in files]
    tensors = [by_hand.checkpoint(folder, n)[1] for n in numbers]

    def values(which, prefix):
        return [(k, v.tolist()) for k, v in by_hand.part(tensors[which], prefix).items()]

    return {
        "start": values(0, "model."),
        "loss": rows[0]["loss"],
        "norm": rows[0]["grad_norm"],
        "m": values(0, "optim.exp_avg."),
        "v": values(0, "optim.exp_avg_sq."),
        "lr": [r["lr"] for r in rows],
        "end": values(-1, "model."),
        "logged": [r["step"] for r in rows],
        "saved": numbers,
        "epoch": rows[-1]["epoch"] / rows[-1]["step"],
        "clips": round(rows[-1]["clips_per_s"] * rows[-1]["step_seconds"]),
        "held out": [r["val_loss"] for r in rows if "val_loss" in r],
    }


# What a change of the pixels or of the mask changes: the first loss and all that follows from it.
STEP = {"loss", "norm", "m", "v", "end"}
MODEL = STEP | {"start"}
BATCH = STEP | {"lr", "epoch", "clips"}
NOTHING: set[str] = set()
TOKENS = {"model.target": "tokens", "model.tokenizer": "toy_tokenizer:make"}

# field: (what is set, what of `observed` is then another). The run is held against by_hand too.
FIELDS = {
    "model.variant": ({"model.variant": "slowfast"}, MODEL),
    "model.img_size": ({"model.img_size": 24}, MODEL),
    "model.patch_size": ({"model.patch_size": 4}, MODEL),
    "model.num_frames": ({"model.num_frames": 2}, MODEL),
    "model.t_patch_size": ({"model.t_patch_size": 4}, MODEL),
    "model.pred_t_dim": ({"model.pred_t_dim": 4}, MODEL),
    "model.embed_dim": ({"model.embed_dim": 8}, MODEL),
    "model.depth": ({"model.depth": 2}, MODEL),
    "model.num_heads": ({"model.num_heads": 4}, STEP),
    "model.decoder_embed_dim": ({"model.decoder_embed_dim": 8}, MODEL),
    "model.decoder_depth": ({"model.decoder_depth": 2}, MODEL),
    "model.decoder_num_heads": ({"model.decoder_num_heads": 4}, STEP),
    "model.mlp_ratio": ({"model.mlp_ratio": 2.0}, MODEL),
    "model.norm_pix_loss": ({"model.norm_pix_loss": False}, STEP),
    "model.sep_pos_embed": ({"model.sep_pos_embed": False}, MODEL),
    "model.cls_embed": ({"model.cls_embed": False}, MODEL),
    "model.no_qkv_bias": ({"model.no_qkv_bias": True}, MODEL),
    "model.trunc_init": ({"model.trunc_init": True}, MODEL),
    "model.target": ({"model.target": "pixels_by_channel"}, STEP),
    "model.tokenizer": (TOKENS, MODEL),
    "model.vocabulary": (TOKENS | {"model.vocabulary": 40}, MODEL),
    "mask.strategy": ({"mask.strategy": "tube"}, STEP),
    "mask.ratio": ({"mask.ratio": 0.75}, STEP),
    "mask.decoder": ({"mask.decoder": "random"}, STEP),
    "mask.decoder_ratio": ({"mask.decoder": "random", "mask.decoder_ratio": 0.25}, STEP),
    "mask.per_clip": ({"mask.per_clip": 2}, STEP),
    "data.sampling_rate": ({"data.sampling_rate": 1}, STEP),
    "data.target_fps": ({"data.target_fps": 60.0}, STEP),
    "data.repeat_aug": ({"data.repeat_aug": 3}, STEP | {"clips"}),
    "data.span_seconds": ({"data.span_seconds": 0.4}, STEP),
    "data.short_side": ({"data.short_side": 20}, STEP),
    "data.crop_area": ({"data.crop_area": (0.2, 0.3)}, STEP),
    "data.crop_aspect": ({"data.crop_aspect": (1.5, 2.0)}, STEP),
    "data.flip": ({"data.flip": 1.0}, STEP),
    "data.decoder": ({"data.decoder": "pyav"}, NOTHING),
    # Of sound videos; tests/data/test_odd_videos.py has damaged ones.
    "data.strict": ({"data.strict": False}, NOTHING),
    "data.workers": ({"data.workers": 1}, NOTHING),
    "train.batch_size": ({"train.batch_size": 3}, BATCH),
    "train.accum_steps": ({"train.accum_steps": 3}, BATCH),
    "train.epochs": (
        {"train.steps": 0, "train.epochs": 1.8, "train.warmup_epochs": 8 / 7},
        {"lr", "end", "logged", "saved"},
    ),
    "train.warmup_epochs": (
        {"train.steps": 0, "train.epochs": 16.5 / 7, "train.warmup_epochs": 6 / 7},
        {"lr", "end"},
    ),
    "train.steps": ({"train.steps": 5}, {"lr", "end", "logged", "saved"}),
    "train.warmup_steps": ({"train.warmup_steps": 1}, {"lr", "end"}),
    "train.blr": ({"train.blr": 0.25}, {"lr", "end"}),
    "train.min_lr": ({"train.min_lr": 0.001}, {"lr", "end"}),
    "train.weight_decay": ({"train.weight_decay": 0.5}, {"end"}),
    "train.betas": ({"train.betas": (0.8, 0.9)}, {"m", "v", "end"}),
    "train.eps": ({"train.eps": 1e-2}, {"end"}),
    "train.clip_grad": ({"train.clip_grad": 0.01}, {"m", "v", "end"}),
    "train.ema_momentum": ({"model.target": "features", "train.ema_momentum": 0.7}, MODEL),
    "train.precision": ({"train.precision": "bf16"}, STEP),
    "train.device": ({"train.device": "auto"}, NOTHING),
    # Of one process; tests/test_sharded.py has two and four.
    "train.shard": ({"train.shard": "full"}, NOTHING),
    "train.give_up": ({"train.give_up": 99.0}, NOTHING),
    "train.cuda_graph": ({"train.cuda_graph": "off"}, NOTHING),
    "train.seed": ({"train.seed": 4}, MODEL),
    "train.log_every": ({"train.log_every": 3, "train.save_every": 99}, {"logged"}),
    "train.save_every": ({"train.save_every": 2}, {"saved", "start", "m", "v"}),
    "train.async_save": ({"train.async_save": False}, NOTHING),
    "train.keep": ({"train.keep": 2}, {"saved", "start", "m", "v"}),
}


# Fields that a comparison of two runs does not show: the test that holds them.
ELSEWHERE = {
    "output": "test_a_run_is_in_its_folder",
    "model.in_chans": "test_in_chans_is_the_model_s",
    "data.index": "test_another_index_is_another_run",
    "data.val_index": "test_held_out_videos_are_those_of_val_index",
    "data.max_bad_share": "test_max_bad_share_is_a_share_of_the_videos",
    "train.max_nonfinite": "test_non_finite_steps_count_on_after_a_resume",
    "train.tensorboard": "test_tensorboard_and_wandb_get_the_rows",
    "train.wandb": "test_tensorboard_and_wandb_get_the_rows",
    "train.backends": "test_backends_are_forced_for_the_run",
    "eval.probe": "test_probes_judge_a_run_and_change_nothing",
    "eval.train_index": "test_probes_judge_a_run_and_change_nothing",
    "eval.test_index": "test_probes_judge_a_run_and_change_nothing",
}
# What a resumed run may change.
FREE = {
    "output",
    "data.workers",
    "data.max_bad_share",
    "data.index",
    "data.val_index",
    "train.device",
    "train.shard",
    "train.give_up",
    "train.cuda_graph",
    "train.log_every",
    "train.save_every",
    "train.async_save",
    "train.keep",
    "train.max_nonfinite",
    "train.tensorboard",
    "train.wandb",
    "eval.probe",
    "eval.train_index",
    "eval.test_index",
}


def _fields(cls=Config, prefix=""):
    for f in dataclasses.fields(cls):
        if f.name in SECTIONS and not prefix:
            yield from _fields(SECTIONS[f.name], f.name + ".")
        else:
            yield prefix + f.name


def test_every_field_has_a_case():
    assert set(_fields()) == FIELDS.keys() | ELSEWHERE.keys()
    assert not FIELDS.keys() & ELSEWHERE.keys()
    assert all(callable(globals().get(test)) for test in ELSEWHERE.values())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the picture of the curves."""
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


@pytest.fixture(scope="module")
def base(index, rows, tmp_path_factory):
    """The base run, held against by_hand."""
    cfg = config(index, tmp_path_factory.mktemp("base") / "run")
    pretrain(cfg)
    by_hand.check(cfg, rows)
    return cfg


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
    """Of 7 videos one is cut to nothing after it was indexed: 1/7 is allowed, less is not."""
    copies = tmp_path / "videos"
    copies.mkdir()
    write_index(_copies(rows, copies), tmp_path / "i.jsonl")
    rows = read_index(tmp_path / "i.jsonl")
    (copies / "v2.mp4").write_bytes(b"")
    cfg = config(str(tmp_path / "i.jsonl"), tmp_path / "a", **{"data.max_bad_share": 0.143})
    last = pretrain(cfg)
    by_hand.check(cfg, rows, bad={str(copies / "v2.mp4")})
    assert last["bad_videos"] == 1
    listed = (tmp_path / "a" / "bad_videos.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in listed] == [str(copies / "v2.mp4")]
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


def _labelled(rows, folder) -> dict[str, str]:
    """Indexes for the probes, of the same videos: two classes."""
    named = [dataclasses.replace(r, label="ab"[i % 2]) for i, r in enumerate(rows)]
    for name, some in (("train", named[:4]), ("test", named[4:])):
        write_index(some, folder / f"probe_{name}.jsonl")
    return {f"eval.{name}_index": str(folder / f"probe_{name}.jsonl") for name in ("train", "test")}


def test_probes_judge_a_run_and_change_nothing(base, index, rows, tmp_path):
    """Every third step and at the end, from the encoder as it then is; the run is the base's."""
    changes = _labelled(rows, tmp_path) | {"eval.probe": 3}
    cfg = config(index, tmp_path / "run", **changes, **{"train.log_every": 99})
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


@pytest.fixture(scope="module")
def two(rows, index, tmp_path_factory):
    """Runs of two ranks in one pair of processes: {name: (cfg, rank 0's result, rank 1's)}."""
    folder = tmp_path_factory.mktemp("two")
    bad = folder / "videos"
    bad.mkdir()
    write_index(_copies(rows, bad), folder / "bad.jsonl")
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
    }
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


# The walks over all fields, last: what they see first is seen by the others too.


@pytest.mark.parametrize("field", sorted(set(_fields()) - {"model.in_chans"}))
def test_on_resume_a_field_is_free_or_refused(field, base, index, tmp_path, caplog):
    """Of the base's last checkpoint: its run is over, so that nothing is computed."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint-00000004.safetensors", "metrics.jsonl", "config.json"):
        (folder / name).symlink_to(Path(base.output) / name)
    special = {
        "train.backends": {"layer_norm": "reference"},
        "data.max_bad_share": 0.5,
        "data.val_index": index,
        "train.max_nonfinite": 5,
        "train.tensorboard": True,
        "train.wandb": True,
        "train.epochs": 7.0,
        "train.warmup_epochs": 2.0,
        "train.save_every": 2,
        "train.log_every": 3,
        "eval.train_index": index,
        "eval.test_index": index,
    }
    changes = FIELDS.get(field, ({},))[0]
    if field == "eval.probe":
        changes = _labelled(read_index(index), tmp_path) | {field: 1}
    if field in special:
        changes = {field: special[field]}
    cfg = config(index, folder, **changes)
    if field in FREE:
        assert pretrain(cfg) == by_hand.rows_of(base.output)[-1]
        assert "all 4 steps are done already" in caplog.text
        assert (folder / "config.json").is_symlink()  # what the run began with
    else:
        with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
            pretrain(cfg)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changes_what_it_should_and_nothing_else(field, base, index, rows, tmp_path):
    changes, wanted = FIELDS[field]
    cfg = config(index, tmp_path / "run", **changes)
    pretrain(cfg)
    before, got = observed(base.output), observed(cfg.output)
    if field == "train.log_every":  # the rows are others: test_a_row_is_of_the_steps_since_the_last
        assert (got["logged"], got["saved"]) == ([3, 4], [4]) and got["end"] == before["end"]
        return
    assert {key for key in got if got[key] != before[key]} == wanted
    if len(got["saved"]) == got["saved"][-1]:
        by_hand.check(cfg, rows)
