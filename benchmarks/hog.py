"""HOG's loss and its gradient beside PySlowFast's operator, on one core of a CPU:
`python -m benchmarks.hog SLOWFAST`, a checkout of facebookresearch/SlowFast.

Of clips of 16 frames of 224 x 224, 90% of 8 x 14 x 14 patches masked: the official HOGLayerC of
every second normalised frame, its values of the masked patches (`_get_hog_label_3d`), the mean
squared error and its backward; ours from the bytes. CPU time; memory is what each adds at most to a
process of its own.
"""

import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from mae_fast import backends
from mae_fast.bench.timing import cpu_time, interleave
from mae_fast.masking import draw_ids
from mae_fast.ops.masked_hog_mse import masked_hog_mse

MEAN, STD, GRID = 0.45, 0.225, (8, 14, 14)


def operator(repository: str) -> nn.Module:
    """HOGLayerC, whose file imports more than it needs: its class alone is taken."""
    text = (Path(repository) / "slowfast/models/operators.py").read_text()
    text = text[text.index("class HOGLayerC") :]
    end = text.find("\nclass ", 1)
    names = dict(nn=nn, torch=torch, math=math, F=F)
    exec(text[: end if end > 0 else None], names)
    return names["HOGLayerC"](nbins=9, pool=8)


def official(layer: nn.Module, video: Tensor, mask: Tensor, pred: Tensor) -> Tensor:
    """Its loss; video is normalised, mask bool [B, N]."""
    found = layer(video[:, :, ::2].transpose(1, 2).flatten(0, 1)).flatten(1, 2)
    cells = found.permute(0, 2, 3, 1).unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    return F.mse_loss(pred, cells.reshape(len(video), -1, 108)[mask].view_as(pred))


def added(run: Callable[[], object]) -> float:
    """MB that a process which runs it holds at most beyond what it had."""

    def status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    ours, theirs = os.pipe()
    if not (child := os.fork()):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = status("VmRSS")
        run()
        os.write(theirs, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(ours, 99)) / 1024


def main(slowfast: str, /, clips: int = 4, rounds: int = 5) -> None:
    torch.set_num_threads(1)
    layer = operator(slowfast)
    video = torch.randint(0, 256, (clips, 3, 16, 224, 224), dtype=torch.uint8)
    ids = draw_ids("random", GRID, 0.9, seed=0, step=0, samples=torch.arange(clips))[1]
    ids = ids.sort(dim=1).values  # as a mask has them
    mask = torch.zeros(clips, math.prod(GRID), dtype=torch.bool).scatter_(1, ids.long(), True)
    pred = torch.randn(*ids.shape, 108, requires_grad=True)
    normal = (video.float() / 255 - MEAN) / STD

    def ours(backend: str) -> Tensor:
        with backends(masked_hog_mse=backend):
            return masked_hog_mse(pred, video, ids, tuple(range(0, 16, 2)), 16, STD)

    def step(loss_of: Callable[[], Tensor]) -> Tensor:
        pred.grad = None
        loss = loss_of()
        loss.backward()
        return loss.detach()

    steps = {"official fp32": partial(step, partial(official, layer, normal, mask, pred))}
    steps |= {name: partial(step, partial(ours, name)) for name in ("reference", "cpp")}
    losses = {name: float(run()) for name, run in steps.items()}
    memory = {name: added(run) for name, run in steps.items()}
    seconds = interleave(steps, rounds, timer=cpu_time)
    print(f"{clips} clips, {rounds} rounds; median and extremes of CPU time, one thread")
    for name, each in seconds.items():
        low, middle, high = (1e3 * x for x in (min(each), statistics.median(each), max(each)))
        print(
            f"{name:14} {middle:8.1f} ms ({low:.1f} to {high:.1f})"
            f" {memory[name]:8.1f} MB  loss {losses[name]:.7f}"
        )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
