"""The sizes of every kernel, by architecture and shape class.

A launcher asks `pick("<kernel>", "<shape class>")` and passes the answer on: `kernel[grid](...,
**picked)`. Of the candidates of a shape class the first is taken, a guess, until `make gpu` has
timed them on an architecture and written the fastest to measured.json. Nothing is tuned while
training.
"""

import functools
import json
from pathlib import Path

import triton

# kernel -> shape class -> candidates: constexprs in CAPITALS, num_warps, num_stages.
CANDIDATES: dict[str, dict[str, list[dict[str, int]]]] = {}

MEASURED = Path(__file__).with_name("measured.json")


def pick(kernel: str, shape: str = "any") -> dict[str, int]:
    """The sizes of a kernel for a shape class on the present device's architecture."""
    return _pick(kernel, shape, architecture())


@functools.cache
def _pick(kernel: str, shape: str, arch: int) -> dict[str, int]:
    found = measured().get(str(arch), {}).get(kernel, {}).get(shape)
    return found or CANDIDATES[kernel][shape][0]


@functools.cache
def measured() -> dict:
    """{architecture: {kernel: {shape class: sizes}}}, as `make gpu` wrote it."""
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
