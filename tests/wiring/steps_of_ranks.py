"""Ten steps by two ranks, each with half of every batch: python steps_of_ranks.py OUT/

As they are and as graphs, of one micro-step and of three; each rank writes what came of a case to
OUT/CASE.RANK.pt, and `take` is the same by one process.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from two_ranks import start

from mae_fast.buckets import Buckets
from mae_fast.config import ModelConfig, TrainConfig
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.optim import make_optimizer
from mae_fast.step import Step

CFG = ModelConfig(
    img_size=16,
    patch_size=8,
    num_frames=4,
    pred_t_dim=2,
    embed_dim=24,
    depth=2,
    num_heads=3,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
)
CASES = {
    f"{accum}{'graph' if graph else ''}": (accum, graph)
    for accum in (1, 3)
    for graph in (False, True)
}
CLIPS, STEPS, SMALL = 4, 10, 4000  # bytes of a bucket: several to the model


def take(accum: int, graph: bool, rank: int = 0, processes: int = 1) -> dict:
    """(loss, norm) of each step, and the weights after them; rank 1 begins with others."""
    torch.manual_seed(rank)
    model = MaskedAutoencoder(CFG)
    buckets = Buckets(model, SMALL) if processes > 1 else None
    optimizer = make_optimizer(model, TrainConfig())

    def loss(video, ids_keep, ids_mask):
        return model(video, ids_keep=ids_keep, ids_mask=ids_mask)[0]

    step = Step(model, optimizer, loss, accum=accum, clip=0.1, graph=graph, buckets=buckets)
    found, mine = [], slice(rank * CLIPS // processes, (rank + 1) * CLIPS // processes)
    for i in range(STEPS):
        for micro in range(i * accum, (i + 1) * accum):
            generator = torch.Generator().manual_seed(micro)
            video = torch.rand(CLIPS, 3, 4, 16, 16, generator=generator)
            samples = torch.arange(CLIPS)
            ids = draw_ids("random", CFG.grid, 0.5, seed=0, step=micro, samples=samples)
            step.micro(*(t[mine] for t in (video, *ids)))
        found.append(torch.stack(step.update(1e-3)))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    captured = [key for key, part in step.micros.items() if getattr(part, "graph", None)]
    count = len(buckets.buckets) if buckets else 0
    return {"rows": torch.stack(found), "weights": weights, "captured": captured, "buckets": count}


def main(out: str) -> int:
    torch.set_num_threads(1)
    other = start()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, (accum, graph) in CASES.items():
        torch.save(take(accum, graph, rank, 2), Path(out) / f"{name}.{rank}.pt")
    dist.destroy_process_group()
    return os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
