"""The peer: VideoMAE of Hugging Face transformers, which is imported only when built.

The nearest it comes to mae_fast's work is `VIDEOMAE_B`, the shape of its own defaults: no cls
token and every frame predicted. It still differs: fixed sine positions, no bias on keys and into
the decoder, no norm after the encoder, pixels normalised channel by channel.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mae_fast.adapters.videomae import IMAGENET
from mae_fast.bench.baselines.training import Baseline, LossOf
from mae_fast.config import ModelConfig, preset

# transformers' VideoMAEConfig(): a decoder of 384, 4 blocks, 6 heads.
VIDEOMAE_B = preset(
    "vit_base",
    decoder_embed_dim=384,
    decoder_depth=4,
    decoder_num_heads=6,
    pred_t_dim=16,
    cls_embed=False,
)


def nearest(cfg: ModelConfig) -> ModelConfig:
    """The model of cfg's widths and depths that VideoMAE has."""
    return replace(cfg, pred_t_dim=cfg.num_frames, cls_embed=False, no_qkv_bias=False)


@functools.cache
def imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's means and deviations, [1, 3, 1, 1, 1], with which VideoMAE normalises."""
    return tuple(torch.tensor(x, device=device).view(1, 3, 1, 1, 1) for x in IMAGENET)


def normalise(clips: Tensor) -> Tensor:
    """uint8 clips as VideoMAE's loaders give them; float ones are."""
    if clips.dtype != torch.uint8:
        return clips
    mean, std = imagenet(clips.device)
    return (clips.float() / 255 - mean) / std


def hidden(noise: Tensor, ratio: float) -> Tensor:
    """The mask [B, L] of these keys, True where masked."""
    ranks = noise.argsort(dim=1).argsort(dim=1)
    return ranks >= int(noise.shape[1] * (1 - ratio))


@dataclass(frozen=True)
class TransformersVideoMAE(Baseline):
    """transformers' VideoMAEForPreTraining with random weights. ValueError where VideoMAE has no
    model of cfg's sizes, and ImportError without transformers."""

    name: str
    attention: Literal["eager", "sdpa"]

    def parts(self, cfg: ModelConfig) -> tuple[nn.Module, LossOf, bool]:
        settings = _settings(cfg)
        try:
            from transformers import VideoMAEConfig, VideoMAEForPreTraining
        except ImportError as e:
            raise ImportError(f"this baseline needs `pip install transformers` ({e})") from e
        config = VideoMAEConfig(**settings, attn_implementation=self.attention)
        model = VideoMAEForPreTraining(config)

        def loss_of(clips: Tensor, noise: Tensor, ratio: float, encode_all: bool = False) -> Tensor:
            clips, masked = normalise(clips), hidden(noise, ratio)
            with _all_seen(model, masked) if encode_all else contextlib.nullcontext():
                return model(clips.transpose(1, 2), bool_masked_pos=masked).loss

        return model, loss_of, False


PEERS = {
    name: TransformersVideoMAE(name, attention)
    for name, attention in (("transformers_eager", "eager"), ("transformers_sdpa", "sdpa"))
}


@contextlib.contextmanager
def _all_seen(model: nn.Module, masked: Tensor) -> Iterator[None]:
    """The encoder sees every token, and hands over those that are not masked."""

    def hand_over(module, inputs, output):
        x = output.last_hidden_state
        output.last_hidden_state = x[~masked].view(len(x), -1, x.shape[-1])
        return output

    embeddings = model.videomae.embeddings
    before = embeddings.register_forward_pre_hook(lambda module, inputs: (inputs[0], None))
    after = model.videomae.register_forward_hook(hand_over)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _settings(cfg: ModelConfig) -> dict[str, Any]:
    """VideoMAEConfig's arguments for cfg."""
    needed = dict(pred_t_dim=cfg.num_frames, cls_embed=False, no_qkv_bias=False, in_chans=3)
    for name, value in needed.items():
        if getattr(cfg, name) != value:
            raise ValueError(f"VideoMAE needs {name} {value}, got {getattr(cfg, name)}")
    return encoder_settings(cfg) | dict(
        decoder_hidden_size=cfg.decoder_embed_dim,
        decoder_num_hidden_layers=cfg.decoder_depth,
        decoder_num_attention_heads=cfg.decoder_num_heads,
        decoder_intermediate_size=int(cfg.decoder_embed_dim * cfg.mlp_ratio),
        norm_pix_loss=cfg.norm_pix_loss,
    )


def encoder_settings(cfg: ModelConfig) -> dict[str, Any]:
    """Those of a classifier too."""
    return dict(
        image_size=cfg.img_size,
        patch_size=cfg.patch_size,
        num_frames=cfg.num_frames,
        tubelet_size=cfg.t_patch_size,
        hidden_size=cfg.embed_dim,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.num_heads,
        intermediate_size=int(cfg.embed_dim * cfg.mlp_ratio),
    )
