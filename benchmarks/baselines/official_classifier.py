"""The official MAE-ST classifier (models_vit.py) as the official code computes it: plain PyTorch,
every pixel through a convolution, scores materialised. As official.py: an oracle and a bar."""

from typing import Literal

import torch
from torch import Tensor, nn

from mae_fast.bench.baselines.official import EPS, Block, PatchEmbed
from mae_fast.classifier import ClassifierConfig


class OfficialClassifier(nn.Module):
    """logits = model(video), video [N, C, T, H, W] float, normalised; the parameters' names are
    VideoClassifier's of the family mae_st. Separable positions and a cls token only."""

    def __init__(
        self, cfg: ClassifierConfig, attention: Literal["eager", "sdpa"] = "eager"
    ) -> None:
        super().__init__()
        m = cfg.model
        self.steps, self.cells = m.grid[0], m.grid[1] * m.grid[2]
        dim = m.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, self.cells, dim))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, self.steps, dim))
        self.patch_embed = PatchEmbed(m)
        self.blocks = nn.ModuleList(Block(dim, m.num_heads, m, attention) for _ in range(m.depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, cfg.num_classes)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch_embed(video)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        spatial = self.pos_embed_spatial.repeat(1, self.steps, 1)
        temporal = self.pos_embed_temporal.repeat_interleave(self.cells, dim=1)
        x = x + torch.cat([self.pos_embed_class, spatial + temporal], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 1:].mean(dim=1)))
