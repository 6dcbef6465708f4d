"""Names for what others' models do, in the terms of our phases and ops. Ours open their spans
themselves (mae_fast/spans.py); modules of the baselines get theirs only inside `labelled(model)`.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import nn

from mae_fast.spans import spanned

METHODS = {
    "encode": ("encoder", "rest"),
    "decode": ("decoder", "decoder_tokens"),
    "loss": ("loss", "masked_mse"),
}
# The first name that a module's path starts with gives its phase.
PATHS = {
    "patch_embed": "patch embedding",
    "videomae.embeddings": "patch embedding",
    "blocks": "encoder",
    "norm": "encoder",
    "videomae": "encoder",
    "decoder": "decoder",
    "encoder_to_decoder": "decoder",
}
# The first name that its class's holds gives the op of ours that does what is in it, outside the
# modules within it. What is left of a block are its residual sums, which ours adds in the norm.
KINDS = {
    "linear": ("Linear",),
    "layer_norm": ("LayerNorm",),
    "patch_embed": ("Conv3d", "Embed"),
    "attention": ("Attention",),
    "bias_gelu": ("GELU", "Mlp", "Intermediate"),
    "add_layer_norm": ("Block", "Layer", "Output"),
    "decoder_tokens": ("Decoder",),
}


@contextlib.contextmanager
def labelled(model: nn.Module) -> Iterator[None]:
    """What the modules of a model compute in here is named. A compiled graph has none, and names
    would break it; an accelerated model's forward is not its class's, and names itself."""
    with contextlib.ExitStack() as stack:
        if model._compiled_call_impl is None and "forward" not in vars(model):
            for module, method, phase, op in list(_named(model)):
                named = spanned(phase, op)(getattr(module, method))
                stack.enter_context(mock.patch.object(module, method, named))
        yield


def _named(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, str]]:
    """(module, its method, phase, op)."""
    methods = (name for name in METHODS if callable(getattr(model, name, None)))
    yield from ((model, name, *METHODS[name]) for name in methods)
    if not hasattr(model, "encode"):  # what a peer does outside its modules is its loss
        yield model, "forward", "loss", "masked_mse"
    for path, module in list(model.named_modules())[1:]:
        kind = type(module).__name__
        op = next((op for op, names in KINDS.items() if any(n in kind for n in names)), None)
        if op:
            yield module, "forward", next((PATHS[p] for p in PATHS if path.startswith(p)), ""), op
