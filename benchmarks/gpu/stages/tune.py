"""The sizes of every kernel: each candidate of its SIZES, timed on the calls of a training
step -> kernels/measured.json. Candidates are compiled first, by as many processes as there are
cores, into Triton's cache on disk.

    python -m benchmarks.gpu.stages.tune SHARE OF    # compile one share of the calls
"""

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.calls import Case, cases, of_every_call
from benchmarks.gpu.records import Declined, Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages.checks import begin, end_by, own_backend
from benchmarks.gpu.stages.kernels import plan, told
from mae_fast.bench import ops
from mae_fast.bench.calls import Call, Run
from mae_fast.bench.timing import interleave
from mae_fast.kernels import configs

MODELS, BATCH = ("vit_large", "vit_base"), 64
ROUNDS = 9
COMPILE_SHARE = 0.6  # of the stage's time
Key = tuple[str, str]  # kernel, shape class


def items(setting: Setting) -> Iterator[Item]:
    yield Item("compile the candidates", partial(compile_all, setting))
    for case in cases_in_order(setting):
        yield Item(case.name, partial(tune, setting, case.call))
    limits = setting.limits()
    for model in setting.some(MODELS):
        yield Item(f"{model} adamw", partial(adamw, setting, model, limits))
    write_table(setting)


def adamw(setting: Setting, model: str, limits: dict) -> dict:
    """Of one size a kernel: its backends beside each other."""
    how = plan(setting, model)
    ready = ops.ready_adamw(how, setting.cfg(model))
    return told(ops.measure(how, ready, limits, setting.clock(cold=True)))


def cases_in_order(setting: Setting) -> list[Case]:
    """Those of kernels that have candidates; attention first, which matters most. The rehearsal has
    two of other ops too."""
    tuned = [
        case
        for case in cases(setting, MODELS, BATCH)
        if any(kernel.startswith(f"{case.call.op}_") for kernel in configs.candidates())
    ]
    return setting.some(sorted(tuned, key=lambda case: case.call.op != "attention"), 5)


def compile_all(setting: Setting) -> dict:
    """Launch every candidate once, in parallel processes."""
    count = 2 if setting.tiny else max(2, len(os.sched_getaffinity(0)) - 2)
    end = time.time() + COMPILE_SHARE * min(setting.deadline - time.time(), 600.0)
    device = ["--rehearse"] if setting.tiny else []
    command = [sys.executable, "-m", "benchmarks.gpu.stages.tune"]
    running = [begin([*command, str(i), str(count), *device]) for i in range(count)]
    late = end_by(running, end)
    failed = sum(p.returncode not in (0, -9) for p in running)
    assert not failed, f"{failed} of {count} processes failed"
    return {"processes": count, "told": f"{late} of {count} processes did not end in time"}


def compile_share(setting: Setting, share: int, of: int) -> None:
    """Each candidate of each call in this share, launched once. Attention's take longest to
    compile, and are split further."""
    tasks = []
    for case in cases_in_order(setting):
        parts = 3 if case.call.op == "attention" else 1
        tasks += [(case.call, part, parts) for part in range(parts)]
    for call, part, parts in tasks[share::of]:
        call = call.real(setting.device)
        try:
            own_backend(setting, call)
        except Declined:
            continue
        for run in runs(setting, call).values():
            for key in picks(run):
                for candidate in candidates_of(setting, key)[part::parts]:
                    try:
                        chosen({key: candidate})(run)()
                    except Exception as e:  # too large for this device: `tune` records it
                        print(f"{key} {candidate}: {type(e).__name__}", flush=True)


def candidates_of(setting: Setting, key: Key) -> Sequence[dict]:
    return setting.some(configs.candidates()[key[0]][key[1]], 2)


def runs(setting: Setting, call: Call) -> dict[str, Run]:
    """The call's forward and backward, apart, by Triton."""
    function = call.function("triton")
    found = {"forward": setting.autocast()(call.forward(function))}
    if call.differentiable:
        with setting.autocast():
            backward = call.backward(function)
        found["backward"] = setting.autocast()(backward)
    return found


def tune(setting: Setting, call: Call) -> dict:
    """The fastest candidate of each kernel that the call launches, one kernel at a time, the others
    at their best so far. A candidate that does not launch, or gives other results than the first
    that does, is out."""
    call = call.real(setting.device)
    own_backend(setting, call)
    sizes, report = {}, []
    for direction, run in runs(setting, call).items():
        for key in sorted(picks(run)):
            candidates = candidates_of(setting, key)
            timed, out, expected = {}, {}, None
            for candidate in candidates:
                this = chosen({**sizes, key: candidate})(run)
                try:
                    got = [t.float() for t in this()]
                    expected = expected or got
                    assert agree(got, expected), "gives other results"
                    timed[json.dumps(candidate)] = this
                except Exception as e:
                    text = f"{type(e).__name__}: {e}"
                    out[json.dumps(candidate)] = text.splitlines()[0]
            assert timed, f"{key}: no candidate runs: {out}"
            seconds = interleave(timed, setting.rounds(ROUNDS), setting.clock(cold=True))
            medians = {name: statistics.median(s) for name, s in seconds.items()}
            sizes[key] = json.loads(min(medians, key=medians.get))
            guess = medians.get(json.dumps(candidates[0]), float("nan"))
            found = {
                "kernel": key[0],
                "shape_class": key[1],
                "direction": direction,
                "fastest": sizes[key],
                "seconds": seconds,
                "out": out,
                "over_the_guess": guess / min(medians.values()),
            }
            report.append(found)
    if not report:
        raise Declined(f"{call.op} launches no kernel with candidates")
    words = ", ".join(f"{r['kernel']} {r['over_the_guess']:.2f}x of the guess" for r in report)
    return {
        "architecture": configs.architecture(),
        "calls_a_step": call.count,
        "kernels": report,
        "told": words,
    }


def agree(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """To the rounding of bf16."""
    return all(
        float((g - e).norm()) <= 1e-2 * float(e.norm()) for g, e in zip(got, expected, strict=True)
    )


def chosen(sizes: dict[Key, dict]) -> Any:
    """A decorator: inside, kernels take these sizes."""
    pick = configs._pick

    def of(kernel: str, shape: str, arch: int) -> dict[str, int]:
        return sizes.get((kernel, shape)) or pick(kernel, shape, arch)

    return mock.patch.object(configs, "_pick", of)


def picks(run: Run) -> set[Key]:
    """The kernels whose sizes a run asks for, with more than one candidate."""
    found, pick = set(), configs._pick

    def recorded(kernel: str, shape: str, arch: int) -> dict[str, int]:
        found.add((kernel, shape))
        return pick(kernel, shape, arch)

    with mock.patch.object(configs, "_pick", recorded):
        with suppress(Exception):  # the guess may be too large for this device
            run()
    return {key for key in found if len(configs.candidates()[key[0]][key[1]]) > 1}


def write_table(setting: Setting) -> None:
    """What is recorded, and what else the table holds."""
    table, found = {} if setting.tiny else configs.measured(), fastest(setting.records.all())
    if not found:
        return
    for (arch, kernel, shape), sizes in found.items():
        table.setdefault(arch, {}).setdefault(kernel, {})[shape] = sizes
    others = {} if setting.tiny else configs.read_measured()
    setting.write_table("measured.json", others | {configs.TRITON: table})


def fastest(records: Iterable[dict]) -> dict[tuple[str, str, str], dict[str, int]]:
    """{(architecture, kernel, shape class): sizes}: of the candidates that every call of the class
    can take, the one with which a step's calls of it take the least time."""
    seconds = defaultdict(lambda: defaultdict(list))
    for record in records:
        for kernel in record.get("kernels", ()) if record["stage"] == "tune" else ():
            key = str(record["architecture"]), kernel["kernel"], kernel["shape_class"]
            for sizes, samples in kernel["seconds"].items():
                seconds[key][sizes].append(record["calls_a_step"] * statistics.median(samples))
    sums = {key: of_every_call(candidates) for key, candidates in seconds.items()}
    return {key: json.loads(min(of, key=of.get)) for key, of in sums.items()}


if __name__ == "__main__":
    compile_share(
        Setting.make("--rehearse" in sys.argv, float("inf")), int(sys.argv[1]), int(sys.argv[2])
    )
