"""Recomputation of one cheap tensor in backward, in place of keeping it.

Why not torch's selective checkpointing: it decides by operator, runs a whole region again and keeps
its inputs. Here the region would be a block whose products and attention are to be kept; what is
cheap to make again (a norm, an activation) is an operator of ours in one backend and several of
torch's in another, so a policy by operator cannot name it. Hooks on a tensor can: nothing but that
tensor is made again, once, however many products have saved it.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from mae_fast.ops import dispatch

_kept: ContextVar[bool] = ContextVar("kept", default=False)


def kept() -> bool:
    """Whether nothing is made again: within `keeping`, and where a compiler chooses."""
    return torch.compiler.is_compiling() or _kept.get()


@contextlib.contextmanager
def keeping(keep: bool = True) -> Iterator[None]:
    """Inside, in this thread, a forward keeps what it else makes again in backward: faster, where
    memory allows (memory.py counts it)."""
    if torch.compiler.is_compiling():
        yield
        return
    before = _kept.set(keep)
    try:
        yield
    finally:
        _kept.reset(before)


@contextlib.contextmanager
def remade(out: Tensor, function: Callable[..., Tensor], *args) -> Iterator[None]:
    """What is called inside keeps, in place of `out`, how to make it again: function(*args), a pass
    over memory, once for all that is called inside. Norms and activations are two thirds of what a
    block would keep for backward. Nothing of this where they are kept."""
    if kept() or not torch.is_grad_enabled():
        yield
        return
    storage = out.untyped_storage()._cdata
    args = [a.detach() if torch.is_tensor(a) else a for a in args]
    packed, unpacked, made = 0, 0, None

    def pack(t: Tensor):
        nonlocal packed
        if t.untyped_storage()._cdata != storage:
            return t
        packed += 1
        return t.shape, t.stride(), t.storage_offset()

    def unpack(kept):
        nonlocal unpacked, made
        if torch.is_tensor(kept):
            return kept
        if made is None:
            dispatch.refuse_second_derivative()
            with torch.no_grad():
                made = function(*args)
        again = made.as_strided(*kept)
        unpacked += 1
        if unpacked % packed == 0:  # the last one
            made = None
        return again

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
