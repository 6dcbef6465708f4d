"""A step as one graph: the rehearsal on a CPU computes what the eager loop does, and refuses what a
capture would."""

import contextlib
import inspect
import types

import pytest
import torch

from mae_fast import graph
from mae_fast.config import TrainConfig
from mae_fast.errors import BackendError
from mae_fast.graph import GraphedStep, count_launches
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.optim import clipped_step, make_optimizer

STEPS = 10


def _trainer(cfg, rate=None):
    """(step(video, ids_keep, ids_mask) -> (loss, norm), set_lr, model) of a tiny model; `rate` says
    what the step reads as its learning rate, which is a tensor unless told otherwise."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(cfg)
    optimizer, lr = make_optimizer(model, TrainConfig()), torch.zeros(())

    def step(video, ids_keep, ids_mask):
        loss = model(video, ids_keep=ids_keep, ids_mask=ids_mask)[0]
        loss.backward()
        return loss.detach(), clipped_step(optimizer, rate(lr) if rate else lr, 1.0)

    return step, lr.fill_, model


def _inputs(cfg, step, clips=2):
    generator = torch.Generator().manual_seed(step)
    size = (clips, 3, cfg.num_frames, cfg.img_size, cfg.img_size)
    video = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    samples = torch.arange(step * clips, (step + 1) * clips)
    return video, *draw_ids("random", cfg.grid, 0.5, seed=0, step=step, samples=samples)


def _losses(cfg, step, set_lr):
    out = []
    for i in range(STEPS):
        set_lr(1e-3 * (i + 1))
        out.append(torch.stack(step(*_inputs(cfg, i))))
    return torch.stack(out)


def test_ten_steps_are_the_eager_ones_bit_for_bit(tiny_cfg):
    step, set_lr, eager = _trainer(tiny_cfg)
    expected = _losses(tiny_cfg, step, set_lr)
    step, set_lr, model = _trainer(tiny_cfg)
    graphed = GraphedStep(step, "cpu")
    assert torch.equal(_losses(tiny_cfg, graphed, set_lr), expected)
    assert graphed.graph is not None and expected[0, 0] > expected[-1, 0]
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is None


def test_a_frozen_number_shows_in_the_rehearsal(tiny_cfg):
    """A learning rate that is a Python number stays what it was at the capture."""
    step, set_lr, _ = _trainer(tiny_cfg)
    expected = _losses(tiny_cfg, step, set_lr)
    step, set_lr, _ = _trainer(tiny_cfg, torch.Tensor.tolist)
    got = _losses(tiny_cfg, GraphedStep(step, "cpu", warmup=3), set_lr)
    # Steps 0 to 2 are warm-up, 3 is captured, and 4 is the first with another's rate.
    assert torch.allclose(got[:5], expected[:5]) and not torch.allclose(got[5:], expected[5:])


def test_a_step_that_is_not_finite_is_skipped_inside_the_graph(tiny_cfg):
    step, set_lr, model = _trainer(tiny_cfg)
    graphed = GraphedStep(step, "cpu", warmup=1)
    set_lr(1e-3)

    def run(i, bad):
        video, *ids = _inputs(tiny_cfg, i)
        loss_and_norm = graphed(video / 255 + (float("nan") if bad else 0), *ids)
        return loss_and_norm[1], [p.detach().clone() for p in model.parameters()]

    (_, _), (_, before), (norm, bad), (_, after) = (run(i, i == 2) for i in range(4))
    assert graphed.graph is not None and norm.isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, bad, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(bad, after, strict=True))


@pytest.mark.parametrize(
    "waits",
    [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0])],
    ids=["item", "boolean_index", "tensor_from_the_host"],
)
def test_what_makes_the_host_wait_is_refused(waits):
    graphed = GraphedStep(lambda x: (waits(x),), "cpu", warmup=1)
    graphed(torch.ones(3))
    with pytest.raises(BackendError, match="cannot be captured as a CUDA graph: aten"):
        graphed(torch.ones(3))


def test_inputs_of_another_shape_run_as_they_are(caplog):
    graphed = GraphedStep(lambda x: (x * 2,), "cpu", warmup=0)
    one = graphed(torch.ones(3))[0]
    for _ in range(2):
        assert torch.equal(graphed(torch.ones(5))[0], torch.full((5,), 2.0))
    assert torch.equal(graphed(torch.full((3,), 2.0))[0], torch.full((3,), 4.0))
    assert torch.equal(one, torch.full((3,), 2.0))  # a copy, which the next step leaves alone
    lines = [r.getMessage() for r in caplog.records]
    assert lines == [
        "a step runs without its CUDA graph: inputs are float32 [5], and its buffers float32 [3]"
    ]


def test_what_is_asked_of_cuda_and_in_which_order(monkeypatch):
    """The lines that need a GPU, on stand-ins: warm-up and capture share one stream, which waits
    for the inputs, and is waited for."""
    said, real = [], inspect.signature(torch.cuda.graph)

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream):
        said.append(f"on {stream.name}")
        yield

    @contextlib.contextmanager
    def capture(*args, **kwargs):
        given = real.bind(*args, **kwargs).arguments
        said.append(f"capture on {given['stream'].name}, {given['capture_error_mode']}")
        with given["cuda_graph"]:
            yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph.Tape)
    graphed = GraphedStep(lambda x: (x * 2,), "cpu", warmup=1)
    graphed.stream = Stream("side")
    for i in range(3):
        assert torch.equal(graphed(torch.full((2,), float(i)))[0], torch.full((2,), 2.0 * i))
    assert said == [
        "side waits for main",
        "on side",
        "main waits for side",
        "capture on side, thread_local",
    ]


def test_why_a_step_is_not_captured():
    assert "cpu, which has no CUDA graphs" in graph.why_not(torch.device("cpu"))
    assert "2 processes" in graph.why_not(torch.device("cuda"), 2)
    assert graph.why_not(torch.device("cuda")) is None


def test_launches_are_counted_by_name(monkeypatch):
    """By torch.profiler's names; without a GPU there are none to count."""
    assert torch.cuda.is_available() or count_launches(lambda: torch.ones(3) * 2) == {}

    class Profile:
        def __init__(self, activities):
            self.calls = []

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def key_averages(self):
            names = {"cudaLaunchKernel": 700, "cudaGraphLaunch": 1, "aten::mm": 96, "cudaFree": 2}
            return [types.SimpleNamespace(key=k, count=n) for k, n in names.items()]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert count_launches(list) == {"cudaLaunchKernel": 700, "cudaGraphLaunch": 1}
