"""transformers' VideoMAE in DistributedDataParallel; each process reads its own videos.

mae-fast index VIDEOS/ -o index.jsonl
torchrun --standalone --nproc-per-node 2 examples/ddp.py index.jsonl [--no-accelerate]
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import VideoMAEConfig, VideoMAEForPreTraining

import mae_fast

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("index", help="what mae-fast index wrote")
parser.add_argument("--accelerate", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--size", choices=["base", "tiny"], default="base")
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()

TINY = dict(image_size=64, hidden_size=96, num_hidden_layers=2, num_attention_heads=3)
TINY |= dict(intermediate_size=384, decoder_num_hidden_layers=1)

gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)  # before anything else of CUDA: what names no device goes there
dist.init_process_group("nccl" if gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
config = VideoMAEConfig(**TINY if args.size == "tiny" else {})
model = VideoMAEForPreTraining(config).to(device)
if args.accelerate:
    model = mae_fast.accelerate(model)  # the one line, before the wrapper
model = DistributedDataParallel(model, device_ids=[device] if gpu else None)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)

side = config.image_size // config.patch_size
grid = (config.num_frames // config.tubelet_size, side, side)
size = dict(num_frames=config.num_frames, batch_size=2, steps=args.steps, rank=rank, world=world)
rows = mae_fast.data.read_index(args.index)
loader = mae_fast.data.make_loader(rows, mae_fast.DataConfig(), seed=0, **size)
for step, batch in enumerate(loader):
    keep, _ = mae_fast.masking.draw_ids("tube", grid, 0.9, seed=0, step=step, samples=batch.samples)
    mask = mae_fast.masking.mask_from_keep(keep, grid[0] * side * side).bool()
    clips = batch.to(device, non_blocking=True).video(config.image_size).transpose(1, 2)
    loss = model(clips, mask.to(device)).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    mean = loss.detach()
    dist.all_reduce(mean)
    if rank == 0:
        print(f"step {step} loss {mean.item() / world:.7f}", flush=True)
dist.destroy_process_group()
