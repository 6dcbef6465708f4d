"""One batch ahead on a stream of its own: the order of events, by stand-ins of stream and event."""

import contextlib
import signal
from dataclasses import replace
from unittest import mock

import pytest
import torch

from mae_fast.checkpoint import latest
from mae_fast.config import Config, DataConfig, MaskConfig, ModelConfig, TrainConfig
from mae_fast.data import build_index
from mae_fast.data.loader import Batch
from mae_fast.data.prefetch import DevicePrefetch
from mae_fast.errors import DataError, Interrupted
from mae_fast.run import Run
from mae_fast.train import pretrain

COPYING, COMPUTING = "copying", "computing"


class Stream:
    """Writes down what is asked of it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def record_event(self):
        self.log.append((self.name, "records", sum(e[1] == "records" for e in self.log)))
        return self.log[-1][2]

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event))


@pytest.fixture
def log(monkeypatch):
    """What streams and batches do, in order; a DevicePrefetch on any device has its stream."""
    log, active = [], [COMPUTING]
    streams = {name: Stream(name, log) for name in (COPYING, COMPUTING)}

    @contextlib.contextmanager
    def stream(found):
        active.append(found.name)
        yield
        active.pop()

    def to(self, device, non_blocking=False):
        log.append((active[-1], "copies" if non_blocking else "waits and copies", self.paths[0]))
        return replace(self, placed=self.table)

    def make(self, batches, device):
        self.batches, self.device, self.found = iter(batches), device, None
        self.stream = streams[COPYING]

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[COMPUTING])
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(DevicePrefetch, "__init__", make)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, found: log.append((found.name, "keeps", str(self.dtype))),
    )
    return log


def batch(k):
    frames = [torch.full((1, 2, 2, 3), k, dtype=torch.uint8)]
    box, flip = torch.tensor([[0, 0, 2, 2]]), torch.zeros(1)
    return Batch.of_rgb(frames, box, flip, torch.tensor([k]), [f"{k}"], [])


def handed_over(k):
    kept = [(COMPUTING, "keeps", f"torch.{dtype}") for dtype in ("uint8", "int64")]
    return [(COMPUTING, "waits for", k), *kept]


def copied(k):
    return [(COPYING, "copies", str(k)), (COPYING, "records", k)]


def test_the_next_batch_is_copied_behind_the_step_and_waited_for_by_its_own(log):
    batches = DevicePrefetch(map(batch, range(3)), torch.device("cuda"))
    for k, found in enumerate(batches):
        assert found.paths == [str(k)]
        log.append(("step", k, None))
        batches.ahead()
        batches.ahead()  # once is enough
    assert log == [
        *copied(0),
        *(*handed_over(0), ("step", 0, None), *copied(1)),
        *(*handed_over(1), ("step", 1, None), *copied(2)),
        *(*handed_over(2), ("step", 2, None)),
    ]


def test_an_error_ahead_is_that_of_the_batch_it_belongs_to(log):
    """Raised behind a step, it would leave weights that are a step ahead of their number."""

    def broken():
        yield batch(0)
        raise DataError("gone")

    batches = DevicePrefetch(broken(), torch.device("cuda"))
    assert next(batches).paths == ["0"]
    batches.ahead()
    with pytest.raises(DataError, match="gone"):
        next(batches)


def test_on_a_cpu_nothing_is_fetched_ahead():
    fetched = []
    batches = DevicePrefetch((fetched.append(k) or batch(k) for k in range(2)), torch.device("cpu"))
    next(batches)
    batches.ahead()
    assert fetched == [0]
    assert [b.paths for b in batches] == [["1"]]


def test_a_run_with_copies_ahead_is_the_run_without(folder, tmp_path, request):
    """Draws, accumulation, a stop and its resumption: the same losses and weights, bit for bit."""
    cfg = ModelConfig(
        img_size=32, patch_size=16, num_frames=4, pred_t_dim=2, embed_dim=32, depth=1,
        num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2,
    )  # fmt: skip
    build_index([folder], tmp_path / "i.jsonl", progress=False)
    data = DataConfig(index=str(tmp_path / "i.jsonl"), repeat_aug=2, workers=0, sampling_rate=2)
    train = TrainConfig(batch_size=1, steps=5, warmup_steps=1, accum_steps=2, log_every=1, blr=0.1)

    def run(name):
        return pretrain(
            Config(
                output=str(tmp_path / name),
                model=cfg,
                mask=MaskConfig(ratio=0.5),
                data=data,
                train=train,
            )
        )

    plain = run("plain")
    log, one_step = request.getfixturevalue("log"), Run._one_step

    def stopped_in_the_third(self, *args):
        one_step(self, *args)
        log.append(("step", self.step, None))
        self.signals.told = signal.SIGTERM if self.step == 2 and not resumed else 0

    resumed = False
    with mock.patch.object(Run, "_one_step", stopped_in_the_third):
        with pytest.raises(Interrupted):
            run("ahead")
        resumed = True
        ahead = run("ahead")
    assert ahead["loss"] == plain["loss"] and ahead["grad_norm"] == plain["grad_norm"]
    first, second = (latest(tmp_path / name)[1] for name in ("plain", "ahead"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    copies = [e for e in log if e[1] == "copies"]
    # Three steps and the one ahead that the stop left; two steps, and nothing ahead of the last.
    assert len(copies) == (3 * 2 + 1) + 2 * 2
    at = [i for i, e in enumerate(log) if e[1] == "copies"]
    assert at[1] < log.index(("step", 0, None)) < at[2] < log.index(("step", 1, None))
