"""add_layer_norm of the decoder's tokens, against torch's sum and norm."""

import torch
import torch.nn.functional as F

from benchmarks.ops.case import EPS, Case, decoder_shape, entry, forward_backward
from mae_fast.ops.add_layer_norm import add_layer_norm, add_layer_norm_ref


def decoder(cfg, clips):
    x, y = torch.randn(decoder_shape(cfg, clips)), torch.randn(decoder_shape(cfg, clips))
    weight, bias = torch.randn(x.shape[-1]), torch.randn(x.shape[-1])
    leaves = x, y, weight, bias

    def torch_expression():
        total = x + y
        return total, F.layer_norm(total, x.shape[-1:], weight, bias, EPS)

    return Case(
        "add_layer_norm",
        f"decoder {list(x.shape)}",
        forward_backward(lambda: add_layer_norm(*leaves, EPS), leaves),
        forward_backward(torch_expression, leaves),
        "torch",
        bytes=8 * 4 * x.numel(),  # x, y -> total, out; dtotal, dout, total -> dx
    )


def smallest():
    args = (*(torch.randn(1, requires_grad=True) for _ in range(4)), EPS, torch.float32)
    return add_layer_norm, torch.ops.mae_fast.add_layer_norm_fwd, add_layer_norm_ref, args


bench_add_layer_norm = entry("add_layer_norm", decoder, baseline="torch")
