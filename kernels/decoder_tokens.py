"""decoder_tokens in Triton. A program of the forward writes some rows of the output; one of the
backward takes some positions, and sums the rows that a sort of the ids lists, in the clips' order.

The position table is read through the cache by every clip. An id out of range gives a row of NaN.
Visible tokens, cls and gradients are read in place where their rows are contiguous.
"""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels._rows import sum_parts

# Each program of the backward has so many positions at least, and one partial sum of mask tokens.
LEAST_POSITIONS = 16

SIZES = {
    "decoder_tokens_fwd": {
        "any": [
            {"ROWS": 4, "num_warps": 4},  # of 512 values in ViT-B and L
            {"ROWS": 8, "num_warps": 4},
            {"ROWS": 8, "num_warps": 8},
        ]
    },
    "decoder_tokens_bwd": {
        "any": [
            {"ROWS": 16, "COLUMNS": 128, "PROGRAMS": 264, "num_warps": 4},  # rows of some clips
            {"ROWS": 32, "COLUMNS": 128, "PROGRAMS": 264, "num_warps": 4},
        ]
    },
}


@triton.jit(do_not_specialize=["rows", "tokens", "kept", "length"])
def _decoder_tokens_fwd_kernel(
    visible,
    cls,
    mask_token,
    pos,
    ids_keep,
    ids_mask,
    out,
    rows,
    tokens,
    kept,
    length,
    visible_clip,
    visible_token,
    cls_clip,
    keep_clip,
    keep_token,
    mask_clip,
    mask_next,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, inside = row < rows, column < E
    clip, token = row // tokens, row % tokens
    if cls is not None:
        token -= 1
    keep, masked = there & (token >= 0) & (token < kept), there & (token >= kept)
    at = ids_keep + clip * keep_clip + token * keep_token
    position = tl.load(at, mask=keep, other=0).to(tl.int64)
    at = ids_mask + clip * mask_clip + (token - kept) * mask_next
    position += tl.load(at, mask=masked, other=0).to(tl.int64)
    known = (position >= 0) & (position < length)
    lost = (keep | masked) & ~known

    at = pos + position[:, None] * E + column
    mask = ((keep | masked) & known)[:, None] & inside
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = visible + (clip * visible_clip + token * visible_token)[:, None] + column
    value += tl.load(at, mask=keep[:, None] & inside, other=0.0).to(tl.float32)
    repeated = tl.load(mask_token + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.where(masked[:, None], repeated, 0.0)
    if cls is not None:
        at = cls + (clip * cls_clip)[:, None] + column
        mask = (there & (token < 0))[:, None] & inside
        value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(lost[:, None], float("nan"), value)
    tl.store(out + row[:, None] * E + column, value, mask=there[:, None] & inside)


@triton.jit(do_not_specialize=["length", "tokens", "kept", "first"])
def _decoder_tokens_bwd_kernel(
    dout,
    order,
    starts,
    dpos,
    parts,
    length,
    tokens,
    kept,
    first,
    dout_clip,
    dout_token,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < E
    dmask = tl.zeros((ROWS, COLUMNS), tl.float32)
    for position in range(tl.program_id(0), length, tl.num_programs(0)):
        stop = tl.load(starts + position + 1)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(tl.load(starts + position), stop, ROWS):
            entry = begin + tl.arange(0, ROWS)
            entry = tl.load(order + entry, mask=entry < stop, other=-1)
            clip, token = entry // tokens, entry % tokens
            at = (clip * dout_clip + (first + token) * dout_token)[:, None] + column[None, :]
            mask = (entry >= 0)[:, None] & inside[None, :]
            d = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
            total += d
            dmask += tl.where((token >= kept)[:, None], d, 0.0)
        to = dpos + tl.cast(position, tl.int64) * E + column
        tl.store(to, tl.sum(total, 0), mask=inside)
    to = parts + tl.program_id(0).to(tl.int64) * E + column
    tl.store(to, tl.sum(dmask, 0), mask=inside)


def decoder_tokens_fwd(visible, cls, mask_token, pos, ids_keep, ids_mask):
    """visible [B, K, E], cls [B, E] or None, mask_token [E], pos [L, E], ids -> [B, (1+)K+M, E]."""
    batch, kept, width = visible.shape
    tokens = (cls is not None) + kept + ids_mask.shape[1]
    dtype = torch.promote_types(visible.dtype, pos.dtype)
    out = torch.empty((batch, tokens, width), dtype=dtype, device=visible.device)
    if out.numel():
        visible = visible if visible.stride(2) == 1 else visible.contiguous()
        cls = cls if cls is None or cls.stride(1) == 1 else cls.contiguous()
        block = triton.next_power_of_2(width)
        sizes = configs.pick("decoder_tokens_fwd")
        _decoder_tokens_fwd_kernel[triton.cdiv(batch * tokens, sizes["ROWS"]),](
            visible,
            cls,
            mask_token.contiguous(),
            pos.contiguous(),
            ids_keep,
            ids_mask,
            out,
            batch * tokens,
            tokens,
            kept,
            pos.shape[0],
            *visible.stride()[:2],
            0 if cls is None else cls.stride(0),
            *ids_keep.stride(),
            *ids_mask.stride(),
            width,
            BLOCK=block,
            **sizes,
        )
    return out


def decoder_tokens_bwd(dout, ids_keep, ids_mask, length):
    """dout [B, S, E] -> (dmask_token [E], dpos [L, E]) fp32."""
    _, all_tokens, width = dout.shape
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    ids = torch.cat([ids_keep, ids_mask], dim=1)
    tokens, kept = ids.shape[1], ids_keep.shape[1]
    # Position by position, the tokens that stand there, in the order of clips.
    ids, order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(length + 1, dtype=ids.dtype, device=ids.device))
    sizes = dict(configs.pick("decoder_tokens_bwd"))
    programs = max(1, min(sizes.pop("PROGRAMS"), length // LEAST_POSITIONS))
    dpos = torch.empty((length, width), dtype=torch.float32, device=dout.device)
    parts = torch.empty((programs, 1, width), dtype=torch.float32, device=dout.device)
    _decoder_tokens_bwd_kernel[programs, triton.cdiv(width, sizes["COLUMNS"])](
        dout,
        order,
        starts,
        dpos,
        parts,
        length,
        tokens,
        kept,
        all_tokens - tokens,
        *dout.stride()[:2],
        width,
        **sizes,
    )
    return *sum_parts(parts, torch.float32), dpos
