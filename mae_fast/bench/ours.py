"""mae_fast as one more engine: built and stepped as the baselines are (benchmarks/baselines)."""

import functools
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from mae_fast.bench.baselines.training import CLIP_GRAD, LR, Built
from mae_fast.config import ModelConfig, TrainConfig
from mae_fast.forward import decode, encode, forward, masked_loss
from mae_fast.masking import ids_from_noise, num_keep
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.source import Source
from mae_fast.optim import make_optimizer
from mae_fast.remade import keeping
from mae_fast.step import Step


@dataclass(frozen=True)
class Ours:
    """The engine; `without` names SAVINGS switched off; encode_all: its encoder sees every token,
    and the decoder and the loss stay those of the mask; graph: its step as CUDA graphs."""

    without: Collection[str] = ()
    encode_all: bool = False
    graph: bool = False
    lr: float = LR

    def build(
        self,
        cfg: ModelConfig,
        mask_ratio: float = 0.9,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> Built:
        """The model with its own starting values, its optimizer, and one training step."""
        model = MaskedAutoencoder(cfg).to(device)
        optimizer = make_optimizer(model, TrainConfig())

        def loss(encode_all: bool, *inputs: Tensor) -> Tensor:
            *pixels, keep, masked = inputs
            clips = Source(*pixels, cfg.img_size) if len(pixels) == 2 else pixels[0]
            how = dict(without=self.without, target=model.target(clips))
            with keeping(device == "cuda"):
                if encode_all:
                    return encode_all_loss(model, clips, keep, masked, **how)
                return forward(model.params(), model.spec, clips, keep, masked, **how)[0]

        how = dict(clip=CLIP_GRAD, precision=precision, graph=self.graph)
        losses = (functools.partial(loss, encode_all) for encode_all in (False, True))
        steps = [Step(model, optimizer, each, **how) for each in losses]

        def step(
            clips: Tensor | Source,
            noise: Tensor,
            mask_ratio: float = mask_ratio,
            encode_all: bool = self.encode_all,
        ) -> Tensor:
            ids = ids_from_noise(noise, num_keep("random", cfg.grid, mask_ratio))
            pixels = (clips,) if torch.is_tensor(clips) else (clips.flat, clips.table)
            steps[encode_all].micro(*pixels, *ids)
            return steps[encode_all].update(self.lr)[0]

        return Built(model, optimizer, step)


def encode_all_loss(
    model: MaskedAutoencoder,
    clips: Tensor | Source,
    ids_keep: Tensor,
    ids_mask: Tensor,
    full_pred: bool = False,
    without: Collection[str] = (),
    target: Tensor | None = None,
) -> Tensor:
    """The loss on masked tokens where the encoder has seen every token, and hands over the kept."""
    params, s = model.params(), model.spec
    latent = encode(params, s, clips, torch.cat([ids_keep, ids_mask], dim=1))
    latent = latent[:, : latent.shape[1] - ids_mask.shape[1]]  # (cls and) the kept stand first
    pred = decode(params, s, latent, ids_keep, ids_mask, full_pred, without)
    return masked_loss(s, pred[:, -ids_mask.shape[1] :], clips, ids_mask, target)
