"""Pre-training: masked clips in, the loss of what is hidden out. How it runs is every run's."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_fast import choices, distributed
from mae_fast.config import Config
from mae_fast.config_file import as_config
from mae_fast.data import Batch, VideoRow
from mae_fast.evaluate import Probes, held_out_loss
from mae_fast.masking import draw_masks
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.source import Source
from mae_fast.optim import learning_rate, make_optimizer
from mae_fast.remade import keeping
from mae_fast.run import Run, run
from mae_fast.signals import Told
from mae_fast.targets import Tokenizer, follow


def pretrain(cfg: Config | str | Path) -> dict[str, Any]:
    """Train a masked autoencoder as `cfg`, or the TOML file of that path, says, resuming the run
    found in its output.

    Returns the last row of metrics. Raises ConfigError, DataError, CheckpointError,
    NonFiniteError, and Interrupted after a signal, when the run has been saved. In another thread
    than the main one there are no signals.
    """
    return run(Pretraining, as_config(cfg))


class Pretraining(Run):
    """A run that learns to see what is masked."""

    def _read_rows(self) -> tuple[list[VideoRow], list[VideoRow]]:
        rows = super()._read_rows()
        self.probes = Probes(self.cfg)
        return rows

    def _make_model(self) -> nn.Module:
        model = MaskedAutoencoder(self.cfg.model)
        if self.cfg.model.target == "tokens":
            model.tokenizer = Tokenizer.find(self.cfg.model.tokenizer)
            model.tokenizer.module.to(self.world.device)
            self.draws["tokenizer"] = model.tokenizer.digest()
        return model

    def _open_folder(self) -> None:
        super()._open_folder()
        self.keeps = choices.keep(self.cfg, self.world.device)

    def _make_optimizer(self) -> torch.optim.AdamW:
        return make_optimizer(self.model, self.cfg.train)

    def _rate(self, step: int) -> float:
        return learning_rate(self.cfg.train, step, self.total, len(self.rows), self.world.size)

    def _after(self) -> dict[str, Any]:
        if not hasattr(self.model, "target_encoder"):
            return {}
        return {"after": functools.partial(follow, self.model, self.cfg.train.ema_momentum)}

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The frames and their table, ids_keep [B, K] and ids_mask [B, M] of a micro-step."""
        cfg = self.cfg
        ids = draw_masks(
            cfg.mask,
            cfg.model.grid,
            seed=cfg.train.seed,
            step=self.step,
            samples=batch.samples,
            device=self.world.device,
        )
        source = batch.source(cfg.model.img_size)
        table = source.table
        if cfg.mask.per_clip > 1:
            table = table.repeat_interleave(cfg.mask.per_clip, dim=0)
        return source.flat, table, *ids

    def _loss(self, flat: Tensor, table: Tensor, ids_keep: Tensor, ids_mask: Tensor) -> Tensor:
        video = Source(flat, table, self.cfg.model.img_size)
        n = self.cfg.mask.per_clip  # a clip stands so often in the batch, and its target is one
        target = self.model.target(video[::n])
        if target is not None:
            target = target.repeat_interleave(n, dim=0)
        with keeping(self.keeps):
            return self.model(video, ids_keep=ids_keep, ids_mask=ids_mask, target=target)[0]

    def _held_out(self) -> dict[str, Any]:
        # A model that lies apart is called by all: none may leave it for a signal.
        if not self.val_rows or not (self.world.writer or self.apart):
            return {}
        distributed.at("the held-out loss")
        heard = (lambda: None) if self.apart else self.signals.look_up
        try:
            return held_out_loss(self.model, self.val_rows, self.cfg, self.world.device, heard)
        except Told:
            return {}
