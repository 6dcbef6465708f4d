"""Which backend computes an op: by capability, shape and dtype, logged once, or as it is forced.

Every op file makes one `Op`. Its backends stand in order of preference; each has a function that
returns None, or the reason why it does not take these arguments. `reference` stands last and takes
everything.
"""

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mae_fast.errors import BackendError, ConfigError

log = logging.getLogger("mae_fast")

# The schemas of all ops are defined in mae_fast/ops; csrc and kernels give the implementations.
LIBRARY = torch.library.Library("mae_fast", "DEF")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS: dict[str, "Op"] = {}
# Backends that not every machine has: why this one has not, or None.
MACHINE: dict[str, Callable[[], str | None]] = {}
# Those that take few calls by their nature: the others' are the next backend's.
PARTIAL = {"amx": "in bf16", "half": "under autocast", "onednn": "in fp32"}
_forced: dict[str, str] = {}
_logged: set[tuple] = set()


@dataclass(frozen=True)
class Op:
    """An op of the engine: its name, what it does in one line, its backends by preference."""

    name: str
    what: str
    backends: dict[str, Callable[..., str | None]]

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def order(self, *args) -> Iterable[str]:
        """The backends for these arguments, by preference."""
        return self.backends

    def choose(self, *args) -> str:
        """The backend for these arguments; BackendError if a forced one does not take them."""
        if self.name in _forced:
            name = _forced[self.name]
            reason = self.backends[name](*args)
            if reason:
                raise BackendError(f"{self.name}: {name} was asked for, but {reason}")
            return name
        declined = ()
        for name in self.order(*args):
            reason = self.backends[name](*args)
            if reason is None:
                break
            declined += (f"{name}: {reason}",)
        if not torch.compiler.is_compiling() and (self.name, name, declined) not in _logged:
            _logged.add((self.name, name, declined))
            log.info("%s: %s%s", self.name, name, f" ({'; '.join(declined)})" if declined else "")
        return name


def anything(*args) -> None:
    """The `why_not` of a backend that takes everything."""


@contextlib.contextmanager
def backends(**choices: str) -> Iterator[None]:
    """Force backends by op, in this process: `with mae_fast.backends(masked_mse="reference"):`.

    Raises ConfigError on an unknown op or backend, and the op BackendError if it cannot run.
    """
    import mae_fast.ops  # noqa: F401  all of them, so that every name is known

    for op, backend in choices.items():
        if op not in OPS:
            raise ConfigError(f"unknown op {op!r} (known: {', '.join(OPS)})")
        if backend not in OPS[op].backends:
            known = ", ".join(OPS[op].backends)
            raise ConfigError(f"{op} has no backend {backend!r} (it has: {known})")
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def why_not_cpp(*tensors: Tensor | None) -> str | None:
    """Why the C++ kernels cannot take these tensors, or None."""
    for t in tensors:
        if t is not None and t.device.type != "cpu":
            return f"a tensor is on {t.device}, not on the CPU"
    return _miss_cpp()


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    reason = load_triton()
    device = "cpu" if interpreting() else "cuda"
    for t in tensors:
        if t is not None and t.device.type != device:
            return reason or f"a tensor is on {t.device}, not on {device}"
    return reason


def why_not_cuda(*tensors: Tensor | None) -> str | None:
    """Why the CUDA kernels cannot take these tensors, or None."""
    reason = load_cuda()
    for t in tensors:
        if t is not None and t.device.type != "cuda":
            return reason or f"a tensor is on {t.device}, not on cuda"
    return reason


def why_not_dtype(*dtypes: torch.dtype) -> str | None:
    """A reason if one of them is not a floating dtype that kernels take."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"dtype {dtype} is none of {', '.join(map(str, DTYPES))}"
    return None


def check_device(what: str, **tensors: Tensor | None) -> None:
    """Raises ValueError on tensors of several devices: a kernel would read what is not there."""
    first = None
    for t in tensors.values():
        if t is None:
            continue
        if first is None:
            first = t.device
        elif t.device != first:
            where = (f"{name} on {t.device}" for name, t in tensors.items() if t is not None)
            raise ValueError(f"{what}: its tensors must be on one device, got {', '.join(where)}")


def check_ids(*ids: Tensor) -> None:
    """Raises ValueError on ids that are not int32 or int64 [B, n]."""
    for t in ids:
        if t.dim() != 2 or t.dtype not in (torch.int32, torch.int64):
            hint = ""
            if t.dtype == torch.bool:
                hint = "; kept of a mask, True where hidden: (~mask).nonzero()[:, 1].view(B, -1)"
            raise ValueError(
                f"ids must be int32 or int64 [B, n], got {t.dtype} {list(t.shape)}{hint}"
            )


def check_range(ids: Tensor, length: int) -> None:
    """Raises IndexError on an id outside [0, length). On a CPU only: elsewhere it would wait."""
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= length:
            raise IndexError(f"ids hold {low if low < 0 else high}, outside [0, {length})")


def constant(function: Callable) -> Callable:
    """Evaluate a function once for given constants, also while torch.compile traces.

    As torch.compiler.assume_constant_result, whose call would import torch's compiler: a second.
    """
    cached = functools.cache(function)

    def once(*constants):
        return cached(*constants)

    once._dynamo_marked_constant = True
    return once


@constant
def _has_autocast(device: str) -> bool:
    """Of torch 2.11, the compiler does not know torch.amp's function."""
    return torch.amp.is_autocast_available(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts products on this type of device to, as it is now; None without."""
    on = _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


@constant
def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors, to test them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _load_triton() -> str | None:
    """Load the Triton kernels; the reason if that cannot be done, else None."""
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, as a test)"
    try:
        import triton  # noqa: F401
    except Exception as e:
        return f"triton does not import: {e}"
    import mae_fast.ops  # noqa: F401  every operator is defined, and its home is known
    from mae_fast.kernels import launchers

    for operator, launch in launchers(LIBRARY._op_defs).items():
        _implement(operator, "triton", _on_its_device(launch), "CPU" if interpreting() else "CUDA")
    return None


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, Triton's kernels start on this device: they would on the current one, whatever their
    tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _on_its_device(launch: Callable) -> Callable:
    """A launcher that starts its kernels on the device of its first tensor."""

    @functools.wraps(launch)
    def guarded(*args):
        tensors = (t for a in args for t in (a if isinstance(a, list | tuple) else (a,)))
        with on(next(t.device for t in tensors if isinstance(t, Tensor))):
            return launch(*args)

    return guarded


def _not_built(kernels: str, compiler: str) -> str:
    """Why there is no library of kernels, as far as it can be told afterwards."""
    if not shutil.which(compiler):
        return f"the {kernels} kernels were not built: there is no compiler ({compiler})"
    return (
        f"the {kernels} kernels were not built, though {compiler} is here: install mae_fast again"
        " (pip install --no-build-isolation), or run python setup.py build_ext --inplace in a"
        " checkout, and read what it says"
    )


@constant
def load_cuda() -> str | None:
    """Load the CUDA kernels; the reason if that cannot be done, else None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    import mae_fast.ops  # noqa: F401  every operator is defined, and its home is known

    library = Path(__file__).resolve().parent.parent / "_cuda.so"
    if not library.exists():
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        return _not_built("CUDA", shutil.which("nvcc") or f"{home}/bin/nvcc")
    try:
        torch.ops.load_library(str(library))
    except OSError as e:  # built for another torch, most often
        return f"the CUDA kernels do not load: {e.__cause__ or e}"
    kernels = torch.ops.mae_fast_cuda
    if not kernels.runs_here():
        return f"the CUDA kernels were not built for {torch.cuda.get_device_name()}"
    for operator in LIBRARY._op_defs:
        kernel = getattr(kernels, operator.split("::")[1], None)
        if kernel is not None:
            _implement(operator, "cuda", kernel, "CUDA")
    return None


_implementations: dict[str, dict[str, Callable]] = {}  # of each operator, by backend


def _implement(operator: str, backend: str, function: Callable, key: str) -> None:
    """Register a backend for an operator. Of two on one device, the forced or the first runs.

    So the second must take nothing that the first declines, once that one is loaded.
    """
    given = _implementations.setdefault(operator, {})
    given[backend] = function
    run = function
    if len(given) > 1:
        op = OPS[operator.split("::")[1].removesuffix("_fwd").removesuffix("_bwd")]
        first = next(given[b] for b in op.backends if b in given)

        def run(*args):
            return given.get(_forced.get(op.name), first)(*args)

    LIBRARY.impl(operator, run, key, allow_override=True)


def _load_cpp() -> str | None:
    """Load the C++ kernels built for this CPU; the reason if that cannot be done, else None."""
    if interpreting():
        return "TRITON_INTERPRET=1: the Triton kernels stand in their place"
    capability = torch.backends.cpu.get_cpu_capability().lower()
    folder = Path(__file__).resolve().parent.parent
    built = sorted(p.stem.removeprefix("_cpu_") for p in folder.glob("_cpu_*.so"))
    if not built:
        return _not_built("C++", os.environ.get("CXX", "c++").split()[0])
    name = capability if capability in built else "default"
    if name not in built:
        return f"the C++ kernels are built for {', '.join(built)}; this CPU has {capability}"
    try:
        torch.ops.load_library(str(folder / f"_cpu_{name}.so"))
    except OSError as e:  # built for another torch, most often
        return f"the C++ kernels do not load: {e.__cause__ or e}"  # torch hides the words
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = sorted(op for op in LIBRARY._op_defs if not has(op, "CPU"))
    if missing:
        return f"the C++ kernels are built from other sources: {missing[0]} is not there"
    return None


load_cpp = constant(_load_cpp)


@constant
def load_amx() -> str | None:
    """Why the C++ kernels multiply no bf16 tiles on this CPU, or None."""
    return load_cpp() or torch.ops.mae_fast_cpu.why_not_amx() or None


@constant
def _miss_cpp() -> str | None:
    """As load_cpp, with a warning: tensors are on the CPU, where it matters."""
    reason = load_cpp()
    if reason and not interpreting():
        log.warning("%s; plain torch is used in their place", reason)
    return reason


load_triton = constant(_load_triton)
MACHINE["cpp"] = load_cpp
MACHINE["amx"] = load_amx
MACHINE["triton"] = load_triton
MACHINE["cuda"] = load_cuda


def refuse_second_derivative() -> None:
    """Called in every backward. With create_graph=True its result would be differentiated, and
    what it has saved or makes again has no history: RuntimeError, not a part of the truth."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "mae_fast's operators have no second derivative (create_graph=True): for this, run the"
            " model's own forward, after mae_fast.restore(model)"
        )


def once_differentiable(backward: Callable) -> Callable:
    """A backward that refuses to be differentiated, whatever its gradients are."""

    once = torch.autograd.function.once_differentiable(backward)  # within it gradients are off

    @functools.wraps(backward)
    def refusing(ctx, *grads):
        refuse_second_derivative()
        return once(ctx, *grads)

    return refusing
