"""A run: what pre-training and fine-tuning do alike, from a configuration to a folder.

It prepares the folder, resumes what is in it, and runs the steps. Inside a step nothing waits for
the device; losses and norms cross to the host once every log_every steps.
"""

import abc
import contextlib
import dataclasses
import functools
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mae_fast import checkpoint, choices, distributed, endings, folder, metrics, resume, sharded
from mae_fast.buckets import Buckets
from mae_fast.config import Config
from mae_fast.config_file import to_dict
from mae_fast.data import BadVideos, Batch, ClipDataset, Loader, VideoRow, make_loader, read_index
from mae_fast.data.packed import check_size, packs_of
from mae_fast.data.prefetch import DevicePrefetch
from mae_fast.data.sampling import draw, weights_of
from mae_fast.distributed import PeerLost, World
from mae_fast.endings import Stop
from mae_fast.errors import CheckpointError, ConfigError, DataError, Interrupted, MaeFastError
from mae_fast.evaluate import Probes
from mae_fast.ops.dispatch import backends
from mae_fast.optim import total_steps, videos_per_step
from mae_fast.signals import Signals, Told
from mae_fast.step import Step
from mae_fast.window import Window

log = logging.getLogger("mae_fast")


def run(kind: type["Run"], cfg: Config) -> dict[str, Any]:
    """Do a run of a kind, alone or as one of torchrun's processes."""
    world = distributed.start(cfg.train.device, cfg.train.give_up)
    try:
        heard = Signals(alone=world.size == 1)
        with heard, backends(**cfg.train.backends), metrics.sturdy_stderr():
            row = kind(cfg, world, heard).train()
        distributed.gather(None, world)  # ranks leave together, when the writer has written
        return row
    finally:
        distributed.finish()


class Run(abc.ABC):
    """The state of one run: model, optimizer, data, and the step it has reached."""

    def __init__(self, cfg: Config, world: World, signals: Signals) -> None:
        self.cfg, self.asked, self.world, self.signals = cfg, cfg, world, signals
        self.peers = world  # those whose numbers are in a row
        self.folder = Path(cfg.output)
        self.rows, self.val_rows = self._read_rows()
        self.packs = packs_of([*self.rows, *self.val_rows])
        check_size([*self.rows, *self.val_rows], cfg.data.short_side)
        self.draws = {"index": resume.draws(self.rows), "val_index": resume.draws(self.val_rows)}
        self.begun = resume.Parts(cfg.train.batch_size, cfg.train.accum_steps, world.size)
        self.weights = weights_of(self.rows)
        self.total = total_steps(cfg.train, len(self.rows), world.size)
        if self.total > checkpoint.LAST_STEP:
            raise ConfigError(f"{self.total} steps: a checkpoint's name holds eight digits")
        torch.manual_seed(cfg.train.seed)
        self.model = self._make_model().to(world.device)
        self.apart = cfg.train.shard != "none" and world.size > 1
        if self.apart:
            sharded.shard(self.model, world, cfg.train.shard)
        self.optimizer = self._make_optimizer()
        self.step, self.nonfinite, self.run = 0, 0, uuid.uuid4().hex
        self.fault: DataError | None = None  # why this rank cannot go on
        self.window = Window()
        self.whole = True  # false from an update's begin until its step is counted
        self._open_folder()
        cfg = self.cfg
        self.saved = self.step
        on_gpu = world.device.type == "cuda"
        self.aside = checkpoint.Aside(on_gpu) if cfg.train.async_save else None
        # A file that is bad counts as one, not as its segments, shots or keyframes.
        files = len({r.path for r in self.rows})
        self.bad = BadVideos(cfg.data.max_bad_share, files, self.folder, world.writer)
        self.trainer = Step(
            self.model,
            self.optimizer,
            self._loss,
            accum=cfg.train.accum_steps,
            clip=cfg.train.clip_grad,
            precision=cfg.train.precision,
            graph=self._graph(),
            buckets=self._buckets(),
            **self._after(),
        )

    # What a task says of itself; the rest is every run's.

    mixed = False  # the clips of a micro-step depend on each other
    probes: Probes | None = None

    @abc.abstractmethod
    def _make_model(self) -> nn.Module:
        """As it is at the start, on any device."""

    @abc.abstractmethod
    def _make_optimizer(self) -> torch.optim.AdamW:
        """Of the model as it lies here."""

    @abc.abstractmethod
    def _rate(self, step: int) -> float:
        """The learning rate of the step numbered `step` from 0."""

    @abc.abstractmethod
    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What _loss takes, on the device, of a micro-step."""

    @abc.abstractmethod
    def _loss(self, *inputs: Tensor) -> Tensor:
        """Of a micro-step, a scalar."""

    @abc.abstractmethod
    def _held_out(self) -> dict[str, Any]:
        """What the held-out videos say of the model; {} on a rank that does not judge, or that is
        told to stop."""

    def _after(self) -> dict[str, Any]:
        """What follows an update of the model, as `Step` takes it."""
        return {}

    def _read_rows(self) -> tuple[list[VideoRow], list[VideoRow]]:
        """What training draws from, and what is held out."""
        data = self.cfg.data
        if not data.index:
            raise ConfigError("data.index is empty: make one with `mae-fast index FOLDER`")
        return read_index(data.index), read_index(data.val_index) if data.val_index else []

    def train(self) -> dict[str, Any]:
        """Run every step that is left; leaves a checkpoint of the last and curves.png."""
        try:
            if self.step >= self.total:
                log.warning("%s: all %d steps are done already", self.folder, self.total)
                return metrics.last(self.folder / "metrics.jsonl") or {"step": self.step}
            if not self.world.writer:
                return self._steps(None)
            with metrics.Metrics(self.cfg, self.total, self.step) as sink:
                try:
                    row = self._steps(sink)
                except (PeerLost, RuntimeError) as e:
                    self._alone(e, sink)
                    raise
            metrics.draw_curves(self.folder, self.cfg.model.loss_unit)
            return row
        except (DataError, Interrupted):
            self._save()  # what was learned until then
            raise
        except (PeerLost, RuntimeError) as e:
            saves = self._can_save()
            if saves:
                self._save()
            if isinstance(e, torch.OutOfMemoryError):
                how = (self.world.rank, self.cfg.train, e)
                raise endings.out_of_memory(self.folder, self.step, *how) from e
            if self.whole and distributed.lost_peer(e):
                lost = f"another process was lost ({str(e).splitlines()[0]})"
                error = self._interrupted(self.signals.told, lost, saves)
                error.lost = True
                raise error from e
            raise
        except OSError as e:
            raise CheckpointError(
                f"cannot write into {self.folder}: {e}; its checkpoints are as they were"
            ) from e
        finally:
            if self.aside:
                with contextlib.suppress(MaeFastError):  # another error is on its way
                    self.aside.wait()
            self.trainer.close()
            folder.leave(self.lock)

    def _steps(self, sink: metrics.Metrics | None) -> dict[str, Any]:
        cfg, row = self.cfg.train, {}
        if self.step == 0 and self.val_rows:
            row = self._held_out()
            if sink:
                sink.write({"step": 0, **row})
        batches, self.window = DevicePrefetch(self._loader(), self.world.device), Window()
        while self.step < self.total:
            window = self.window
            try:
                self._one_step(batches, window)
            except Stop:
                self._leave(window, sink)
            self.step += 1
            self.whole = True
            before = time.perf_counter()
            distributed.at(functools.partial(self._awaited, self.step, 0))
            batches.ahead()
            distributed.at(f"step {self.step}")
            window.waited += time.perf_counter() - before
            save = self.step == self.total or self.step % cfg.save_every == 0
            probe = self.probes is not None and self.probes.due(self.step, self.total)
            if save or probe or self.step % cfg.log_every == 0:
                row = self._report(window, sink, save, probe)
                self.window = Window()
            elif sink:
                sink.tick(self.step, time.perf_counter() - window.began)
            if save:
                self._save(leaving=self.step == self.total)
        return row

    def _report(
        self, window: Window, sink: metrics.Metrics | None, held_out: bool, probe: bool = False
    ) -> dict:
        """Write the window's row, and only then raise what is wrong with it."""
        row, wrong = self._cross(window)
        if held_out and not wrong:
            row |= self._held_out()
        if probe and not wrong:
            row |= self._probed()
        if sink and row:
            sink.write(row)
        if wrong:
            raise wrong
        return row

    def _can_save(self) -> bool:
        """After an error. A device that waits for a lost rank would have whoever reads it wait."""
        return self.whole and not self.apart and distributed.answers(self.world.device)

    def _alone(self, error: Exception, sink: metrics.Metrics) -> None:
        """The last row where another rank was lost with its numbers: of this one's alone."""
        if distributed.lost_peer(error) and self._can_save():
            self.peers = World(0, 1, self.world.device)
            self._report(self.window, sink, held_out=False)

    def _leave(self, window: Window, sink: metrics.Metrics | None) -> NoReturn:
        """Every rank is here, before the same step, as one was told to stop or cannot go on."""
        reasons = distributed.gather((self.signals.told, str(self.fault or "")), self.world)
        self._report(window, sink, held_out=False)
        told = next((signum for signum, _ in reasons if signum), 0)
        if not told:
            raise self.fault or DataError(next(text for _, text in reasons if text))
        error = self._interrupted(told)
        error.told = told
        raise error

    def _interrupted(self, told: int, lost: str = "", saved: bool = True) -> Interrupted:
        # Who was lost may be the one that saves.
        saved = saved and (self.world.writer or not lost)
        return endings.interrupted(self.folder, self.step, told, lost, saved)

    def _buckets(self) -> Buckets | None:
        """What adds up the gradients of several processes."""
        return Buckets(self.model) if self.world.size > 1 and not self.apart else None

    def _graph(self) -> bool:
        return choices.cuda_graph(self.cfg, self.world, self.apart)

    def _one_step(self, batches: Iterator[Batch], window: Window) -> None:
        """One optimizer step: accum_steps micro-steps, then clip and update. Never syncs."""
        window.paths.append([])
        for _ in range(self.cfg.train.accum_steps):
            self.trainer.micro(*self._inputs(self._next(batches, window)))
        self.whole = False
        loss, norm = self.trainer.update(self._rate(self.step))
        window.losses.append(loss)
        window.norms.append(norm)

    def _next(self, batches: Iterator[Batch], window: Window) -> Batch:
        """The next batch, when every rank has its own; Stop where one cannot or should not go on.

        Nothing of a step has changed the state until then, so that it can be left here.
        """
        before, batch = time.perf_counter(), None
        distributed.at(functools.partial(self._awaited, self.step, len(self.trainer.losses)))
        if not self.signals.told:
            try:
                batch = next(batches)
                window.bad += batch.bad
                window.paths[-1] += batch.paths
            except Told:
                pass
            except DataError as e:
                self.fault = e
                window.bad += getattr(e, "bad", [])
        window.waited += time.perf_counter() - before
        stop = bool(self.signals.told or self.fault)
        if distributed.agree(stop, self.world, lambda: bool(self.signals.told)):
            raise Stop
        distributed.at(f"step {self.step + 1}")
        return batch

    def _awaited(self, step: int, micro: int) -> str:
        """The videos of this rank's batch of a micro-step, in words."""
        t, n = self.cfg.train, len(self.rows)
        first = ((step * t.accum_steps + micro) * self.world.size + self.world.rank) * t.batch_size
        videos = [
            draw(n, g, t.seed, self.weights)[1] for g in range(first, first + min(t.batch_size, 4))
        ]
        names = ", ".join(self.rows[i].path for i in videos)
        more = f" and {t.batch_size - len(videos)} more" if t.batch_size > len(videos) else ""
        return f"loading {names}{more} for step {step + 1}"

    def _cross(self, window: Window) -> tuple[dict[str, Any], MaeFastError | None]:
        """Bring the window's numbers to the host and judge them. Every rank takes part.

        Returns its row ({} of no steps), and why the run must not go on, if it must not.
        """
        seen = window.gather(self.peers)
        wrong = self._note_bad(seen.bad)
        if not seen.norms:
            return {}, wrong
        steps, seconds, cfg = len(seen.norms), seen.seconds, self.cfg
        listed = self.folder if self.world.writer else None
        self.nonfinite += seen.note_skipped(self.step - steps, listed)
        wrong = endings.non_finite(self.folder, self.nonfinite, cfg.train.max_nonfinite) or wrong
        clips = steps * cfg.train.batch_size * cfg.train.accum_steps * cfg.data.repeat_aug
        row = {
            "step": self.step,
            "epoch": self.step * videos_per_step(cfg.train, self.world.size) / len(self.rows),
            "loss": sum(seen.losses) / len(seen.losses) if seen.losses else math.nan,
            "lr": self._rate(self.step - 1),
            "grad_norm": seen.norms[-1],
            "clips_per_s": clips * self.world.size / seconds,
            "step_seconds": seconds / steps,
            "data_wait": window.waited / seconds,
            "memory_mb": metrics.memory_mb(self.world.device),
            "nonfinite": self.nonfinite,
            "bad_videos": len(self.bad.found),
            "seconds_left": (self.total - self.step) * seconds / steps,
        }
        return row, wrong

    def _probed(self) -> dict[str, Any]:
        if not self.world.writer:
            return {}
        distributed.at("its probes")
        try:
            return self.probes(self.model, self.signals.look_up)
        except Told:
            return {}

    def _note_bad(self, bad: list[tuple[str, str]]) -> DataError | None:
        try:
            self.bad.add(bad)
        except DataError as e:
            return e
        return None

    def _loader(self, clips: Callable[..., ClipDataset] = ClipDataset) -> Loader:
        """The batches of the steps that are left."""
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
            waiting=self.signals.look_up,
            clips=clips,
        )

    def _save(self, leaving: bool = True) -> None:
        """Save the present step, if it is not saved; written when this returns, if it is the last
        that this process does."""
        if (self.world.writer or self.apart) and self.step > self.saved:
            what = (self.model, self.optimizer, self._state(), self.cfg.train.keep)
            ranks = self.world if self.apart else None
            distributed.at(f"saving step {self.step}")
            checkpoint.save(self.folder, self.step, *what, self.aside, ranks)
            self.saved = self.step
        if leaving and self.aside:
            self.aside.wait()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of its run, beside the step."""
        return {
            "config": to_dict(self._with_parts(self.asked, self.begun)),
            "asked": [self.asked.train.batch_size, self.asked.train.accum_steps],
            "world": self.begun.world,
            "nonfinite": self.nonfinite,
            "run": self.run,
            **self.draws,
        }

    @staticmethod
    def _with_parts(cfg: Config, parts: resume.Parts) -> Config:
        how = dict(batch_size=parts.batch, accum_steps=parts.accum)
        return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **how))

    def _open_folder(self) -> None:
        """Make the run's folder, or go on with the run that is in it."""
        taken, error = None, None
        if self.world.writer:
            how = (self._state(), self.begun, self.mixed, self.packs)
            try:
                taken = folder.take(self.folder, self.cfg, *how)
            except MaeFastError as e:
                error = e
        self.lock, found, parts = taken or (None, None, None)
        told = error, found and found[0]["step"], parts
        error, step, parts = distributed.gather(told, self.world)[0]
        if error:
            raise error
        if step is None:
            return
        self.begun, now = parts
        self.cfg = self._with_parts(self.asked, now)
        self.total = total_steps(self.cfg.train, len(self.rows), self.world.size)
        state, tensors = found or checkpoint.read(checkpoint.file(self.folder, step))
        checkpoint.restore(tensors, self.model, self.optimizer)
        self.step, self.nonfinite, self.run = state["step"], state["nonfinite"], state.get("run")
        if self.world.writer:
            log.info("resuming %s after step %d: %s", self.folder, self.step, now)
