"""What judges a pre-training run on the way: held-out loss, of the same clips, crops and masks
every time, beside what a mean would score; and probes of the frozen encoder.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from mae_fast.config import Config
from mae_fast.data import VideoRow, make_loader, read_index
from mae_fast.forward import targets
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.masked_mse import norm_target

log = logging.getLogger("mae_fast")

CLIPS = 64
_SEED = 20220518  # any fixed number: the paper's first day on arXiv


@torch.no_grad()
def held_out_loss(
    model: MaskedAutoencoder,
    rows: list[VideoRow],
    cfg: Config,
    device: torch.device,
    waiting: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{"val_loss", "val_mean_patch_loss", "val_clips"} over CLIPS clips of the held-out `rows`.

    The loss is that of all hidden patches under one mask a clip, whatever mask.decoder and per_clip
    are. val_mean_patch_loss is that of predicting, for every masked patch, the patch's own mean;
    without it where targets are no values of patches (tokens, features).
    Broken videos are replaced as in training. `waiting` is called now and then; it may raise.
    """
    videos = max(1, 8 // cfg.data.repeat_aug)  # a batch of about 8 clips
    loader = make_loader(
        rows,
        cfg.data,
        num_frames=cfg.model.num_frames,
        batch_size=videos,
        seed=_SEED,
        start=0,
        steps=-(-CLIPS // (videos * cfg.data.repeat_aug)),
        waiting=waiting,
    )
    spec, losses, means, clips, bad = model.spec, 0.0, 0.0, 0, {}
    given = cfg.model.target in ("tokens", "features")
    for batch in loader:
        waiting()
        batch = batch.to(device)
        video = batch.source(cfg.model.img_size)
        keep, masked = draw_ids(
            cfg.mask.strategy,
            cfg.model.grid,
            cfg.mask.ratio,
            seed=_SEED,
            step=0,
            samples=batch.samples,
            device=device,
        )
        loss, _, _ = model(video, ids_keep=keep, ids_mask=masked)
        if not given:
            target = targets(spec, video, masked, torch.float32)
            target, _, _ = norm_target(target, spec.norm_pix, cfg.model.in_chans)
            means += float(target.var(dim=-1, correction=0).mean()) * len(batch.paths)
        losses += float(loss) * len(batch.paths)
        clips += len(batch.paths)
        bad |= dict(batch.bad)
    if bad:
        said = ": ".join(next(iter(bad.items())))
        log.warning("held out: %d videos do not decode, replaced by others: %s", len(bad), said)
    mean = {} if given else {"val_mean_patch_loss": means / clips}
    return {"val_loss": losses / clips, **mean, "val_clips": clips}


class Probes:
    """The probes of a run, every eval.probe-th step and after the last, where it has any. The
    indexes are read, and their labels checked, when the run begins. Raises DataError."""

    def __init__(self, cfg: Config) -> None:
        self.every = cfg.eval.probe
        if not self.every:
            return
        # Late, as below: commands beside them want tyro, which a GPU's image may lack.
        from mae_fast.tasks.clips import classes_of, numbers_of
        from mae_fast.tasks.config import ClipsConfig

        self.train = read_index(cfg.eval.train_index)
        self.test = read_index(cfg.eval.test_index, broken=True)  # a broken one counts as wrong
        numbers_of(self.test, classes_of(self.train))
        d, same = cfg.data, "sampling_rate target_fps decoder strict workers"
        # The whole picture, at the model's own size.
        self.clips = ClipsConfig(short_side=0, **{name: getattr(d, name) for name in same.split()})
        self.seed = cfg.train.seed

    def due(self, step: int, total: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or step == total)

    def __call__(self, model: MaskedAutoencoder, waiting: Callable[[], None]) -> dict[str, float]:
        """{"probe_knn", "probe_linear"}: accuracies. `waiting` may raise."""
        from mae_fast import probe

        net = probe.encoder_of(model)
        found = probe.judge(net, self.train, self.test, self.clips, seed=self.seed, waiting=waiting)
        return {f"probe_{kind}": accuracy for kind, accuracy in found.items()}
