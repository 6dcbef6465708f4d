"""The calls of the ops that a training step makes: which, on what, in which phase. So that what is
counted, tuned, checked and timed has the shapes, strides and dtypes of the real thing, and a new op
is there by itself."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor

from mae_fast import model as model_module
from mae_fast import ops
from mae_fast.bench.ours import encode_all_loss
from mae_fast.config import ModelConfig
from mae_fast.forward import forward
from mae_fast.masking import ids_from_noise, num_keep
from mae_fast.model import PIXEL_MEAN, PIXEL_STD, MaskedAutoencoder
from mae_fast.ops import dispatch
from mae_fast.ops.source import Source, colours, frame_bytes
from mae_fast.ops.work import Both, Work, outputs, work
from mae_fast.spans import recording

Run = Callable[[], Sequence[Tensor]]
# Norms of errors, relative to the greatest among the exact results, beyond twice plain torch's.
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
TARGET = "target encoder"  # a phase: it has no backward


@dataclass(frozen=True)
class Call:
    """One op on arguments, which may be meta tensors until `real`. Its floating tensors get
    gradients, a clip does not. `count`: so many times in a step; ids are `kept` and the rest of
    `length`; `product`: what autocast casts inputs of products to."""

    op: str
    args: tuple
    phase: str = "data"
    count: int = 1
    kept: int = 0
    length: int = 0
    product: torch.dtype | None = None

    @property
    def shape(self) -> str:
        """Of its tensors that are more than a row, and of the clips of a source."""
        return " ".join(
            f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}".replace(" ", "")
            for a in self.args
            if isinstance(a, Source) or (torch.is_tensor(a) and a.dim() > 1)
        )

    def work(self) -> Both:
        """(forward, backward) of one such call, at the least."""
        forward, backward = work(self.op, self.args, self.product)
        return forward, Work() if self.phase == TARGET else backward

    @property
    def differentiable(self) -> bool:
        return any(_floating(a) for a in self.args)

    def again(self, times: int = 1) -> "Call":
        """The same, so many times more in a step."""
        return replace(self, count=self.count + times)

    def function(self, backend: str) -> Callable:
        """The public function with its backend forced."""
        public = getattr(import_module(f"mae_fast.ops.{self.op}"), self.op)

        def forced(*args):
            with dispatch.backends(**{self.op: backend}):
                return public(*args)

        return forced

    def reference(self) -> Callable:
        return getattr(import_module(f"mae_fast.ops.{self.op}"), f"{self.op}_ref")

    def real(self, device: str = "cpu") -> "Call":
        """The same with memory behind its tensors: numbers of a normal distribution, random bytes,
        and masks; strides as they are."""
        return replace(self, args=tuple(self._real(a, device) for a in self.args))

    def _real(self, a, device: str):
        if isinstance(a, Source):
            return Source(self._real(a.flat, device), a.table.to(device), a.size)
        if not (torch.is_tensor(a) and a.is_meta):
            return a.to(device) if torch.is_tensor(a) else a
        if a.dtype == torch.int32:
            generator = torch.Generator(device).manual_seed(0)
            noise = torch.rand(len(a), self.length, device=device, generator=generator)
            return ids_from_noise(noise, self.kept)[a.shape[1] != self.kept]
        span = 1 + sum((n - 1) * stride for n, stride in zip(a.shape, a.stride(), strict=True))
        flat = torch.empty(span, dtype=a.dtype, device=device)
        flat = flat.normal_() if a.is_floating_point() else flat.random_(0, 256)
        return flat.as_strided(a.shape, a.stride())  # which may repeat, as an expanded token does

    def wide(self) -> "Call":
        """The same in fp64, and a dtype that is asked for too."""

        def widened(a):
            if isinstance(a, torch.dtype):
                return torch.float64
            return a.double() if _floating(a) else a

        return replace(self, args=tuple(map(widened, self.args)))

    def forward(self, function: Callable) -> Run:
        """A run of the function: its outputs."""

        def run() -> Sequence[Tensor]:
            with torch.no_grad():
                return _tuple(function(*self.args))

        return run

    def both(self, function: Callable, of: Callable[[Tensor], Tensor] = lambda dout: dout) -> Run:
        """A run of the function and its backward: outputs, then gradients. Without anything to
        differentiate, the outputs. `of` brings an output's gradient into the function's order."""
        args, leaves = self.leaves()
        douts: list[Tensor] = []

        def run() -> Sequence[Tensor]:
            outs = _tuple(function(*args))
            if not leaves:
                return outs
            if not douts:  # a loss has the gradient 1, as in training
                generator = torch.Generator(outs[0].device).manual_seed(0)
                for out in outs:  # drawn in fp32: in fp64 a generator gives other numbers
                    dout = torch.ones(out.shape, device=out.device)
                    dout = dout.normal_(generator=generator) if out.dim() else dout
                    douts.append(of(dout.to(out.dtype)))
            grads = torch.autograd.grad(outs, leaves, douts, allow_unused=True)
            return [*(o.detach() for o in outs), *(g for g in grads if g is not None)]

        return run

    def backward(self, function: Callable) -> Run:
        """A run of the backward alone."""
        args, leaves = self.leaves()
        outs = _tuple(function(*args))
        douts = [torch.ones_like(o) for o in outs]

        def run() -> Sequence[Tensor]:
            grads = torch.autograd.grad(outs, leaves, douts, retain_graph=True, allow_unused=True)
            return [g for g in grads if g is not None]

        return run

    def leaves(self) -> tuple[list, list[Tensor]]:
        """The arguments, and those of them that want a gradient."""
        args = [a.detach().requires_grad_() if _floating(a) else a for a in self.args]
        return args, [a for a in args if _floating(a)]


@functools.lru_cache(maxsize=256)
def step_calls(
    cfg: ModelConfig,
    clips: int,
    ratio: float = 0.9,
    dtype: torch.dtype = torch.float32,
    without: frozenset[str] = frozenset(),
    encode_all: bool = False,
    full_pred: bool = False,
) -> list[Call]:
    """Each different call of one forward in each phase, in order; that of the head has a phase of
    its own. dtype bfloat16: under autocast.

    Nothing is computed and no memory taken: all tensors are torch's meta tensors, and ops give
    empty ones.
    """
    found: dict[tuple, Call] = {}
    last: dict[str, tuple] = {}  # of each op
    length, kept = cfg.num_patches, num_keep("random", cfg.grid, ratio)
    product = torch.bfloat16 if dtype == torch.bfloat16 else None

    def record(phase: str, op: str, args: tuple) -> object:
        call = Call(op, args, phase, 0, kept, length, product)
        last[op] = key = phase, op, call.shape
        found[key] = found.get(key, call).again()
        outs = tuple(
            torch.empty(shape, dtype=d, device="meta") for shape, d in outputs(op, args, product)
        )
        return outs if len(outs) > 1 else outs[0]

    with (
        # Meta tensors hold no numbers, and have no autocast.
        mock.patch.object(ModelConfig, "target_frames", cfg.target_frames),
        mock.patch.object(model_module, "init_weights"),
        mock.patch.object(dispatch, "autocast_dtype", lambda device: product),
        # Layers of one input by themselves: what each computes, whoever joins them.
        mock.patch.object(import_module("mae_fast.forward"), "linears", lambda *args: None),
        torch.device("meta"),
        torch.no_grad(),
    ):
        net = MaskedAutoencoder(cfg)
        video = _clip(cfg, clips)
        ids = ids_from_noise(torch.rand(clips, length, device="meta"), kept)
        if cfg.target == "tokens":  # the tokenizer is another's
            target = torch.empty(clips, length, dtype=torch.int64, device="meta")
        else:
            with recording(lambda _, op, args: record(TARGET, op, args)):
                target = net.target(video)
        with recording(record):
            if encode_all:
                encode_all_loss(net, video, *ids, full_pred, without, target)
            else:
                forward(net.params(), net.spec, video, *ids, full_pred, without, target=target)
    head = found[last["linear"]]
    found[last["linear"]] = head.again(-1)
    predicted = full_pred or kept < length  # a mask of 0% leaves nothing to predict
    head = replace(head, phase="head", count=int(predicted))
    return [*(call for call in found.values() if call.count), head]


def _clip(cfg: ModelConfig, clips: int, patch: int = 0) -> Tensor:
    """`patch`: of another size than the model's."""
    height, width = ((patch or cfg.patch_size) * n for n in cfg.grid[1:])
    shape = (clips, cfg.in_chans, cfg.num_frames, height, width)
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def _source(cfg: ModelConfig, clips: int) -> Source:
    """Y, U, V frames a quarter larger than the clips."""
    side = cfg.img_size * 5 // 8 * 2
    top, left, bytes_ = side // 90, side // 55, frame_bytes(side, side, True)
    box, colour = (top, left, side - 3 * top, side - left - top), colours(1, False)
    rows = [
        [side, side, *box, (clip + 1) % 2, *colour]
        + [(clip * cfg.num_frames + t) * bytes_ for t in range(cfg.num_frames)]
        for clip in range(clips)
    ]
    flat = torch.empty(clips * cfg.num_frames * bytes_, dtype=torch.uint8, device="meta")
    return Source(flat, torch.tensor(rows, dtype=torch.int64, device="cpu"), cfg.img_size)


def calls(cfg: ModelConfig, clips: int, ratio: float, dtype: torch.dtype) -> list[Call]:
    """Each different call of one forward, whatever its phase, of HOG's loss, and what the data path
    calls."""
    merged: dict[tuple, Call] = {}
    for call in step_calls(cfg, clips, ratio, dtype):
        key = call.op, call.shape
        merged[key] = merged[key].again(call.count) if key in merged else call
    length, kept = cfg.num_patches, num_keep("random", cfg.grid, ratio)
    ids, masked = (
        torch.empty(clips, count, dtype=torch.int32, device="meta")
        for count in (kept, length - kept)
    )
    pixels = cfg.t_patch_size, cfg.patch_size, PIXEL_MEAN, PIXEL_STD, dtype
    cell = 8  # of HOG: a patch has whole ones
    patch = max(cfg.patch_size // cell, 1) * cell
    values = cfg.in_chans * 9 * (patch // cell) ** 2
    pred = torch.empty(*masked.shape, values, dtype=dtype, device="meta")
    frames = tuple(range(0, cfg.num_frames, cfg.t_patch_size))
    data = {
        "masked_hog_mse": (pred, _clip(cfg, clips, patch), masked, frames, patch, PIXEL_STD),
        "patchify_gather": (_clip(cfg, clips), ids, *pixels),
        "crop_resize_patchify_gather": (_source(cfg, clips), ids, *pixels),
    }
    loading = (Call(op, args, kept=kept, length=length) for op, args in data.items())
    return [*merged.values(), *loading]


def check(call: Call, function: Callable) -> None:
    """AssertionError where the function's error against fp64 is more than twice plain torch's."""
    got, plain = call.both(function)(), call.both(call.reference())()
    wide = call.wide()
    exact = wide.both(wide.reference())()
    greatest = max(float(e.norm()) for e in exact)
    assert len(got) == len(exact), f"{call.op} gives {len(got)} results, expected {len(exact)}"
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        floor = FLOOR.get(torch.promote_types(g.dtype, p.dtype), 0.0)
        # A gradient of fp32 parameters through bf16 is as good as bf16.
        if any(torch.bfloat16 in (a, getattr(a, "dtype", None)) for a in call.args):
            floor = max(floor, FLOOR[torch.bfloat16])
        error, allowed = float((g - e).norm()), 2 * float((p - e).norm()) + floor * greatest
        assert error <= allowed, f"{call.op} {call.shape}: result {i}: {error:.2e} > {allowed:.2e}"


def _floating(a) -> bool:
    return torch.is_tensor(a) and a.is_floating_point()


def _tuple(out) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


assert ops  # all of them, so that OPS is whole
