"""Seven videos, their index, and the base run of them."""

import by_hand
import numpy as np
import pytest
from base_run import config

from mae_fast import metrics
from mae_fast.data import VideoRow, read_index, write_index
from mae_fast.train import pretrain

RATES = (30, 25, 15)


def _texture(k, height, width):
    """Frame k: coarse noise, so that every frame, place and side looks different."""
    coarse = np.random.default_rng(k).integers(
        20, 235, (height // 4, width // 4, 3), dtype=np.uint8
    )
    return coarse.repeat(4, 0).repeat(4, 1)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def index(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "index.jsonl"
    return _index([(videos / f"v{i}.mp4", 20 + i, RATES[i % 3]) for i in range(7)], out)


@pytest.fixture(scope="session")
def rows(index):
    return read_index(index)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the picture of the curves."""
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


@pytest.fixture(scope="session")
def base(index, rows, tmp_path_factory):
    """The base run, held against by_hand."""
    cfg = config(index, tmp_path_factory.mktemp("base") / "run")
    pretrain(cfg)
    by_hand.check(cfg, rows)
    return cfg
