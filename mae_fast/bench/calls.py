"""The calls of the ops that a training step makes: which, on what. So that what is tuned, checked
and timed has the shapes, strides and dtypes of the real thing, and a new op is there by itself."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mae_fast import forward, ops
from mae_fast import model as model_module
from mae_fast.config import ModelConfig
from mae_fast.masking import ids_from_noise, num_keep
from mae_fast.model import PIXEL_MEAN, PIXEL_STD, MaskedAutoencoder
from mae_fast.ops import OPS, dispatch

Run = Callable[[], Sequence[Tensor]]
# Norms of errors, relative to the greatest among the exact results, beyond twice plain torch's.
FLOOR = {torch.float32: 4e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


@dataclass(frozen=True)
class Call:
    """One op on arguments, which may be fake until `real`. Its floating tensors get gradients, a
    clip does not. `count`: so many times in a step; ids are `kept` and the rest of `length`."""

    op: str
    args: tuple
    count: int = 1
    kept: int = 0
    length: int = 0

    @property
    def shape(self) -> str:
        """Of its tensors that are more than a row; of a list, the first."""
        firsts = (a[0] if isinstance(a, list) else a for a in self.args)
        return " ".join(
            f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}".replace(" ", "")
            for a in firsts
            if torch.is_tensor(a) and a.dim() > 1
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

    def real(self) -> "Call":
        """The same with memory behind its tensors: numbers of a normal distribution, random bytes,
        and masks; strides as they are."""
        return replace(self, args=tuple(self._real(a) for a in self.args))

    def _real(self, a):
        if isinstance(a, list):
            return [self._real(x) for x in a]
        if not isinstance(a, FakeTensor):
            return a
        if a.dtype == torch.int32:
            generator = torch.Generator(a.device).manual_seed(0)
            noise = torch.rand(len(a), self.length, device=a.device, generator=generator)
            return ids_from_noise(noise, self.kept)[a.shape[1] != self.kept]
        span = 1 + sum((n - 1) * stride for n, stride in zip(a.shape, a.stride(), strict=True))
        flat = torch.empty(span, dtype=a.dtype, device=a.device)
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
                for out in outs:  # drawn in fp32: in fp64 a generator gives other numbers
                    dout = torch.ones(out.shape, device=out.device)
                    dout = dout.normal_(generator=generator) if out.dim() else dout
                    douts.append(dout.to(out.dtype))
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


def calls(
    cfg: ModelConfig, clips: int, ratio: float, device: str, dtype: torch.dtype
) -> list[Call]:
    """Each different call of one forward, in order, and what the data path calls besides; dtype
    bfloat16: under autocast.

    Nothing is computed and no memory taken: all tensors are fake, and the references stand in the
    place of the ops.
    """
    seen, counts = {}, Counter()
    length, kept = cfg.num_patches, num_keep("random", cfg.grid, ratio)

    def recorded(op: str) -> Callable:
        def record(*args):
            call = Call(op, args, kept=kept, length=length)
            seen.setdefault((op, call.shape), call)
            counts[op, call.shape] += 1
            return call.reference()(*args)

        return record

    called = [op for op in OPS if hasattr(forward, op)]
    frames = cfg.target_frames
    with (
        mock.patch.object(ModelConfig, "target_frames", frames),  # fake tensors hold no numbers
        mock.patch.object(model_module, "init_weights"),
        FakeTensorMode(),
        torch.device(device),
        torch.no_grad(),
        torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16),
        mock.patch.multiple(forward, **{op: recorded(op) for op in called}),
    ):
        net = MaskedAutoencoder(cfg)
        shape = (clips, cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
        video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        ids = ids_from_noise(torch.rand(clips, length, device=device), kept)
        forward.forward(net.params(), net.spec, video, *ids)
        side = cfg.img_size * 5 // 4
        size = (cfg.num_frames, side, side, cfg.in_chans)
        sources = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(clips)]
    box = torch.tensor([3, 5, side - 9, side - 7], dtype=torch.int32, device=device)
    flips = torch.arange(clips, device=device) % 2 == 0
    crop = sources, box.repeat(clips, 1), flips, ids[0], cfg.img_size
    pixels = cfg.t_patch_size, cfg.patch_size, PIXEL_MEAN, PIXEL_STD, dtype
    data = {
        "patchify_gather": (video, ids[0], *pixels),
        "crop_resize_patchify_gather": (*crop, *pixels),
    }
    return [
        *(replace(call, count=counts[key]) for key, call in seen.items()),
        *(Call(op, args, kept=kept, length=length) for op, args in data.items()),
    ]


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


def cost(call: Call) -> dict[str, dict[str, int]]:
    """{"bytes" or "flop": {direction: what must move, or be computed, at the least}}.

    Bytes: each tensor read or written once, of a clip only the pixels of the tokens asked for; a
    backward reads the outputs' gradients and what was kept, and writes gradients.
    """
    with torch.no_grad():
        outs = call.reference()(*call.args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    tensors = [a for a in call.args if torch.is_tensor(a)]
    written = sum(map(_size, outs))
    if call.op == "attention":
        q, k = tensors[:2]
        flop = 4 * q.numel() * k.shape[1]
        return {"flop": {"forward": flop, "forward_backward": 3 * flop}}
    if call.op == "linear":
        flop = 2 * tensors[0].numel() * len(tensors[1])
        return {"flop": {"forward": flop, "forward_backward": 3 * flop}}
    if call.op == "patch_embed":
        flop = 2 * tensors[1].numel() * tensors[2].numel()
        return {"flop": {"forward": flop, "forward_backward": 2 * flop}}
    if call.op == "masked_mse":  # pred and a byte of the clip for each value -> the gradient
        pred = tensors[0]
        moved = 2 * _size(pred) + pred.numel()
        return {"bytes": {"forward": moved, "forward_backward": moved}}
    if call.op in ("patchify_gather", "crop_resize_patchify_gather"):
        moved = written + outs[0].numel()
        return {"bytes": {"forward": moved}}
    if call.op == "decoder_tokens":  # the gradient of what is visible is a part of dout
        visible, _, _, pos = tensors[:4]
        forward = _size(visible) + _size(pos) + written
        return {"bytes": {"forward": forward, "forward_backward": forward + written + _size(pos)}}
    # Norms and activations: the large tensors in and out; back, also what was kept.
    read = sum(_size(t) for t in tensors if t.dim() > 1)
    back = written + 2 * read  # the inputs are kept
    if call.op == "add_layer_norm":  # the sum is kept, and its gradient serves both terms
        back = written + 2 * _size(outs[0])
    return {"bytes": {"forward": read + written, "forward_backward": read + written + back}}


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _floating(a) -> bool:
    return torch.is_tensor(a) and a.is_floating_point()


def _has_bf16(args: tuple) -> bool:
    return any(torch.bfloat16 in (a, getattr(a, "dtype", None)) for a in args)


def _tuple(out) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


assert ops  # all of them, so that OPS is whole
