"""Hugging Face's VideoMAEModel, the encoder alone: features, and the trunk of its classifier.

out = model(pixel_values, bool_masked_pos=None): out.last_hidden_state [B, K, D] of the visible
tokens, all of them without a mask; with output_hidden_states what each layer took and gave.
"""

import functools
import inspect
import sys

import torch
from torch import Tensor, nn

from mae_fast.adapters import transformers as pretraining
from mae_fast.adapters.parts import Finding, Parts, Pixels, Unfused, noise
from mae_fast.adapters.videomae import ids_of
from mae_fast.forward import Block, Norm, OwnBlock, Params, encode

FAMILY = "transformers_encoder"
SOURCE = "transformers, VideoMAEModel"
PARTS = (
    "embeddings.patch_embeddings.projection",
    "encoder.layer.0.attention.attention.query",
)
CHANNEL_DIM = pretraining.CHANNEL_DIM
WRITTEN = ("_output_capturing_hooks_installed",)


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    takes = list(inspect.signature(type(model).forward).parameters)[1:3]
    with parts.group("forward"):
        parts.value("forward", takes, ["pixel_values", "bool_masked_pos"])
        parts.need("forward", _output_class(model) is not None, "is not that of transformers")
    if pretraining.check_encoder(parts, "", model):
        parts.rest_is_off("", "embeddings", "encoder", "layernorm")
    return parts.findings


def _output_class(model: nn.Module) -> type | None:
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    return getattr(sys.modules[owner.__module__], "BaseModelOutput", None)


def sample(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor]:
    """What the model's forward takes: one clip of noise."""
    config, embed = model.config, model.embeddings.patch_embeddings
    shape = (1, config.num_frames, config.num_channels, *embed.image_size)
    return (noise(shape, dtype, embed.projection),)


def forward(
    model: nn.Module,
    pixels: Pixels | None,
    pixel_values: Tensor,
    bool_masked_pos: Tensor | None = None,
    head_mask: Tensor | None = None,
    **kwargs,
):
    """BaseModelOutput, or a tuple of what is in it with return_dict=False."""
    config = model.config
    asked = {
        name: kwargs.pop(name, getattr(config, name, False))
        for name in ("output_attentions", "output_hidden_states", "return_dict")
    }
    if asked["output_attentions"]:
        raise Unfused("output_attentions is asked for")
    if not isinstance(asked["output_hidden_states"], bool | None):
        raise Unfused("output_hidden_states names layers")
    if asked["return_dict"] is None:
        raise Unfused("return_dict is None, which versions of transformers read differently")
    pretraining.nothing_else(head_mask=head_mask, **kwargs)
    pretraining.same_size(model, pixel_values)
    device, layers = pixel_values.device, model.encoder.layer
    length = model.embeddings.num_patches
    if bool_masked_pos is None:
        ids = torch.arange(length, dtype=torch.int32, device=device)
        ids = ids.expand(len(pixel_values), -1)
    else:
        ids, _ = ids_of(bool_masked_pos, length, device)
    patch_embed, pos = pretraining.patches(model, device)
    if pixel_values.dtype == torch.uint8:
        patch_embed = pixels.fold(patch_embed, config.num_channels)
    found, states = pretraining.blocks_of(layers, config), []
    if asked["output_hidden_states"]:
        found = [functools.partial(_watched, states, block) for block in found]
    norm = None if model.layernorm is None else Norm.of(model.layernorm)
    nothing = dict.fromkeys(Params._fields)  # of a decoder
    params = Params(**nothing | dict(patch_embed=patch_embed, pos=pos, blocks=found, norm=norm))
    spec = pretraining.spec_of(config, layers, layers)
    last = encode(params, spec, pixel_values.transpose(1, 2), ids)
    output = _output_class(model)(last_hidden_state=last)
    if asked["output_hidden_states"]:
        output["hidden_states"] = tuple(states)
    return output if asked["return_dict"] else output.to_tuple()


def _watched(states: list[Tensor], p: Block | OwnBlock, x, y, first: int, fused):
    """A block's output in one piece; `states` gets it, and the first block's input before it."""
    x = x if y is None else x + y
    if not states:
        states.append(x)
    x, y = fused(x, None, p)
    states.append(x if y is None else x + y)
    return states[-1], None
