"""The official MAE-ST classifier, models_vit.VisionTransformer: logits = model(x).

All tokens are encoded; the mean of all but the first, the pre-trained norm, dropout and the head
are the model's own modules.
"""

import torch
from torch import Tensor, nn

from mae_fast.adapters import mae_st, own
from mae_fast.adapters.parts import Finding, Parts, Pixels
from mae_fast.forward import Affine, Params, Spec, encode

FAMILY = "mae_st_classifier"
SOURCE = "facebookresearch/mae_st, VisionTransformer of models_vit.py"
PARTS = (
    "patch_embed.proj",
    "blocks.0.attn.q",
    "blocks.0.mlp.fc1",
    "norm",
    "dropout",
    "head",
)
CHANNEL_DIM = 1


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    parts.signature(forward)
    settings = "patch_embed.input_size patch_embed.frames patch_embed.img_size"
    if not parts.has("", *settings.split(), "sep_pos_embed", "cls_embed"):
        return parts.findings
    if not parts.layer("patch_embed.proj", nn.Conv3d, in_channels=3):
        return parts.findings
    dim = model.patch_embed.proj.out_channels
    mae_st.check_patch_embed(parts, model)
    tables = mae_st.check_tables(parts, model, "", dim)
    mae_st.check_blocks(parts, "blocks", dim)
    for name in ("norm", "dropout", "head"):
        parts.findings.append(Finding(name, None, "is called as it is"))
    parts.rest_is_off("", "patch_embed", "blocks", "norm", "dropout", "head", *tables)
    return parts.findings


def sample(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor]:
    """What the model's forward takes: one clip of noise."""
    return mae_st.sample(model, dtype)


def forward(model: nn.Module, pixels: Pixels | None, x: Tensor) -> Tensor:
    """Logits [N, classes]. Raises ValueError on a clip of another size than the model's."""
    embed, proj = model.patch_embed, model.patch_embed.proj
    clip = (proj.in_channels, embed.frames, *embed.img_size)
    if x.shape[1:] != clip:
        raise ValueError(f"x must be [N, {', '.join(map(str, clip))}], got {list(x.shape)}")
    weights = Affine(proj.weight.flatten(1), proj.bias)
    if x.dtype == torch.uint8:
        weights = pixels.fold(weights, x.shape[1])
    pos, cls = mae_st.pos_of(model, "")
    found = dict(patch_embed=weights, pos=pos, cls=cls, norm=None)
    found["blocks"] = [own.block(block, mae_st.block_of) for block in model.blocks]
    spec = spec_of(proj.kernel_size, model.blocks[0].attn.num_heads)
    tokens = encode(params_of(**found), spec, x, every_token(len(pos), x))
    return model.head(model.dropout(model.norm(tokens[:, 1:, :].mean(dim=1))))


def params_of(**encoder) -> Params:
    """Parameters of an encoder without a decoder."""
    return Params(**dict.fromkeys(Params._fields) | encoder)


def spec_of(kernel: tuple[int, int, int], heads: int) -> Spec:
    """The specification of an encoder alone, of normalised clips."""
    nothing = dict(target_frames=(), pred_t_patch=1, norm_pix="none", keep_encoder_cls=False)
    return Spec(kernel[0], kernel[1], heads, 1, **nothing, mean=0.0, std=1.0)


def every_token(length: int, clip: Tensor) -> Tensor:
    """ids [B, L] of a clip's tokens, in their order."""
    ids = torch.arange(length, dtype=torch.int32, device=clip.device)
    return ids.expand(len(clip), -1)
