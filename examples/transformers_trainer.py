"""transformers' VideoMAE in its Trainer (which needs `pip install accelerate`, another package).

mae-fast index VIDEOS/ -o index.jsonl
python examples/transformers_trainer.py index.jsonl [--no-accelerate]
"""

import argparse

import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainingArguments, VideoMAEConfig, VideoMAEForPreTraining

import mae_fast

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("index", help="what mae-fast index wrote")
parser.add_argument("--accelerate", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--size", choices=["base", "tiny"], default="base")
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()

TINY = dict(image_size=64, hidden_size=96, num_hidden_layers=2, num_attention_heads=3)
TINY |= dict(intermediate_size=384, decoder_num_hidden_layers=1)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)  # ImageNet's, as VideoMAE takes
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)


def collate(batches: list[mae_fast.data.Batch]) -> dict[str, torch.Tensor]:
    """Clips as VideoMAE takes them, and tube masks, which depend on the clips' numbers alone."""
    batch = mae_fast.data.join(batches)
    clips = batch.video(config.image_size) * 0.225 + 0.45  # [B, 3, T, H, W] in [0, 1]
    side = config.image_size // config.patch_size
    grid = (config.num_frames // config.tubelet_size, side, side)
    keep, _ = mae_fast.masking.draw_ids("tube", grid, 0.9, seed=0, step=0, samples=batch.samples)
    mask = mae_fast.masking.mask_from_keep(keep, grid[0] * side * side).bool()
    return dict(pixel_values=((clips - MEAN) / STD).transpose(1, 2), bool_masked_pos=mask)


class VideoTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        clips = mae_fast.data.ClipDataset(rows, mae_fast.DataConfig(), config.num_frames, seed=0)
        draws = BatchSampler(range(2 * args.steps), 2, drop_last=True)  # 2 videos, 4 clips of each
        return DataLoader(clips, batch_sampler=draws, collate_fn=collate, num_workers=2)


torch.manual_seed(0)
rows = mae_fast.data.read_index(args.index)
config = VideoMAEConfig(**TINY if args.size == "tiny" else {})
model = VideoMAEForPreTraining(config)
if args.accelerate:
    model = mae_fast.accelerate(model)  # the one line

settings = dict(max_steps=args.steps, learning_rate=1e-3, max_grad_norm=0.1, logging_steps=1)
cpu = not torch.cuda.is_available()  # where bf16 must be asked for so
quiet = dict(save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=cpu)
trainer = VideoTrainer(model, TrainingArguments("trainer", bf16=True, **settings, **quiet))
trainer.train()
for entry in trainer.state.log_history[:-1]:
    print(f"step {entry['step'] - 1} loss {entry['loss']:.7f}")
