"""Hugging Face's VideoMAEForPreTraining, of transformers 4.57 and later; nothing is imported.

out = model(pixel_values, bool_masked_pos): out.loss, and out.logits [B, M, P] of masked tokens.
"""

import functools
import inspect
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_fast.adapters import own
from mae_fast.adapters.parts import Finding, Parts, Pixels, Unfused, noise
from mae_fast.adapters.videomae import IMAGENET, fixed, ids_of, most, product_dtype, unnormalised
from mae_fast.forward import Affine, Block, Norm, OwnBlock, Params, Spec
from mae_fast.forward import forward as fused
from mae_fast.ops.dispatch import autocast_dtype

FAMILY = "transformers"
SOURCE = "transformers, VideoMAEForPreTraining"
PARTS = (
    "videomae.embeddings.patch_embeddings.projection",
    "videomae.encoder.layer.0.attention.attention.query",
    "encoder_to_decoder",
    "mask_token",
    "decoder.decoder_layers.0.attention.attention.query",
    "decoder.norm",
    "decoder.head",
)
CHANNEL_DIM = 2
# All of them softmax(q k / sqrt(d)) v, and none takes a mask here.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Arguments that Trainer passes and VideoMAE ignores.
_IGNORED = {"return_dict", "num_items_in_batch"}


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    takes = list(inspect.signature(type(model).forward).parameters)[1:3]
    with parts.group("forward"):
        parts.value("forward", takes, ["pixel_values", "bool_masked_pos"])
        parts.need("forward", _output_class(model) is not None, "is not that of transformers")
    if not check_encoder(parts, "videomae.", model.videomae):
        return parts.findings
    config, embed = model.config, model.videomae.embeddings
    u, p, length = config.tubelet_size, config.patch_size, embed.num_patches
    dim, dec = embed.patch_embeddings.projection.out_channels, model.mask_token.shape[-1]
    parts.shape("position_embeddings", 1, length, dec)
    _check_layers(parts, "decoder.decoder_layers", dec)
    parts.linear("encoder_to_decoder", dim, dec, None)
    parts.shape("mask_token", 1, 1, dec)
    parts.norm("decoder.norm", dec)
    parts.linear("decoder.head", dec, config.num_channels * u * p * p)
    parts.rest_is_off("videomae", "embeddings", "encoder", "layernorm")
    parts.rest_is_off("decoder", "decoder_layers", "norm", "head")
    parts.rest_is_off("", "videomae", "encoder_to_decoder", "mask_token", "decoder")
    return parts.findings


def check_encoder(parts: Parts, at: str, model: nn.Module) -> bool:
    """A VideoMAEModel, whose parts' names begin with `at`; False where nothing more can be said."""
    config, embed = model.config, model.embeddings.patch_embeddings
    name, attention = f"{at}embeddings.patch_embeddings", config._attn_implementation
    parts.need("config._attn_implementation", attention in _ATTENTIONS, f"is {attention}")
    if not parts.layer(f"{name}.projection", nn.Conv3d, in_channels=config.num_channels):
        return False
    u, p, dim = config.tubelet_size, config.patch_size, embed.projection.out_channels
    if not parts.need("config.patch_size", isinstance(p, int), "is not one number"):
        return False
    t, (h, w) = config.num_frames // u, (n // p for n in embed.image_size)
    with parts.group(f"{at}embeddings"):
        size = dict(kernel_size=(u, p, p), stride=(u, p, p))
        plain = dict(padding=(0, 0, 0), dilation=(1, 1, 1), groups=1)
        parts.layer(f"{name}.projection", nn.Conv3d, **size, **plain)
        parts.value(f"{name}.image_size", tuple(embed.image_size), (h * p, w * p))
        parts.value("config.num_frames", config.num_frames, t * u)
        parts.shape(f"{at}embeddings.position_embeddings", 1, t * h * w, dim)
    _check_layers(parts, f"{at}encoder.layer", dim)
    if model.layernorm is not None:
        parts.norm(f"{at}layernorm", dim)
    parts.rest_is_off(name, "projection")
    parts.rest_is_off(f"{at}embeddings", "patch_embeddings")
    parts.rest_is_off(f"{at}encoder", "layer")
    return True


def _check_layers(parts: Parts, name: str, dim: int) -> None:
    layers = parts.model.get_submodule(name)
    heads = layers[0].attention.attention.num_attention_heads
    for i, layer in enumerate(layers):
        part, attn = f"{name}.{i}", layer.attention.attention
        with parts.group(part):
            if parts.runs_itself(part):
                continue
            attention = f"{part}.attention.attention"
            parts.value(f"{attention}.num_attention_heads", attn.num_attention_heads, heads)
            parts.value(f"{attention}.attention_head_size", attn.attention_head_size * heads, dim)
            parts.value(f"{attention}.scaling", attn.scaling, attn.attention_head_size**-0.5)
            kind = parts.model.config._attn_implementation
            drops = kind in ("eager", "sdpa") or attn.dropout_prob == 0
            parts.need(f"{attention}.dropout_prob", drops, f"is {attn.dropout_prob} of {kind}")
            fits = parts.weight if hasattr(attn, "q_bias") else parts.linear
            for product in ("query", "key", "value"):
                fits(f"{attention}.{product}", dim, dim, *([] if fits == parts.weight else [None]))
            hidden = layer.intermediate.dense.out_features
            parts.linear(f"{part}.attention.output.dense", dim, dim)
            parts.linear(f"{part}.intermediate.dense", dim, hidden)
            parts.linear(f"{part}.output.dense", hidden, dim)
            act = layer.intermediate.intermediate_act_fn
            parts.need(
                f"{part}.intermediate.intermediate_act_fn", _is_gelu(act), "is no exact GELU"
            )
            parts.norm(f"{part}.layernorm_before", dim)
            parts.norm(f"{part}.layernorm_after", dim)
            norms = "layernorm_before", "layernorm_after"
            parts.rest_is_off(part, *norms, "attention", "intermediate", "output")
            parts.rest_is_off(f"{part}.attention", "attention", "output")
            parts.rest_is_off(attention, "query", "key", "value", "q_bias", "v_bias")
            parts.rest_is_off(f"{part}.intermediate", "dense", "intermediate_act_fn")
            for output in (f"{part}.attention.output", f"{part}.output"):
                parts.drops(output, "dropout")
                parts.rest_is_off(output, "dense", "dropout")


@torch.no_grad()
def _is_gelu(act) -> bool:
    """The activation is GELU by the error function; its class is transformers', so it is tried."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, device="cpu")
    try:
        return torch.allclose(act(x), F.gelu(x), rtol=0, atol=1e-6)
    except Exception:  # it has weights, or another way to be called
        return False


def _output_class(model: nn.Module) -> type | None:
    """VideoMAEForPreTrainingOutput, from the module whose forward the model has."""
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    return getattr(sys.modules[owner.__module__], "VideoMAEForPreTrainingOutput", None)


def sample(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the model's forward takes: one clip of noise, and a mask of three tokens in four."""
    config, embed = model.config, model.videomae.embeddings.patch_embeddings
    shape = (1, config.num_frames, config.num_channels, *embed.image_size)
    clip = noise(shape, dtype, embed.projection)
    return clip, most(embed.num_patches, clip.device)


def forward(
    model: nn.Module,
    pixels: Pixels | None,
    pixel_values: Tensor,
    bool_masked_pos: Tensor,
    head_mask: Tensor | None = None,
    **kwargs,
):
    """VideoMAEForPreTrainingOutput, or a tuple (loss, logits) with return_dict=False.

    pixel_values [B, T, C, H, W]; bool_masked_pos [B, L], True where masked.
    """
    config = model.config
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.pop(name, getattr(config, name, False)):
            raise Unfused(f"{name} is asked for")
    nothing_else(head_mask=head_mask, **kwargs)
    if bool_masked_pos is None:
        raise Unfused("there is no mask")
    if config.num_channels != 3 and not config.norm_pix_loss:
        raise Unfused("only RGB clips are un-normalised")
    same_size(model.videomae, pixel_values)
    ids = ids_of(bool_masked_pos, model.videomae.embeddings.num_patches, pixel_values.device)
    targets, params = pixel_values, _params(model, pixel_values.device)
    if pixel_values.dtype == torch.uint8:
        if pixels != IMAGENET or config.num_channels != 3:
            raise Unfused("the targets of uint8 clips are by ImageNet's constants")
        weights = pixels.fold(params.patch_embed, config.num_channels)
        params = params._replace(patch_embed=weights)
    elif config.num_channels == 3:
        targets = unnormalised(pixel_values, CHANNEL_DIM)
    decoder = model.decoder.decoder_layers
    spec = spec_of(config, model.videomae.encoder.layer, decoder)
    video, targets = pixel_values.transpose(1, 2), targets.transpose(1, 2)
    without = ("masked_last_block",) if own.needs_order(decoder, params.decoder_blocks) else ()
    loss, logits = fused(params, spec, video, *ids, without=without, pixels=targets)
    wide = model.mask_token.dtype if targets.dtype == torch.uint8 else targets.dtype
    if autocast_dtype(pixel_values.device.type):  # takes a mean square in fp32
        wide = torch.promote_types(wide, torch.float32)
    loss = loss.to(torch.promote_types(logits.dtype, wide))  # the mean's own dtype
    output = _output_class(model)(loss=loss, logits=logits)
    return_dict = kwargs.get("return_dict")
    if return_dict is None:
        return_dict = config.return_dict
    return output if return_dict else output.to_tuple()


def nothing_else(**given) -> None:
    """Raises Unfused with the names of arguments that the fused forward does not know."""
    others = [name for name, value in given.items() if name not in _IGNORED and value is not None]
    if others:
        raise Unfused(f"{', '.join(others)} is given")


def same_size(model: nn.Module, pixel_values: Tensor) -> None:
    """Raises Unfused on a clip of another size than the VideoMAEModel's."""
    config, size = model.config, model.embeddings.patch_embeddings.image_size
    clip = (config.num_frames, config.num_channels, *size)
    if pixel_values.shape[1:] != clip:
        shape = list(pixel_values.shape)
        raise Unfused(f"the clip is {shape}, not [B, {', '.join(map(str, clip))}]")


def spec_of(config, encoder: nn.ModuleList, decoder: nn.ModuleList) -> Spec:
    """The specification; a layer that model.gradient_checkpointing_enable() was called of keeps its
    input only."""
    return Spec(
        t_patch=config.tubelet_size,
        patch=config.patch_size,
        num_heads=encoder[0].attention.attention.num_attention_heads,
        decoder_num_heads=decoder[0].attention.attention.num_attention_heads,
        target_frames=tuple(range(config.num_frames)),
        pred_t_patch=config.tubelet_size,
        norm_pix="channel" if config.norm_pix_loss else "none",
        keep_encoder_cls=False,
        mean=0.0,
        std=1.0,
        checkpoint=any(m.gradient_checkpointing and m.training for m in (*encoder, *decoder)),
    )


def patches(model: nn.Module, device: torch.device) -> tuple[Affine, Tensor]:
    """(the patch embedding, the positions [L, D]) of a VideoMAEModel."""
    embed, proj = model.embeddings, model.embeddings.patch_embeddings.projection
    positions = fixed(embed.position_embeddings, product_dtype(proj.weight), device)
    return Affine(proj.weight.flatten(1), proj.bias), positions


def blocks_of(layers: nn.ModuleList, config) -> list[Block | OwnBlock]:
    """Each layer's parameters, or what runs it."""
    read = functools.partial(_block, scores=config._attn_implementation == "eager")
    return [own.block(layer, read) for layer in layers]


def _params(model: nn.Module, device: torch.device) -> Params:
    encoder, decoder = model.videomae, model.decoder
    patch_embed, pos = patches(encoder, device)
    return Params(
        patch_embed=patch_embed,
        pos=pos,
        cls=None,
        blocks=blocks_of(encoder.encoder.layer, model.config),
        norm=None if encoder.layernorm is None else Norm.of(encoder.layernorm),
        decoder_embed=own.linear(model.encoder_to_decoder),
        mask_token=model.mask_token[0, 0],
        decoder_pos=fixed(model.position_embeddings, model.mask_token.dtype, device),
        decoder_cls=None,
        decoder_blocks=blocks_of(decoder.decoder_layers, model.config),
        decoder_norm=Norm.of(decoder.norm),
        head=own.linear(decoder.head),
    )


def _block(layer: nn.Module, scores: bool) -> Block:
    a, out, mlp = layer.attention.attention, layer.attention.output, layer.output
    if hasattr(a, "q_bias"):  # until transformers 5, which reads weights and calls no query
        biases = (a.query.bias, a.key.bias, a.value.bias)
        biases = biases if a.q_bias is None else (a.q_bias, None, a.v_bias)
        weights = (a.query.weight, a.key.weight, a.value.weight)
        qkv = tuple(map(Affine, weights, biases))
    else:
        qkv = own.products(a.query, a.key, a.value, order=(1, 2, 0))
    proj = own.dropped(own.linear(out.dense), *own.drops(out, "dropout"))
    fc1, fc2 = own.linear(layer.intermediate.dense), own.linear(mlp.dense)
    norms = Norm.of(layer.layernorm_before), Norm.of(layer.layernorm_after)
    attend = own.attention_dropout(a.dropout_prob if a.training else 0.0, scores)
    fc2 = own.dropped(fc2, *own.drops(mlp, "dropout"))
    return Block(norms[0], *qkv, proj, norms[1], fc1, fc2, attend)
