"""attention in the decoder and in the encoder, against the official one, which keeps its scores."""

import torch

from benchmarks.ops.case import Case, decoder_shape, entry, forward_backward
from mae_fast.masking import num_keep
from mae_fast.ops.attention import attention, attention_ref


def official(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def _case(name, clips, tokens, width, heads):
    qkv = [torch.randn(clips, tokens, heads, width // heads) for _ in range(3)]
    return Case(
        "attention",
        f"{name} {list(qkv[0].shape)}",
        forward_backward(lambda: attention(*qkv), qkv),
        forward_backward(lambda: official(*qkv), qkv),
        "official",
        flop=12 * clips * tokens**2 * width,  # two products forward, four backward
    )


def decoder(cfg, clips):
    return _case("decoder", *decoder_shape(cfg, clips), cfg.decoder_num_heads)


def encoder(cfg, clips):
    tokens = num_keep("random", cfg.grid, 0.9) + int(cfg.cls_embed)
    return _case("encoder", clips, tokens, cfg.embed_dim, cfg.num_heads)


def smallest():
    args = [torch.randn(1, 1, 1, 1, requires_grad=True) for _ in range(3)]
    return attention, torch.ops.mae_fast.attention_fwd, attention_ref, args


bench_attention = entry("attention", decoder, encoder, baseline="official")
