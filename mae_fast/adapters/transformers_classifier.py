"""Hugging Face's VideoMAEForVideoClassification: its VideoMAEModel fused, the rest its own modules.

out = model(pixel_values, labels=None): out.logits [B, classes], and out.loss where labels are.
"""

import inspect
import sys

import torch
from torch import Tensor, nn

from mae_fast.adapters import transformers as pretraining
from mae_fast.adapters import transformers_encoder
from mae_fast.adapters.parts import Finding, Parts, Pixels, Unfused

FAMILY = "transformers_classifier"
SOURCE = "transformers, VideoMAEForVideoClassification"
PARTS = (
    "videomae.embeddings.patch_embeddings.projection",
    "videomae.encoder.layer.0.attention.attention.query",
    "classifier",
)
CHANNEL_DIM = pretraining.CHANNEL_DIM


def check(model: nn.Module) -> list[Finding]:
    """Each part of the model, compared with what the fused forward computes."""
    parts = Parts(model)
    takes = list(inspect.signature(type(model).forward).parameters)[1:2]
    with parts.group("forward"):
        parts.value("forward", takes, ["pixel_values"])
        parts.need("forward", _output_class(model) is not None, "is not that of transformers")
    if pretraining.check_encoder(parts, "videomae.", model.videomae):
        parts.rest_is_off("videomae", "embeddings", "encoder", "layernorm")
        there = [n for n in ("fc_norm", "classifier") if getattr(model, n, None) is not None]
        parts.findings += [Finding(name, None, "is called as it is") for name in there]
        parts.rest_is_off("", "videomae", *there)
    return parts.findings


def _output_class(model: nn.Module) -> type | None:
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    return getattr(sys.modules[owner.__module__], "ImageClassifierOutput", None)


def sample(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor]:
    """What the model's forward takes: one clip of noise."""
    return transformers_encoder.sample(model.videomae, dtype)


def forward(
    model: nn.Module,
    pixels: Pixels | None,
    pixel_values: Tensor | None = None,
    *others,
    labels: Tensor | None = None,
    **kwargs,
):
    """ImageClassifierOutput, or a tuple of what is in it with return_dict=False."""
    if others:
        raise Unfused("more than the clip is given by position, which differs by version")
    config = model.config
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.pop(name, getattr(config, name, False)):
            raise Unfused(f"{name} is asked for")
    return_dict = kwargs.pop("return_dict", None)
    pretraining.nothing_else(**kwargs)
    if pixel_values is None:
        raise Unfused("there are no pixel_values")
    encoder = model.videomae
    tokens = transformers_encoder.forward(encoder, pixels, pixel_values, return_dict=True)
    tokens = tokens.last_hidden_state
    features = tokens[:, 0] if model.fc_norm is None else model.fc_norm(tokens.mean(1))
    logits = model.classifier(features)
    loss = None
    if labels is not None:
        loss = model.loss_function(labels, logits, config, **kwargs)  # Trainer's num_items_in_batch
    output = _output_class(model)(loss=loss, logits=logits)
    plain = return_dict is False or (return_dict is None and not config.return_dict)
    return output.to_tuple() if plain else output
