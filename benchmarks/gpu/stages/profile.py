"""One warmed step of the engine, kernel by kernel: its time on the device, its calls, its op."""

from collections import Counter
from collections.abc import Iterator
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
    clips, noise = setting.clips(cfg, batch), setting.noise(cfg, batch)
    engine = build(EAGER, cfg, setting)

    def step() -> None:
        engine.step(clips, noise)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # nothing may still run when the profile ends

    for _ in range(3):
        step()
    with profile() as found:
        step()
    launches = count_launches(step)
    graph = build(OURS, cfg, setting)
    for _ in range(5):
        graph.step(clips, noise)
    rows = kernels_of(found.key_averages(), setting.device)
    total, by_op = sum(r["microseconds"] for r in rows), Counter()
    for row in rows:
        by_op[row["op"]] += row["microseconds"]
    shares = {op: us / total for op, us in by_op.most_common()}
    return {
        "model": model,
        "batch_clips": batch,
        "microseconds": total,
        "shares": shares,
        "launches": launches,
        "launches_with_graph": count_launches(lambda: graph.step(clips, noise)),
        "kernels": rows[:KERNELS],
        "told": ", ".join(f"{op} {part:.0%}" for op, part in list(shares.items())[:7]),
    }


def kernels_of(averages: Any, device: str) -> list[dict]:
    """The rows with a time of their own on the device, the longest first. A span of the host, as
    our labels are, has a shadow there, from its first kernel to its last: no kernel itself."""
    own = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
    if device == "cuda":
        averages = [e for e in averages if e.device_type.name == "CUDA"]
        averages = [e for e in averages if not e.is_user_annotation]
    rows = [
        {
            "kernel": event.key[:120],
            "op": op_of(event.key),
            "calls": event.count,
            "microseconds": getattr(event, own),
        }
        for event in averages
        if getattr(event, own) > 0
    ]
    return sorted(rows, key=lambda row: -row["microseconds"])


def op_of(kernel: str) -> str:
    """The op whose stem a kernel's name holds, the longest first; else the kind of library."""
    name = kernel.lower()
    for op in sorted(OPS, key=len, reverse=True):
        if op in name and op != "linear":
            return op
    for kind, words in LIBRARY.items():
        if any(word in name for word in words):
            return kind
    return "other"
