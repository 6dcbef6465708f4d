"""VideoMAE V2, models.modeling_pretrain.PretrainVisionTransformer: VideoMAE with dual masking.

pred = model(x, mask, decode_mask): the decoder predicts the tokens that decode_mask leaves, some of
which the encoder sees too. The loss is computed outside of the model and counts only those it does
not see; `loss` is what engine_for_pretraining.py computes there.
"""

import torch
from torch import Tensor, nn

from mae_fast.adapters import videomae
from mae_fast.adapters.parts import Finding, Parts, Pixels
from mae_fast.ops.masked_mse import norm_target, target_patches

FAMILY = "videomae_v2"
SOURCE = "OpenGVLab/VideoMAEv2, PretrainVisionTransformer"
PARTS = videomae.PARTS
CHANNEL_DIM = videomae.CHANNEL_DIM
sample = videomae.sample


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    parts.signature(forward)
    return videomae.check_parts(parts)


def forward(
    model: nn.Module,
    pixels: Pixels | None,
    x: Tensor,
    mask: Tensor,
    decode_mask: Tensor | None = None,
) -> Tensor:
    """pred [B, M, P] of the tokens where decode_mask [B, L] is False; without one, where mask
    [B, L] is True. The encoder sees those where mask is False."""
    length = model.encoder.patch_embed.num_patches
    ids_keep, ids_mask = videomae.ids_of(mask, length, x.device)
    if decode_mask is not None:
        ids_mask, _ = videomae.ids_of(decode_mask, length, x.device)
    return videomae.predict(model, pixels, x, ids_keep, ids_mask)


def loss(
    outputs: Tensor,
    images: Tensor,
    bool_masked_pos: Tensor,
    decode_masked_pos: Tensor,
    patch_size: int = 16,
    normlize_target: bool = True,
    tubelet_size: int = 2,
) -> Tensor:
    """The loss of engine_for_pretraining.py, with labels of the decoded tokens only.

    outputs [B, M, P], the model's; images [B, 3, T, H, W], normalised by ImageNet's constants, or
    uint8; the masks [B, L], M tokens a row not in decode_masked_pos. The mean over tokens that are
    in bool_masked_pos too; their clips may have different numbers of them.
    """
    masked, skipped = (m.flatten(1).bool() for m in (bool_masked_pos, decode_masked_pos))
    length = images[0, 0].numel() // (tubelet_size * patch_size**2)
    ids, _ = videomae.ids_of(skipped, length, images.device)
    with torch.no_grad():
        if images.dtype != torch.uint8:
            images = videomae.unnormalised(images, CHANNEL_DIM)
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        frames = tuple(range(images.shape[2]))
        labels = target_patches(images, ids, frames, tubelet_size, patch_size, 0.0, 1.0, dtype)
        norm_pix = "channel" if normlize_target else "none"
        labels, _, _ = norm_target(labels, norm_pix, images.shape[1])
        counted = masked.to(images.device).gather(1, ids.long()).to(dtype)
    each = (outputs - labels).square().mean(dim=-1)
    return (each * counted).sum() / counted.sum()
