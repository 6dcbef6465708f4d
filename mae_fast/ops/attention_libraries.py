"""Attention by libraries, behind one interface: q, k, v [B, S, H, d] -> [B, S of q, H, d].

Nothing is imported before it is asked for, and what is absent costs nothing. A reason is given for
what a library does not take; its own checks stand behind. Written from the sources of flash-attn
2.8.3, flash-attention's hopper folder (flash-attn 3), flash-attn-4 4.0.0b36 and xformers 0.0.35.
Of them only torch's own have run on a GPU: the others are unmeasured.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mae_fast.ops import dispatch


@dataclass(frozen=True)
class Library:
    """A package's attention for fp16 and bf16 on CUDA: `compute`, and what it takes.

    `file` of `package` shows that it is there without an import; compute imports `function` from
    `module` and gives it the arguments that it `passes` by name. `capabilities` are the lowest and
    the highest that it has kernels for, forward and backward.
    """

    compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    package: str
    file: str
    module: str
    function: str
    passes: tuple[str, ...]
    install: str
    capabilities: tuple[tuple[int, int], tuple[int, int]]
    widest: int
    broken: Callable[[], str | None] = lambda: None  # why it imports, and cannot run

    def here(self) -> str | None:
        """Why this machine has it not, or None. Imports nothing."""
        if not self._found():
            return f"not installed ({self.install})"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        has, (low, high) = torch.cuda.get_device_capability(), self.capabilities
        if not low <= has <= high:
            names = [f"sm_{major}{minor}" for major, minor in (has, low, high)]
            return f"the device is {names[0]}, and its kernels are for {names[1]} to {names[2]}"
        return None

    def _found(self) -> bool:
        spec = importlib.util.find_spec(self.package)
        if spec is None:
            return False
        # Two distributions share the folder flash_attn, so that its being there says little.
        folders = spec.submodule_search_locations
        return folders is None or any((Path(f) / self.file).exists() for f in folders)

    def loads(self) -> str | None:
        """Why it does not import, or is not the version that we call, or None."""
        try:
            function = getattr(importlib.import_module(self.module), self.function)
        except Exception as e:
            return f"{self.module} does not import: {e}"
        # flash-attn 2.8 ships an early copy of flash-attn-4, for one.
        lacks = [p for p in self.passes if p not in inspect.signature(function).parameters]
        return f"{self.function} of {self.module} has no {lacks[0]}" if lacks else self.broken()

    def takes(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why it does not take these tensors, or None."""
        for name, t in zip("qkv", (q, k, v), strict=True):
            if t.device.type != "cuda":
                return f"{name} is on {t.device}, not on cuda"
            if t.dtype != q.dtype or t.dtype not in (torch.float16, torch.bfloat16):
                return f"{name} is {t.dtype}, and all must be float16 or all bfloat16"
            if t.numel() == 0:
                return f"{name} {list(t.shape)} is empty"
            # 8 values are the 16 bytes that its loads take at once.
            if t.stride(-1) != 1 or any(n % 8 for n in (*t.stride()[:-1], t.storage_offset())):
                return f"the heads of {name} do not start at multiples of 16 bytes"
        width = q.shape[-1]
        if width % 8 or width > self.widest:
            return f"head dim {width} is not a multiple of 8 up to {self.widest}"
        return None


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_func

    return flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    return out[0] if isinstance(out, tuple) else out  # early ones give the log-sum-exp besides


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func

    with dispatch.on(q.device):  # its kernels are compiled in Python, as Triton's
        out, _ = flash_attn_func(
            q, k, v, deterministic=torch.are_deterministic_algorithms_enabled()
        )
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def _xformers_broken() -> str | None:
    """Built for another torch it imports, says so in its log, and no kernel takes anything."""
    library = sys.modules.get("xformers._cpp_lib")
    error = getattr(library, "_cpp_library_load_exception", None)
    if error is not None:  # several lines, the last of them advice
        return " ".join(str(error).partition("\n  Please")[0].split())
    return None if getattr(library, "_built_with_cuda", True) else "xformers is built without CUDA"


_ANY = (99, 0)
LIBRARIES = {
    "flash_attn_4": Library(
        _flash_attn_4,
        package="flash_attn",
        file="cute/interface.py",
        module="flash_attn.cute.interface",
        function="flash_attn_func",
        passes=("deterministic",),
        install="pip install mae-fast[flash-attn-4]",
        capabilities=((9, 0), (12, 9)),  # forward alone also runs on sm_80
        widest=128,
    ),
    "flash_attn_3": Library(
        _flash_attn_3,
        package="flash_attn_interface",
        file="",
        module="flash_attn_interface",
        function="flash_attn_func",
        passes=("deterministic",),
        install="built from the folder hopper of Dao-AILab/flash-attention",
        capabilities=((8, 0), (9, 0)),
        widest=256,
    ),
    "flash_attn": Library(
        _flash_attn,
        package="flash_attn",
        file="flash_attn_interface.py",
        module="flash_attn.flash_attn_interface",
        function="flash_attn_func",
        passes=("deterministic",),
        install="pip install mae-fast[flash-attn]",
        capabilities=((8, 0), _ANY),
        widest=256,
    ),
    "xformers": Library(
        _xformers,
        package="xformers",
        file="ops/__init__.py",
        module="xformers.ops",
        function="memory_efficient_attention",
        passes=(),
        install="pip install mae-fast[xformers]",
        capabilities=((8, 0), _ANY),
        widest=256,
        broken=_xformers_broken,
    ),
}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, by whichever of its kernels torch takes."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@dataclass(frozen=True)
class TorchKernel:
    """One kernel of torch's scaled_dot_product_attention; `ask` is torch's own rule on CUDA."""

    kernel: SDPBackend
    ask: Callable[..., bool] | None = None
    on_cpu: bool = False

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(self.kernel):
            return sdpa(q, k, v)

    def here(self) -> str | None:
        """Why this machine has it not, or None."""
        return None if self.on_cpu or torch.cuda.is_available() else "there is no CUDA device"

    def takes(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why it does not take these tensors, or None."""
        if self.ask is None:
            return None
        if q.device.type == "cpu":
            if not self.on_cpu:
                return "q is on cpu, not on cuda"
            if not q.numel() * k.numel():
                return "a tensor is empty"
            strided = any(t.stride(-1) != 1 for t in (q, k, v))
            return "the values of a head do not lie together" if strided else None
        if torch.compiler.is_compiling():  # torch.compile cannot ask; torch raises if it must
            return None
        tensors = (x.transpose(1, 2) for x in (q, k, v))
        params = torch.backends.cuda.SDPAParams(*tensors, None, 0.0, False, False)
        return None if self.ask(params, False) else self.torch_says(q, k, v)

    def torch_says(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Why torch declines, from the warnings with which it refuses: what its rule says when it
        is asked alone goes past Python, to stderr."""
        with warnings.catch_warnings(record=True) as said, contextlib.suppress(RuntimeError):
            warnings.simplefilter("always")
            self.compute(q, k, v)
        reasons = [str(w.message).split(" (Triggered")[0].strip() for w in said]
        # Of every kernel in turn; those that were not asked for are disabled.
        other = ("not used because", "runtime disabled")
        reasons = [r for r in reasons if not any(words in r for words in other)]
        return "; ".join(reasons) or "torch declines, without a reason"


_cuda = torch.backends.cuda
TORCH_KERNELS = {
    "sdpa_cudnn": TorchKernel(SDPBackend.CUDNN_ATTENTION, _cuda.can_use_cudnn_attention),
    "sdpa_flash": TorchKernel(
        SDPBackend.FLASH_ATTENTION, _cuda.can_use_flash_attention, on_cpu=True
    ),
    "sdpa_efficient": TorchKernel(
        SDPBackend.EFFICIENT_ATTENTION, _cuda.can_use_efficient_attention
    ),
    "sdpa_math": TorchKernel(SDPBackend.MATH, on_cpu=True),
}

BACKENDS = LIBRARIES | TORCH_KERNELS
for _name, _backend in BACKENDS.items():
    dispatch.MACHINE[_name] = dispatch.constant(_backend.here)
_LOADS = {name: dispatch.constant(library.loads) for name, library in LIBRARIES.items()}


def why_not(name: str) -> Callable[[Tensor, Tensor, Tensor], str | None]:
    """A backend's reasons, as the dispatcher asks for them; a library is imported last."""

    def reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
        declined = dispatch.MACHINE[name]() or BACKENDS[name].takes(q, k, v)
        return declined or (_LOADS[name]() if name in _LOADS else None)

    return reason


def compute(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the backend of this name; "sdpa" leaves the choice of kernel to torch."""
    return sdpa(q, k, v) if name == "sdpa" else BACKENDS[name].compute(q, k, v)
