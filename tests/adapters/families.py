"""A small model of each family, and the arguments of a call."""

import functools

import pytest
import torch
from compare import scattered
from foreign import clips, make
from stand_ins import MaskMViT, VideoMAE, VideoMAEV2


def _mask(n, length):
    return (torch.arange(length) >= length // 4).repeat(n, 1)


def _mae_st(tiny_cfg):
    return make(tiny_cfg), (clips(tiny_cfg),)


def _slowfast(tiny_cfg):
    sizes = dict(size=16, frames=4, dims=(12, 64), depths=(2, 2))
    return scattered(MaskMViT(**sizes)), ([torch.randn(2, 3, 4, 16, 16)],)


def _videomae(tiny_cfg, kind=VideoMAE):
    model = scattered(kind(size=(16, 16), frames=4, dims=(12, 12)))
    return model, (torch.randn(2, 3, 4, 16, 16), _mask(2, 8))


def _transformers(tiny_cfg):
    videomae = pytest.importorskip("transformers").models.videomae
    sizes = dict(image_size=16, patch_size=8, num_frames=4, hidden_size=12, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=3, intermediate_size=20, decoder_hidden_size=12)
    sizes |= dict(decoder_num_hidden_layers=2, decoder_num_attention_heads=2)
    config = videomae.VideoMAEConfig(**sizes, decoder_intermediate_size=20)
    model = scattered(videomae.VideoMAEForPreTraining(config).train())
    return model, (torch.randn(2, 4, 3, 16, 16), _mask(2, 8))


FAMILIES = {
    "mae_st": _mae_st,
    "slowfast": _slowfast,
    "videomae": _videomae,
    "videomae_v2": functools.partial(_videomae, kind=VideoMAEV2),
    "transformers": _transformers,
}
