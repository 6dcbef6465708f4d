"""The sizes of every kernel: each candidate of its SIZES, timed on the calls of a training step ->
kernels/measured.json; and what else has two ways. Candidates are compiled first, by as many
processes as there are cores, into Triton's cache on disk.

    python -m benchmarks.gpu.stages.tune SHARE OF    # compile one share of the calls
"""

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from unittest import mock

import torch

from benchmarks.gpu.records import Declined, Item
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages.checks import begin, by_triton, end_by
from benchmarks.gpu.stages.kernels import BATCH, Case, cases, of_a_step, plan, told
from mae_fast.bench import ops
from mae_fast.bench.calls import Call, Run
from mae_fast.bench.timing import interleave
from mae_fast.kernels import configs

MODELS, ROUNDS = ("vit_large", "vit_base"), 9
COMPILE_SHARE = 0.6  # of the stage's time
Key = tuple[str, str]  # kernel, shape class


def items(setting: Setting) -> Iterator[Item]:
    yield Item("compile the candidates", partial(compile_all, setting))
    for case in cases_in_order(setting):
        yield Item(case.name, partial(tune, setting, case.call))
    limits = setting.limits()
    for model in setting.some(MODELS):
        yield Item(f"{model} adamw", partial(adamw, setting, model, limits))
    yield Item("a bias's gradient", partial(bias_gradient, setting))
    setting.write_table("measured.json", fastest(setting.records.all()))


def adamw(setting: Setting, model: str, limits: dict) -> dict:
    """Of one size a kernel: its backends beside each other."""
    how = plan(setting, model)
    ready = ops.ready_adamw(how, setting.cfg(model))
    return told(ops.measure(how, ready, limits, setting.clock(cold=True)))


def bias_gradient(setting: Setting) -> dict:
    """As sums that a norm's backward makes of the gradient that it writes, and in a pass of its
    own; of the decoder of ViT-B and L."""
    cfg = setting.cfg("vit_base")
    shape = setting.batch(BATCH), 1 + cfg.num_patches, cfg.decoder_embed_dim
    wide, rows, weight = (
        torch.randn(size, device=setting.device) for size in (shape, shape[:2], shape[2:])
    )
    args = wide, wide.bfloat16(), wide, weight, rows, rows, torch.bfloat16, 0
    backward, sums = torch.ops.mae_fast.add_layer_norm_bwd, torch.ops.mae_fast.linear_sums
    ways = {
        "within": lambda: backward(*args, True)[-1],
        "apart": lambda: sums(backward(*args, False)[1].flatten(0, 1)),
    }
    within, apart = (way() for way in ways.values())
    assert float((within - apart).norm()) <= 1e-2 * float(apart.norm()), "the sums differ"
    seconds = interleave(ways, setting.rounds(ROUNDS), setting.clock(cold=True))
    words = (f"{name} {1e6 * statistics.median(s):.0f} us" for name, s in seconds.items())
    return {"seconds": seconds, "told": ", ".join(words)}


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
    command = [sys.executable, "-m", "benchmarks.gpu.stages.tune"]
    device = ["--rehearse"] * setting.tiny
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
        with contextlib.suppress(Declined):
            for _, run, key in kernels_of(setting, call.real(setting.device)):
                for candidate in candidates_of(setting, key)[part::parts]:
                    with contextlib.suppress(Exception):  # too large: `tune` records it
                        chosen({key: candidate})(run)()


def candidates_of(setting: Setting, key: Key) -> Sequence[dict]:
    return setting.some(configs.candidates()[key[0]][key[1]], 2)


def kernels_of(setting: Setting, call: Call) -> Iterator[tuple[str, Run, Key]]:
    """Each kernel with several candidates that the call launches by Triton, forward and backward
    apart: (direction, a run of it, the kernel)."""
    function, autocast = by_triton(setting, call), setting.autocast()
    runs = {"forward": autocast(call.forward(function))}
    if call.differentiable:
        runs["backward"] = autocast(autocast(call.backward)(function))
    for direction, run in runs.items():
        for key in sorted(picks(run)):
            yield direction, run, key


def tune(setting: Setting, call: Call) -> dict:
    """The fastest candidate of each kernel that the call launches, one kernel at a time, the others
    at their best so far."""
    sizes, report = {}, []
    for direction, run, key in kernels_of(setting, call.real(setting.device)):
        found = fastest_of(setting, key, run, sizes)
        sizes[key] = found["fastest"]
        report.append({"kernel": key[0], "shape_class": key[1], "direction": direction} | found)
    if not report:
        raise Declined(f"{call.op} launches no kernel with candidates")
    words = ", ".join(f"{r['kernel']} {r['over_the_guess']:.2f}x of the guess" for r in report)
    return {
        "architecture": configs.architecture(),
        "calls_a_step": call.count,
        "kernels": report,
        "told": words,
    }


def fastest_of(setting: Setting, key: Key, run: Run, sizes: dict[Key, dict]) -> dict:
    """Of one kernel's candidates, beside the `sizes` of others. One that does not launch, or gives
    other results than the first that does, is out."""
    timed, out, expected = {}, {}, None
    names = {json.dumps(candidate): candidate for candidate in candidates_of(setting, key)}
    for name, candidate in names.items():
        this = chosen({**sizes, key: candidate})(run)
        try:
            got = [t.float() for t in this()]
            expected = expected or got
            for g, e in zip(got, expected, strict=True):  # to the rounding of bf16
                assert float((g - e).norm()) <= 1e-2 * float(e.norm()), "gives other results"
            timed[name] = this
        except Exception as e:
            out[name] = f"{type(e).__name__}: {e}".splitlines()[0]
    assert timed, f"{key}: no candidate runs: {out}"
    seconds = interleave(timed, setting.rounds(ROUNDS), setting.clock(cold=True))
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    best, guess = min(medians, key=medians.get), medians.get(next(iter(names)), math.nan)
    return {
        "fastest": names[best],
        "seconds": seconds,
        "out": out,
        "over_the_guess": guess / medians[best],
    }


@contextlib.contextmanager
def chosen(sizes: dict[Key, dict]) -> Iterator[set[Key]]:
    """Inside, kernels take these sizes; which kernels ask for theirs."""
    asked, pick = set(), configs._pick

    def of(kernel: str, shape: str, arch: int) -> dict[str, int]:
        asked.add((kernel, shape))
        return sizes.get((kernel, shape)) or pick(kernel, shape, arch)

    with mock.patch.object(configs, "_pick", of):
        yield asked


def picks(run: Run) -> set[Key]:
    """The kernels whose sizes a run asks for, with more than one candidate."""
    # The guess may be too large for this device.
    with chosen({}) as asked, contextlib.suppress(Exception):
        run()
    return {key for key in asked if len(configs.candidates()[key[0]][key[1]]) > 1}


def fastest(records: Iterable[dict]) -> dict[tuple[str, ...], dict[str, int]]:
    """{(Triton's version, architecture, kernel, shape class): sizes}: of the candidates that every
    call of the class can take, the one with which a step's calls of it take the least time."""
    found = of_a_step(
        ((str(r["architecture"]), k["kernel"], k["shape_class"]), r["calls_a_step"], k["seconds"])
        for r in records
        if r["stage"] == "tune"
        for k in r.get("kernels", ())
    )
    return {(configs.TRITON, *key): json.loads(min(of, key=of.get)) for key, of in found.items()}


if __name__ == "__main__":
    made = Setting.make("--rehearse" in sys.argv, math.inf)
    compile_share(made, int(sys.argv[1]), int(sys.argv[2]))
