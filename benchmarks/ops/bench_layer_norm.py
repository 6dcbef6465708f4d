"""layer_norm of the decoder's tokens, against torch's."""

import torch
import torch.nn.functional as F

from benchmarks.ops.case import EPS, Case, decoder_shape, entry, forward_backward
from mae_fast.ops.layer_norm import layer_norm, layer_norm_ref


def decoder(cfg, clips):
    x = torch.randn(decoder_shape(cfg, clips))
    leaves = x, torch.randn(x.shape[-1]), torch.randn(x.shape[-1])
    return Case(
        "layer_norm",
        f"decoder {list(x.shape)}",
        forward_backward(lambda: layer_norm(*leaves, EPS), leaves),
        forward_backward(lambda: F.layer_norm(x, x.shape[-1:], *leaves[1:], EPS), leaves),
        "torch",
        bytes=5 * 4 * x.numel(),  # x -> out; x, dout -> dx
    )


def smallest():
    args = (*(torch.randn(1, requires_grad=True) for _ in range(3)), EPS, torch.float32)
    return layer_norm, torch.ops.mae_fast.layer_norm_fwd, layer_norm_ref, args


bench_layer_norm = entry("layer_norm", decoder, baseline="torch")
