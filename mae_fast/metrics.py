"""What a run tells: metrics.jsonl always, a progress line, curves.png, tensorboard and wandb.

Numbers arrive here once every log_every steps, already on the host. Only the writing rank has one.
"""

import contextlib
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mae_fast import figures
from mae_fast.config import Config
from mae_fast.config_file import to_dict
from mae_fast.errors import ConfigError

log = logging.getLogger("mae_fast")

SILENCE = 30.0  # seconds after which a step is told of though no row is due


class Metrics:
    """Writes the metrics of one run into its folder. Use as a context manager."""

    def __init__(self, cfg: Config, total_steps: int, start_step: int) -> None:
        from rich import progress as bar

        self.folder = Path(cfg.output)
        self.path = self.folder / "metrics.jsonl"
        # On resume, drop the rows of steps that will be done again; a new run has none yet.
        forget(self.path, lambda row: start_step and row["step"] <= start_step)
        self.file = self.path.open("a")
        self.sinks = []
        if cfg.train.tensorboard:
            self.sinks.append(_tensorboard(self.folder))
        if cfg.train.wandb:
            self.sinks.append(_wandb(cfg))
        self.live = sys.stderr.isatty()
        self.progress = bar.Progress(
            bar.TextColumn("[progress.description]{task.description}"),
            bar.BarColumn(bar_width=20),
            bar.MofNCompleteColumn(),
            disable=not self.live,
            console=_console(),
        )
        self.task = self.progress.add_task("pretrain", total=total_steps, completed=start_step)
        self.total = total_steps
        self.steps, self.told = 0, 0.0  # ended in this process; when something was last said

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()
        self.file.close()
        for close in (close for _, close in self.sinks):
            close()

    def tick(self, step: int, seconds: float) -> None:
        """Say that a step has ended, `seconds` after the last row: at once after the first one, and
        then where nothing was said for SILENCE seconds. No number of the device is waited for."""
        self.steps += 1
        if self.live:
            self.progress.update(self.task, completed=step)
        elif self.steps == 1 or time.monotonic() - self.told >= SILENCE:
            self._say(f"step {step}/{self.total}  in {seconds:.1f} s; numbers follow")

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; `step` counts finished steps."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for add, _ in self.sinks:
            add(row)
        line = _line(row)
        self.progress.update(self.task, completed=row["step"], description=line)
        if not self.live:
            self._say(f"step {row['step']}/{self.total}  {line}")

    def _say(self, line: str) -> None:
        self.told = time.monotonic()
        print(line, file=sys.stderr, flush=True)


def _line(row: dict[str, Any]) -> str:
    words = []
    if "loss" in row:
        words.append(
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  norm {row['grad_norm']:.3g}  "
            f"{row['clips_per_s']:.2f} clips/s  data {row['data_wait']:.0%}  "
            f"{row['memory_mb']:.0f} MB  {row['seconds_left'] / 60:.1f} min left"
        )
    if "val_loss" in row:
        words.append(f"held out {row['val_loss']:.4f}")
        if "val_mean_patch_loss" in row:
            words[-1] += f" (mean {row['val_mean_patch_loss']:.4f})"
        if "val_acc1" in row:
            averaged = f", averaged {row['val_ema_acc1']:.1%}" if "val_ema_acc1" in row else ""
            words[-1] += f" (top-1 {row['val_acc1']:.1%}{averaged})"
    if "val_map" in row:
        averaged = f" (averaged {row['val_ema_map']:.1%})" if "val_ema_map" in row else ""
        words.append(f"held out mAP {row['val_map']:.1%}{averaged}")
    words += [f"{key.replace('_', ' ')} {x:.1%}" for key, x in row.items() if key[:6] == "probe_"]
    return "  ".join(words)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order. Damaged lines are left out and warned of; a last line
    cut short by a crash is left out."""
    rows, damaged = [], []
    lines = Path(path).read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("not a row")
            rows.append(row)
        except ValueError:
            if line and number < len(lines):
                damaged.append(number)
    if damaged:
        log.warning("%s: damaged, left out: line %s", path, ", ".join(map(str, damaged)))
    return rows


def last(path: str | Path) -> dict[str, Any] | None:
    """The last row of a metrics.jsonl, if there is one."""
    rows = read(path) if Path(path).exists() else []
    return rows[-1] if rows else None


def forget(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of rows with those that are to be kept."""
    from mae_fast.checkpoint import write_text

    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in read(path) if keep(row)))


class _Sturdy:
    """A stream whose failures are nobody's: the reader of a pipe gone, a terminal, a full disk."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def sturdy_stderr() -> Iterator[None]:
    """While this lasts, no message that cannot be written stops the run."""
    for fd in (0, 1, 2):  # one that was closed would be the number of the next file opened
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stderr
    sys.stderr = _Sturdy(open(os.devnull, "w") if before is None else before)
    try:
        yield
    finally:
        sys.stderr = before
        try:
            if before is not None:
                before.flush()
        except (OSError, ValueError):
            # What is left in its buffer would fail again, and be this program's exit code.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), before.fileno())
                before.flush()


def memory_mb(device: Any) -> float:
    """Peak memory of this process in MB: allocated on a CUDA device, resident on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        # Of this program alone: getrusage also counts what the process was before exec.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def draw_curves(folder: str | Path, unit: str = "") -> None:
    """Plot loss (a mean of `unit`), learning rate and gradient norm of a run into curves.png, where
    there is matplotlib."""
    folder = Path(folder)
    history = read(folder / "metrics.jsonl")
    rows = [r for r in history if "loss" in r]
    if not rows:
        return
    try:
        figure, axes = figures.figure(10, 3, columns=3)
    except ConfigError as e:
        log.warning("no curves.png: %s", e)
        return
    steps = [r["step"] for r in rows]
    scales = {"loss": "linear", "lr": "linear", "grad_norm": "log"}
    for axis, (key, scale) in zip(axes[0], scales.items(), strict=True):
        axis.plot(steps, [r[key] for r in rows], linewidth=1.2)
        axis.set(title=key, xlabel="step", yscale=scale)
        axis.set_ylabel(unit if key == "loss" else "", fontsize=6)
        axis.grid(alpha=0.3)
    held_out = [(r["step"], r["val_loss"]) for r in history if "val_loss" in r]
    if held_out:
        axes[0, 0].plot(*zip(*held_out, strict=True), "o-", markersize=3, label="held out")
        axes[0, 0].legend()
    figures.write_figure(folder / "curves.png", figure, dpi=110)


def _console():
    from rich.console import Console

    return Console(stderr=True)


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ConfigError(
            f"train.tensorboard needs `pip install mae-fast[tensorboard]`: {e}"
        ) from e
    writer = SummaryWriter(str(folder))

    def add(row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step":
                writer.add_scalar(key, value, row["step"])

    return add, writer.close


def _wandb(cfg: Config):
    try:
        import wandb
    except ImportError as e:
        raise ConfigError(f"train.wandb needs `pip install mae-fast[wandb]`: {e}") from e
    run = wandb.init(project="mae_fast", dir=cfg.output, config=to_dict(cfg), resume="allow")
    return (lambda row: run.log(row, step=row["step"])), run.finish
