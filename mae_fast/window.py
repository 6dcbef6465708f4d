"""What a run gathers between two rows: on the device, then brought to the host at once."""

import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mae_fast import distributed
from mae_fast.distributed import World

log = logging.getLogger("mae_fast")


class Gathered(NamedTuple):
    """A window on the host, of all ranks."""

    losses: list[float]  # those that are finite
    norms: list[float]  # of each step
    paths: list[list[str]]  # of each step, each file once
    bad: list[tuple[str, str]]
    seconds: float

    def note_skipped(self, first: int, folder: Path | None) -> int:
        """How many steps, numbered from `first`, were skipped because a gradient was not finite;
        each is listed in the folder's nonfinite.jsonl."""
        skipped = [i for i, norm in enumerate(self.norms) if not math.isfinite(norm)]
        for i in skipped:
            norm, files = self.norms[i], self.paths[i]
            log.warning("step %d skipped, gradient norm %s; videos: %s", first + i, norm, files)
            if folder:
                with (folder / "nonfinite.jsonl").open("a") as f:
                    row = {"step": first + i, "grad_norm": str(norm), "videos": files}
                    f.write(json.dumps(row) + "\n")
        return len(skipped)


@dataclass
class Window:
    """What has been gathered since numbers last crossed to the host."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    paths: list[list[str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def gather(self, peers: World) -> Gathered:
        """Bring the numbers to the host. Every peer takes part."""
        losses, norms = [], []
        if self.losses:
            numbers = [torch.stack(self.losses), torch.stack(self.norms)]
            losses, norms = torch.stack(numbers).tolist()
        seconds = time.perf_counter() - self.began
        ranks = distributed.gather((losses, self.bad, self.paths), peers)
        return Gathered(
            [x for each, _, _ in ranks for x in each if math.isfinite(x)],
            norms,
            [sorted({p for _, _, paths in ranks for p in paths[i]}) for i in range(len(norms))],
            [bad for _, bads, _ in ranks for bad in bads],
            seconds,
        )
