"""Which sizes a kernel takes, by architecture and shape class.

Candidates stand beside each kernel: SIZES is {kernel: {shape class: [sizes]}}, constexprs in
CAPITALS, num_warps, num_stages. A launcher asks `pick("<kernel>", "<shape class>")` and passes the
answer on: `kernel[grid](..., **picked)`. The first candidate is taken, a guess (for what ViT-B and
L ask for at 64 clips: the fastest on an H200 under Triton 3.6), until `make gpu` has timed them on
an architecture and written the fastest to measured.json, by version of Triton. Nothing is tuned
while training.
"""

import functools
import json
from importlib import import_module
from pathlib import Path

import triton

MEASURED = Path(__file__).with_name("measured.json")
TRITON = ".".join(triton.__version__.split(".")[:2])


def pick(kernel: str, shape: str = "any") -> dict[str, int]:
    """The sizes of a kernel for a shape class on the present device's architecture."""
    return _pick(kernel, shape, architecture())


@functools.cache
def _pick(kernel: str, shape: str, arch: int) -> dict[str, int]:
    found = measured().get(str(arch), {}).get(kernel, {}).get(shape)
    return found or candidates()[kernel][shape][0]


@functools.cache
def candidates() -> dict[str, dict[str, list[dict[str, int]]]]:
    """The SIZES of all kernels."""
    found = {}
    for file in Path(__file__).parent.glob("*[!_].py"):  # not __init__
        found |= getattr(import_module(f"mae_fast.kernels.{file.stem}"), "SIZES", {})
    return found


@functools.cache
def measured() -> dict:
    """{architecture: {kernel: {shape class: sizes}}}, as `make gpu` wrote it under this Triton."""
    return read_measured().setdefault(TRITON, {})


def read_measured() -> dict:
    """{version of Triton: what was measured under it}: each has a compiler of its own."""
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


@functools.cache
def interpreted() -> bool:
    """Whether kernels run on a CPU, by Triton's interpreter."""
    return triton.knobs.runtime.interpret


def architecture() -> int:
    """80 for sm_80 and so on; the interpreter stands for sm_90."""
    if interpreted():
        return 90
    return triton.runtime.driver.active.get_current_target().arch
