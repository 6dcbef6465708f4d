"""mae_fast's own model, and a data set of your own: uint8 clips [B, 3, T, H, W] are all it takes.

python examples/native_model.py VIDEO.mp4 [VIDEO.mp4 ...]
"""

import argparse
import itertools

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import mae_fast

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("videos", nargs="+")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()


class Videos(Dataset):
    """The first 16 frames of each video, its middle square at 64 x 64: uint8 [3, 16, 64, 64]."""

    def __len__(self) -> int:
        return len(args.videos)

    def __getitem__(self, i: int) -> torch.Tensor:
        with av.open(args.videos[i]) as container:
            frames = itertools.islice(container.decode(video=0), 16)
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        clip = torch.from_numpy(frames).permute(3, 0, 1, 2)
        side = min(clip.shape[2:])
        top, left = (clip.shape[2] - side) // 2, (clip.shape[3] - side) // 2
        clip = clip[:, :, top : top + side, left : left + side]
        return torch.nn.functional.interpolate(clip.float(), size=(64, 64), mode="area").byte()


torch.manual_seed(0)
model = mae_fast.MaskedAutoencoder(mae_fast.preset("vit_tiny", img_size=64, depth=4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
loader = DataLoader(Videos(), batch_size=4, shuffle=True, num_workers=2)
step = 0
while step < args.steps:
    for video in loader:
        loss, _, _ = model(video, mask_ratio=0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.7f}", flush=True)
        step += 1
