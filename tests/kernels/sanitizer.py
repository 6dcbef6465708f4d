"""A sanitizer for Triton kernels without a GPU: watches what Triton's interpreter loads and stores.

While `sanitized()` is open, each kernel's programs run in a shuffled order, and these are errors:
an access outside the tensors passed to the kernel; an address written by one program and touched by
another; a program that reads back what it wrote; an element of an output stored twice, or never; a
masked load that leaves its masked values undefined; an atomic. Bytes are counted as they go.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

_MANY = -1  # in a reader's place: more than one program read the element


class Violation(AssertionError):
    """What a kernel did wrong."""


@dataclass
class Launch:
    """One kernel's launch: bytes of its unmasked lanes, and of the distinct elements it loaded."""

    kernel: str
    programs: int
    loaded: int = 0
    loaded_once: int = 0
    stored: int = 0


@dataclass
class Record:
    """What happened while `sanitized()` was open; `torch_bytes`: what torch's operators moved."""

    launches: list[Launch] = field(default_factory=list)
    torch_bytes: int = 0

    @property
    def requested(self) -> int:
        """Bytes of all unmasked lanes loaded and stored, and of torch's operators."""
        return sum(x.loaded + x.stored for x in self.launches) + self.torch_bytes

    @property
    def moved(self) -> int:
        """As `requested`, but what several programs of a launch load counts once, as in a cache."""
        return sum(x.loaded_once + x.stored for x in self.launches) + self.torch_bytes


class _Storage:
    """The elements of one storage: which are open to the present launch, and who touched them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.keep = tensor.untyped_storage()  # so that its addresses are not given out again
        self.start, self.unit = self.keep.data_ptr(), tensor.element_size()
        n = self.keep.nbytes() // self.unit
        self.end = self.start + n * self.unit
        self.open, self.wanted, self.stored = (np.zeros(n, dtype=bool) for _ in range(3))
        self.writer, self.reader, self.lane = (np.zeros(n, dtype=np.int32) for _ in range(3))
        self.views: list[tuple[str, torch.Tensor]] = []

    def view(self, tensor: torch.Tensor, of: np.ndarray) -> np.ndarray:
        """The part of one of the arrays above that is `tensor`."""
        step = tensor.element_size() // self.unit
        assert step, "two tensors share a storage, and the first has the greater elements"
        strides = [s * step for s in tensor.stride()]
        shape, strides = (
            ([*tensor.shape, step], [*strides, 1]) if step > 1 else (tensor.shape, strides)
        )
        offset = tensor.storage_offset() * step
        return torch.from_numpy(of).as_strided(shape, strides, offset).numpy()

    def begin(self) -> None:
        self.open[:] = False
        self.writer[:] = self.reader[:] = 0
        self.views = []

    def name(self, element: int) -> str:
        """`x_ptr[3]`, by the tensor that was passed first: where an element of the storage lies."""
        return f"{self.views[0][0] if self.views else 'a tensor not passed'}[{element}]"


class _Sanitizer:
    def __init__(self, seed: int, extra: Iterable[torch.Tensor]) -> None:
        self.record, self.random = Record(), np.random.default_rng(seed)
        self.extra = [(f"extra{i}", t) for i, t in enumerate(extra)]
        self.storages: list[_Storage] = []
        self.launch: Launch | None = None
        self.grid, self.program, self.order = (1, 1, 1), 0, np.zeros(1, dtype=int)

    # A launch

    def begin(self, kernel: str, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.launch = Launch(kernel, 0)
        for storage in self.storages:
            storage.begin()
        for name, tensor in tensors + self.extra:
            if tensor.numel():
                storage = self.storage_of(tensor)
                storage.view(tensor, storage.open)[...] = True
                storage.views.append((name, tensor))
        self.storages.sort(key=lambda s: s.start)
        self.starts = np.array([s.start for s in self.storages], dtype=np.uint64)

    def storage_of(self, tensor: torch.Tensor) -> _Storage:
        start = tensor.untyped_storage().data_ptr()
        for storage in self.storages:
            if storage.start == start:
                return storage
        self.storages.append(_Storage(tensor))
        return self.storages[-1]

    def end(self) -> None:
        for s in self.storages:
            self.launch.loaded_once += int(np.count_nonzero(s.reader)) * s.unit
            for _, tensor in s.views:
                if s.view(tensor, s.writer).any():
                    s.view(tensor, s.wanted)[...] = True
        self.record.launches.append(self.launch)
        self.launch = None

    def set_grid(self, *grid: int) -> None:
        self.grid, self.launch.programs = grid, int(np.prod(grid))
        self.order = self.random.permutation(self.launch.programs)

    def set_program(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        """Another program in the place of (x, y, z)."""
        self.program = int(self.order[np.ravel_multi_index((x, y, z), self.grid)])
        return tuple(int(i) for i in np.unravel_index(self.program, self.grid))

    # Its accesses

    def wrong(self, what: str) -> None:
        program = tuple(int(i) for i in np.unravel_index(self.program, self.grid))
        raise Violation(f"{self.launch.kernel}, program {program}: {what}")

    def touched(self, pointers, mask) -> Iterator[tuple[_Storage, np.ndarray]]:
        """(storage, elements in it) of the unmasked lanes."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        wanted = mask.data.astype(bool)  # of `a & b` the interpreter makes numbers
        at = pointers.data[np.broadcast_to(wanted, pointers.data.shape)].ravel()
        if not at.size:
            return
        slots = np.searchsorted(self.starts, at, side="right").astype(np.int64) - 1
        for slot in [slots[0]] if (slots == slots[0]).all() else np.unique(slots):
            storage, here = self.storages[max(slot, 0)], at[slots == slot]
            inside = (here >= storage.start) & (here + size <= storage.end)
            if slot < 0 or not inside.all():
                self.wrong("an access outside of every tensor passed")
            byte = (here - np.uint64(storage.start)).astype(np.int64)
            if size % storage.unit or (byte % storage.unit).any():
                self.wrong(f"an access to a part of an element, near {storage.name(byte[0])}")
            element = byte // storage.unit
            if size > storage.unit:
                element = (element[:, None] + np.arange(size // storage.unit)).ravel()
            closed = ~storage.open[element]
            if closed.any():
                where = storage.name(element[closed][0])
                self.wrong(f"an access to what was not passed, at {where} of the storage")
            yield storage, element

    def load(self, pointers, mask, other) -> None:
        me = self.program + 1
        if other is None and not mask.data.all():
            self.wrong("a masked load without other=")
        for s, at in self.touched(pointers, mask):
            writer, reader = s.writer[at], s.reader[at]
            for what, bad in (
                ("reads what another program writes", (writer != 0) & (writer != me)),
                ("reads back what it wrote, unordered between its threads", writer == me),
            ):
                if bad.any():
                    self.wrong(f"{what}, {s.name(at[bad][0])}")
            s.reader[at] = np.where((reader == 0) | (reader == me), me, _MANY)
            self.launch.loaded += at.size * s.unit

    def store(self, pointers, mask) -> None:
        me = self.program + 1
        for s, at in self.touched(pointers, mask):
            writer, reader = s.writer[at], s.reader[at]
            lanes = np.arange(at.size, dtype=np.int32)
            s.lane[at] = lanes
            for what, bad in (
                ("writes what another program writes", (writer != 0) & (writer != me)),
                ("writes what another program reads", (reader != 0) & (reader != me)),
                ("an element stored twice", s.stored[at] | (s.lane[at] != lanes)),
            ):
                if bad.any():
                    self.wrong(f"{what}, {s.name(at[bad][0])}")
            s.writer[at], s.stored[at] = me, True
            self.launch.stored += at.size * s.unit

    def finish(self) -> None:
        for s in self.storages:
            missing = s.wanted & ~s.stored
            if missing.any():
                raise Violation(
                    f"{missing.sum()} elements of an output are never stored, the first at "
                    f"{missing.argmax()} of {missing.size}"
                )


class _TorchBytes(TorchDispatchMode):
    """Counts what torch's operators read and write outside of kernels; views and allocations: 0."""

    def __init__(self, watch: _Sanitizer) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.watch.launch is None and not func.is_view and "empty" not in func.name():
            tensors = [t for t in tree_leaves((args, out)) if torch.is_tensor(t)]
            self.watch.record.torch_bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def _tensors(name: str, value) -> list[tuple[str, torch.Tensor]]:
    """The tensors of one argument of a kernel, with its name."""
    if torch.is_tensor(value):
        return [(name, value)]
    if isinstance(value, tuple):
        return [found for part in value for found in _tensors(name, part)]
    return _tensors(name, value.base) if hasattr(value, "base") else []  # a tensor descriptor


@contextlib.contextmanager
def sanitized(seed: int = 0, extra: Iterable[torch.Tensor] = ()) -> Iterator[Record]:
    """Raises Violation out of the kernel that does wrong, or at the end. `extra`: tensors that
    kernels reach by a table of pointers. Every output must be stored whole before it closes."""
    watch = _Sanitizer(seed, extra)
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    call = executor.__call__

    def launch(self, *args, **kwargs):
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        watch.begin(self.fn.__name__, [t for name, a in named for t in _tensors(name, a)])
        try:
            call(self, *args, **kwargs)
        except interpreter.InterpreterError as e:  # it keeps the words only
            raise (e.__cause__ if isinstance(e.__cause__, Violation) else e) from None
        watch.end()

    def load(pointers, mask, other, *rest, **more):
        watch.load(pointers, mask, other)
        return type(builder).create_masked_load(builder, pointers, mask, other, *rest, **more)

    def store(pointers, value, mask, *rest, **more):
        watch.store(pointers, mask)
        return type(builder).create_masked_store(builder, pointers, value, mask, *rest, **more)

    def atomic(*args, **kwargs):
        watch.wrong("an atomic: no kernel here needs one, and their order is not fixed")

    def set_grid_dim(*grid):
        watch.set_grid(*grid)
        type(builder).set_grid_dim(builder, *grid)

    def set_grid_idx(*place):
        type(builder).set_grid_idx(builder, *watch.set_program(*place))

    # The other loads and stores of a builder come down to these two.
    hooks = {
        "create_masked_load": load,
        "create_masked_store": store,
        "set_grid_dim": set_grid_dim,
        "set_grid_idx": set_grid_idx,
        **{name: atomic for name in dir(builder) if name.startswith("create_atomic_")},
    }
    executor.__call__ = launch
    for name, hook in hooks.items():
        setattr(builder, name, hook)
    try:
        with _TorchBytes(watch):
            yield watch.record
    finally:
        executor.__call__ = call
        for name in hooks:
            delattr(builder, name)
    watch.finish()
