"""The training loop: one configuration in, one folder out.

`pretrain(cfg)` prepares the folder, resumes what is in it, and runs the steps. Inside a step
nothing waits for the device; losses and norms cross to the host once every log_every steps.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mae_fast import checkpoint, distributed, graph, memory, metrics, resume, sharded
from mae_fast.buckets import Buckets
from mae_fast.config import Config
from mae_fast.config_file import as_config, to_dict
from mae_fast.data import (
    BadVideos,
    Batch,
    ClipDataset,
    Loader,
    VideoRow,
    make_loader,
    read_index,
)
from mae_fast.data.packed import check_size, packs_of
from mae_fast.data.prefetch import DevicePrefetch
from mae_fast.data.sampling import draw
from mae_fast.distributed import PeerLost, World
from mae_fast.environment import environment
from mae_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    MaeFastError,
    NonFiniteError,
    OutOfMemory,
)
from mae_fast.evaluate import Probes, held_out_loss
from mae_fast.fields import defaults
from mae_fast.masking import draw_masks
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.dispatch import backends
from mae_fast.ops.source import Source
from mae_fast.optim import learning_rate, make_optimizer, total_steps, videos_per_step
from mae_fast.signals import Signals, Told
from mae_fast.step import Step
from mae_fast.targets import Tokenizer, follow

log = logging.getLogger("mae_fast")


def pretrain(cfg: Config | str | Path) -> dict[str, Any]:
    """Train a masked autoencoder as `cfg`, or the TOML file of that path, says, resuming the run
    found in its output.

    Returns the last row of metrics. Raises ConfigError, DataError, CheckpointError,
    NonFiniteError, and Interrupted after a signal, when the run has been saved. In another thread
    than the main one there are no signals.
    """
    return run(Run, as_config(cfg))


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


class _Stop(Exception):
    """Raised on every rank before the same step: one of them was told to stop, or cannot go on."""


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

    def __init__(self, cfg: Config, world: World, signals: Signals) -> None:
        self.cfg, self.asked, self.world, self.signals = cfg, cfg, world, signals
        self.peers = world  # those whose numbers are in a row
        self.folder = Path(cfg.output)
        self.rows, self.val_rows = self._read_rows()
        self.probes = self._make_probes()
        self.packs = packs_of([*self.rows, *self.val_rows])
        check_size([*self.rows, *self.val_rows], cfg.data.short_side)
        self.draws = {"index": resume.draws(self.rows), "val_index": resume.draws(self.val_rows)}
        self.begun = resume.Parts(cfg.train.batch_size, cfg.train.accum_steps, world.size)
        self.total = total_steps(cfg.train, len(self.rows), world.size)
        if self.total > checkpoint.LAST_STEP:
            raise ConfigError(f"{self.total} steps: a checkpoint's name holds eight digits")
        torch.manual_seed(cfg.train.seed)
        self.model = self._make_model().to(world.device)
        self.apart = self._shard()
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
        self.bad = BadVideos(
            cfg.data.max_bad_share, len(self.rows), self.folder if world.writer else None
        )
        if isinstance(self.model, MaskedAutoencoder):
            self.model.spec = self.model.spec._replace(keep=self._keep())
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

    # What another task does otherwise; the rest is every run's.

    mixed = False  # the clips of a micro-step depend on each other

    def _read_rows(self) -> tuple[list[VideoRow], list[VideoRow]]:
        """What training draws from, and what is held out."""
        data = self.cfg.data
        if not data.index:
            raise ConfigError("data.index is empty: make one with `mae-fast index FOLDER`")
        return read_index(data.index), read_index(data.val_index) if data.val_index else []

    def _make_probes(self) -> Probes | None:
        return Probes(self.cfg)

    def _make_model(self) -> nn.Module:
        model = MaskedAutoencoder(self.cfg.model)
        if self.cfg.model.target == "tokens":
            model.tokenizer = Tokenizer.find(self.cfg.model.tokenizer)
            model.tokenizer.module.to(self.world.device)
            self.draws["tokenizer"] = model.tokenizer.digest()
        return model

    def _make_optimizer(self) -> torch.optim.AdamW:
        return make_optimizer(self.model, self.cfg.train)

    def _rate(self, step: int) -> float:
        """The learning rate of the step numbered `step` from 0."""
        return learning_rate(self.cfg.train, step, self.total, len(self.rows), self.world.size)

    def _after(self) -> dict[str, Any]:
        """What follows an update of the model, as `Step` takes it."""
        if not hasattr(self.model, "target_encoder"):
            return {}
        return {"after": functools.partial(follow, self.model, self.cfg.train.ema_momentum)}

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
                raise self._out_of_memory(e) from e
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
            self._unlock()

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
            except _Stop:
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
        """What ended the run: a signal, a lost process, or both, of which one may be the cause."""
        stopped = f"stopped by {signal.Signals(told).name}" if told else ""
        why = ", and ".join(filter(None, [stopped, lost]))
        if not self.step:
            return Interrupted(f"{why} before the first step")
        # Who was lost may be the one that saves.
        if (self.world.writer or not lost) and saved:
            words = "which is saved; the same command goes on from there"
        else:
            words = f"and the same command goes on from {checkpoint.newest(self.folder)}"
        return Interrupted(f"{why} after step {self.step}, {words}")

    def _out_of_memory(self, error: Exception) -> OutOfMemory:
        t, text = self.cfg.train, str(error).splitlines()[0]
        return OutOfMemory(
            f"rank {self.world.rank} has too little memory in step {self.step + 1} ({text}). With "
            f"a smaller train.batch_size than {t.batch_size}, and as much more of "
            f"train.accum_steps than {t.accum_steps}, the same run goes on from "
            f"{checkpoint.newest(self.folder)}"
        )

    def _shard(self) -> bool:
        """Part the model among the ranks, where it is to be and there are several."""
        how = self.cfg.train.shard
        if how == "none" or self.world.size == 1:
            return False
        sharded.shard(self.model, self.world, how)
        return True

    def _buckets(self) -> Buckets | None:
        """What adds up the gradients of several processes."""
        return Buckets(self.model) if self.world.size > 1 and not self.apart else None

    def _graph(self) -> bool:
        """Whether the step is to be CUDA graphs, and can be."""
        how, device = self.cfg.train.cuda_graph, self.world.device
        reason = graph.why_not(device)
        if not reason and self.apart:
            reason = "what parted weights need of other processes is not captured"
        if not reason and how == "auto" and self.world.size > 1:
            reason = f'with {self.world.size} processes it is untried on GPUs; "on" tries it'
        if self.cfg.model.target == "tokens":
            reason = reason or "the tokenizer may do what a capture does not permit"
        if reason and (how == "on" or (how == "auto" and device.type == "cuda")):
            log.warning("train.cuda_graph is not used: %s", reason)
        return how != "off" and not reason

    def _keep(self) -> bool:
        """Whether a GPU holds norms and activations too (memory.py); else they are made again in
        backward."""
        cfg, device = self.cfg, self.world.device
        if device.type != "cuda":
            return False
        clips = cfg.train.batch_size * cfg.data.repeat_aug * cfg.mask.per_clip
        has = torch.cuda.get_device_properties(device).total_memory
        p = 2 if cfg.train.precision == "bf16" else 4
        return memory.keeps(cfg.model, clips, cfg.mask.ratio, p, has)

    def _one_step(self, batches: Iterator[Batch], window: Window) -> None:
        """One optimizer step: accum_steps micro-steps, then clip and update. Never syncs."""
        window.paths.append([])
        for _ in range(self.cfg.train.accum_steps):
            self.trainer.micro(*self._inputs(self._next(batches, window)))
        self.whole = False
        loss, norm = self.trainer.update(self._rate(self.step))
        window.losses.append(loss)
        window.norms.append(norm)

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

    def _next(self, batches: Iterator[Batch], window: Window) -> Batch:
        """The next batch, when every rank has its own; _Stop where one cannot or should not go on.

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
            raise _Stop
        distributed.at(f"step {self.step + 1}")
        return batch

    def _awaited(self, step: int, micro: int) -> str:
        """The videos of this rank's batch of a micro-step, in words."""
        t, n = self.cfg.train, len(self.rows)
        first = ((step * t.accum_steps + micro) * self.world.size + self.world.rank) * t.batch_size
        videos = [draw(n, g, t.seed)[1] for g in range(first, first + min(t.batch_size, 4))]
        names = ", ".join(self.rows[i].path for i in videos)
        more = f" and {t.batch_size - len(videos)} more" if t.batch_size > len(videos) else ""
        return f"loading {names}{more} for step {step + 1}"

    def _loss(self, flat: Tensor, table: Tensor, ids_keep: Tensor, ids_mask: Tensor) -> Tensor:
        video = Source(flat, table, self.cfg.model.img_size)
        n = self.cfg.mask.per_clip  # a clip stands so often in the batch, and its target is one
        target = self.model.target(video[::n])
        if target is not None:
            target = target.repeat_interleave(n, dim=0)
        return self.model(video, ids_keep=ids_keep, ids_mask=ids_mask, target=target)[0]

    def _cross(self, window: Window) -> tuple[dict[str, Any], MaeFastError | None]:
        """Bring the window's numbers to the host and judge them. Every rank takes part.

        Returns its row ({} of no steps), and why the run must not go on, if it must not.
        """
        if not window.losses:
            gathered = distributed.gather(window.bad, self.peers)
            return {}, self._note_bad([bad for bads in gathered for bad in bads])
        losses, norms = torch.stack(
            [torch.stack(window.losses), torch.stack(window.norms)]
        ).tolist()
        seconds = time.perf_counter() - window.began
        gathered = distributed.gather((losses, window.bad, window.paths), self.peers)
        wrong = self._note_bad([bad for _, bads, _ in gathered for bad in bads])
        wrong = self._judge(norms, [paths for _, _, paths in gathered]) or wrong
        finite = [x for each, _, _ in gathered for x in each if math.isfinite(x)]
        steps, cfg = len(losses), self.cfg
        clips = steps * cfg.train.batch_size * cfg.train.accum_steps * cfg.data.repeat_aug
        row = {
            "step": self.step,
            "epoch": self.step * videos_per_step(cfg.train, self.world.size) / len(self.rows),
            "loss": sum(finite) / len(finite) if finite else math.nan,
            "lr": self._rate(self.step - 1),
            "grad_norm": norms[-1],
            "clips_per_s": clips * self.world.size / seconds,
            "step_seconds": seconds / steps,
            "data_wait": window.waited / seconds,
            "memory_mb": metrics.memory_mb(self.world.device),
            "nonfinite": self.nonfinite,
            "bad_videos": len(self.bad.found),
            "seconds_left": (self.total - self.step) * seconds / steps,
        }
        return row, wrong

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

    def _judge(self, norms: list[float], paths: list[list[list[str]]]) -> NonFiniteError | None:
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
        if self.nonfinite <= self.cfg.train.max_nonfinite:
            return None
        return NonFiniteError(
            f"{self.nonfinite} steps were not finite (train.max_nonfinite "
            f"{self.cfg.train.max_nonfinite}); every checkpoint is kept, see "
            f"{self.folder / 'nonfinite.jsonl'}"
        )

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
            how = (
                self._state(),
                self.cfg.train.keep,
                self.aside,
                self.world if self.apart else None,
            )
            distributed.at(f"saving step {self.step}")
            checkpoint.save(self.folder, self.step, self.model, self.optimizer, *how)
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
        self.lock, found, error = None, None, None
        self.parts = self.begun, self.begun
        if self.world.writer:
            try:
                found = self._take_folder()
            except MaeFastError as e:
                error = e
        told = error, found and found[0]["step"], self.parts
        error, step, (self.begun, parts) = distributed.gather(told, self.world)[0]
        if error:
            raise error
        if step is None:
            return
        self.cfg = self._with_parts(self.asked, parts)
        self.total = total_steps(self.cfg.train, len(self.rows), self.world.size)
        state, tensors = found or checkpoint.read(checkpoint.file(self.folder, step))
        checkpoint.restore(tensors, self.model, self.optimizer)
        self.step, self.nonfinite, self.run = state["step"], state["nonfinite"], state.get("run")
        if self.world.writer:
            log.info("resuming %s after step %d: %s", self.folder, self.step, parts)

    def _take_folder(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Lock the folder for this run; the last good checkpoint in it, if there is one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = resume.lock(self.folder / "environment.jsonl")
            checkpoint.sweep(self.folder)
            broken: list[Path] = []
            found = checkpoint.latest(self.folder, broken)
            if found:
                files = {"index": self.cfg.data.index, "val_index": self.cfg.data.val_index}
                resume.check(self.folder, found[0], self._state(), files, defaults(self.cfg))
                self.parts = resume.parted(self.folder, found[0], self.begun, self.mixed)
            for path in broken:
                checkpoint.set_aside(path, "broken")
            config, step = self.folder / "config.json", found[0]["step"] if found else 0
            if found is None or not config.exists():
                how = {"packs": self.packs} if self.packs else {}
                checkpoint.write_text(config, json.dumps({**to_dict(self.cfg), **how}, indent=2))
            metrics.forget(self.folder / "nonfinite.jsonl", lambda row: row["step"] < step)
            where = {"processes": self.world.size}
            self.lock.write(json.dumps({"step": step, **where, **environment()}) + "\n")
            self.lock.flush()
            return found
        except OSError as e:
            self._unlock()
            raise CheckpointError(f"cannot write into {self.folder}: {e.strerror or e}") from e
        except MaeFastError:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self.lock:
            with contextlib.suppress(OSError):  # of a full disk
                self.lock.close()
