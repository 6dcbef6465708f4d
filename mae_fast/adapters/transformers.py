"""Hugging Face's VideoMAEForPreTraining, of transformers 4.57 and later; nothing is imported.

out = model(pixel_values, bool_masked_pos): out.loss, and out.logits [B, M, P] of masked tokens.
"""

import inspect
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_fast.adapters.parts import Finding, Parts, Pixels, Unfused, noise
from mae_fast.adapters.videomae import IMAGENET, fixed, ids_of, most, product_dtype, unnormalised
from mae_fast.forward import Affine, Block, Norm, Params, Spec
from mae_fast.forward import forward as fused

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
    config, name = model.config, "videomae.embeddings.patch_embeddings"
    attention = config._attn_implementation
    parts.need("config._attn_implementation", attention in _ATTENTIONS, f"is {attention}")
    if not parts.layer(f"{name}.projection", nn.Conv3d, in_channels=config.num_channels):
        return parts.findings
    embed = model.get_submodule(name)
    dim, dec = embed.projection.out_channels, model.mask_token.shape[-1]
    u, p = config.tubelet_size, config.patch_size
    if not parts.need("config.patch_size", isinstance(p, int), "is not one number"):
        return parts.findings
    t, h, w = _grid(model)
    with parts.group("videomae.embeddings"):
        size = dict(kernel_size=(u, p, p), stride=(u, p, p))
        plain = dict(padding=(0, 0, 0), dilation=(1, 1, 1), groups=1)
        parts.layer(f"{name}.projection", nn.Conv3d, **size, **plain)
        parts.value(f"{name}.image_size", tuple(embed.image_size), (h * p, w * p))
        parts.value("config.num_frames", config.num_frames, t * u)
        parts.shape("videomae.embeddings.position_embeddings", 1, t * h * w, dim)
    parts.shape("position_embeddings", 1, t * h * w, dec)
    _check_layers(parts, "videomae.encoder.layer", dim)
    _check_layers(parts, "decoder.decoder_layers", dec)
    if model.videomae.layernorm is not None:
        parts.norm("videomae.layernorm", dim)
    parts.linear("encoder_to_decoder", dim, dec, None)
    parts.shape("mask_token", 1, 1, dec)
    parts.norm("decoder.norm", dec)
    parts.linear("decoder.head", dec, config.num_channels * u * p * p)
    parts.rest_is_off(name, "projection")
    parts.rest_is_off("videomae.embeddings", "patch_embeddings")
    parts.rest_is_off("videomae.encoder", "layer")
    parts.rest_is_off("videomae", "embeddings", "encoder", "layernorm")
    parts.rest_is_off("decoder", "decoder_layers", "norm", "head")
    parts.rest_is_off("", "videomae", "encoder_to_decoder", "mask_token", "decoder")
    return parts.findings


def _check_layers(parts: Parts, name: str, dim: int) -> None:
    layers = parts.model.get_submodule(name)
    heads = layers[0].attention.attention.num_attention_heads
    for i, layer in enumerate(layers):
        part, attn = f"{name}.{i}", layer.attention.attention
        with parts.group(part):
            attention = f"{part}.attention.attention"
            parts.value(f"{attention}.num_attention_heads", attn.num_attention_heads, heads)
            parts.value(f"{attention}.attention_head_size", attn.attention_head_size * heads, dim)
            parts.value(f"{attention}.scaling", attn.scaling, attn.attention_head_size**-0.5)
            parts.value(f"{attention}.dropout_prob", attn.dropout_prob, 0)
            for product in ("query", "key", "value"):
                parts.linear(f"{attention}.{product}", dim, dim, None)
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
            parts.rest_is_off(f"{part}.attention.output", "dense")
            parts.rest_is_off(f"{part}.intermediate", "dense", "intermediate_act_fn")
            parts.rest_is_off(f"{part}.output", "dense")


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


def _grid(model: nn.Module) -> tuple[int, int, int]:
    config, embed = model.config, model.videomae.embeddings.patch_embeddings
    t = config.num_frames // config.tubelet_size
    return t, *(n // config.patch_size for n in embed.image_size)


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
    others = [name for name, value in kwargs.items() if name not in _IGNORED and value is not None]
    if head_mask is not None or others:
        raise Unfused(f"{', '.join(others) or 'head_mask'} is given")
    if bool_masked_pos is None:
        raise Unfused("there is no mask")
    if config.num_channels != 3 and not config.norm_pix_loss:
        raise Unfused("only RGB clips are un-normalised")
    u, size = config.tubelet_size, model.videomae.embeddings.patch_embeddings.image_size
    clip = (config.num_frames, config.num_channels, *size)
    if pixel_values.shape[1:] != clip:
        shape = list(pixel_values.shape)
        raise Unfused(f"the clip is {shape}, not [B, {', '.join(map(str, clip))}]")
    ids = ids_of(bool_masked_pos, pixel_values.device)
    targets, params = pixel_values, _params(model, pixel_values.device)
    if pixel_values.dtype == torch.uint8:
        if pixels != IMAGENET or config.num_channels != 3:
            raise Unfused("the targets of uint8 clips are by ImageNet's constants")
        weights = pixels.fold(params.patch_embed, config.num_channels)
        params = params._replace(patch_embed=weights)
    elif config.num_channels == 3:
        targets = unnormalised(pixel_values, CHANNEL_DIM)
    spec = Spec(
        t_patch=u,
        patch=config.patch_size,
        num_heads=_heads(model.videomae.encoder.layer),
        decoder_num_heads=_heads(model.decoder.decoder_layers),
        target_frames=tuple(range(config.num_frames)),
        pred_t_patch=u,
        norm_pix="channel" if config.norm_pix_loss else "none",
        keep_encoder_cls=False,
        mean=0.0,
        std=1.0,
        checkpoint=_checkpointed(model),
    )
    video, targets = pixel_values.transpose(1, 2), targets.transpose(1, 2)
    loss, logits = fused(params, spec, video, *ids, pixels=targets)
    wide = model.mask_token.dtype if targets.dtype == torch.uint8 else targets.dtype
    if product_dtype(model.mask_token) != model.mask_token.dtype:
        wide = torch.promote_types(wide, torch.float32)  # autocast takes a mean square in fp32
    loss = loss.to(torch.promote_types(logits.dtype, wide))  # the mean's own dtype
    output = _output_class(model)(loss=loss, logits=logits)
    return_dict = kwargs.get("return_dict")
    if return_dict is None:
        return_dict = config.return_dict
    return output if return_dict else output.to_tuple()


def _heads(layers: nn.ModuleList) -> int:
    return layers[0].attention.attention.num_attention_heads


def _checkpointed(model: nn.Module) -> bool:
    """model.gradient_checkpointing_enable() was called, and this is training."""
    layers = (*model.videomae.encoder.layer, *model.decoder.decoder_layers)
    return any(layer.gradient_checkpointing and layer.training for layer in layers)


def _params(model: nn.Module, device: torch.device) -> Params:
    embed, decoder = model.videomae.embeddings, model.decoder
    proj, norm = embed.patch_embeddings.projection, model.videomae.layernorm
    dtype = product_dtype(proj.weight)
    return Params(
        patch_embed=Affine(proj.weight.flatten(1), proj.bias),
        pos=fixed(embed.position_embeddings, dtype, device),
        cls=None,
        blocks=[_block(layer) for layer in model.videomae.encoder.layer],
        norm=None if norm is None else Norm.of(norm),
        decoder_embed=Affine.of(model.encoder_to_decoder),
        mask_token=model.mask_token[0, 0],
        decoder_pos=fixed(model.position_embeddings, model.mask_token.dtype, device),
        decoder_cls=None,
        decoder_blocks=[_block(layer) for layer in decoder.decoder_layers],
        decoder_norm=Norm.of(decoder.norm),
        head=Affine.of(decoder.head),
    )


def _block(layer: nn.Module) -> Block:
    a = layer.attention.attention
    q, k, v = map(Affine.of, (a.query, a.key, a.value))
    if getattr(a, "q_bias", None) is not None:  # until transformers 5
        q, v = Affine(q.weight, a.q_bias), Affine(v.weight, a.v_bias)
    dense = (layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
    proj, fc1, fc2 = map(Affine.of, dense)
    return Block(
        Norm.of(layer.layernorm_before), q, k, v, proj, Norm.of(layer.layernorm_after), fc1, fc2
    )
