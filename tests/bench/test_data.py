"""`bench data`: a clip's time by stage."""

import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from mae_fast.bench import data
from mae_fast.data.decode import VideoReader
from mae_fast.data.loader import ClipDataset, join
from mae_fast.data.packed import PackReader

# Seconds of functions, what they call included.
EITHER = {join: 2.0, ClipDataset.__getitem__: 100.0}
PACK = {PackReader.pictures: 60.0, PackReader.frames: 40.0}
PACK |= {PackReader._table: 3.0, PackReader._bytes: 4.0}
FILES = {VideoReader.pictures: 60.0, VideoReader._read_pyav: 40.0}
FILES |= {VideoReader.__init__: 8.0, VideoReader.close: 1.0}


@pytest.mark.parametrize(
    ("taken", "stages"),
    [
        (PACK, {"read": 7, "decode": 33, "planes": 20, "sample, copy, join": 42}),
        (FILES, {"open": 9, "decode": 40, "planes": 20, "sample, copy, join": 33}),
    ],
    ids=["pack", "files"],
)
def test_each_stage_is_without_those_within_it(taken, stages, monkeypatch):
    class Profile:
        def __init__(self, timer, builtins):
            assert timer is data.time.process_time and not builtins

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def getstats(self):
            every = EITHER | taken
            return [SimpleNamespace(code=f.__code__, totaltime=t) for f, t in every.items()]

    monkeypatch.setattr(data.cProfile, "Profile", Profile)
    found = data._stages(None, 0)
    assert found == stages
    assert sum(found.values()) == sum(EITHER.values())


def test_a_core_s_rate_is_by_processor_time_of_all_processes(monkeypatch):
    times = iter(
        (os.times_result((1, 1, 1, 1, 5.0)), os.times_result((1.5, 1.25, 1.75, 1.5, 15.0)))
    )
    monkeypatch.setattr(data.os, "times", lambda: next(times))
    monkeypatch.setattr(data, "make_loader", lambda *args, **how: [[0] * 3, [0] * 2])
    found = data._round([], data.DataConfig(), 2, 0)
    assert (found["clips"], found["clips_per_s"], found["clips_per_s_core"]) == (5, 0.5, 2.5)


def test_stages_are_of_a_clip(monkeypatch):
    """Of the least round, over the clips of each video."""
    dataset = MagicMock(cfg=SimpleNamespace(repeat_aug=4))
    rounds, videos = iter((6.0, 3.0, 9.0)), data._STAGED // 4
    monkeypatch.setattr(data, "_stages", lambda dataset, videos: {"decode": next(rounds)})
    monkeypatch.setattr(data, "join", lambda batches: MagicMock())
    monkeypatch.setattr(data, "cpu_time", lambda function: 1.0)
    found = data.stages(dataset)
    assert found == pytest.approx({"decode": 3000 / videos / 4, "patches": 1000 / videos / 4})


def test_bytes_are_those_of_a_clip(monkeypatch):
    """Of the videos that were read, over the clips of each."""
    read = iter((1000, 9000))
    monkeypatch.setattr(data, "_bytes_read", lambda: next(read))
    seconds = iter((0.0, 0.0, 0.5, 1.0, 1.0))
    monkeypatch.setattr(data.time, "process_time", lambda: next(seconds))
    monkeypatch.setattr(data, "ClipDataset", lambda *args, **how: MagicMock())
    one = {"clips_per_s_core": 2.0, "clips_per_s": 1.0, "clips": 8, "memory_mb": 1.0}
    monkeypatch.setattr(data, "_round", lambda *args: one)
    monkeypatch.setattr(data, "_forget", lambda rows: False)
    monkeypatch.setattr(data, "stages", lambda dataset: {})
    found = data.measure([], data.DataConfig(repeat_aug=4), 1.0, 1)
    assert found["bytes_a_clip"] == 8000 / 2 / 4
