"""Gradients of several processes, added up in flat buffers while backward still runs.

What DistributedDataParallel does, in Python's sight: its reducer cannot be part of a CUDA graph
that is captured after a few steps, and a rehearsal of the graph on a CPU cannot see it.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BYTES = 25 << 20  # of a bucket, as DistributedDataParallel's
ALIGNED = 64  # elements: a gradient begins where kernels may read 16 bytes at once


@dataclass
class Bucket:
    """Parameters, and the places of their gradients in one flat buffer."""

    params: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]


class Buckets:
    """buckets = Buckets(model), where a group of processes has been joined; every process makes it
    at the same place, and has rank 0's parameters and buffers from then on.

    with buckets.added_up(): loss.backward()    # p.grad is the sum of all processes' gradients

    A bucket is added up as soon as backward has written all of it and those before it; the order is
    that of the parameters, the last first, on every process. p.grad then lies in the bucket, and a
    parameter that got no gradient has none. Nothing waits for the device but on gloo.
    """

    def __init__(self, model: nn.Module, size: int = BYTES) -> None:
        self.processes = dist.get_world_size()
        for t in (*model.parameters(), *model.buffers()):
            dist.broadcast(t.detach(), src=0)
        self.buckets: list[Bucket] = []
        some: list[nn.Parameter] = []
        params = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        for p, after in zip(params, [*params[1:], None], strict=True):
            some.append(p)
            full = sum(q.nbytes for q in some) >= size
            if after is None or full or (after.dtype, after.device) != (p.dtype, p.device):
                self._add(some)
                some = []
        self.missing: list[int] | None = None  # gradients of each bucket, in a last micro-step
        self.works: list[dist.Work] = []

    def _add(self, params: list[nn.Parameter]) -> None:
        number = len(self.buckets)
        sizes = [-(-p.numel() // ALIGNED) * ALIGNED for p in params]
        flat = params[0].new_zeros(sum(sizes))
        parts = zip(flat.split(sizes), params, strict=True)
        views = [part[: p.numel()].view_as(p) for part, p in parts]
        self.buckets.append(Bucket(params, flat, views))
        for p in params:
            p.register_post_accumulate_grad_hook(lambda p, number=number: self._ready(number))

    @contextlib.contextmanager
    def added_up(self):
        """The backward in this block ends with all processes' gradients in p.grad."""
        self.missing, self.works = [len(b.params) for b in self.buckets], []
        try:
            yield
            for number in range(len(self.works), len(self.buckets)):  # of unused parameters
                self._reduce(self.buckets[number])
            for work in self.works:
                work.wait()
        finally:
            self.missing = None

    def _ready(self, number: int) -> None:
        if self.missing is None:
            return
        self.missing[number] -= 1
        while len(self.works) < len(self.buckets) and not self.missing[len(self.works)]:
            self._reduce(self.buckets[len(self.works)])

    @torch.no_grad()
    def _reduce(self, bucket: Bucket) -> None:
        both = zip(bucket.params, bucket.views, strict=True)
        pairs = [(p, view) for p, view in both if p.grad is not None]
        if len(pairs) < len(bucket.params):
            bucket.flat.zero_()
        if pairs:
            torch._foreach_copy_([v for _, v in pairs], [p.grad for p, _ in pairs])
        for p, view in pairs:
            p.grad = view
        self.works.append(dist.all_reduce(bucket.flat, async_op=True))
