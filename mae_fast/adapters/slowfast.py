"""PySlowFast's MaskMViT as its MAE configurations make it (MASK.MAE_ON, no pooling).

preds, labels = model([clip]) or model([clip, meta, mask]): preds[0] [B * M, P] and labels[0][0] are
of masked tokens, clip after clip, in patch order. Labels are those of the fused forward for pixels,
and the model's own for HOG.
"""

import functools

import torch
from torch import Tensor, nn

from mae_fast.adapters import own
from mae_fast.adapters.parts import Finding, Parts, Pixels, Unfused, noise
from mae_fast.adapters.videomae import block_of, check_blocks
from mae_fast.forward import Affine, Norm, Params, Spec, decode, encode, targets
from mae_fast.ops.masked_mse import norm_target

FAMILY = "slowfast"
SOURCE = "facebookresearch/SlowFast, MaskMViT"
PARTS = (
    "patch_embed.proj",
    "blocks.0.attn.proj",
    "norm",
    "decoder_embed",
    "mask_token",
    "pred_head.transforms.0.0.attn.proj",
    "pred_head.projections.0",
)
CHANNEL_DIM = 1
WRITTEN = ("patch_info", "counter")
_SETTINGS = (
    "cls_embed_on",
    "sep_pos_embed",
    "sep_pos_embed_decoder",
    "patch_dims",
    "pred_pixel_wt",
    "pred_hog_wt",
    *(f"cfg.AUG.{name}" for name in ("MASK_RATIO", "MASK_TUBE")),
    *(f"cfg.MASK.{name}" for name in ("MAE_RND_MASK", "TIME_STRIDE_LOSS", "NORM_PRED_PIXEL")),
)


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    parts.signature(forward)
    if not parts.has("", *_SETTINGS):
        return parts.findings
    with parts.group("cfg"):
        parts.value("cfg.MASK.MAE_ON", model.cfg.MASK.MAE_ON, True)
        parts.value("cfg.MASK.PER_FRAME_MASKING", model.cfg.MASK.PER_FRAME_MASKING, False)
        parts.value("use_2d_patch", model.use_2d_patch, False)
        parts.value("use_abs_pos", model.use_abs_pos, True)
    if not parts.layer("patch_embed.proj", nn.Conv3d, in_channels=3):
        return parts.findings
    proj, (t, h, w) = model.patch_embed.proj, model.patch_dims
    (u, p, _), dim, dec = proj.kernel_size, proj.out_channels, model.mask_token.shape[-1]
    with parts.group("patch_embed"):
        plain = dict(stride=(u, p, p), padding=(0, 0, 0), dilation=(1, 1, 1), groups=1)
        parts.layer("patch_embed.proj", nn.Conv3d, kernel_size=(u, p, p), **plain)
        parts.rest_is_off("patch_embed", "proj")
    known = ["patch_embed", "blocks", "norm", "decoder_embed", "mask_token", "pred_head", "hogs"]
    tables = _tables("pos_embed", "pos_embed", model.sep_pos_embed, t, h * w, model.cls_embed_on)
    for name, length in (tables | {"cls_token": 1} if model.cls_embed_on else tables).items():
        parts.shape(name, 1, length, dim)
        known.append(name)
    apart = model.sep_pos_embed_decoder
    tables = _tables("decoder_pos_embed", "dec_pos_embed", apart, t, h * w, model.cls_embed_on)
    for name, length in tables.items():
        parts.shape(name, 1, length, dec)
        known.append(name)
    check_blocks(parts, [f"blocks.{i}" for i in range(len(model.blocks))], dim)
    parts.norm("norm", dim)
    parts.linear("decoder_embed", dim, dec)
    parts.shape("mask_token", 1, 1, dec)
    head = model.pred_head
    parts.value("pred_head.transforms", len(head.transforms), 1)
    last = len(head.transforms[0]) - 1
    check_blocks(parts, [f"pred_head.transforms.0.{i}" for i in range(last)], dec)
    parts.norm(f"pred_head.transforms.0.{last}", dec)
    values = (1 if model.cfg.MASK.TIME_STRIDE_LOSS else u) * p * p * 3
    values = head.projections[0].out_features if model.pred_hog_wt else values
    parts.linear("pred_head.projections.0", dec, values)
    parts.rest_is_off("pred_head", "transforms", "projections")
    parts.rest_is_off("", *known)
    return parts.findings


def _tables(joint: str, apart: str, separable: bool, t: int, hw: int, cls: bool) -> dict[str, int]:
    """The names and lengths of one table of positions."""
    if not separable:
        return {joint: t * hw + bool(cls)}
    return {f"{apart}_spatial": hw, f"{apart}_temporal": t} | ({f"{apart}_class": 1} if cls else {})


def sample(model: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor]]:
    """What the model's forward takes: [clip], of noise."""
    (t, h, w), (u, p, _) = model.patch_dims, model.patch_embed.proj.kernel_size
    return ([noise((1, 3, t * u, h * p, w * p), dtype, model.patch_embed.proj)],)


def forward(
    model: nn.Module, pixels: Pixels | None, x: list[Tensor], return_all: bool = False
) -> tuple[list[Tensor], list[tuple]]:
    """([pred], [(label, weight)]), with HOG (label, weight, "mse"); the mask from the same random
    numbers as the model's. return_all says nothing to an MAE."""
    cfg, (t, h, w) = model.cfg, model.patch_dims
    if cfg.VIS_MASK.ENABLE:
        raise Unfused("cfg.VIS_MASK.ENABLE is on")
    if len(x) not in (1, 3):
        raise Unfused(f"it takes [clip] or [clip, meta, mask], not {len(x)} things")
    clip, given = x[0], x[2] if len(x) == 3 else None
    u, p, _ = model.patch_embed.proj.kernel_size
    if clip.shape[1:] != (3, t * u, h * p, w * p):
        raise Unfused(f"the clip is {list(clip.shape)}, not [B, 3, {t * u}, {h * p}, {w * p}]")
    ids, keep = _ids(model, clip, None if cfg.MASK.MAE_RND_MASK else given)
    ids_keep, ids_mask = ids[:, :keep].int(), ids[:, keep:].sort(dim=1).values.int()
    spec = _spec(model)
    dtype = torch.get_default_dtype() if clip.dtype == torch.uint8 else clip.dtype
    if clip.dtype == torch.uint8:
        if len({*pixels.mean}) == len({*pixels.std}) == 1 and not model.pred_hog_wt:
            spec = spec._replace(mean=pixels.mean[0], std=pixels.std[0])
        else:
            clip = pixels.normalise(clip, CHANNEL_DIM, dtype)
    params = _params(model)
    latent = encode(params, spec, clip, ids_keep)
    ordered = own.needs_order(model.pred_head.transforms[0][:-1], params.decoder_blocks)
    without = ("no_unshuffle",) if ordered else ()
    pred = decode(params, spec, latent, ids_keep, ids_mask, without=without).flatten(0, 1)
    model.counter += 1
    return [pred], _labels(model, spec, clip.detach(), ids_mask, dtype)


def _ids(model: nn.Module, clip: Tensor, given: Tensor | None) -> tuple[Tensor, int]:
    """(ids [B, L], of them the first K kept), by the model's own calls."""
    (t, h, w), batch, ratio = model.patch_dims, len(clip), model.cfg.AUG.MASK_RATIO
    if given is not None:
        noise = given.flatten(1)
        shape = [*noise.shape]
        known = noise.dtype in (torch.float32, torch.float64, torch.bool)
        if not known or shape != [batch, t * h * w]:
            raise Unfused(f"the mask is {noise.dtype} {shape}, of {batch} clips of {t * h * w}")
        ratio = noise.sum() / noise.numel()  # in fp32, with its rounding
    keep = int(t * h * w * (1 - ratio))
    if keep <= 1:
        raise Unfused(f"the mask leaves {keep} tokens")
    if given is None and model.cfg.AUG.MASK_TUBE:
        noise = torch.rand(batch, 1, h * w, device=clip.device).repeat(1, t, 1).flatten(1)
    elif given is None:
        noise = torch.rand(batch, t * h * w, device=clip.device)
    return torch.argsort(noise, dim=1), keep


def _labels(
    model: nn.Module, spec: Spec, clip: Tensor, ids_mask: Tensor, dtype: torch.dtype
) -> list[tuple]:
    labels = []
    if model.pred_pixel_wt:
        with torch.no_grad():
            label = targets(spec, clip, ids_mask, dtype)
            label = norm_target(label, spec.norm_pix, clip.shape[1])[0].flatten(0, 1)
        labels.append((label, model.pred_pixel_wt / len(model.pretrain_depth)))
        t, h, w = model.patch_dims
        frames, size = len(spec.target_frames), clip.shape[3:]
        u = spec.pred_t_patch  # what model._unpatchify reads:
        model.patch_info = (len(clip), frames, *size, spec.patch, u, t, h, w)
    if model.pred_hog_wt:
        t, h, w = model.patch_dims
        mask = torch.zeros(len(clip), t * h * w, dtype=torch.bool, device=clip.device)
        labels += model._get_hog_label_3d(clip, [mask.scatter_(1, ids_mask.long(), True)])
    return labels


def _spec(model: nn.Module) -> Spec:
    u, p, _ = model.patch_embed.proj.kernel_size
    frames, strided = model.patch_dims[0] * u, model.cfg.MASK.TIME_STRIDE_LOSS
    return Spec(
        t_patch=u,
        patch=p,
        num_heads=model.blocks[0].attn.num_heads,
        decoder_num_heads=model.pred_head.transforms[0][0].attn.num_heads,
        target_frames=tuple(range(0, frames, u if strided else 1)),
        pred_t_patch=1 if strided else u,
        norm_pix="patch" if model.cfg.MASK.NORM_PRED_PIXEL else "none",
        keep_encoder_cls=bool(model.cls_embed_on),
    )


def _params(model: nn.Module) -> Params:
    pos, cls = _pos(model, "pos_embed", "pos_embed", model.sep_pos_embed)
    apart = model.sep_pos_embed_decoder
    decoder_pos, decoder_cls = _pos(model, "decoder_pos_embed", "dec_pos_embed", apart)
    read = functools.partial(block_of, twice=True)

    def shaped(block: nn.Module):  # the model calls block(x, thw) -> (x, thw), as hooks see
        return lambda x: block(x, list(model.patch_dims))[0]

    proj, (*decoder_blocks, decoder_norm) = model.patch_embed.proj, model.pred_head.transforms[0]
    return Params(
        patch_embed=Affine(proj.weight.flatten(1), proj.bias),
        pos=pos,
        cls=None if cls is None else model.cls_token[0, 0] + cls,
        blocks=[own.block(block, read, shaped(block)) for block in model.blocks],
        norm=Norm.of(model.norm),
        decoder_embed=own.linear(model.decoder_embed),
        mask_token=model.mask_token[0, 0],
        decoder_pos=decoder_pos,
        decoder_cls=decoder_cls,
        decoder_blocks=[
            own.block(block, read, None if own.is_wrapper(block) else shaped(block))
            for block in decoder_blocks
        ],
        decoder_norm=Norm.of(decoder_norm),
        head=own.linear(model.pred_head.projections[0]),
    )


def _pos(model: nn.Module, joint: str, apart: str, separable: bool) -> tuple[Tensor, Tensor | None]:
    """Positions [L, D], and that of the cls token [D] (None without one)."""
    if separable:
        spatial, temporal = (getattr(model, f"{apart}_{part}") for part in ("spatial", "temporal"))
        pos = (temporal[0, :, None] + spatial[0]).flatten(0, 1)
        return pos, getattr(model, f"{apart}_class")[0, 0] if model.cls_embed_on else None
    table = getattr(model, joint)[0]
    return (table[1:], table[0]) if model.cls_embed_on else (table, None)
