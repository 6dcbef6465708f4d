"""add_layer_norm in Triton: layer_norm's kernels, with the addition in the same pass."""

from mae_fast.kernels.layer_norm import backward, forward


def add_layer_norm_fwd(x, y, weight, bias, eps, dtype):
    """x, y [..., D], weight and bias [D] -> (x + y, its norm of `dtype`, mean, rstd)."""
    return forward("add_layer_norm_fwd", x, y, weight, bias, eps, dtype)


def add_layer_norm_bwd(dtotal, dout, total, weight, mean, rstd, y_dtype):
    """-> (dtotal + the norm's gradient, the same of y_dtype, dweight, dbias); dtotal may be None.
    The second holds nothing where the first is of y_dtype."""
    return backward("add_layer_norm_bwd", dtotal, dout, total, weight, mean, rstd, y_dtype)
