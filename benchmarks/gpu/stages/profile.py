"""One warmed step of the engine, kernel by kernel: its time on the device, its calls, its op."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.gpu.engines import EAGER, OURS, build
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from mae_fast.graph import count_launches
from mae_fast.ops import OPS

PLAN = (("vit_base", 64), ("vit_large", 64), ("vit_large", 8), ("vit_base", 8))
KERNELS = 60  # kept in a record
# What a kernel's name holds, for what is not named after an op: libraries', torch's, some of ours.
LIBRARY = {
    "products": ("gemm", "nvjet", "cutlass", "cublas", "::mm", "::addmm", "::linear", "xmma"),
    "attention": ("flash", "fmha", "scaled_dot_product"),
    "adamw": ("multi_tensor_apply", "_grad_norm_", "_clip_", "_advance_"),
    "sort": ("sort", "radix"),
    "indexing": ("gather", "scatter", "index", "compute_grad_weight"),
    "copies": ("memcpy", "copy", "cat"),
    "fills": ("memset", "fill"),
    "sums": ("reduce_kernel", "_sum_parts_", "_linear_sums_"),
    "elementwise": ("elementwise_kernel",),
}


def items(setting: Setting) -> Iterator[Item]:
    for model, batch in setting.some(PLAN):
        yield Item(f"{model} {batch} clips", partial(profiled, setting, model, batch))


def profiled(setting: Setting, model: str, batch: int) -> dict:
    cfg, batch = setting.cfg(model), setting.batch(batch)
    inputs = setting.inputs(cfg, batch)

    def step(engine: str) -> Callable[[], None]:
        built = build(engine, cfg, setting)

        def run() -> None:
            built.step(*inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # nothing may still run when the profile ends

        for _ in range(5):  # until a graph is captured, and once more
            run()
        return run

    plain = step(EAGER)
    with profile() as found:
        plain()
    rows, by_op = kernels_of(found.key_averages(), setting.device), Counter()
    for row in rows:
        by_op[row["op"]] += row["microseconds"]
    shares = {op: us / by_op.total() for op, us in by_op.most_common()}
    return {
        "model": model,
        "batch_clips": batch,
        "microseconds": by_op.total(),
        "shares": shares,
        "launches": count_launches(plain),
        "launches_with_graph": count_launches(step(OURS)),
        "kernels": rows[:KERNELS],
        "told": ", ".join(f"{op} {part:.0%}" for op, part in list(shares.items())[:7]),
    }


def kernels_of(averages: Iterable[Any], device: str) -> list[dict]:
    """The rows with a time of their own on the device, the longest first. A span of the host, as
    our labels are, has a shadow there, from its first kernel to its last: no kernel itself."""
    own = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
    if device == "cuda":
        averages = (e for e in averages if e.device_type.name == "CUDA")
        averages = (e for e in averages if not e.is_user_annotation)
    rows = [
        {"kernel": e.key[:120], "op": op_of(e.key), "calls": e.count, "microseconds": time}
        for e in averages
        if (time := getattr(e, own)) > 0
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def op_of(kernel: str) -> str:
    """The op whose stem a kernel's name holds, the longest first; else the kind of library."""
    name = kernel.lower()
    ours = (op for op in sorted(OPS, key=len, reverse=True) if op in name and op != "linear")
    kinds = (kind for kind, words in LIBRARY.items() if any(word in name for word in words))
    return next(itertools.chain(ours, kinds), "other")
