"""The operations of the forward, one file each: the file's reference is its specification."""

from mae_fast.ops import layer_norm  # noqa: F401
