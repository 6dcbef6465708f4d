"""transformers' VideoMAE in a LightningModule (`pip install lightning`).

mae-fast index VIDEOS/ -o index.jsonl
python examples/lightning_module.py index.jsonl [--no-accelerate]
"""

import argparse

import lightning
import torch
from torch.utils.data import BatchSampler, DataLoader
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


class VideoMAE(lightning.LightningModule):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        self.model = VideoMAEForPreTraining(config)
        if args.accelerate:
            self.model = mae_fast.accelerate(self.model)  # the one line

    def training_step(self, batch: mae_fast.data.Batch, step: int) -> torch.Tensor:
        clips = batch.video(config.image_size).transpose(1, 2)  # [B, T, 3, H, W]
        noise = torch.rand(len(clips), (config.image_size // config.patch_size) ** 2)
        tube = noise.argsort(dim=1) >= noise.shape[1] // 10  # 10% of the places stay
        mask = tube.repeat(1, config.num_frames // config.tubelet_size).to(clips.device)
        loss = self.model(clips, mask).loss
        print(f"step {step} loss {loss.item():.7f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)


lightning.seed_everything(0)
config = VideoMAEConfig(**TINY if args.size == "tiny" else {})
rows = mae_fast.data.read_index(args.index)
clips = mae_fast.data.ClipDataset(rows, mae_fast.DataConfig(), config.num_frames, seed=0)
draws = BatchSampler(range(2 * args.steps), 2, drop_last=True)  # 2 videos, 4 clips of each
loader = DataLoader(clips, batch_sampler=draws, collate_fn=mae_fast.data.join, num_workers=2)
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
lightning.Trainer(max_steps=args.steps, gradient_clip_val=0.1, **options).fit(
    VideoMAE(config), loader
)
