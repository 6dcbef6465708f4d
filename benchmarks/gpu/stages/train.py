"""train.py itself, on synthetic clips through its own loader: with a CUDA graph and without, saved
and resumed, as a rank of NCCL. Beside the smoke, as Triton compiles its kernels for seconds."""

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from benchmarks.gpu.records import Declined, Item
from benchmarks.gpu.setting import TINY, Setting
from mae_fast.config import Config, DataConfig, TrainConfig, preset

STEPS = 8  # the fifth is the graph's first replay but one
SAME = 1e-3  # of a loss in bf16, with a graph and without
BT709 = 1  # AVCOL_SPC_BT709
# What train.py imports and a bare machine may lack; of av and rich nothing is used here.
MAY_LACK = {"av": (), "rich": ("console", "progress", "table"), "safetensors": ("torch",)}


def items(setting: Setting) -> Iterator[Item]:
    absent = stand_in()
    yield Item("train.py with and without a CUDA graph", partial(with_and_without, setting, absent))
    yield Item("train.py saves and resumes", partial(resumed, setting))
    yield Item("train.py with one rank of NCCL", partial(one_rank, setting))


def stand_in() -> list[str]:
    """Put stand-ins where a package is absent, for this process; which these are."""
    absent = []
    for name, parts in MAY_LACK.items():
        try:
            import_module(name)
        except ImportError:
            found = mock.MagicMock()  # whatever is asked of it, it is
            found.SafetensorError, found.safe_open, found.save_file = ValueError, safe_open, save
            sys.modules |= dict.fromkeys([name, *(f"{name}.{part}" for part in parts)], found)
            absent.append(name)
    return absent


def save(tensors, path, metadata) -> None:
    torch.save((metadata, tensors), path)


@contextlib.contextmanager
def safe_open(path, framework: str):
    with open(path, "rb") as f:  # by its name torch would ask safetensors for it
        metadata, tensors = torch.load(f)
    get = tensors.__getitem__
    yield SimpleNamespace(metadata=lambda: metadata, keys=tensors.keys, get_tensor=get)


class Frames(contextlib.nullcontext):
    """In place of a video's reader: frames of random bytes, that depend on its name alone."""

    num_frames = 64

    def __init__(self, path: str, *args, **kwargs):
        super().__init__(self)
        self.seed = sum(Path(path).name.encode())

    def pictures(self, wanted, *args, **kwargs):
        """As a decoder gives them: Y, U and V."""
        from mae_fast.data.planes import Pictures
        from mae_fast.ops.source import colours, frame_bytes

        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(wanted), frame_bytes(64, 80, True))
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return Pictures(pixels, 64, 80, colours(BT709, False))


def replays(setting: Setting) -> bool:
    """Whether a step can be replayed: plain torch, which a rehearsal has where no C++ is built,
    reads the frames' sizes on the host."""
    from mae_fast.ops import dispatch

    return not setting.tiny or dispatch.why_not_cpp() is None


def trained(
    setting: Setting, folder: Path, steps: int = STEPS, held_out: bool = False, **train
) -> list[dict]:
    """The rows of metrics of a run of pretrain in bf16, accumulating two micro-steps."""
    from mae_fast import graph, metrics
    from mae_fast.data import VideoRow, loader, write_index
    from mae_fast.train import pretrain

    folder.mkdir(exist_ok=True)
    how = dict(frames=64, fps=30.0, width=80, height=64)
    index = folder / "index.jsonl"
    write_index([VideoRow(f"synthetic-{i}", **how) for i in range(8)], index)
    model = TINY if setting.tiny else preset("vit_tiny", img_size=64, depth=2, decoder_depth=2)
    val = str(index) if held_out else ""
    data = DataConfig(index=str(index), val_index=val, workers=2, repeat_aug=2)
    settings = dict(batch_size=2, accum_steps=2, precision="bf16", log_every=1, blr=0.1)
    settings |= dict(warmup_steps=1, save_every=steps // 2, device=setting.device, steps=steps)
    cfg = Config(str(folder / "run"), model, data=data, train=TrainConfig(**settings | train))
    # The rehearsal's graph is a tape of the CPU's operators (mae_fast/graph.py).
    taped = setting.tiny and replays(setting)
    why_not = (lambda *args: None) if taped else graph.why_not
    with mock.patch.object(loader, "VideoReader", Frames):
        with mock.patch.object(graph, "why_not", why_not):
            pretrain(cfg)
    return [row for row in metrics.read(folder / "run/metrics.jsonl") if "loss" in row]


def with_and_without(setting: Setting, absent: list[str]) -> dict:
    """The losses of both, step by step."""
    if not replays(setting):
        raise Declined("plain torch reads the frames' sizes on the host: no replay has others")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, how in (("without", "off"), ("with a graph", "on")):
            rows = trained(setting, Path(folder) / name, cuda_graph=how)
            found[name] = [row["loss"] for row in rows]
    pairs = list(zip(*found.values(), strict=True))
    worst = max(abs(a / b - 1) for a, b in pairs)
    assert len(pairs) == STEPS and worst <= SAME, f"losses differ by {worst:.1e}: {found}"
    told = f"losses differ by {worst:.1e} at most" + f", stand-ins of {absent}" * bool(absent)
    return {"losses": found, "stand_ins": absent, "equal_bits": worst == 0, "told": told}


def resumed(setting: Setting) -> dict:
    """A run whose last checkpoint is lost goes on from the one before to the same bits; and the
    held-out loss is taken."""
    from mae_fast.checkpoint import read

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = trained(setting, folder, held_out=True)
        last = sorted((folder / "run").glob("checkpoint-*.safetensors"))[-1]
        expected = read(last)[1]
        last.unlink()
        again = trained(setting, folder, held_out=True)
        got = read(last)[1]
    differ = [key for key, t in expected.items() if not torch.equal(t, got[key])]
    assert not differ, f"a resumed run differs in {', '.join(differ)}"
    held_out = again[-1]["val_loss"]
    assert math.isfinite(held_out) and again[-1]["loss"] == rows[-1]["loss"], (rows, again)
    told = f"{len(got)} tensors are equal, held-out loss {held_out:.3f}"
    return {"tensors": len(got), "val_loss": held_out, "told": told}


def one_rank(setting: Setting) -> dict:
    """Gradients of a group of one, which NCCL adds up in the step's CUDA graph."""
    import torch.distributed as dist

    backend = "gloo" if setting.tiny else "nccl"
    if not getattr(dist, f"is_{backend}_available")():
        raise Declined(f"torch is built without {backend}")
    from mae_fast.buckets import Buckets
    from mae_fast.run import Run

    os.environ["NCCL_DEBUG"] = "WARN"
    made = lambda run: Buckets(run.model)  # noqa: E731
    with tempfile.TemporaryDirectory() as name, mock.patch.object(Run, "_buckets", made):
        where = f"file://{name}/store"
        dist.init_process_group(backend, init_method=where, rank=0, world_size=1)
        rows = trained(setting, Path(name), steps=5)
    loss = rows[-1]["loss"]
    assert math.isfinite(loss), rows
    return {"backend": backend, "loss": loss, "told": f"{backend}: loss {loss:.3f} after 5 steps"}
