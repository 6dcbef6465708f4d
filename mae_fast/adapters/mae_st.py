"""The official MAE-ST model (arXiv 2205.09113), models_mae.MaskedAutoencoderViT.

loss, pred, mask = model(imgs, mask_ratio): its own random mask, pred of all tokens in patch order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mae_fast.adapters import own
from mae_fast.adapters.parts import Finding, Parts, Pixels, Unfused, noise
from mae_fast.forward import Affine, Block, Layer, Norm, Params, Spec, apply_layer
from mae_fast.forward import forward as fused
from mae_fast.masking import mask_from_keep

FAMILY = "mae_st"
SOURCE = "facebookresearch/mae_st, MaskedAutoencoderViT"
PARTS = (
    "patch_embed.proj",
    "blocks.0.attn.q",
    "blocks.0.mlp.fc1",
    "norm",
    "decoder_embed",
    "mask_token",
    "decoder_blocks.0.attn.q",
    "decoder_norm",
    "decoder_pred",
)
CHANNEL_DIM = 1
WRITTEN = ("patch_info",)
DROPS = ("drop", "drop1", "drop2")  # timm's: one for both places, or two


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    parts.signature(forward)
    settings = "patch_embed.input_size patch_embed.frames patch_embed.img_size pred_t_dim"
    settings += " t_pred_patch_size norm_pix_loss sep_pos_embed cls_embed"
    if not parts.has("", *settings.split()):
        return parts.findings
    known = parts.layer("patch_embed.proj", nn.Conv3d, in_channels=3)
    if not parts.has("decoder_embed", "out_features") or not known:
        return parts.findings
    proj, p = model.patch_embed.proj, model.patch_embed.proj.kernel_size[1]
    dim, dec = proj.out_channels, model.decoder_embed.out_features
    check_patch_embed(parts, model)
    steps = model.patch_embed.input_size[0]
    parts.value("pred_t_dim", model.pred_t_dim, steps * model.t_pred_patch_size)
    known = ["patch_embed", "blocks", "norm", "decoder_embed", "mask_token"]
    known += ["decoder_blocks", "decoder_norm", "decoder_pred"]
    for name, width in (("", dim), ("decoder_", dec)):
        known += check_tables(parts, model, name, width)
        check_blocks(parts, f"{name}blocks", width)
        parts.norm(f"{name}norm", width)
    parts.shape("mask_token", 1, 1, dec)
    parts.linear("decoder_embed", dim, dec)
    parts.linear("decoder_pred", dec, model.t_pred_patch_size * p * p * 3)
    parts.rest_is_off("", *known)
    return parts.findings


def check_patch_embed(parts: Parts, model: nn.Module) -> None:
    """The patch embedding: a convolution whose kernel is its stride, of clips of one size."""
    embed = model.patch_embed
    (t, h, w), (u, p, q) = embed.input_size, embed.proj.kernel_size
    with parts.group("patch_embed"):
        plain = dict(stride=(u, p, p), padding=(0, 0, 0), dilation=(1, 1, 1), groups=1)
        parts.layer("patch_embed.proj", nn.Conv3d, kernel_size=(u, p, p), **plain)
        size = (embed.frames, *embed.img_size)
        parts.value("patch_embed.input_size", (t * u, h * p, w * q), size)
        parts.rest_is_off("patch_embed", "proj")


def check_tables(parts: Parts, model: nn.Module, prefix: str, width: int) -> list[str]:
    """Positions and cls of the encoder ("") or of the decoder ("decoder_"); their names."""
    t, h, w = model.patch_embed.input_size
    tables = {"pos_embed": t * h * w + bool(model.cls_embed)}
    if model.sep_pos_embed:
        tables = {"pos_embed_spatial": h * w, "pos_embed_temporal": t}
    if model.cls_embed:
        tables |= {"cls_token": 1} | ({"pos_embed_class": 1} if model.sep_pos_embed else {})
    for table, length in tables.items():
        parts.shape(prefix + table, 1, length, width)
    return [prefix + table for table in tables]


def check_blocks(parts: Parts, name: str, dim: int) -> None:
    blocks = parts.model.get_submodule(name)
    heads = getattr(blocks[0].attn, "num_heads", 1)
    linears = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    for i, block in enumerate(blocks):
        part = f"{name}.{i}"
        with parts.group(part):
            if parts.runs_itself(part):
                continue
            names = ["attn.num_heads", "attn.scale", "mlp.act", "norm1", "norm2", *linears]
            if not parts.has(part, *names):
                continue
            parts.value(f"{part}.attn.num_heads", block.attn.num_heads, heads)
            parts.value(f"{part}.attn.scale", block.attn.scale, (dim // heads) ** -0.5)
            turned = getattr(block.attn, "requires_t_shape", False)
            parts.need(f"{part}.attn", not turned, "takes tokens by time step")
            for layer in ("q", "k", "v"):
                parts.linear(f"{part}.attn.{layer}", dim, dim, bias=None)
            parts.linear(f"{part}.attn.proj", dim, dim)
            hidden = getattr(block.mlp.fc1, "out_features", None)
            parts.linear(f"{part}.mlp.fc1", dim, hidden)
            parts.layer(f"{part}.mlp.act", nn.GELU, approximate="none")
            parts.linear(f"{part}.mlp.fc2", hidden, dim)
            parts.norm(f"{part}.norm1", dim)
            parts.norm(f"{part}.norm2", dim)
            parts.drops(part, "drop_path")
            parts.drops(f"{part}.attn", "proj_drop")
            parts.drops(f"{part}.mlp", *DROPS)
            parts.rest_is_off(part, "norm1", "attn", "drop_path", "norm2", "mlp")
            parts.rest_is_off(f"{part}.attn", "q", "k", "v", "proj", "proj_drop")
            parts.rest_is_off(f"{part}.mlp", "fc1", "act", "fc2", *DROPS)


def sample(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor]:
    """What the model's forward takes: one clip of noise."""
    embed = model.patch_embed
    return (noise((1, embed.proj.in_channels, embed.frames, *embed.img_size), dtype, embed.proj),)


def forward(
    model: nn.Module, pixels: Pixels | None, imgs: Tensor, mask_ratio: float = 0.75
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, pred [N, L, P], mask [N, L]), the mask from the same random numbers as the model's.

    Raises ValueError on a clip of another size than the model's.
    """
    embed = model.patch_embed
    clip = (embed.proj.in_channels, embed.frames, *embed.img_size)
    if imgs.shape[1:] != clip:
        raise ValueError(f"imgs must be [N, {', '.join(map(str, clip))}], got {list(imgs.shape)}")
    if own.draws(model.decoder_pred):
        raise Unfused("decoder_pred draws random numbers for tokens that are not predicted")
    t, h, w = embed.input_size
    length = t * h * w
    ids = torch.argsort(torch.rand(len(imgs), length, device=imgs.device), dim=1).int()
    keep = int(length * (1 - mask_ratio))
    ids_keep, ids_mask = ids[:, :keep], ids[:, keep:]
    spec = _spec(model)
    if imgs.dtype == torch.uint8:
        if len({*pixels.mean}) == len({*pixels.std}) == 1:
            spec = spec._replace(mean=pixels.mean[0], std=pixels.std[0])
        else:  # the targets are of normalised pixels, whose channels then differ in scale
            dtype = torch.promote_types(embed.proj.weight.dtype, torch.float32)
            imgs = pixels.normalise(imgs, CHANNEL_DIM, dtype)
    params = _params(model)
    ordered = own.needs_order(model.decoder_blocks, params.decoder_blocks)
    without = ("no_unshuffle",) if ordered else ()
    loss, pred = fused(params, spec, imgs, ids_keep, ids_mask, True, without)
    # What model.unpatchify(pred) reads.
    size, frames = embed.img_size[0], model.pred_t_dim
    p, u = embed.proj.kernel_size[1], model.t_pred_patch_size
    model.patch_info = (len(imgs), frames, size, size, p, u, t, h, w)
    mask = mask_from_keep(ids_keep, length).to(torch.get_default_dtype())
    clip = embed.proj.weight.dtype if imgs.dtype == torch.uint8 else imgs.dtype
    wide = torch.promote_types(torch.promote_types(pred.dtype, clip), mask.dtype)
    return loss.to(wide), pred, mask


def _spec(model: nn.Module) -> Spec:
    u, p, _ = model.patch_embed.proj.kernel_size
    return Spec(
        t_patch=u,
        patch=p,
        num_heads=model.blocks[0].attn.num_heads,
        decoder_num_heads=model.decoder_blocks[0].attn.num_heads,
        target_frames=_target_frames(model.patch_embed.frames, model.pred_t_dim),
        pred_t_patch=model.t_pred_patch_size,
        norm_pix="patch" if model.norm_pix_loss else "none",
        keep_encoder_cls=False,
    )


def _target_frames(frames: int, count: int) -> tuple[int, ...]:
    """The frames that are predicted, by the model's own expression."""
    with _disable_current_modes():  # torch.export's has no numbers
        return tuple(torch.linspace(0, frames - 1, count, device="cpu").long().tolist())


_target_frames._dynamo_marked_constant = True  # torch.compile evaluates it once


def _params(model: nn.Module) -> Params:
    pos, cls = pos_of(model, "")
    decoder_pos, decoder_cls = pos_of(model, "decoder_")
    proj = model.patch_embed.proj
    return Params(
        patch_embed=Affine(proj.weight.flatten(1), proj.bias),
        pos=pos,
        cls=cls,
        blocks=[own.block(block, block_of) for block in model.blocks],
        norm=Norm.of(model.norm),
        decoder_embed=_embed(model.decoder_embed, model.cls_embed),
        mask_token=model.mask_token[0, 0],
        decoder_pos=decoder_pos,
        decoder_cls=decoder_cls,
        decoder_blocks=[own.block(block, block_of) for block in model.decoder_blocks],
        decoder_norm=Norm.of(model.decoder_norm),
        head=own.linear(model.decoder_pred),
    )


def _embed(layer: nn.Module, cls: bool) -> Layer:
    """The decoder's embedding; the model's own module never sees the encoder's cls token."""
    found = own.linear(layer)
    if type(found) is Affine or not cls:
        return found
    return lambda x: F.pad(apply_layer(x[:, 1:], found), (0, 0, 1, 0))


def block_of(block: nn.Module) -> Block:
    a, m, (path,) = block.attn, block.mlp, own.drops(block, "drop_path")
    drop, drop1, drop2 = own.drops(m, *DROPS)
    proj = own.dropped(own.linear(a.proj), *own.drops(a, "proj_drop"), path)
    fc2 = own.dropped(own.linear(m.fc2), drop2 or drop, path, before=drop1 or drop)
    norms, qkv = (Norm.of(block.norm1), Norm.of(block.norm2)), own.products(a.q, a.k, a.v)
    return Block(norms[0], *qkv, proj, norms[1], own.linear(m.fc1), fc2)


def pos_of(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Positions [L, D], and the cls token [D] with its own (None without one)."""
    if model.sep_pos_embed:
        spatial = getattr(model, f"{name}pos_embed_spatial")
        temporal = getattr(model, f"{name}pos_embed_temporal")
        pos = (temporal[0, :, None] + spatial[0]).flatten(0, 1)
        cls = getattr(model, f"{name}pos_embed_class")[0, 0] if model.cls_embed else None
    else:
        table = getattr(model, f"{name}pos_embed")[0]
        pos, cls = (table[1:], table[0]) if model.cls_embed else (table, None)
    return pos, cls if cls is None else getattr(model, f"{name}cls_token")[0, 0] + cls
