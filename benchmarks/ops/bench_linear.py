"""linear: the first layer of the MLP in the decoder and in the encoder, against torch's."""

import torch
import torch.nn.functional as F

from benchmarks.ops.case import Case, decoder_shape, entry, forward_backward
from mae_fast.masking import num_keep
from mae_fast.ops.linear import linear, linear_ref


def _case(name, clips, tokens, width):
    x, weight = torch.randn(clips, tokens, width), torch.randn(4 * width, width)
    leaves = x, weight, torch.randn(4 * width)
    return Case(
        "linear",
        f"{name} {list(x.shape)} x {4 * width}",
        forward_backward(lambda: linear(*leaves), leaves),
        forward_backward(lambda: F.linear(*leaves), leaves),
        "torch",
        flop=6 * x.numel() * 4 * width,
    )


def decoder(cfg, clips):
    return _case("decoder", *decoder_shape(cfg, clips))


def encoder(cfg, clips):
    tokens = num_keep("random", cfg.grid, 0.9) + int(cfg.cls_embed)
    return _case("encoder", clips, tokens, cfg.embed_dim)


def smallest():
    """The bare operator is oneDNN's inside torch."""

    def bare(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    args = [torch.randn(*size, requires_grad=True) for size in ((1, 1), (1, 1), (1,))]
    return linear, bare, linear_ref, args


bench_linear = entry("linear", decoder, encoder, baseline="torch")
