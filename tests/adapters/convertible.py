"""A small model of each family whose weights convert carries."""

import pytest
import stand_ins
import torch
from torch import nn

from mae_fast import MaskedAutoencoder, ModelConfig
from mae_fast.weights import Size
from mae_fast.weights.families import FAMILIES

GRID = (4, 4, 4)  # 8 frames of 32 pixels, patches of 2 x 8 x 8
SIZE = Size(img_size=32, num_frames=8, source_num_frames=8)


def ours(**changes) -> MaskedAutoencoder:
    """A small mae_fast model, with both frames of a patch predicted, as VideoMAE does."""
    fields = dict(img_size=32, patch_size=8, num_frames=8, pred_t_dim=8, embed_dim=24, depth=2)
    fields |= dict(num_heads=3, decoder_embed_dim=12, decoder_depth=2, decoder_num_heads=2)
    return MaskedAutoencoder(ModelConfig(**{**fields, **changes}))


def transformers_model(pooled: bool = False, **changes):
    pytest.importorskip("transformers")
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    fields = dict(image_size=32, patch_size=8, num_frames=8, hidden_size=24, num_hidden_layers=2)
    fields |= dict(num_attention_heads=3, intermediate_size=96, decoder_num_attention_heads=2)
    fields |= dict(decoder_hidden_size=12, decoder_num_hidden_layers=2)
    fields |= dict(decoder_intermediate_size=48, layer_norm_eps=1e-6, use_mean_pooling=pooled)
    model = VideoMAEForPreTraining(VideoMAEConfig(**{**fields, **changes}))
    model.decoder.norm.eps = 1e-6  # 1e-5 in theirs alone
    return model


class ImageViT(nn.Module):
    """timm's VisionTransformer, in its names and its arithmetic."""

    def __init__(self, size: int = 32, patch: int = 8, dim: int = 24, cls: bool = True) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls else None
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + cls, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        blocks = [stand_ins.Block(dim, 3, 4.0, True, False) for _ in range(2)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(dim, eps=1e-6)

    def forward(self, image):
        x = self.patch_embed.proj(image).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


JOINT = dict(sep_pos_embed=False, cls_embed=False)
MODELS = {
    "mae_st": ours,
    "mae_st-joint": lambda: ours(sep_pos_embed=False),
    "mae_st-no_cls": lambda: ours(cls_embed=False),
    "mae_st-no_biases": lambda: ours(no_qkv_bias=True, cls_embed=False),
    "slowfast": stand_ins.MaskMViT,
    "slowfast-sep_decoder": lambda: stand_ins.MaskMViT(decoder_sep_pos_embed=True),
    "slowfast-no_cls": lambda: stand_ins.MaskMViT(cls=False, sep_pos_embed=False),
    "videomae": stand_ins.VideoMAE,
    "videomae-no_biases": lambda: stand_ins.VideoMAE(qkv_bias=False),
    "transformers": transformers_model,
    "transformers-no_norm": lambda: transformers_model(pooled=True),
    "transformers-no_biases": lambda: transformers_model(qv_bias=False),
    "timm-vit": ImageViT,
    "timm-vit-no_cls": lambda: ImageViT(cls=False),
}


def family_of(name: str) -> str:
    return max((f for f in FAMILIES if name.startswith(f)), key=len)


def make(kind, seed: int = 0) -> nn.Module:
    """A model of MODELS, or one of a kind, with every parameter away from its starting value."""
    torch.manual_seed(seed)
    model = MODELS.get(kind, kind)().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return model
