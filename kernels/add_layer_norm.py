"""add_layer_norm in Triton: layer_norm's kernels, with the addition in the same pass."""

import torch

from mae_fast.kernels import layer_norm
from mae_fast.kernels.layer_norm import backward, forward

SIZES = {
    "add_layer_norm_fwd": {
        "512": [
            {"ROWS": 4, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 4224, "num_warps": 2},
            {"ROWS": 8, "PROGRAMS": 1056, "num_warps": 8},
        ],
        "1024": [
            {"ROWS": 1, "PROGRAMS": 4224, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 2112, "num_warps": 8},
            {"ROWS": 4, "PROGRAMS": 1056, "num_warps": 8},
        ],
        "2048": [
            {"ROWS": 1, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 1056, "num_warps": 8},
        ],
    },
    # A third sum takes registers: fewer rows at a time, and as many programs as H100 holds at once.
    "add_layer_norm_bwd": layer_norm.SIZES["layer_norm_bwd"]
    | {
        "512_sums": [
            {"ROWS": 2, "PROGRAMS": 660, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 1320, "num_warps": 4},
            {"ROWS": 4, "PROGRAMS": 396, "num_warps": 4},
            {"ROWS": 1, "PROGRAMS": 1320, "num_warps": 2},
        ],
        "1024_sums": [
            {"ROWS": 1, "PROGRAMS": 660, "num_warps": 4},
            {"ROWS": 1, "PROGRAMS": 1320, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 396, "num_warps": 4},
        ],
        "2048_sums": [
            {"ROWS": 1, "PROGRAMS": 264, "num_warps": 8},
            {"ROWS": 1, "PROGRAMS": 528, "num_warps": 8},
            {"ROWS": 2, "PROGRAMS": 264, "num_warps": 8},
        ],
    },
}


def add_layer_norm_fwd(x, y, weight, bias, eps, dtype):
    """x, y [..., D], weight and bias [D] -> (x + y, its norm of `dtype`, mean, rstd)."""
    return forward("add_layer_norm_fwd", x, y, weight, bias, eps, dtype)


def add_layer_norm_bwd(dtotal, dout, total, weight, mean, rstd, y_dtype, first, sums):
    """-> (dtotal + the norm's gradient, the same of y_dtype, dweight, dbias, the first's columns'
    sums); dtotal [B, S - first, D] may be None. The second holds nothing where the first is of
    y_dtype, the last where no `sums` are asked for."""
    saved = total, weight, mean, rstd
    grads = backward("add_layer_norm_bwd", dtotal, dout, *saved, y_dtype, first, sums)
    return grads if sums else (*grads, total.new_empty(0, dtype=torch.float32))
