"""The classifier of VideoMAE and VideoMAE V2 by their authors, modeling_finetune.VisionTransformer.

logits = model(x): all tokens, their mean, a norm of its own, dropout, head. The last three are the
model's own modules.
"""

import torch
from torch import Tensor, nn

from mae_fast.adapters.mae_st_classifier import every_token, params_of, spec_of
from mae_fast.adapters.parts import Finding, Parts, Pixels, Unfused, noise
from mae_fast.adapters.videomae import blocks_of, check_blocks, checkpointed, fixed, product_dtype
from mae_fast.forward import Affine, encode

FAMILY = "videomae_classifier"
SOURCE = "MCG-NJU/VideoMAE and OpenGVLab/VideoMAEv2, VisionTransformer of modeling_finetune.py"
PARTS = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "fc_norm", "head")
CHANNEL_DIM = 1
_OWN = ("fc_norm", "fc_dropout", "head_dropout", "head")  # V2's dropout has another name


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    parts.signature(forward)
    settings = ["patch_embed.img_size", "patch_embed.num_patches", "pos_embed"]
    if not parts.has("", *settings) or not parts.layer("patch_embed.proj", nn.Conv3d):
        return parts.findings
    embed, proj = model.patch_embed, model.patch_embed.proj
    (u, p, _), dim = proj.kernel_size, proj.out_channels
    with parts.group("patch_embed"):
        plain = dict(stride=(u, p, p), padding=(0, 0, 0), dilation=(1, 1, 1), groups=1)
        parts.layer("patch_embed.proj", nn.Conv3d, kernel_size=(u, p, p), **plain)
        size = tuple(n // p * p for n in embed.img_size)
        parts.value("patch_embed.img_size", tuple(embed.img_size), size)
        parts.rest_is_off("patch_embed", "proj")
    parts.shape("pos_embed", 1, embed.num_patches, dim)
    check_blocks(parts, [f"blocks.{i}" for i in range(len(model.blocks))], dim)
    there = [name for name in _OWN if isinstance(getattr(model, name, None), nn.Module)]
    parts.findings += [Finding(name, None, "is called as it is") for name in there]
    parts.rest_is_off("", "patch_embed", "blocks", "pos_embed", *there)
    return parts.findings


def sample(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor]:
    """What the model's forward takes: one clip of noise."""
    return (noise((1, *_clip(model)), dtype, model.patch_embed.proj),)


def _clip(model: nn.Module) -> tuple[int, ...]:
    embed = model.patch_embed
    u, p, _ = embed.proj.kernel_size
    rows, columns = (n // p for n in embed.img_size)
    return embed.proj.in_channels, embed.num_patches // (rows * columns) * u, *embed.img_size


def forward(model: nn.Module, pixels: Pixels | None, x: Tensor) -> Tensor:
    """Logits [B, classes]."""
    proj = model.patch_embed.proj
    if x.shape[1:] != _clip(model):
        raise Unfused(f"the clip is {list(x.shape)}, not [B, {', '.join(map(str, _clip(model)))}]")
    weights = Affine(proj.weight.flatten(1), proj.bias)
    if x.dtype == torch.uint8:
        weights = pixels.fold(weights, x.shape[1])
    # Learned positions are detached there too.
    pos = fixed(model.pos_embed, product_dtype(proj.weight), x.device)
    blocks = blocks_of(model.blocks, checkpointed(model))
    params = params_of(patch_embed=weights, pos=pos, blocks=blocks)
    spec = spec_of(proj.kernel_size, model.blocks[0].attn.num_heads)
    out = model.fc_norm(encode(params, spec, x, every_token(len(pos), x)).mean(1))
    for name in _OWN[1:]:
        if (module := getattr(model, name, None)) is not None:
            out = module(out)
    return out
