"""The calls of the ops that a training step makes: which, on what. So that what is tuned, checked
and timed has the shapes, strides and dtypes of the real thing, and a new op is there by itself."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.setting import Setting
from mae_fast import forward, ops
from mae_fast.masking import ids_from_noise, num_keep
from mae_fast.model import PIXEL_MEAN, PIXEL_STD, MaskedAutoencoder
from mae_fast.ops import OPS, dispatch

Run = Callable[[], Sequence[Tensor]]
# Norms of errors, relative to the greatest among the exact results, beyond twice plain torch's.
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


@dataclass(frozen=True)
class Call:
    """One op on arguments. Its floating tensors get gradients, a clip does not. `count`: so many
    times in a step."""

    op: str
    args: tuple
    count: int = 1

    @property
    def shape(self) -> str:
        return " ".join(
            f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}".replace(" ", "")
            for a in _flat(self.args)
            if a.dim() > 1
        )

    @property
    def differentiable(self) -> bool:
        return any(_floating(a) for a in self.args)

    def function(self, backend: str) -> Callable:
        """The public function with its backend forced."""
        public = getattr(import_module(f"mae_fast.ops.{self.op}"), self.op)

        def forced(*args):
            with dispatch.backends(**{self.op: backend}):
                return public(*args)

        return forced

    def reference(self) -> Callable:
        return getattr(import_module(f"mae_fast.ops.{self.op}"), f"{self.op}_ref")

    def wide(self) -> "Call":
        """The same in fp64."""
        args = (a.double() if _floating(a) else a for a in self.args)
        return Call(self.op, tuple(args))

    def forward(self, function: Callable) -> Run:
        """A run of the function: its outputs."""

        def run() -> Sequence[Tensor]:
            with torch.no_grad():
                return _tuple(function(*self.args))

        return run

    def both(self, function: Callable) -> Run:
        """A run of the function and its backward: outputs, then gradients. Without anything to
        differentiate, the outputs."""
        args = [a.detach().requires_grad_() if _floating(a) else a for a in self.args]
        leaves = [a for a in args if _floating(a)]
        douts: list[Tensor] = []

        def run() -> Sequence[Tensor]:
            outs = _tuple(function(*args))
            if not leaves:
                return outs
            if not douts:  # a loss has the gradient 1, as in training
                generator = torch.Generator(outs[0].device).manual_seed(0)
                for out in outs:
                    dout = torch.ones_like(out)
                    douts.append(dout.normal_(generator=generator) if out.dim() else dout)
            grads = torch.autograd.grad(outs, leaves, douts, allow_unused=True)
            return [*(o.detach() for o in outs), *(g for g in grads if g is not None)]

        return run

    def backward(self, function: Callable) -> Run:
        """A run of the backward alone."""
        args = [a.detach().requires_grad_() if _floating(a) else a for a in self.args]
        leaves = [a for a in args if _floating(a)]
        outs = _tuple(function(*args))
        douts = [torch.ones_like(o) for o in outs]

        def run() -> Sequence[Tensor]:
            grads = torch.autograd.grad(outs, leaves, douts, retain_graph=True, allow_unused=True)
            return [g for g in grads if g is not None]

        return run


def calls(setting: Setting, model: str, batch: int) -> list[Call]:
    """Each different call of one forward in bf16, in order, and what the data path calls besides.

    They are found with plain torch in the place of our kernels.
    """
    cfg, seen, counts = setting.cfg(model), {}, Counter()
    clips = setting.clips(cfg, setting.batch(batch))
    ids = ids_from_noise(setting.noise(cfg, len(clips)), num_keep("random", cfg.grid, 0.9))

    def recorded(op: str, function: Callable) -> Callable:
        def record(*args):
            call = Call(op, tuple(a.detach() if torch.is_tensor(a) else a for a in args))
            seen.setdefault((op, call.shape), call)
            counts[op, call.shape] += 1
            return function(*args)

        return record

    plain = {op: "reference" for op in OPS} | {"attention": "sdpa"}
    called = {op: getattr(forward, op) for op in OPS if hasattr(forward, op) and op != "linear"}
    with torch.device(setting.device.type):
        net = MaskedAutoencoder(cfg)
    patched = {op: recorded(op, function) for op, function in called.items()}
    with (
        torch.no_grad(),
        setting.autocast(),
        dispatch.backends(**plain),
        mock.patch.multiple(forward, **patched),
    ):
        forward.forward(net.params(), net.spec, clips, *ids)
    pixels = (cfg.t_patch_size, cfg.patch_size, PIXEL_MEAN, PIXEL_STD, torch.bfloat16)
    return [
        *(replace(call, count=counts[key]) for key, call in seen.items()),
        Call("patchify_gather", (clips, ids[0], *pixels)),
        Call("crop_resize_patchify_gather", (*frames(cfg, clips), ids[0], cfg.img_size, *pixels)),
    ]


def frames(cfg, clips: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """(frames of videos at source size [T, H, W, C], boxes, flips) for as many clips."""
    side = cfg.img_size * 5 // 4
    size = (cfg.num_frames, side, side, cfg.in_chans)
    count, device = len(clips), clips.device
    videos = [torch.randint(0, 256, size, dtype=torch.uint8, device=device) for _ in range(count)]
    box = torch.tensor([3, 5, side - 9, side - 7], dtype=torch.int32, device=device)
    flips = torch.arange(count, device=device) % 2 == 0
    return videos, box.repeat(count, 1), flips


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
        floor = max(floor, FLOOR[torch.bfloat16] if _has_bf16(call.args) else floor)
        error, allowed = float((g - e).norm()), 2 * float((p - e).norm()) + floor * greatest
        assert error <= allowed, f"{call.op} {call.shape}: result {i}: {error:.2e} > {allowed:.2e}"


def _floating(a) -> bool:
    return torch.is_tensor(a) and a.is_floating_point()


def _has_bf16(args: tuple) -> bool:
    return any(a.dtype == torch.bfloat16 for a in _flat(args))


def _flat(args: tuple) -> Iterator[Tensor]:
    for a in args:
        if torch.is_tensor(a):
            yield a
        elif isinstance(a, list):
            yield from (x for x in a if torch.is_tensor(x))


def _tuple(out) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


assert ops  # all of them, so that OPS is whole
