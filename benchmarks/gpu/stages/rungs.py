"""Training steps of the other rungs and sizes, as `steps` takes those that decide."""

from collections.abc import Iterator

from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages.steps import LADDER, REST, RUNGS
from benchmarks.gpu.stages.steps import items as items_of


def items(setting: Setting) -> Iterator[Item]:
    every = (("vit_base", 64, (*LADDER, *REST)),)  # each engine once
    return items_of(setting, every if setting.tiny else RUNGS)
