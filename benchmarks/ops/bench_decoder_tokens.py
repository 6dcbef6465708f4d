"""decoder_tokens, against the official repeat, concatenation and unshuffling gather."""

import torch

from benchmarks.ops.case import Case, clip_and_ids, decoder_shape, entry, forward_backward, rows
from mae_fast.ops.decoder_tokens import decoder_tokens, decoder_tokens_ref


def decoder(cfg, clips):
    batch, tokens, width = decoder_shape(cfg, clips)
    _, _, keep, masked = clip_and_ids(cfg, clips)
    kept, length = keep.shape[1], tokens - 1
    order = torch.cat([keep, masked], dim=1)  # ours at each place
    visible, pos = torch.randn(batch, kept, width), torch.randn(length, width)
    cls, mask_token = torch.randn(batch, width), torch.randn(width)
    leaves = visible, cls, mask_token, pos
    dout = torch.randn(batch, tokens, width)
    restore = order.argsort(dim=1)

    def official():
        """In patch order."""
        x = torch.cat([visible, mask_token.repeat(batch, masked.shape[1], 1)], dim=1)
        return torch.cat([cls[:, None], rows(x, restore) + pos], dim=1)

    def in_our_order(out, *grads):
        return torch.cat([out[:, :1], rows(out[:, 1:], order)], dim=1), *grads

    patch_order = torch.cat([dout[:, :1], rows(dout[:, 1:], restore)], dim=1)
    return Case(
        "decoder_tokens",
        f"decoder {[batch, tokens, width]}",
        forward_backward(lambda: decoder_tokens(*leaves, keep, masked), leaves, dout),
        forward_backward(official, leaves, patch_order),
        "official",
        # visible, pos -> out; dout -> dpos. The gradient of visible is a part of dout.
        bytes=4 * width * (batch * (kept + 2 * tokens) + 2 * length),
        project=in_our_order,
    )


def smallest():
    ids = torch.zeros(1, 1, dtype=torch.int32)
    visible, cls, mask_token, pos = (
        torch.randn(*size, requires_grad=True) for size in ((1, 1, 1), (1, 1), (1,), (1, 1))
    )
    args = visible, cls, mask_token, pos, ids, ids
    return decoder_tokens, torch.ops.mae_fast.decoder_tokens_fwd, decoder_tokens_ref, args


bench_decoder_tokens = entry("decoder_tokens", decoder, baseline="official")
