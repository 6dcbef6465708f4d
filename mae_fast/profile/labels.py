"""Names for what a profiler sees: the phase of the step and the op that each event belongs to.

Labels exist only inside `labelled(built)`: there, functions of `mae_fast.forward` and modules of
the baselines open a range of torch's profiler, so a step that is not profiled pays nothing.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn
from torch.profiler import record_function

import mae_fast.bench.ours
import mae_fast.forward
import mae_fast.step
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.cell import LoadedClips

PREFIX = "mae_fast label:"
# Functions that the engine calls, by name: (phase, op); an empty phase is that of the caller.
FUNCTIONS = {
    "ids_from_noise": ("mask", "mask"),
    "encode": ("encoder", "rest"),
    "decode": ("decoder", "rest"),
    "masked_loss": ("loss", "masked_mse"),
    "patch_embed": ("patch embedding", "patch_embed"),
    "decoder_tokens": ("decoder", "decoder_tokens"),
    "masked_mse": ("loss", "masked_mse"),
    "layer_norm": ("", "layer_norm"),
    "add_layer_norm": ("", "add_layer_norm"),
    "linear": ("", "linear"),
    "attention": ("", "attention"),
    "bias_gelu": ("", "bias_gelu"),
    "clipped_step": ("optimizer", "adamw"),
}
LOADING = {
    "next_batch": ("data", "wait"),
    "to_device": ("host to device", "copy"),
    "augment": ("data", "crop_resize"),
}
# Methods and modules of the baselines, in the terms of our ops; the first name that a module's
# path starts with gives its phase.
METHODS = {
    "encode": ("encoder", "rest"),
    "decode": ("decoder", "decoder_tokens"),
    "loss": ("loss", "masked_mse"),
}
PATHS = {
    "patch_embed": "patch embedding",
    "videomae.embeddings": "patch embedding",
    "blocks": "encoder",
    "norm": "encoder",
    "videomae": "encoder",
    "decoder": "decoder",
    "encoder_to_decoder": "decoder",
}


@contextlib.contextmanager
def labelled(built: Built) -> Iterator[None]:
    """Everything that `built` calls in here is named."""
    with contextlib.ExitStack() as stack:
        for module in (mae_fast.forward, mae_fast.bench.ours, mae_fast.step):
            for name in FUNCTIONS.keys() & vars(module).keys():
                called = _ranged(getattr(module, name), *FUNCTIONS[name])
                stack.enter_context(mock.patch.object(module, name, called))
        for name, where in LOADING.items():
            loading = _ranged(getattr(LoadedClips, name), *where)
            stack.enter_context(mock.patch.object(LoadedClips, name, loading))
        clip = _ranged(torch.nn.utils.clip_grad_norm_, "optimizer", "adamw")
        stack.enter_context(mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip))
        step = _ranged(built.optimizer.step, "optimizer", "adamw")
        stack.enter_context(mock.patch.object(built.optimizer, "step", step))
        compiled = built.model._compiled_call_impl
        if compiled is None:
            # An accelerated model's forward is not its class's: its modules are not called.
            if "forward" not in vars(built.model):
                _label_modules(built.model, stack)
        else:  # a graph has no modules, and hooks would break it
            whole = _ranged(compiled, "compiled", "compiled")
            stack.enter_context(mock.patch.object(built.model, "_compiled_call_impl", whole))
        yield


def _ranged(function: Callable, phase: str, op: str) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
        with record_function(f"{PREFIX}{phase}|{op}"):
            return function(*args, **kwargs)

    return run


def _label_modules(model: nn.Module, stack: contextlib.ExitStack) -> None:
    for name in METHODS.keys() & {n for n in METHODS if callable(getattr(model, n, None))}:
        method = _ranged(getattr(model, name), *METHODS[name])
        stack.enter_context(mock.patch.object(model, name, method))
    for path, module in model.named_modules():
        phase = next((PATHS[p] for p in PATHS if path.startswith(p)), "")
        op = _op_of(module)
        if not path:  # what a peer does outside its modules is its loss; ours has methods
            phase, op = "loss", None if hasattr(model, "encode") else "masked_mse"
        if op:
            _range_module(module, f"{PREFIX}{phase}|{op}", stack)


def _op_of(module: nn.Module) -> str | None:
    """The op of ours that does what is in `module`, outside the modules within it."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.LayerNorm):
        return "layer_norm"
    if isinstance(module, nn.Conv3d) or "Embed" in kind:
        return "patch_embed"
    if "Attention" in kind:
        return "attention"
    if "GELU" in kind or "Mlp" in kind or "Intermediate" in kind:
        return "bias_gelu"
    # What is left of a block are its residual sums, which ours adds in the norm.
    if "Block" in kind or "Layer" in kind or "Output" in kind:
        return "add_layer_norm"
    return "decoder_tokens" if "Decoder" in kind else None


def _range_module(module: nn.Module, name: str, stack: contextlib.ExitStack) -> None:
    open_ranges = []

    def enter(*_) -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def leave(*_) -> None:
        open_ranges.pop().__exit__(None, None, None)

    before = module.register_forward_pre_hook(enter)
    after = module.register_forward_hook(leave, always_call=True)
    stack.callback(before.remove)
    stack.callback(after.remove)
