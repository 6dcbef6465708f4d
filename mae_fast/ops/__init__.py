"""The operations of the forward, one file each: the file's reference is its specification."""

from mae_fast.ops import (  # noqa: F401  every op, so that dispatch.OPS is whole
    adamw,
    add_layer_norm,
    attention,
    bias_gelu,
    decoder_tokens,
    layer_norm,
    linear,
    masked_mse,
)
from mae_fast.ops.dispatch import OPS  # noqa: F401
