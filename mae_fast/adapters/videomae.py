"""VideoMAE by its authors, modeling_pretrain.PretrainVisionTransformer.

pred = model(x, mask): the mask is the caller's, pred [B, M, P] is of masked tokens in their order.
The loss is computed outside of the model; `loss` is what engine_for_pretraining.py computes there.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

from mae_fast.adapters import own
from mae_fast.adapters.parts import Finding, Parts, Pixels, Unfused, noise
from mae_fast.forward import Affine, Block, Norm, OwnBlock, Params, Spec, decode, encode
from mae_fast.ops.dispatch import autocast_dtype
from mae_fast.ops.masked_mse import masked_mse

FAMILY = "videomae"
SOURCE = "MCG-NJU/VideoMAE, PretrainVisionTransformer"
PARTS = (
    "encoder.patch_embed.proj",
    "encoder.blocks.0.attn.qkv",
    "encoder.norm",
    "encoder_to_decoder",
    "mask_token",
    "decoder.blocks.0.attn.qkv",
    "decoder.norm",
    "decoder.head",
)
CHANNEL_DIM = 1
IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    parts.signature(forward)
    return check_parts(parts)


def check_parts(parts: Parts) -> list[Finding]:
    """What V2 has in common with VideoMAE: everything but the arguments of the forward."""
    model = parts.model
    settings = ["encoder.patch_embed.img_size", "encoder.patch_embed.num_patches"]
    if not parts.has("", *settings) or not parts.layer("encoder.patch_embed.proj", nn.Conv3d):
        return parts.findings
    embed, proj = model.encoder.patch_embed, model.encoder.patch_embed.proj
    (u, p, _), dim, dec = proj.kernel_size, proj.out_channels, model.mask_token.shape[-1]
    rows, columns = (n // p for n in embed.img_size)
    with parts.group("encoder.patch_embed"):
        plain = dict(stride=(u, p, p), padding=(0, 0, 0), dilation=(1, 1, 1), groups=1)
        parts.layer("encoder.patch_embed.proj", nn.Conv3d, kernel_size=(u, p, p), **plain)
        parts.rest_is_off("encoder.patch_embed", "proj")
        parts.value("encoder.patch_embed.img_size", tuple(embed.img_size), (rows * p, columns * p))
    parts.shape("encoder.pos_embed", 1, embed.num_patches, dim)
    parts.shape("pos_embed", 1, embed.num_patches, dec)
    for name, width in (("encoder", dim), ("decoder", dec)):
        count = len(parts.model.get_submodule(name).blocks)
        check_blocks(parts, [f"{name}.blocks.{i}" for i in range(count)], width)
        parts.norm(f"{name}.norm", width)
    parts.linear("encoder_to_decoder", dim, dec, None)
    parts.shape("mask_token", 1, 1, dec)
    parts.linear("decoder.head", dec, proj.in_channels * u * p * p)
    parts.rest_is_off("encoder", "patch_embed", "blocks", "norm", "pos_embed")
    parts.rest_is_off("decoder", "blocks", "norm", "head")
    parts.rest_is_off("", "encoder", "decoder", "encoder_to_decoder", "mask_token", "pos_embed")
    return parts.findings


def check_blocks(parts: Parts, names: list[str], dim: int) -> None:
    """Blocks whose attention makes q, k and v by one product, attn.qkv, or by attn.q, .k and .v."""
    heads = getattr(parts.model.get_submodule(names[0]).attn, "num_heads", 1)
    layers = ("attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2", "norm1", "norm2")
    for part in names:
        with parts.group(part):
            if parts.runs_itself(part):
                continue
            if not parts.has(part, "attn.num_heads", "attn.scale", *layers):
                continue
            block = parts.model.get_submodule(part)
            attn, hidden = block.attn, getattr(block.mlp.fc1, "out_features", None)
            parts.value(f"{part}.attn.num_heads", attn.num_heads, heads)
            parts.need(f"{part}.attn", dim % heads == 0, f"{dim} is no multiple of {heads} heads")
            learned = torch.is_tensor(attn.scale)
            scale = "learned (attention by cosines)" if learned else attn.scale
            parts.value(f"{part}.attn.scale", scale, (dim // heads) ** -0.5)
            for pooling in ("pool_first", "residual_pooling"):  # PySlowFast's
                parts.value(f"{part}.attn.{pooling}", getattr(attn, pooling, False), False)
            products = ["attn.qkv"] if hasattr(attn, "qkv") else ["attn.q", "attn.k", "attn.v"]
            by_weight = hasattr(attn, "q_bias")  # VideoMAE's: it calls no attn.qkv
            for layer in products if parts.has(part, *products) else []:
                columns = 3 * dim // len(products)
                if by_weight:
                    parts.weight(f"{part}.{layer}", dim, columns)
                else:
                    parts.linear(f"{part}.{layer}", dim, columns, bias=None)
            parts.linear(f"{part}.attn.proj", dim, dim)
            parts.linear(f"{part}.mlp.fc1", dim, hidden)
            parts.layer(f"{part}.mlp.act", nn.GELU, approximate="none")
            parts.linear(f"{part}.mlp.fc2", hidden, dim)
            parts.norm(f"{part}.norm1", dim)
            parts.norm(f"{part}.norm2", dim)
            drops = "attn_drop", "proj_drop"
            parts.drops(part, "drop_path")
            parts.drops(f"{part}.attn", *drops)
            parts.drops(f"{part}.mlp", "drop")
            known = "q", "k", "v", "qkv", "proj", "q_bias", "v_bias"
            parts.rest_is_off(part, "norm1", "attn", "drop_path", "norm2", "mlp")
            parts.rest_is_off(f"{part}.attn", *known, *drops)
            parts.rest_is_off(f"{part}.mlp", "fc1", "act", "fc2", "drop")


def sample(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the model's forward takes: one clip of noise, and a mask of three tokens in four."""
    embed, (u, p, _) = model.encoder.patch_embed, model.encoder.patch_embed.proj.kernel_size
    rows, columns = (n // p for n in embed.img_size)
    frames = embed.num_patches // (rows * columns) * u
    clip = noise((1, embed.proj.in_channels, frames, *embed.img_size), dtype, embed.proj)
    return clip, most(embed.num_patches, clip.device)


def most(length: int, device: torch.device) -> Tensor:
    """A mask [1, L] that hides three tokens in four, and leaves one at least."""
    return (torch.arange(length, device=device) >= max(1, length // 4))[None]


def forward(model: nn.Module, pixels: Pixels | None, x: Tensor, mask: Tensor) -> Tensor:
    """pred [B, M, P] of the tokens where mask [B, L] is True."""
    return predict(model, pixels, x, *ids_of(mask, model.encoder.patch_embed.num_patches, x.device))


def predict(
    model: nn.Module, pixels: Pixels | None, x: Tensor, ids_keep: Tensor, ids_mask: Tensor
) -> Tensor:
    """pred [B, M, P] of the tokens ids_mask, in their order; the encoder sees ids_keep."""
    embed = model.encoder.patch_embed
    u, p, _ = embed.proj.kernel_size
    rows, columns = (n // p for n in embed.img_size)
    frames = embed.num_patches // (rows * columns) * u
    clip = (embed.proj.in_channels, frames, *embed.img_size)
    if x.shape[1:] != clip:
        raise Unfused(f"the clip is {list(x.shape)}, not [B, {', '.join(map(str, clip))}]")
    encoder, decoder = model.encoder.blocks, model.decoder.blocks
    spec = Spec(
        t_patch=u,
        patch=p,
        num_heads=encoder[0].attn.num_heads,
        decoder_num_heads=decoder[0].attn.num_heads,
        target_frames=tuple(range(frames)),
        pred_t_patch=u,
        norm_pix="none",
        keep_encoder_cls=False,
        mean=0.0,
        std=1.0,
        checkpoint=checkpointed(model.encoder) or checkpointed(model.decoder),
    )
    weights = Affine(embed.proj.weight.flatten(1), embed.proj.bias)
    if x.dtype == torch.uint8:
        weights = pixels.fold(weights, x.shape[1])
    params = Params(
        patch_embed=weights,
        pos=fixed(model.encoder.pos_embed, product_dtype(embed.proj.weight), x.device),
        cls=None,
        blocks=blocks_of(encoder, checkpointed(model.encoder)),
        norm=Norm.of(model.encoder.norm),
        decoder_embed=own.linear(model.encoder_to_decoder),
        mask_token=model.mask_token[0, 0],
        decoder_pos=fixed(model.pos_embed, model.mask_token.dtype, x.device),
        decoder_cls=None,
        decoder_blocks=blocks_of(decoder, checkpointed(model.decoder)),
        decoder_norm=Norm.of(model.decoder.norm),
        head=own.linear(model.decoder.head),
    )
    without = ("masked_last_block",) if own.needs_order(decoder, params.decoder_blocks) else ()
    latent = encode(params, spec, x, ids_keep)
    return decode(params, spec, latent, ids_keep, ids_mask, without=without)


def checkpointed(part: nn.Module) -> bool:
    """The encoder or decoder was built to keep its blocks' inputs only."""
    return bool(getattr(part, "use_checkpoint", False) or getattr(part, "with_cp", False))


def blocks_of(modules: Iterable[nn.Module], again: bool) -> list[Block | OwnBlock]:
    """Each block's parameters, or what runs it; `again`: it keeps its input only."""
    if not again:
        return [own.block(module, block_of) for module in modules]
    keep = functools.partial(functools.partial, checkpoint, use_reentrant=False)
    return [own.block(module, block_of, keep(module)) for module in modules]


def block_of(block: nn.Module, twice: bool = False) -> Block:
    """A block's parameters. `twice`: the MLP's dropout acts after its activation too."""
    a, m, (path,) = block.attn, block.mlp, own.drops(block, "drop_path")
    if hasattr(a, "q_bias"):  # VideoMAE reads the weight of attn.qkv
        biases = (None,) * 3 if a.qkv.bias is None else a.qkv.bias.chunk(3)
        if a.q_bias is not None:
            biases = a.q_bias, None, a.v_bias
        qkv = [Affine(w, b) for w, b in zip(a.qkv.weight.chunk(3), biases, strict=True)]
    else:
        qkv = own.product(a.qkv) if hasattr(a, "qkv") else own.products(a.q, a.k, a.v)
    (scores, after), (drop,) = own.drops(a, "attn_drop", "proj_drop"), own.drops(m, "drop")
    proj = own.dropped(own.linear(a.proj), after, path)
    fc2 = own.dropped(own.linear(m.fc2), drop, path, before=drop if twice else None)
    norms, fc1 = (Norm.of(block.norm1), Norm.of(block.norm2)), own.linear(m.fc1)
    attend = own.attention_dropout(scores, scores=True)
    return Block(norms[0], *qkv, proj, norms[1], fc1, fc2, attend)


def ids_of(mask: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids_keep [B, K], ids_mask [B, M]) int32, ascending, of mask [B, L], True where masked.

    Raises Unfused where rows differ in their counts, or nothing is kept, or nothing is masked.
    """
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] != length:
        raise Unfused(f"the mask is {mask.dtype} {list(mask.shape)}, not bool [B, {length}]")
    if torch.compiler.is_exporting():
        raise Unfused("torch.export does not know how many tokens a mask hides")
    counts = mask.sum(dim=1).aminmax()
    least, most = torch.stack(counts).tolist()  # the host waits here, once
    if least != most:
        raise Unfused(f"the mask hides {least} tokens of one clip and {most} of another")
    if not 0 < most < length:
        raise Unfused(f"the mask hides {most} of {length} tokens")
    ids = mask.to(device).byte().argsort(dim=1, stable=True).int()
    return ids[:, :-most], ids[:, -most:]


_COPIES = WeakIdKeyDictionary()  # a fixed table -> (what it was copied from and to, the copy)


def fixed(table: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Positions [1, L, D] that are not trained: [L, D], in the dtype that they are added in.

    They are no buffer, so they stay on the CPU when the model moves: a copy elsewhere is kept.
    """
    if table.device == device or torch.compiler.is_compiling():
        return table.detach()[0].to(device, dtype)
    key = (table._version, table.data_ptr(), dtype, device)
    known, copy = _COPIES.get(table, (None, None))
    if known != key:
        with torch.inference_mode(False):  # training may follow
            copy = table.detach()[0].to(device, dtype)
        _COPIES[table] = key, copy
    return copy


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a product with `weight`, which the encoder's positions are rounded to."""
    cast = autocast_dtype(weight.device.type)
    return weight.dtype if cast is None or weight.dtype == torch.float64 else cast


def unnormalised(clip: Tensor, channel_dim: int) -> Tensor:
    """clip * std + mean by ImageNet's constants in fp32, without gradient: pixels in [0, 1]."""
    out = torch.empty_like(clip)
    channels = zip(clip.detach().unbind(channel_dim), out.unbind(channel_dim), strict=True)
    constants = torch.tensor(IMAGENET, device="cpu").tolist()
    for (x, y), mean, std in zip(channels, *constants, strict=True):
        torch.mul(x, std, out=y).add_(mean)
    return out


def loss(
    outputs: Tensor,
    videos: Tensor,
    bool_masked_pos: Tensor,
    patch_size: int = 16,
    normlize_target: bool = True,
    tubelet_size: int = 2,
) -> Tensor:
    """The loss of engine_for_pretraining.py, its labels read from the clip and never stored.

    outputs [B, M, P], the model's; videos [B, 3, T, H, W], normalised by ImageNet's constants, or
    uint8; bool_masked_pos [B, L], M a row. Normalised channel by channel, eps outside the root.
    """
    length = videos[0, 0].numel() // (tubelet_size * patch_size**2)
    _, ids = ids_of(bool_masked_pos.flatten(1).bool(), length, videos.device)
    clip = videos if videos.dtype == torch.uint8 else unnormalised(videos, CHANNEL_DIM)
    frames = tuple(range(clip.shape[2]))
    norm_pix = "channel" if normlize_target else "none"
    return masked_mse(outputs, clip, ids, frames, tubelet_size, patch_size, 0.0, 1.0, norm_pix)
