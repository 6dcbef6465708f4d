"""The official MAE-ST classifier (models_vit.py) as the official code computes it: plain PyTorch,
every pixel through a convolution, scores materialised. As official.py: an oracle and a bar."""

from typing import Literal

import torch
from torch import Tensor, nn

from mae_fast.bench.baselines.official import Trunk
from mae_fast.classifier import ClassifierConfig


class OfficialClassifier(Trunk):
    """logits = model(video), video [N, C, T, H, W] float, normalised; the parameters' names are
    VideoClassifier's of the family mae_st. A model with a cls token only."""

    def __init__(
        self, cfg: ClassifierConfig, attention: Literal["eager", "sdpa"] = "eager"
    ) -> None:
        super().__init__(cfg.model, attention)
        self.head = nn.Linear(cfg.model.embed_dim, cfg.num_classes)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch_embed(video)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._pos("pos_embed")
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 1:].mean(dim=1)))
