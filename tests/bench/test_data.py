"""`bench data`: a clip's time by stage."""

from types import SimpleNamespace

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
