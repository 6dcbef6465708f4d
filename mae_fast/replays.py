"""The fused forward as CUDA graphs within somebody else's training loop: forward is one graph,
backward another, both one launch each for the host.

    with replaying(replays):        # a `Replays`, kept with the model
        loss, pred = forward(...)   # any function of forward.py that is `replayed`
    loss.backward()

A step of a B takes hundreds of launches, and the host 100 us and more for each where Python makes
it: with few clips the GPU waits. (mae_fast/step.py has the whole step as graphs, which wants a loop
of its own.) The loop around sees tensors as before: outputs and gradients are copies, and what it
changes in place between two calls is read where it lies. What does not fit a graph runs as it does
without: a kind of call that comes seldom, a second forward before the first one's backward, layers
of others.
"""

import contextlib
import functools
import gc
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from mae_fast import graph
from mae_fast.ops import dispatch

log = logging.getLogger("mae_fast")

WARMUP = 3  # calls of a kind before its capture: all kernels and workspaces exist by then
KINDS = 8  # of calls that are remembered
SPAN = 4 * KINDS  # calls of the model in which those of a kind must come to be captured
MEMORY = 0.9  # of what is free, which the graphs may take
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype)
_replays: ContextVar["Replays | None"] = ContextVar("replays", default=None)


@contextlib.contextmanager
def replaying(replays: "Replays | None") -> Iterator[None]:
    """Inside, in this thread, what is `replayed` is so by these."""
    token = _replays.set(replays)
    try:
        yield
    finally:
        _replays.reset(token)


def replayed(function: Callable) -> Callable:
    """A function of tensors and constants, in tuples and lists, that draws no random numbers."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if torch.compiler.is_compiling() or (replays := _replays.get()) is None:
            return function(*args, **kwargs)
        with replaying(None):
            return replays(function, args, kwargs)

    return run


class Replays:
    """The graphs of a model, by kind of call: function, constants, shapes, precision."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known: list[_Replay] = []
        self.calls = 0
        self.streams: dict[torch.device, torch.cuda.Stream | None] = {}
        self.failed, self.said = False, set()
        self.one_thread = threading.Lock()

    def __call__(self, function: Callable, args: tuple, kwargs: dict):
        if graph.why_not(next(self.model.parameters()).device):
            return function(*args, **kwargs)
        tensors, others = _parted((args, *kwargs.items()))
        why_not = _why_not(tensors, others)
        if why_not and why_not not in self.said:
            self.said.add(why_not)
            log.info("a forward runs without CUDA graphs: %s", why_not)
        if why_not or self.failed or not self.one_thread.acquire(blocking=False):
            return function(*args, **kwargs)
        try:
            kind = (function, others, [_kind(t) for t in tensors], _conditions(tensors[0]))
            replay = self._of(kind, tensors)
            self.calls += 1
            if not replay.is_due(self.calls):
                return replay.warm_up(tensors, args, kwargs)
            if not self._captured(replay, tensors, args, kwargs):
                return function(*args, **kwargs)
            return replay(tensors)
        finally:
            self.one_thread.release()

    def _of(self, kind: tuple, tensors: list[Tensor]) -> "_Replay":
        """That of a kind of call; a new one takes the place of the one that is out of use, or of
        one whose parameters were exchanged."""
        found = next((r for r in self.known if r.kind == kind), None)
        rest = [r for r in self.known if r is not found]
        if found is None or found.places != _places(tensors, found.fixed):
            if not self.known:
                gc.collect()  # models of before hold their graphs' memory until then
            device = tensors[0].device
            # A pool of memory for each: two kinds may be between forward and backward.
            side = graph.Side(device, self.streams.get(device))
            self.streams[device] = side.stream
            own = {_storage(p) for p in self.model.parameters()}
            found = _Replay(kind, side, tensors, [_storage(t) in own for t in tensors])
        self.known = [found, *rest][:KINDS]
        return found

    def _captured(
        self, replay: "_Replay", tensors: list[Tensor], args: tuple, kwargs: dict
    ) -> bool:
        """False where it cannot be, now and later."""
        reason = None if replay.forward else replay.no_room(tensors)
        if reason and len(self.known) > 1:
            self.known = [replay]  # the others may come again
            reason = replay.no_room(tensors)
        if reason is None:
            try:
                with dispatch.on(tensors[0].device):
                    replay.capture(tensors, args, kwargs)
                return True
            except RuntimeError as e:  # what failed first is the context of what ends the capture
                reason = str(e.__context__ or e).strip().splitlines()[0]
        self.failed, self.known = True, []
        log.warning("forward and backward run without CUDA graphs: %s", reason)
        return False


class _Replay:
    """One kind of call. `fixed`: which of the tensors lie in the model's parameters; what the
    others hold is copied into the graphs' memory."""

    def __init__(
        self, kind: tuple, side: graph.Side, tensors: list[Tensor], fixed: list[bool]
    ) -> None:
        self.kind, self.side, self.fixed = kind, side, fixed
        self.places = _places(tensors, fixed)
        self.calls: deque[int] = deque(maxlen=WARMUP + 1)  # the numbers of the last ones
        self.held = 0  # bytes that a call leaves in use until its backward
        self.forward = self.backward = self.tree = None
        self.leaves: list[Tensor] = []  # the tensors, as the graphs read them
        self.outputs: list[Tensor] = []
        self.of: tuple[bool, ...] = ()  # the outputs whose gradients backward was given last
        self.captured_of: tuple[bool, ...] = ()  # and those of the graph
        self.given: list[Tensor] = []  # their gradients, as the graph reads them
        self.grads: list[Tensor | None] = []
        self.number = 0
        self.last: Callable[[], _Use | None] = lambda: None

    def is_due(self, number: int) -> bool:
        """Whether this call can be a replay; else it is one more as it is without. The last batch
        of an epoch is not worth the memory."""
        self.calls.append(number)
        use, often = self.last(), number - self.calls[0] <= SPAN
        due = self.forward is not None or (len(self.calls) > WARMUP and often)
        return due and (use is None or use.done)

    def warm_up(self, tensors: list[Tensor], args: tuple, kwargs: dict):
        """The call as it is without; the last of these on the stream of the capture, and its
        backward too: what it reads there is not to be given away before."""
        function = self.kind[0]
        if len(self.calls) != WARMUP:
            return function(*args, **kwargs)
        for t, fixed in zip(tensors, self.fixed, strict=True):
            if self.side.stream and not fixed:
                t.record_stream(self.side.stream)
        with self.side.beside():
            before = _in_use(self.side.device)
            out = function(*args, **kwargs)
            self.held = _in_use(self.side.device) - before
        return out

    def no_room(self, tensors: list[Tensor]) -> str | None:
        """The graphs' memory is theirs alone: as much as a call holds, for backward as much again,
        gradients; and calls that do not fit them want the same beside it."""
        device = self.side.device
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - _in_use(device)
        wanted = 3 * self.held + sum(t.nbytes for t in tensors)
        if wanted <= MEMORY * free:
            return None
        return f"they want {wanted >> 20} MiB, and {free >> 20} are free"

    def capture(self, tensors: list[Tensor], args: tuple, kwargs: dict) -> None:
        """What is not captured yet: forward, and backward once it is known of which outputs."""
        function = self.kind[0]
        if self.forward is None:
            # A pool whose graphs are gone takes no other.
            self.side = graph.Side(self.side.device, self.side.stream)
            # Not t.detach(), whose count of changes is the parameter's: an optimizer's are allowed.
            self.leaves = [
                (t.data if fixed else t.detach().clone()).requires_grad_(_wants_gradient(t))
                for t, fixed in zip(tensors, self.fixed, strict=True)
            ]
            leaves = iter(self.leaves)
            args, kwargs = tree_map_only(Tensor, lambda _: next(leaves), (args, kwargs))
            self.forward, out = self._graph(lambda: function(*args, **kwargs))
            self.outputs, self.tree = tree_flatten(out)
            self.backward = None
        if any(self.of) and self.backward is None:
            pairs = zip(self.outputs, self.of, strict=True)
            self.given = [torch.zeros_like(t) for t, has in pairs if has]
            self.backward, self.grads = self._graph(lambda: self._gradients(self.of, self.given))
            self.captured_of = self.of

    def _graph(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        """The work as a graph, and where its results will be."""
        made, block = self.side.capture()
        cast = dispatch.autocast_dtype(self.side.device.type)
        how = dict(dtype=cast, enabled=cast is not None, cache_enabled=False)
        with block, torch.autocast(self.side.device.type, **how):
            out = work()
        if isinstance(made, graph.Tape):
            made.done = False  # its inputs come yet
        return made, out

    def _gradients(self, of: tuple[bool, ...], douts: list[Tensor]) -> list[Tensor | None]:
        """Of every tensor, from those of some outputs; by what forward has saved last."""
        outputs = [t for t, has in zip(self.outputs, of, strict=True) if has]
        asked = [t for t in self.leaves if t.requires_grad]
        # One that is broken off may leave what it has made again (remade.py) to the next.
        forward, self.forward = self.forward, None
        found = iter(
            torch.autograd.grad(outputs, asked, douts, retain_graph=True, allow_unused=True)
        )
        self.forward = forward
        return [next(found) if t.requires_grad else None for t in self.leaves]

    def __call__(self, tensors: list[Tensor]):
        with torch.no_grad():
            for leaf, t, fixed in zip(self.leaves, tensors, self.fixed, strict=True):
                if not fixed:
                    leaf.data.copy_(t)
        return tree_unflatten(list(_Replayed.apply(self, *tensors)), self.tree)

    def gradients(self, douts: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """As `_gradients`, by the graph where it is one of these outputs: copies."""
        self.of = tuple(d is not None for d in douts)
        given = [d for d in douts if d is not None]
        if not given:
            return [None] * len(self.leaves)
        if self.backward is None or self.of != self.captured_of:
            return self._gradients(self.of, given)
        for place, d in zip(self.given, given, strict=True):
            place.copy_(d)
        self.backward.replay()
        made = [g for g in self.grads if g is not None]
        copies = [torch.empty_like(g) for g in made]
        torch._foreach_copy_(copies, made)  # all with a few launches
        found = iter(copies)
        return [None if g is None else next(found) for g in self.grads]


class _Use:
    """A forward whose backward may come yet, as long as somebody holds it."""

    done = False


class _Replayed(torch.autograd.Function):
    """A replay of both graphs. What lies in parameters is saved, so that torch finds it
    changed before its backward; the rest of what backward needs is in the graphs' memory, until
    the next forward."""

    @staticmethod
    def forward(ctx, replay: _Replay, *tensors: Tensor) -> tuple[Tensor, ...]:
        replay.forward.replay()
        replay.number += 1
        ctx.replay, ctx.number, ctx.use = replay, replay.number, _Use()
        replay.last = weakref.ref(ctx.use)
        ctx.save_for_backward(*(t for t, f in zip(tensors, replay.fixed, strict=True) if f))
        ctx.set_materialize_grads(False)
        found = [t.detach().clone() for t in replay.outputs]
        pairs = zip(found, replay.outputs, strict=True)
        ctx.mark_non_differentiable(*(t for t, of in pairs if not of.requires_grad))
        return tuple(found)

    @staticmethod
    @dispatch.once_differentiable
    def backward(ctx, *douts: Tensor | None):
        _ = ctx.saved_tensors  # raises where one was changed in place
        if ctx.number != ctx.replay.number:
            raise RuntimeError(
                "a second backward (retain_graph=True) comes after a later forward, which has"
                " written over what it needs: mae_fast.accelerate(model, cuda_graph=False)"
            )
        found = ctx.replay.gradients(douts)
        ctx.use.done = True  # not before: another thread's forward would write over what this reads
        return None, *found


def _parted(values: tuple) -> tuple[list[Tensor], list]:
    """The tensors in tuples and lists, and all the rest, the containers' types and lengths too: of
    a model's parameters, torch's tree_flatten takes six times as long."""
    tensors, others = [], []

    def part(values: tuple | list) -> None:
        others.extend((type(values), len(values)))
        for value in values:
            if isinstance(value, Tensor):
                tensors.append(value)
                others.append(Tensor)
            elif isinstance(value, tuple | list):
                part(value)
            else:
                others.append(value)

    part(values)
    return tensors, others


def _why_not(tensors: list[Tensor], others: list) -> str | None:
    """Why a call is no replay: what is no plain tensor or constant, or somebody who looks on."""
    device = tensors[0].device
    if not all(type(t) in (Tensor, nn.Parameter) and t.device == device for t in tensors):
        return "not all are plain tensors of one device"
    if any(t.is_inference() for t in tensors):
        return "inference mode"
    if not all(type(o) in _CONSTANTS or isinstance(o, type) for o in others):
        return "a block or layer runs itself"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "what is saved for backward goes through hooks"
    if _get_current_dispatch_mode() is not None:
        return "a dispatch mode is on"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    return None if _in_order(device) else "the stream is not the default one"


def _in_order(device: torch.device) -> bool:
    """A call begins when the last one's backward has ended: on a stream of their own two may
    overlap, or somebody captures them."""
    if device.type != "cuda":
        return True
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def _kind(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, _wants_gradient(t)


def _wants_gradient(t: Tensor) -> bool:
    return t.requires_grad and torch.is_grad_enabled()


def _conditions(t: Tensor) -> tuple:
    """What else the work of a call depends on."""
    cast, forced = dispatch.autocast_dtype(t.device.type), dict(dispatch._forced)
    precision = torch.backends.cuda.matmul.fp32_precision
    exact = torch.are_deterministic_algorithms_enabled()
    return t.device, cast, forced, precision, exact, torch.get_default_dtype()


def _places(tensors: list[Tensor], fixed: list[bool]) -> list[int]:
    return [t.data_ptr() for t, is_fixed in zip(tensors, fixed, strict=True) if is_fixed]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
