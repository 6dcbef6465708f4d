"""A tokenizer of the tests: the brightness of patches of 2 x 8 x 8 pixels, in 16 steps."""

import torch
from torch import nn


class Brightness(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.tensor(16.0))

    def forward(self, clips):
        assert clips.dtype == torch.float32 and 0 <= clips.min() and clips.max() <= 1
        patches = nn.functional.avg_pool3d(clips.mean(1), (2, 8, 8))
        return (patches * self.steps).long().clamp(max=15)


make = Brightness
