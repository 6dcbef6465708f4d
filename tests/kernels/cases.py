"""The calls of every operator that the proofs of its Triton kernels run: at the models' shapes, at
these cut down, and at odd ones."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mae_fast.ops  # noqa: F401  every operator is defined
from mae_fast.ops import dispatch
from mae_fast.ops.source import COLUMNS, colours, frame_bytes

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Model(NamedTuple):
    """A masked autoencoder as its operators see it; a patch has 2 frames, a head width / heads."""

    clips: int
    frames: int
    size: int
    patch: int
    width: int
    heads: int
    decoder_width: int
    decoder_heads: int

    @property
    def tokens(self) -> int:
        return self.frames // 2 * (self.size // self.patch) ** 2

    @property
    def kept(self) -> int:
        return int(self.tokens * 0.1)


MODELS = {
    "vit_b": Model(64, 16, 224, 16, 768, 12, 512, 16),
    "vit_l": Model(64, 16, 224, 16, 1024, 16, 512, 16),
    "vit_h": Model(64, 16, 224, 14, 1280, 16, 512, 16),
    "vit_b_two_clips": Model(2, 16, 224, 16, 768, 12, 512, 16),
    "vit_l_slowfast": Model(64, 16, 224, 16, 1024, 16, 512, 8),
    "heads_of_128": Model(64, 16, 224, 16, 1024, 8, 512, 4),
    "vit_b_eighth_clip": Model(1, 2, 224, 16, 768, 12, 512, 16),
    "vit_b_cut_down": Model(2, 4, 64, 16, 128, 2, 64, 2),
    "odd": Model(2, 6, 35, 7, 80, 1, 48, 3),
}


class Call(NamedTuple):
    """One call of an operator, as its autograd makes it."""

    operator: str
    args: tuple[Any, ...]


class _Maker:
    """The arguments of one model's operators, in one dtype, on one device ("meta": shapes only)."""

    def __init__(self, model: Model, dtype: torch.dtype, device: str) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.random = torch.Generator().manual_seed(0)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        values = torch.randn(shape, generator=self.random)
        return values.to(self.device, dtype).requires_grad_()

    def param(self, *shape: int) -> Tensor:
        """Parameters stay in fp32 beside bf16 activations."""
        return self.floats(*shape, dtype=torch.float32)

    def bytes(self, *shape: int) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=torch.uint8, device="meta")
        values = torch.randint(256, shape, generator=self.random, dtype=torch.uint8)
        return values.to(self.device)

    def clip(self) -> Tensor:
        m = self.model
        return self.bytes(m.clips, 3, m.frames, m.size, m.size)

    def ids(self) -> tuple[Tensor, Tensor]:
        """(ids_keep, ids_mask), int32."""
        m = self.model
        if self.device == "meta":
            shuffled = torch.empty(m.clips, m.tokens, dtype=torch.int32, device="meta")
        else:
            noise = torch.rand(m.clips, m.tokens, generator=self.random)
            shuffled = noise.argsort(dim=1).to(self.device, torch.int32)
        return shuffled[:, : m.kept].contiguous(), shuffled[:, m.kept :].contiguous()

    def planes(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Decoded frames Y, U, V of every clip, and their table."""
        m, size = self.model, frame_bytes(height, width, True)
        flat = self.bytes(m.clips * m.frames * size)
        if self.device == "meta":
            shape = m.clips, COLUMNS + m.frames
            return flat, torch.empty(shape, dtype=torch.int64, device="meta")
        rows = []
        for i in range(m.clips):
            box = i, 2 * i, height - 3 * i, width - 5 * i
            begins = ((i * m.frames + t) * size for t in range(m.frames))
            rows.append([height, width, *box, 0, *colours(1, False), *begins])
        return flat, torch.tensor(rows, device=self.device)


def _patchify_gather(m: _Maker):
    yield "", (m.clip(), m.ids()[0], 2, m.model.patch, 0.45, 0.225, m.dtype)


def _crop_resize_patchify_gather(m: _Maker):
    height, width = m.model.size + 32, m.model.size * 3 // 2
    planes = m.planes(height, width)
    pixels = (m.model.size, 2, m.model.patch, 0.45, 0.225, m.dtype)
    for name, ids, channel_last in zip(("", "target"), m.ids(), (False, True), strict=True):
        yield name, (*planes, ids, *pixels, channel_last)


def _patch_embed(m: _Maker):
    values, width = 6 * m.model.patch**2, m.model.width
    weights = (m.floats(width, values), m.floats(width), m.param(m.model.tokens, width))
    yield "", (m.clip(), m.ids()[0], *weights, 2, m.model.patch, 0.45, 0.225)


def _attention(m: _Maker):
    """In bf16 q, k and v come from one product, in one tensor."""
    clips, kept, tokens = m.model.clips, m.model.kept + 1, m.model.tokens + 1
    heads, head_dim = m.model.heads, m.model.width // m.model.heads
    if m.dtype == torch.float32 and head_dim > 80:  # declined
        return
    fused = m.floats(clips, kept, 3, heads, head_dim)
    if m.dtype != torch.float32:
        yield "encoder", (fused, 0)
    else:
        yield "encoder", tuple(x.requires_grad_() for x in fused.detach().unbind(2))
    heads, head_dim = m.model.decoder_heads, m.model.decoder_width // m.model.decoder_heads
    for name, queries in (("decoder", tokens), ("last_block", tokens - kept)):
        sizes = (queries, tokens, tokens)
        if m.dtype != torch.float32:
            yield name, (m.floats(clips, tokens, 3, heads, head_dim), tokens - queries)
        else:
            yield name, tuple(m.floats(clips, n, heads, head_dim) for n in sizes)


def _stacks(m: _Maker) -> list[tuple[str, int, int]]:
    """(name, tokens, width) of what norms and activations see."""
    kept, tokens = m.model.kept + 1, m.model.tokens + 1
    return [("encoder", kept, m.model.width), ("decoder", tokens, m.model.decoder_width)]


def _layer_norm(m: _Maker):
    """Under autocast the residual stays in fp32, and products take and give bf16."""
    for name, tokens, width in _stacks(m):
        x = m.param(m.model.clips, tokens, width)
        yield name, (x, m.param(width), m.param(width), 1e-6, m.dtype)


def _add_layer_norm(m: _Maker):
    """In the last block the sum goes on for the masked tokens alone."""
    *_, (_, tokens, width) = _stacks(m)
    clips, first = m.model.clips, m.model.kept + 1
    grads = m.param(clips, tokens - first, width), m.floats(clips, tokens, width)
    rows = (m.param(clips, tokens) for _ in range(2))
    saved = m.param(clips, tokens, width), m.param(width), *rows
    args = [t.detach() for t in (*grads, *saved)]
    sums = m.dtype != torch.float32
    yield "last_block", Call("add_layer_norm_bwd", (*args, m.dtype, first, sums))
    for name, tokens, width in _stacks(m):
        x, y = (make(m.model.clips, tokens, width) for make in (m.param, m.floats))
        yield name, (x, y, m.param(width), m.param(width), 1e-6, m.dtype)


def _linear(m: _Maker):
    """Not an operator with a backward: the sums that are a bias's gradient."""
    for name, tokens, width in _stacks(m):
        yield name, Call("linear_sums", (m.floats(m.model.clips * tokens, width).detach(),))


def _bias_gelu(m: _Maker):
    for name, tokens, width in _stacks(m):
        yield name, (m.floats(m.model.clips, tokens, 4 * width), m.param(4 * width))


def _decoder_tokens(m: _Maker):
    clips, width = m.model.clips, m.model.decoder_width
    visible, cls = m.floats(clips, m.model.kept, width), m.floats(clips, width)
    yield "", (visible, cls, m.param(width), m.param(m.model.tokens, width), *m.ids())


def _masked_mse(m: _Maker):
    """As VideoMAE, by channel, and as MAE-ST, where every second frame is a target."""
    ids, frames = m.ids()[1], [*range(m.model.frames)]
    for name, u, norm_pix in (("by_channel", 2, "channel"), ("", 1, "patch")):
        pred = m.floats(*ids.shape, 3 * u * m.model.patch**2)
        pixels = (frames[:: 3 - u], u, m.model.patch, 0.45, 0.225, norm_pix)
        yield name, (pred, m.clip(), ids, *pixels, True)


def _masked_hog_mse(m: _Maker):
    """Of every second frame, as PySlowFast; patches of whole cells only."""
    patch = m.model.patch
    if patch % 8:
        return
    ids, frames = m.ids()[1], [*range(0, m.model.frames, 2)]
    if ids.device.type == "cpu":  # interpreted, a token takes a third of a second
        ids = ids[:, ::8].contiguous()
    pred = m.floats(*ids.shape, 27 * (patch // 8) ** 2)
    yield "", (pred, m.clip(), ids, frames, patch, 0.225, True)


def _adamw(m: _Maker):
    """Not an operator: the launchers' arguments, by groups of (param, grad, mean, square, step,
    copy); one of the tensors begins at an odd address."""
    shapes = [(m.model.width, 4 * m.model.width), (m.model.width,), (37,), (1,)]
    groups = []
    for odd in (0, 1):
        rows = []
        for shape in shapes[odd::2]:
            size = torch.Size(shape).numel()
            whole = [m.param(size + odd).detach().abs() for _ in range(4)]
            row = [t[odd:].view(shape) for t in whole]
            copy = torch.empty(shape, dtype=torch.bfloat16, device=m.device)
            step = torch.zeros((), device=m.device)
            rows.append((*row, step, copy if m.dtype == torch.bfloat16 else None))
        groups.append(rows)
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.05, "eps": 1e-8}
    ones, zeros = torch.ones((), device=m.device), torch.zeros((), device=m.device)
    yield (
        Call("adamw_norm", (groups, 1.0)),
        Call("adamw_step", (groups, [options] * 2, ones, zeros)),
    )


# op -> its cases' names and the arguments of its forward operator
CASES: dict[str, Callable[[_Maker], Any]] = {
    "adamw": _adamw,
    "add_layer_norm": _add_layer_norm,
    "attention": _attention,
    "bias_gelu": _bias_gelu,
    "crop_resize_patchify_gather": _crop_resize_patchify_gather,
    "decoder_tokens": _decoder_tokens,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "masked_hog_mse": _masked_hog_mse,
    "masked_mse": _masked_mse,
    "patch_embed": _patch_embed,
    "patchify_gather": _patchify_gather,
}
ON_TRITON = [name for name, op in dispatch.OPS.items() if {"triton", "half"} & {*op.backends}]


def op_of(operator: str) -> str:
    """The op that an operator belongs to: <op>_fwd, or attention_qkv_fwd."""
    return operator.rsplit("_", 1)[0].removesuffix("_qkv")


class _Recorder(TorchDispatchMode):
    """Keeps the operators of mae_fast that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mae_fast":
            detached = (a.detach() if torch.is_tensor(a) else a for a in args)
            self.calls.append(Call(func.name().split("::")[1], tuple(detached)))
        return func(*args, **(kwargs or {}))


def calls(
    op: str, model: str, dtype: str, device: str, watch: Callable = contextlib.nullcontext
) -> dict[str, list[Call]]:
    """{case: the calls of forward and backward} of one op; runs them as on a GPU, so that backward
    has its inputs. watch(forward's arguments): a context in which they run."""
    maker = _Maker(MODELS[model], DTYPES[dtype], device)
    if op == "adamw":
        return {"": list(*_adamw(maker))}
    found: dict[str, list[Call]] = {}
    for name, args in CASES[op](maker):
        if isinstance(args, Call):
            found.setdefault(name, []).append(args)
            continue
        on_gpu = mock.patch.object(dispatch, "why_not_triton", lambda *tensors: None)
        with on_gpu, watch(args), _Recorder() as recorder:
            in_one = op == "attention" and len(args) == 2
            outs = getattr(torch.ops.mae_fast, f"{op}{'_qkv' * in_one}_fwd")(*args)
            outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o.requires_grad]
            leaves = [a for a in args if torch.is_tensor(a) and a.requires_grad]
            if outs:
                torch.autograd.grad(outs, leaves, [torch.randn_like(o) for o in outs])
        found[name] = recorder.calls
    return found


def launcher(operator: str) -> Callable:
    """The function that launches an operator's Triton kernels."""
    from mae_fast.kernels import adamw, launchers

    def norm(groups, clip):
        return adamw.grad_norm(adamw.Table(groups), clip)

    def step(groups, options, scale, skip):
        adamw.adamw_step(adamw.Table(groups), options, scale, skip)

    own = {"adamw_norm": norm, "adamw_step": step}
    return own.get(operator) or launchers(dispatch.LIBRARY._op_defs)[f"mae_fast::{operator}"]


def tensors(args: Any) -> list[Tensor]:
    """The tensors among arguments, those in lists too."""
    if torch.is_tensor(args):
        return [args]
    return [t for a in args for t in tensors(a)] if isinstance(args, list | tuple) else []
