"""The training step, the only one: micro-steps that add up gradients, and the update.

step = Step(model, optimizer, loss, accum=2, clip=0.02)
step.micro(video, ids_keep, ids_mask)
step.micro(video, ids_keep, ids_mask)
mean_loss, norm = step.update(lr=1e-4)

Nothing in it waits for the device.
"""

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mae_fast.buckets import Buckets
from mae_fast.graph import Graphed, Side
from mae_fast.ops.linear import Copies
from mae_fast.optim import clipped_step

log = logging.getLogger("mae_fast")

WARMUP = 3  # steps before a capture: all state, workspaces and kernels exist by then


class Step:
    """Optimizer steps of `accum` micro-steps each.

    loss(*inputs) is a batch's loss, a scalar, computed under autocast if precision is "bf16". With
    `buckets`, of several processes with batches of their own, gradients are the mean over all: they
    are added up in the last micro-step. clip is the greatest global norm of the gradients, 0 for
    none; a step whose norm is not finite changes nothing. after(norm) follows each update, as a
    part of it.

    With graph=True the first WARMUP steps run as they are, and from then on each part (the first
    micro-step, a further one, the last, the update) is a CUDA graph; on a CPU, its rehearsal.
    Inputs whose shapes are not those of the capture run without, and the log says why, once. Raises
    BackendError if a part cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        loss: Callable[..., Tensor],
        *,
        accum: int = 1,
        clip: float = 0.0,
        precision: str = "fp32",
        graph: bool = False,
        buckets: Buckets | None = None,
        after: Callable[[Tensor], None] = lambda norm: None,
    ) -> None:
        self.model, self.optimizer, self.loss, self.buckets = model, optimizer, loss, buckets
        self.accum, self.clip, self.precision, self.after = accum, clip, precision, after
        self.device = next(model.parameters()).device
        self.lr = torch.zeros((), device=self.device)  # a graph would freeze a number
        self.losses: list[Tensor] = []  # of this step's micro-steps
        whole = all(type(p) is nn.Parameter for p in model.parameters())  # not FSDP's
        self.copies = Copies() if whole and precision == "bf16" else contextlib.nullcontext()
        side = Side(self.device) if graph else None
        self.side, self.warmup, self.replays = side, WARMUP, False
        # The first finds no gradients and writes them, others add; the last adds up all processes'.
        self.micros: dict[tuple[bool, bool], Callable[..., Tensor]] = {
            (first, last): self._part(functools.partial(self._add_gradients, last))
            for first in (True, False)
            for last in (True, False)
        }
        self.end = self._part(self._end)
        self.captured: list[Tensor] = []  # the gradients that the graphs write
        self._told: set[str] = set()

    def micro(self, *inputs: Tensor) -> None:
        """Add the gradients of the loss of one batch, on the device, over accum."""
        if len(self.losses) == self.accum:
            raise RuntimeError(f"{self.accum} micro-steps are done: the update is next")
        first = not self.losses
        last = self.buckets is not None and len(self.losses) == self.accum - 1
        if first:
            self.replays = self.side is not None and not self.warmup
        self.losses.append(self._run(self.micros[first, last], *inputs))
        if first and self.replays and not self.captured:
            self.captured = [p.grad for p in self.model.parameters()]

    def update(self, lr: float) -> tuple[Tensor, Tensor]:
        """(mean loss of the micro-steps, gradients' norm before clipping), on the device, after one
        step of the optimizer with this learning rate. Leaves no gradients behind."""
        if len(self.losses) != self.accum:
            raise RuntimeError(f"{len(self.losses)} of {self.accum} micro-steps are done")
        self.lr.fill_(lr)
        norm = self._run(self.end)
        losses, self.losses = self.losses, []
        self.warmup = max(self.warmup - 1, 0)
        return torch.stack(losses).mean(), norm

    def close(self) -> None:
        """Let go of the graphs: NCCL does not end while one holds its kernels."""
        if self.side:
            for part in (*self.micros.values(), self.end):
                part.close()

    def _part(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return Graphed(function, self.side) if self.side else function

    def _add_gradients(self, last: bool, *inputs: Tensor) -> Tensor:
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with half, self.copies:
            loss = self.loss(*inputs)
        addends = self.accum * (self.buckets.processes if self.buckets else 1)
        with self.buckets.added_up() if last else contextlib.nullcontext():
            (loss / addends).backward()
        return loss.detach()

    def _end(self) -> Tensor:
        norm = clipped_step(self.optimizer, self.lr, self.clip)
        self.after(norm)
        return norm

    def _run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A part of the step: as it is, or as the graph that it is."""
        if self.side is None:
            return part(*inputs)
        if self.replays:
            reason = part.does_not_fit(*inputs)
            if reason is None:
                return part(*inputs)
            self._go_on_without(reason)
        if self.warmup:
            with self.side.beside():
                return part.function(*inputs)
        return part.function(*inputs)

    def _go_on_without(self, reason: str) -> None:
        """The rest of this step runs as it is, on the gradients of its replays."""
        if reason not in self._told:
            log.warning("a step runs without its CUDA graph: %s", reason)
        self._told.add(reason)
        self.replays = False
        if self.losses:
            for p, grad in zip(self.model.parameters(), self.captured, strict=True):
                p.grad = grad
