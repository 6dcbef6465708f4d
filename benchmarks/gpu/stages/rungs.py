"""Training steps of the other rungs and sizes, as `steps` takes those that decide."""

from collections.abc import Iterator

from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages import steps


def items(setting: Setting) -> Iterator[Item]:
    return steps.items(setting, rungs=True)
