"""The sizes of every kernel: each candidate of kernels/configs.py, timed on the calls of a training
step -> kernels/measured.json. Candidates are compiled first, by as many processes as there are
cores, into Triton's cache on disk.

    python -m benchmarks.gpu.stages.tune SHARE OF    # compile one share of the calls
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch

from benchmarks.gpu.calls import Case, cases
from benchmarks.gpu.records import Declined, Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages.checks import begin, end_by, own_backend
from benchmarks.gpu.stages.kernels import plan, timer, told
from mae_fast.bench import ops
from mae_fast.bench.calls import Call, Run
from mae_fast.bench.timing import interleave
from mae_fast.kernels import configs
from mae_fast.kernels.configs import CANDIDATES

MODELS, BATCH = ("vit_large", "vit_base"), 64
ROUNDS = 9
COMPILE_SHARE = 0.6  # of the stage's time
Key = tuple[str, str]  # kernel, shape class


def items(setting: Setting) -> Iterator[Item]:
    yield Item("compile the candidates", lambda: compile_all(setting))
    for case in cases_in_order(setting):
        yield Item(case.name, lambda call=case.call: tune(setting, call))
    limits = setting.limits()
    for model in setting.some(MODELS):  # of one size a kernel: its backends beside each other

        def adamw(model: str = model) -> dict:
            how = plan(setting, model), setting.cfg(model), limits, timer(setting)
            return told(setting, ops.adamw(*how))

        yield Item(f"{model} adamw", adamw)
    write_table(setting)


def cases_in_order(setting: Setting) -> list[Case]:
    """Those of kernels that have candidates; attention first, which matters most. The rehearsal has
    two of other ops too."""
    tuned = [
        case
        for case in cases(setting, MODELS, BATCH)
        if any(kernel.startswith(f"{case.call.op}_") for kernel in CANDIDATES)
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
    parts = {"attention": 3}
    tasks = [
        (case.call, part, parts.get(case.call.op, 1))
        for case in cases_in_order(setting)
        for part in range(parts.get(case.call.op, 1))
    ]
    for call, part, of_parts in tasks[share::of]:
        call = call.real(setting.device.type)
        try:
            own_backend(setting, call)
        except Declined:
            continue
        for run in runs(setting, call).values():
            for key in picks(run):
                for candidate in setting.some(CANDIDATES[key[0]][key[1]], 2)[part::of_parts]:
                    try:
                        with chosen({key: candidate}):
                            run()
                    except Exception as e:  # too large for this device: `tune` records it
                        print(f"{key} {candidate}: {type(e).__name__}", flush=True)


def runs(setting: Setting, call: Call) -> dict[str, Run]:
    """The call's forward and backward, apart, by Triton."""
    function = call.function("triton")

    def cast(run: Run) -> Run:
        def under_autocast():
            with setting.autocast():
                return run()

        return under_autocast

    found = {"forward": cast(call.forward(function))}
    if call.differentiable:
        with setting.autocast():
            found["backward"] = cast(call.backward(function))
    return found


def tune(setting: Setting, call: Call) -> dict:
    """The fastest candidate of each kernel that the call launches, one kernel at a time, the others
    at their best so far. A candidate that does not launch, or gives other results than the first
    that does, is out."""
    call = call.real(setting.device.type)
    own_backend(setting, call)
    sizes, report = {}, []
    for direction, run in runs(setting, call).items():
        for key in sorted(picks(run)):
            candidates = setting.some(CANDIDATES[key[0]][key[1]], 2)
            timed, out, expected = {}, {}, None
            for i, candidate in enumerate(candidates):
                this = sized(run, {**sizes, key: candidate})
                try:
                    got = [t.float() for t in this()]
                    expected = expected or got
                    assert agree(got, expected), "gives other results"
                    timed[str(i)] = this
                except Exception as e:
                    text = f"{type(e).__name__}: {e}"
                    out[json.dumps(candidate)] = text.splitlines()[0]
            assert timed, f"{key}: no candidate runs: {out}"
            seconds = interleave(timed, setting.rounds(ROUNDS), timer(setting))
            medians = {i: statistics.median(s) for i, s in seconds.items()}
            best = candidates[int(min(medians, key=medians.get))]
            sizes[key] = best
            report.append(
                {
                    "kernel": key[0],
                    "shape_class": key[1],
                    "direction": direction,
                    "fastest": best,
                    "seconds": {json.dumps(candidates[int(i)]): s for i, s in seconds.items()},
                    "out": out,
                    "over_the_guess": medians.get("0", float("nan")) / min(medians.values()),
                }
            )
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


def sized(run: Run, sizes: dict[Key, dict]) -> Run:
    def with_sizes():
        with chosen(sizes):
            return run()

    return with_sizes


@contextmanager
def chosen(sizes: dict[Key, dict]):
    """Inside, kernels take these sizes, as if they had been measured."""
    table = configs.measured().setdefault(str(configs.architecture()), {})
    before = json.loads(json.dumps(table))
    for (kernel, shape), size in sizes.items():
        table.setdefault(kernel, {})[shape] = size
    configs._pick.cache_clear()
    try:
        yield
    finally:
        table.clear()
        table.update(before)
        configs._pick.cache_clear()


def picks(run: Run) -> set[Key]:
    """The kernels whose sizes a run asks for, with more than one candidate."""
    found, pick = set(), configs._pick

    def recorded(kernel: str, shape: str, arch: int) -> dict[str, int]:
        found.add((kernel, shape))
        return pick(kernel, shape, arch)

    configs._pick = recorded
    try:
        with suppress(Exception):  # the guess may be too large for this device
            run()
    finally:
        configs._pick = pick
    return {key for key in found if len(CANDIDATES[key[0]][key[1]]) > 1}


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
    seconds: dict[tuple, dict[str, list[float]]] = {}
    for record in records:
        for kernel in record.get("kernels", ()) if record["stage"] == "tune" else ():
            key = str(record["architecture"]), kernel["kernel"], kernel["shape_class"]
            for sizes, samples in kernel["seconds"].items():
                of_step = record["calls_a_step"] * statistics.median(samples)
                seconds.setdefault(key, {}).setdefault(sizes, []).append(of_step)
    found = {}
    for key, candidates in seconds.items():
        most = max(map(len, candidates.values()))
        sums = {sizes: sum(s) for sizes, s in candidates.items() if len(s) == most}
        found[key] = json.loads(min(sums, key=sums.get))
    return found


if __name__ == "__main__":
    compile_share(
        Setting.make("--rehearse" in sys.argv, float("inf")), int(sys.argv[1]), int(sys.argv[2])
    )
