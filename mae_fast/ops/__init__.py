"""The operations of the forward, one file each: the file's reference is its specification."""

from mae_fast.ops import (  # noqa: F401  every op, so that dispatch.OPS is whole
    adamw,
    add_layer_norm,
    attention,
    bias_gelu,
    crop_resize_patchify_gather,
    decoder_tokens,
    layer_norm,
    linear,
    masked_hog_mse,
    masked_mse,
    patch_embed,
    patchify_gather,
)
from mae_fast.ops.dispatch import OPS  # noqa: F401
from mae_fast.ops.work import register

register()  # torch's counter of FLOP knows our operators from here on
