"""A function as a CUDA graph: the host launches all of its kernels with one call.

Graphed captures any function; mae_fast.step has one for each part of a training step. On a CPU it
rehearses: what the function computes is taped, operator by operator, and played again on the same
memory, so that a number frozen by the capture, or a call that waits for the device, shows without a
GPU. `count_launches` counts what a call costs.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_fast.errors import BackendError

# What a host calls to give a GPU work, under torch.profiler's names.
LAUNCHES = (
    "cudaGraphLaunch",
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
)
# Operators for which a host waits: they read the device, or copy to it from pageable memory.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
}


def why_not(device: torch.device) -> str | None:
    """Why a training step on this device is not captured, or None."""
    if device.type != "cuda":
        return f"the run is on the {device.type}, which has no CUDA graphs"
    return None


class Side:
    """Where graphs that belong together are captured: a stream, as libraries keep a workspace for
    every stream, and a pool of memory, which they use one after another as they were captured."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device, on_gpu = device, device.type == "cuda"
        self.stream = stream or torch.cuda.Stream(device) if on_gpu else None
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None

    @contextlib.contextmanager
    def beside(self):
        """Work that the stream of the captures does, after what is asked for already."""
        if self.stream is None:
            yield
            return
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            yield
        now.wait_stream(self.stream)

    def capture(self) -> tuple["torch.cuda.CUDAGraph | Tape", contextlib.AbstractContextManager]:
        """A new graph, and the block whose work it takes up."""
        if self.stream is None:
            tape = Tape()
            return tape, tape
        graph = torch.cuda.CUDAGraph()
        return graph, self._capturing(graph)

    @contextlib.contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph):
        # The loader's thread goes on pinning memory meanwhile, which "global" would forbid.
        how = dict(stream=self.stream, capture_error_mode="thread_local")
        before = torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, self.pool, **how):
                yield
        except RuntimeError:
            # torch stays on the capture's stream, gives memory from its pool, unless the capture
            # has ended, and draws no random numbers (2.11), until one ends as it should.
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            with contextlib.suppress(RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is empty
                with torch.cuda.graph(torch.cuda.CUDAGraph(), **how):
                    pass
            raise


class Graphed:
    """call = Graphed(function, Side(device)): the first call captures, and every later one replays.

    function(*inputs) takes tensors and returns one, of shapes that stay. All else that it reads and
    writes (parameters, gradients, optimizer state, a learning rate) must be on the device and keep
    its place; it has run before on side.beside(). Inputs are copied into static buffers, without
    waiting where they are on the device or in pinned memory. The output is a copy.

    Raises BackendError if the function cannot be captured.
    """

    def __init__(self, function: Callable[..., Tensor], side: Side) -> None:
        self.function, self.side = function, side
        self.buffers: list[Tensor] = []
        self.graph, self.output = None, None

    def does_not_fit(self, *inputs: Tensor) -> str | None:
        """Why inputs are not those of the capture, or None."""
        given, captured = (
            [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors]
            for tensors in (inputs, self.buffers)
        )
        if self.graph is not None and given != captured:
            return f"inputs are {', '.join(given)}, and its buffers {', '.join(captured)}"
        return None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None:
            self.buffers = [torch.empty_like(t, device=self.side.device) for t in inputs]
        for buffer, t in zip(self.buffers, inputs, strict=True):
            buffer.copy_(t, non_blocking=True)
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.output.clone()

    def close(self) -> None:
        """Free the graph; it cannot be called again."""
        if isinstance(self.graph, torch.cuda.CUDAGraph):
            self.graph.reset()

    def _capture(self) -> None:
        graph, block = self.side.capture()
        try:
            with block:
                self.output = self.function(*self.buffers)
        except RuntimeError as e:
            # What failed first is the context of the error that ends the capture.
            reason = str(e.__context__ or e).strip().splitlines()[0]
            raise BackendError(f"the step cannot be captured as a CUDA graph: {reason}") from e
        self.graph = graph


class Tape(TorchDispatchMode):
    """What a capture is on a GPU, for CPU tensors: the operators called inside, in order, with the
    very tensors and numbers; `replay` calls them again and puts their results where they were.

    Inside, an operator for which a host would wait for its GPU is a RuntimeError, as in a capture.
    (A CPU tensor's tolist() and numpy() call no operator, and are not seen.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.done = False  # a CUDA capture computes nothing, and this one has

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(operator, args):
            raise RuntimeError(f"{operator} makes the host wait, which a capture does not permit")
        out = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, out))
        self.done = True
        return out

    @torch.no_grad()
    def replay(self) -> None:
        if self.done:
            self.done = False
            return
        for operator, args, kwargs, out in self.calls:
            written = tree_leaves((args, kwargs)) if operator._schema.is_mutable else []
            written = tuple(t for t in written if torch.is_tensor(t))
            # A graph's writing is no change that a backward would refuse.
            with torch.autograd._unsafe_preserve_version_counter(written):
                again = operator(*args, **kwargs)
            if operator.namespace == "c10d":  # a collective, with its work
                again[-1].wait()
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # A view, or what was written in place, is where it was.
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.data.copy_(new)


def waits(operator: torch._ops.OpOverload, args: tuple) -> bool:
    """Whether a host would wait for its GPU in this call of an operator."""
    name = operator._schema.name
    if name == "aten::index":  # by a mask: how many elements that gives, the device must tell
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return name in WAITING


def count_launches(function: Callable[[], object]) -> dict[str, int]:
    """What the host launches in one call of `function`, by name (LAUNCHES); {} without a GPU."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as found:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    counts = Counter()
    for event in found.key_averages():
        if event.key in LAUNCHES:
            counts[event.key] += event.count
    return dict(counts)
