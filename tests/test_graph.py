"""A function as one graph: the rehearsal on a CPU refuses what a capture would. test_step.py has
the training step as graphs."""

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch

from mae_fast import graph
from mae_fast.errors import BackendError
from mae_fast.graph import Graphed, Side, count_launches

SIDE = Side(torch.device("cpu"))


@pytest.mark.parametrize(
    "waits",
    [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0])],
    ids=["item", "boolean_index", "tensor_from_the_host"],
)
def test_what_makes_the_host_wait_is_refused(waits):
    graphed = Graphed(waits, SIDE)
    with pytest.raises(BackendError, match="cannot be captured as a CUDA graph: aten"):
        graphed(torch.ones(3))


def test_inputs_are_copied_in_and_the_output_out():
    graphed = Graphed(lambda x: x * 2, SIDE)
    one = graphed(torch.ones(3))
    assert torch.equal(graphed(torch.full((3,), 2.0)), torch.full((3,), 4.0))
    assert torch.equal(one, torch.full((3,), 2.0))  # which the next call leaves alone


def test_inputs_that_do_not_fit_are_told():
    graphed = Graphed(lambda x: x * 2, SIDE)
    assert graphed.does_not_fit(torch.ones(5)) is None  # nothing is captured yet
    graphed(torch.ones(3))
    assert graphed.does_not_fit(torch.zeros(3)) is None
    said = "inputs are float32 [5], and its buffers float32 [3]"
    assert graphed.does_not_fit(torch.ones(5)) == said
    assert "inputs are float64 [3]" in graphed.does_not_fit(torch.ones(3).double())


def test_what_is_asked_of_cuda_and_in_which_order(monkeypatch):
    """The lines that need a GPU, on stand-ins: warm-up and captures share one stream, which waits
    for the inputs, and is waited for; captures share one pool."""
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
        where = f"{given['stream'].name}, {given['pool']}, {given['capture_error_mode']}"
        said.append(f"capture on {where}")
        with given["cuda_graph"]:
            yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph.Tape)
    side = Side(torch.device("cpu"))
    side.stream, side.pool = Stream("side"), "the pool"
    with side.beside():
        said.append("warm-up")
    one, two = (Graphed(lambda x, by=by: x * by, side) for by in (2, 3))
    for i in range(3):
        x = torch.full((2,), float(i))
        assert torch.equal(one(x), 2 * x) and torch.equal(two(x), 3 * x)
    assert said == [
        "side waits for main",
        "on side",
        "warm-up",
        "main waits for side",
        "capture on side, the pool, thread_local",
        "capture on side, the pool, thread_local",
    ]


def test_why_a_step_is_not_captured():
    assert "cpu, which has no CUDA graphs" in graph.why_not(torch.device("cpu"))
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
            return [SimpleNamespace(key=k, count=n) for k, n in names.items()]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert count_launches(list) == {"cudaLaunchKernel": 700, "cudaGraphLaunch": 1}


def test_a_closed_graph_is_freed(monkeypatch):
    """NCCL waits for graphs that hold its kernels."""
    freed = []
    graph_of_a_gpu = type("CUDAGraph", (), {"reset": lambda self: freed.append(self)})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph_of_a_gpu)
    graphed = Graphed(lambda x: x * 2, SIDE)
    graphed.close()  # which was never captured
    graphed.graph = graph_of_a_gpu()
    graphed.close()
    assert freed == [graphed.graph]


@pytest.mark.parametrize("ended", [False, True])
def test_after_a_failed_capture_torch_is_as_it_was(ended, monkeypatch):
    """On the stream of before; its memory from no pool, which a capture that ended has left; its
    random numbers of no capture, as after one that ends well (torch's own, in 2.11, by reading)."""
    calls = []

    def end(index, pool):
        calls.append((index, pool))
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    @contextlib.contextmanager
    def capture(graph, pool=None, **how):
        calls.append(f"begin {graph} {pool} {how['stream']}")
        yield
        calls.append(f"end {graph}")

    graphs = iter(["another"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: next(graphs))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    side = SimpleNamespace(device=torch.device("cuda", 1), pool="pool", stream="side")
    with pytest.raises(RuntimeError, match="too late"), Side._capturing(side, "one"):
        raise RuntimeError("too late")
    after = ["before", (1, "pool"), "begin another None side", "end another"]
    assert calls == ["begin one pool side", *after]
