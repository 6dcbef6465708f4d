"""bias_gelu of the decoder's hidden values, against torch's sum and GELU."""

import torch
import torch.nn.functional as F

from benchmarks.ops.case import Case, decoder_shape, entry, forward_backward
from mae_fast.ops.bias_gelu import bias_gelu, bias_gelu_ref


def decoder(cfg, clips):
    *tokens, width = decoder_shape(cfg, clips)
    x, bias = torch.randn(*tokens, 4 * width), torch.randn(4 * width)
    return Case(
        "bias_gelu",
        f"decoder {list(x.shape)}",
        forward_backward(lambda: bias_gelu(x, bias), (x, bias)),
        forward_backward(lambda: F.gelu(x + bias), (x, bias)),
        "torch",
        bytes=5 * 4 * x.numel(),  # x -> out; x, dout -> dx
    )


def smallest():
    args = torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)
    return bias_gelu, torch.ops.mae_fast.bias_gelu_fwd, bias_gelu_ref, args


bench_bias_gelu = entry("bias_gelu", decoder, baseline="torch")
