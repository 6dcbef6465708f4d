"""mae_fast as one more engine: built and stepped as the baselines are (benchmarks/baselines)."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from mae_fast.bench.baselines.training import CLIP_GRAD, LR, Built
from mae_fast.config import ModelConfig, TrainConfig
from mae_fast.forward import decode, encode, forward, masked_loss
from mae_fast.masking import ids_from_noise, num_keep
from mae_fast.model import MaskedAutoencoder
from mae_fast.optim import clipped_step, make_optimizer


@dataclass(frozen=True)
class Ours:
    """The engine; `without` names SAVINGS switched off; encode_all: its encoder sees every token,
    and the decoder and the loss stay those of the mask."""

    without: Collection[str] = ()
    encode_all: bool = False

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

        def step(
            clips: Tensor,
            noise: Tensor,
            mask_ratio: float = mask_ratio,
            encode_all: bool = self.encode_all,
        ) -> Tensor:
            ids = ids_from_noise(noise, num_keep("random", cfg.grid, mask_ratio))
            with torch.autocast(clips.device.type, torch.bfloat16, enabled=precision == "bf16"):
                if encode_all:
                    loss = encode_all_loss(model, clips, *ids)
                else:
                    without = self.without
                    loss = forward(model.params(), model.spec, clips, *ids, without=without)[0]
            loss.backward()
            clipped_step(optimizer, LR, CLIP_GRAD)
            return loss.detach()

        return Built(model, optimizer, step)


def encode_all_loss(
    model: MaskedAutoencoder, clips: Tensor, ids_keep: Tensor, ids_mask: Tensor
) -> Tensor:
    """The loss on masked tokens where the encoder has seen every token, and hands over the kept."""
    params, s = model.params(), model.spec
    latent = encode(params, s, clips, torch.cat([ids_keep, ids_mask], dim=1))
    latent = latent[:, : latent.shape[1] - ids_mask.shape[1]]  # (cls and) the kept stand first
    pred = decode(params, s, latent, ids_keep, ids_mask)
    return masked_loss(s, pred, clips, ids_mask)
