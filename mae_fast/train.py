"""The training loop: one configuration in, one folder out.

`pretrain(cfg)` prepares the folder, resumes what is in it, and runs the steps. Inside a step
nothing waits for the device; losses and norms cross to the host once every log_every steps.
"""

import itertools
import json
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_fast import checkpoint, distributed, graph, metrics
from mae_fast.config import Config, to_dict
from mae_fast.data import BadVideos, Batch, make_loader, read_index
from mae_fast.data.prefetch import DevicePrefetch
from mae_fast.distributed import World
from mae_fast.environment import environment
from mae_fast.errors import CheckpointError, ConfigError, DataError, Interrupted, NonFiniteError
from mae_fast.evaluate import held_out_loss
from mae_fast.masking import draw_ids, num_keep
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.dispatch import backends
from mae_fast.optim import clipped_step, lr_at, make_optimizer, peak_lr

log = logging.getLogger("mae_fast")
Inputs = tuple[Tensor, Tensor, Tensor]  # video [B, C, T, H, W], ids_keep [B, K], ids_mask [B, M]

# Settings that may change between the start of a run and its resumption: none of them changes
# what is computed.
_FREE = {
    "output",
    "data.workers",
    "data.max_bad_share",
    "data.index",
    "data.val_index",
    "train.device",
    "train.cuda_graph",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.max_nonfinite",
    "train.tensorboard",
    "train.wandb",
}


def pretrain(cfg: Config) -> dict[str, Any]:
    """Train a masked autoencoder as `cfg` says, resuming the run found in cfg.output.

    Returns the last row of metrics. Raises ConfigError, DataError, CheckpointError,
    NonFiniteError, and Interrupted after SIGINT or SIGTERM, when the run has been saved.
    """
    world = distributed.start(cfg.train.device)
    try:
        with backends(**cfg.train.backends):
            row = Run(cfg, world).train()
        distributed.gather(None, world)  # ranks leave together, when the writer has written
        return row
    finally:
        distributed.finish()


@dataclass
class Window:
    """What has been gathered since numbers last crossed to the host."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    paths: list[list[str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)


class Run:
    """The state of one run: model, optimizer, data, and the step it has reached."""

    def __init__(self, cfg: Config, world: World) -> None:
        self.cfg, self.world = cfg, world
        if not cfg.data.index:
            raise ConfigError("data.index is empty: make one with `mae-fast index FOLDER`")
        if cfg.mask.ratio == 0:
            raise ConfigError("mask.ratio 0 leaves nothing to predict")
        num_keep(cfg.mask.strategy, cfg.model.grid, cfg.mask.ratio)  # fails early, with numbers
        self.folder = Path(cfg.output)
        self.rows = read_index(cfg.data.index)
        self.val_rows = read_index(cfg.data.val_index) if cfg.data.val_index else []
        self.total = total_steps(cfg, len(self.rows), world.size)
        torch.manual_seed(cfg.train.seed)
        self.model = MaskedAutoencoder(cfg.model).to(world.device)
        self.optimizer = make_optimizer(self.model, cfg.train)
        self.lr = torch.zeros((), device=world.device)
        self.step, self.nonfinite = 0, 0
        self._open_folder()
        self.bad = BadVideos(
            cfg.data.max_bad_share, len(self.rows), self.folder if world.writer else None
        )
        self.wrapped = distributed.wrap(self.model, world)
        self.graphed = self._graphed() if cfg.train.cuda_graph else None
        self.stop_signal = 0

    def train(self) -> dict[str, Any]:
        """Run every step that is left; leaves a checkpoint of the last and curves.png."""
        if self.step >= self.total:
            log.warning("%s: all %d steps are done already", self.folder, self.total)
            return metrics.read(self.folder / "metrics.jsonl")[-1]
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            if not self.world.writer:
                return self._steps(None)
            with metrics.Metrics(self.cfg, self.total, self.step) as sink:
                row = self._steps(sink)
            metrics.draw_curves(self.folder)
            return row
        except DataError:
            self._save()  # what was learned until the videos ran out
            raise
        except OSError as e:
            raise CheckpointError(
                f"cannot write into {self.folder}: {e}; its checkpoints are as they were"
            ) from e
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def _steps(self, sink: metrics.Metrics | None) -> dict[str, Any]:
        cfg, row = self.cfg.train, {}
        if self.step == 0 and sink and self.val_rows:
            sink.write({"step": 0, **self._held_out()})
        batches, window = DevicePrefetch(self._loader(), self.world.device), Window()
        while self.step < self.total:
            self._one_step(batches, window)
            before = time.perf_counter()
            batches.ahead()
            window.waited += time.perf_counter() - before
            self.step += 1
            last = self.step == self.total
            save = last or self.step % cfg.save_every == 0
            cross = save or self.step % cfg.log_every == 0
            # Alone, a process looks for signals after every step; ranks when they meet anyway.
            stop = (cross or self.world.size == 1) and any(
                distributed.gather(self.stop_signal, self.world)
            )
            if cross or stop:
                row = self._cross(window) | (self._held_out() if save else {})
                window = Window()
                if sink:
                    sink.write(row)
            if save or stop:
                self._save()
            if stop and not last:
                raise Interrupted(
                    f"stopped by {signal.Signals(self.stop_signal or signal.SIGTERM).name} after "
                    f"step {self.step}, which is saved; the same command goes on from there"
                )
        return row

    def _graphed(self) -> graph.GraphedStep | None:
        """The step as a CUDA graph, or None where it cannot be one."""
        reason = graph.why_not(self.world.device, self.world.size)
        if reason:
            log.warning("train.cuda_graph is not used: %s", reason)
            return None

        def compute(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self._compute(zip(*[iter(inputs)] * 3, strict=True))

        return graph.GraphedStep(compute, self.world.device)

    def _one_step(self, batches: Iterator[Batch], window: Window) -> None:
        """One optimizer step: accum_steps micro-steps, then clip and update. Never syncs."""
        self.lr.fill_(
            learning_rate(self.cfg, self.step, self.total, len(self.rows), self.world.size)
        )
        window.paths.append([])
        inputs = self._inputs(batches, window)
        if self.graphed is None:
            loss, norm = self._compute(inputs)
        else:
            loss, norm = self.graphed(*itertools.chain.from_iterable(inputs))
        window.losses.append(loss)
        window.norms.append(norm)

    def _inputs(self, batches: Iterator[Batch], window: Window) -> Iterator[Inputs]:
        """What each micro-step takes, on the device."""
        cfg = self.cfg
        for _ in range(cfg.train.accum_steps):
            before = time.perf_counter()
            batch = next(batches)
            window.waited += time.perf_counter() - before
            window.bad += batch.bad
            window.paths[-1] += batch.paths
            ids = draw_ids(
                cfg.mask.strategy,
                cfg.model.grid,
                cfg.mask.ratio,
                seed=cfg.train.seed,
                step=self.step,
                samples=batch.samples,
            )
            yield batch.video(cfg.model.img_size), *ids

    def _compute(self, inputs: Iterable[Inputs]) -> tuple[Tensor, Tensor]:
        """(loss, gradient norm) of one optimizer step: all that a CUDA graph holds."""
        accum, losses = self.cfg.train.accum_steps, []
        for micro, each in enumerate(inputs):
            with distributed.no_sync(self.wrapped, micro == accum - 1):
                loss = self._loss(*each)
                (loss / accum).backward()
            losses.append(loss.detach())
        norm = clipped_step(self.optimizer, self.lr, self.cfg.train.clip_grad)
        return torch.stack(losses).mean(), norm

    def _loss(self, video: Tensor, ids_keep: Tensor, ids_mask: Tensor) -> Tensor:
        bf16 = self.cfg.train.precision == "bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            return self.wrapped(video, ids_keep=ids_keep, ids_mask=ids_mask)[0]

    def _cross(self, window: Window) -> dict[str, Any]:
        """Bring the window's numbers to the host and judge them. Every rank takes part."""
        losses, norms = torch.stack(
            [torch.stack(window.losses), torch.stack(window.norms)]
        ).tolist()
        seconds = time.perf_counter() - window.began
        gathered = distributed.gather((losses, window.bad, window.paths), self.world)
        self.bad.add([bad for _, bads, _ in gathered for bad in bads])
        self._judge(norms, [paths for _, _, paths in gathered])
        finite = [x for each, _, _ in gathered for x in each if math.isfinite(x)]
        steps, cfg = len(losses), self.cfg
        clips = steps * cfg.train.batch_size * cfg.train.accum_steps * cfg.data.repeat_aug
        return {
            "step": self.step,
            "epoch": self.step * _videos_per_step(cfg, self.world.size) / len(self.rows),
            "loss": sum(finite) / len(finite) if finite else math.nan,
            "lr": learning_rate(cfg, self.step - 1, self.total, len(self.rows), self.world.size),
            "grad_norm": norms[-1],
            "clips_per_s": clips * self.world.size / seconds,
            "step_seconds": seconds / steps,
            "data_wait": window.waited / seconds,
            "memory_mb": metrics.memory_mb(self.world.device),
            "nonfinite": self.nonfinite,
            "bad_videos": len(self.bad.found),
            "seconds_left": (self.total - self.step) * seconds / steps,
        }

    def _held_out(self) -> dict[str, Any]:
        if not self.val_rows or not self.world.writer:
            return {}
        return held_out_loss(self.model, self.val_rows, self.cfg, self.world.device)

    def _judge(self, norms: list[float], paths: list[list[list[str]]]) -> None:
        """Count the steps that were skipped because a gradient was not finite."""
        first = self.step - len(norms)
        for i, norm in enumerate(norms):
            if math.isfinite(norm):
                continue
            self.nonfinite += 1
            files = sorted({p for rank in paths for p in rank[i]})
            log.warning("step %d skipped, gradient norm %s; videos: %s", first + i, norm, files)
            if self.world.writer:
                with (self.folder / "nonfinite.jsonl").open("a") as f:
                    row = {"step": first + i, "grad_norm": str(norm), "videos": files}
                    f.write(json.dumps(row) + "\n")
        if self.nonfinite > self.cfg.train.max_nonfinite:
            raise NonFiniteError(
                f"{self.nonfinite} steps were not finite (train.max_nonfinite "
                f"{self.cfg.train.max_nonfinite}); every checkpoint is kept, see "
                f"{self.folder / 'nonfinite.jsonl'}"
            )

    def _loader(self):
        cfg, accum = self.cfg, self.cfg.train.accum_steps
        return make_loader(
            self.rows,
            cfg.data,
            num_frames=cfg.model.num_frames,
            batch_size=cfg.train.batch_size,
            seed=cfg.train.seed,
            start=self.step * accum,
            steps=(self.total - self.step) * accum,
            rank=self.world.rank,
            world=self.world.size,
        )

    def _save(self) -> None:
        if self.world.writer and self.step:
            state = {"config": to_dict(self.cfg), "nonfinite": self.nonfinite}
            keep = self.cfg.train.keep
            checkpoint.save(self.folder, self.step, self.model, self.optimizer, state, keep)

    def _open_folder(self) -> None:
        """Make the run's folder, or go on with the run that is in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = checkpoint.latest(self.folder)
            if self.world.writer:
                text = json.dumps(to_dict(self.cfg), indent=2)
                previous = self.folder / "config.json"
                if found is None or not previous.exists():
                    checkpoint.write_text(previous, text)
                history = self.folder / "environment.jsonl"
                with history.open("a") as f:
                    row = {"step": found[0]["step"] if found else 0, **environment()}
                    f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise CheckpointError(f"cannot write into {self.folder}: {e.strerror or e}") from e
        if found is None:
            return
        state, tensors = found
        changed = changed_settings(state["config"], to_dict(self.cfg))
        if changed:
            raise ConfigError(
                f"{self.folder} holds a run with other settings ({'; '.join(changed)}): "
                f"choose another output"
            )
        checkpoint.restore(tensors, self.model, self.optimizer)
        self.step, self.nonfinite = state["step"], state["nonfinite"]
        if self.world.writer:
            log.info("resuming %s after step %d", self.folder, self.step)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.stop_signal = signum


def _videos_per_step(cfg: Config, world: int) -> int:
    return cfg.train.batch_size * cfg.train.accum_steps * world


def total_steps(cfg: Config, videos: int, world: int) -> int:
    """Optimizer steps of the whole run: train.steps, or train.epochs passes over the videos."""
    if cfg.train.steps:
        return cfg.train.steps
    return max(1, int(cfg.train.epochs * videos / _videos_per_step(cfg, world)))


def learning_rate(cfg: Config, step: int, total: int, videos: int, world: int) -> float:
    """The rate of the step numbered `step` from 0, warmed up per step, in the official shape."""
    t = cfg.train
    warmup = t.warmup_steps
    if not t.steps:
        warmup = t.warmup_epochs * videos / _videos_per_step(cfg, world)
    return lr_at(step, total, warmup, peak_lr(t, world), t.min_lr)


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for each setting that decides what is computed and is not the same."""
    changed = []
    for key in sorted({*old, *new}):
        name, a, b = prefix + key, old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += changed_settings(a, b, name + ".")
        elif name not in _FREE and json.dumps(a) != json.dumps(b):
            changed.append(f"{name}: {a} -> {b}")
    return changed
