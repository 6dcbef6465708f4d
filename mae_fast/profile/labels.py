"""Names for what others' models do, in the terms of our phases and ops. Ours open their spans
themselves (mae_fast/spans.py); modules of the baselines get theirs only inside `labelled(model)`.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import nn

from mae_fast.spans import span, spanned

# The first name that a module's path starts with gives its phase.
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
def labelled(model: nn.Module) -> Iterator[None]:
    """What the modules of a model compute in here is named. A compiled graph has none, and hooks
    would break it; an accelerated model's forward is not its class's, and names itself."""
    with contextlib.ExitStack() as stack:
        if model._compiled_call_impl is None and "forward" not in vars(model):
            _label_modules(model, stack)
        yield


def _label_modules(model: nn.Module, stack: contextlib.ExitStack) -> None:
    for name in (n for n in METHODS if callable(getattr(model, n, None))):
        method = spanned(*METHODS[name])(getattr(model, name))
        stack.enter_context(mock.patch.object(model, name, method))
    for path, module in model.named_modules():
        phase = next((PATHS[p] for p in PATHS if path.startswith(p)), "")
        op = _op_of(module)
        if not path:  # what a peer does outside its modules is its loss; ours has methods
            phase, op = "loss", None if hasattr(model, "encode") else "masked_mse"
        if op:
            _name_module(module, phase, op, stack)


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


def _name_module(module: nn.Module, phase: str, op: str, stack: contextlib.ExitStack) -> None:
    open_spans = []

    def enter(*_) -> None:
        open_spans.append(span(phase, op))
        open_spans[-1].__enter__()

    def leave(*_) -> None:
        open_spans.pop().__exit__(None, None, None)

    before = module.register_forward_pre_hook(enter)
    after = module.register_forward_hook(leave, always_call=True)
    stack.callback(before.remove)
    stack.callback(after.remove)
