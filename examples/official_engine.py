"""The official MAE-ST in the loop of its own engine_pretrain.py; mae_fast.data reads the videos.

mae-fast index VIDEOS/ -o index.jsonl
python examples/official_engine.py MAE_ST_CHECKOUT index.jsonl [--no-accelerate]
"""

import argparse
import math
from functools import partial

import torch
from torch import nn

import mae_fast
from mae_fast.bench.baselines.official_repository import import_models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("repository", help="checkout of facebookresearch/mae_st")
parser.add_argument("index", help="what mae-fast index wrote")
parser.add_argument("--accelerate", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--size", choices=["base", "tiny"], default="base")
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()

SIZES = {
    "base": dict(embed_dim=768, depth=12, num_heads=12, decoder_embed_dim=512, decoder_depth=4),
    "tiny": dict(embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=2)
    | dict(img_size=64, decoder_num_heads=2),
}
RECIPE = dict(norm_pix_loss=True, t_patch_size=2, sep_pos_embed=True, cls_embed=True)
lr, warmup, clip_grad, mask_ratio = 1e-3, args.steps // 10, 0.02, 0.9
torch.manual_seed(0)
model = import_models(args.repository).MaskedAutoencoderViT(
    norm_layer=partial(nn.LayerNorm, eps=1e-6), **RECIPE, **SIZES[args.size]
)
if args.accelerate:
    model = mae_fast.accelerate(model)  # the one line

decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(".bias")]
others = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith(".bias")]
groups = [dict(params=decayed, weight_decay=0.05), dict(params=others, weight_decay=0.0)]
optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

rows = mae_fast.data.read_index(args.index)
size = dict(num_frames=16, batch_size=2, steps=args.steps)  # 2 videos, 4 clips of each
loader = mae_fast.data.make_loader(rows, mae_fast.DataConfig(), seed=0, **size)
for step, batch in enumerate(loader):
    done = max(step - warmup, 0) / max(args.steps - warmup, 1)
    rate = step / warmup if step < warmup else (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = lr * rate
    loss, _, _ = model(batch.video(model.patch_embed.img_size[0]), mask_ratio=mask_ratio)
    if not math.isfinite(loss.item()):
        raise SystemExit(f"loss is {loss.item()} in step {step}")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    print(f"step {step} loss {loss.item():.7f}", flush=True)
