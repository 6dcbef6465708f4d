"""Attention on the calls of a training step, by every backend that is here: ours, libraries, each
of torch's kernels -> kernels/measured_backends.json, by which the op chooses, also in `steps`."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from benchmarks.gpu.calls import Case, cases, of_every_call
from benchmarks.gpu.records import MEASURED, Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages.kernels import BATCH, items_of
from mae_fast.kernels import configs
from mae_fast.ops.attention import measured_key
from mae_fast.ops.measured import read_measured

MODELS = ("vit_large", "vit_base", "vit_huge16")


def items(setting: Setting) -> Iterator[Item]:
    limits = setting.limits()
    for case in cases(setting, MODELS, BATCH):
        if case.call.op == "attention":
            for item in items_of(setting, case, limits):
                yield Item(item.name, lambda case=case, run=item.run: run() | row(case))
    write_table(setting)


def row(case: Case) -> dict:
    """The row of the table that a call belongs to."""
    _, k, _ = case.call.args
    return {"width": k.shape[-1], "keys": k.shape[1], "architecture": configs.architecture()}


def write_table(setting: Setting) -> None:
    """What is recorded, and what else the table holds."""
    found = rows(setting.records.all())
    table = {} if setting.tiny else read_measured()
    for arch, classes in found.items():
        table.setdefault(arch, {}).update(classes)
    if found:
        setting.write_table("measured_backends.json", table)


def rows(records: Iterable[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """{architecture: {row: {backend: milliseconds of all calls of a step in this row}}}, of the
    backends that took every one of these calls."""
    times = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["stage"] != "attention" or record["status"] != MEASURED:
            continue
        gradients = record["direction"] != "forward"
        key = measured_key(record["width"], record["keys"], torch.bfloat16, gradients)
        for backend, samples in record["seconds"].items():
            milliseconds = 1e3 * record["calls_a_step"] * statistics.median(samples)
            times[str(record["architecture"]), key][backend].append(milliseconds)
    table = defaultdict(dict)
    for (arch, key), backends in times.items():
        table[arch][key] = of_every_call(backends)
    return table
