"""Attention on the calls of a training step, by every backend that is here: ours, libraries, each
of torch's kernels -> kernels/measured_attention.json, by which the op chooses, also in `steps`."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from benchmarks.gpu.calls import Case, cases
from benchmarks.gpu.records import MEASURED, Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages.kernels import BATCH, measure, own
from mae_fast.kernels import configs
from mae_fast.ops.attention import measured_key, read_measured

MODELS = ("vit_large", "vit_base", "vit_huge16")
TABLE = "measured_attention.json"
DIRECTIONS = {"forward": False, "forward_backward": True}  # whether gradients are wanted


def items(setting: Setting) -> Iterator[Item]:
    limits = setting.device.limits()
    for case in cases(setting, MODELS, BATCH):
        if case.call.op == "attention":
            yield Item(case.name, lambda case=case: measured(setting, case, limits))
    write_table(setting)


def measured(setting: Setting, case: Case, limits: dict) -> dict:
    """The record of a call, and the row of the table that it belongs to."""
    _, k, _ = case.call.args
    row = {"width": k.shape[-1], "keys": k.shape[1], "architecture": configs.architecture()}
    return measure(setting, case, limits, own(case.call)) | row


def write_table(setting: Setting) -> None:
    """The table, and a copy beside the records; a rehearsal's only there."""
    found = rows(setting.records.all())
    table = {} if setting.tiny else read_measured()
    for arch, classes in found.items():
        table.setdefault(arch, {}).update(classes)
    paths = [setting.records.path.with_name(TABLE)]
    if not setting.tiny:
        paths.append(configs.MEASURED.with_name(TABLE))
    for path in paths if found else ():
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        print(f"wrote {path}", flush=True)


def rows(records: Iterable[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """{architecture: {row: {backend: milliseconds of all calls of a step in this row}}}, of the
    backends that took every one of these calls."""
    sums: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["stage"] != "attention" or record["status"] != MEASURED:
            continue
        for direction, seconds in record["seconds_a_call"].items():
            size = record["width"], record["keys"], torch.bfloat16, DIRECTIONS[direction]
            row = sums[str(record["architecture"]), measured_key(*size)]
            for backend, samples in seconds.items():
                row[backend].append(1e3 * record["calls_a_step"] * statistics.median(samples))
    table: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (arch, key), backends in sums.items():
        most = max(map(len, backends.values()))
        table[arch][key] = {
            "reference" if name == "torch" else name: sum(times)
            for name, times in backends.items()
            if len(times) == most
        }
    return table
