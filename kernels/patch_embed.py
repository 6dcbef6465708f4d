"""patch_embed in Triton: a product whose one operand is made from the clip's bytes, tile by tile.

Forward: a program makes BLOCK_M tokens' embeddings of BLOCK_N values; the patches' pixels are read
line by line, normalised in fp32 and multiplied in the weight's dtype. Backward reads them again:
each program sums weight gradients over one of SPLIT shares of the tokens, and torch adds the
shares. Positions' gradients are summed token by token, in the order that a stable sort of the ids
gives. No sum depends on timing. An id that is no token gives a row of NaN, reads nothing, and has
no share in the gradients.
"""

import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels.patchify_gather import locate, offsets


@triton.jit
def _corners(
    ids,
    row,
    end,
    kept,
    length,
    sb,
    st,
    sh,
    sw,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    T_PATCH: tl.constexpr,
    PATCH: tl.constexpr,
):
    """(the tokens ids[row], whether they are tokens and row < end, where their patches begin)."""
    token = tl.load(ids + row, mask=row < end, other=-1)
    there, t, r, c = locate(token, length, ROWS, COLUMNS)
    corner = (row // kept).to(tl.int64) * sb + t.to(tl.int64) * T_PATCH * st
    return token, there, corner + r.to(tl.int64) * PATCH * sh + c.to(tl.int64) * PATCH * sw


@triton.jit
def _patches(
    video,
    corner,
    there,
    value,
    sc,
    st,
    sh,
    sw,
    scale,
    shift,
    CHANNELS: tl.constexpr,
    T_PATCH: tl.constexpr,
    PATCH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Values (c, u, y, x) of the patches that begin at `corner`, normalised, in fp32."""
    line = value // PATCH
    at = offsets(line, line // PATCH % T_PATCH, value % PATCH, sc, st, sh, sw, T_PATCH, PATCH)
    mask = there[:, None]
    if not WHOLE:
        mask = mask & (value < CHANNELS * T_PATCH * PATCH * PATCH)[None, :]
    pixels = tl.load(video + corner[:, None] + at[None, :], mask=mask, other=0)
    if pixels.dtype == tl.uint8:
        return pixels.to(tl.int32).to(tl.float32) * scale + shift
    else:
        return pixels.to(tl.float32)


@triton.jit
def _patch_embed_fwd_kernel(
    out,
    video,
    ids,
    weight,
    bias,
    pos,
    total,
    kept,
    length,
    sb,
    sc,
    st,
    sh,
    sw,
    scale,
    shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    T_PATCH: tl.constexpr,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    values: tl.constexpr = CHANNELS * T_PATCH * PATCH * PATCH
    whole: tl.constexpr = values % BLOCK_K == 0
    dtype = weight.dtype.element_ty
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, there, corner = _corners(
        ids, row, total, kept, length, sb, st, sh, sw, ROWS, COLUMNS, T_PATCH, PATCH
    )
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, values, BLOCK_K):
        value = first + tl.arange(0, BLOCK_K)
        a = _patches(
            video, corner, there, value, sc, st, sh, sw, scale, shift, CHANNELS, T_PATCH, PATCH,
            whole,
        )  # fmt: skip
        mask = (n < WIDTH)[:, None]
        if not whole:
            mask = mask & (value < values)[None, :]
        b = tl.load(weight + n[:, None] * values + value[None, :], mask=mask, other=0)
        acc = tl.dot(a.to(dtype), tl.trans(b), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + n, mask=n < WIDTH, other=0).to(tl.float32)[None, :]
    mask = there[:, None] & (n < WIDTH)[None, :]
    at = token.to(tl.int64)[:, None] * WIDTH + n[None, :]
    acc += tl.load(pos + at, mask=mask, other=0).to(tl.float32)
    acc = tl.where(there[:, None], acc, float("nan")).to(out.dtype.element_ty)
    to = out + row.to(tl.int64)[:, None] * WIDTH + n[None, :]
    tl.store(to, acc, mask=(row < total)[:, None] & (n < WIDTH)[None, :])


@triton.jit
def _patch_embed_dweight_kernel(
    partial,
    dout,
    video,
    ids,
    total,
    share,
    kept,
    length,
    sb,
    sc,
    st,
    sh,
    sw,
    scale,
    shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    T_PATCH: tl.constexpr,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    values: tl.constexpr = CHANNELS * T_PATCH * PATCH * PATCH
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    value = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, total)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(begin, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        _, there, corner = _corners(
            ids, row, end, kept, length, sb, st, sh, sw, ROWS, COLUMNS, T_PATCH, PATCH
        )
        patches = _patches(
            video, corner, there, value, sc, st, sh, sw, scale, shift, CHANNELS, T_PATCH, PATCH,
            values % BLOCK_K == 0,
        )  # fmt: skip
        at = row.to(tl.int64)[:, None] * WIDTH + n[None, :]
        mask = there[:, None] & (n < WIDTH)[None, :]
        d = tl.load(dout + at, mask=mask, other=0)
        acc = tl.dot(tl.trans(d), patches.to(d.dtype), acc, input_precision="ieee")
    to = (tl.program_id(2) * WIDTH + n).to(tl.int64)[:, None] * values + value[None, :]
    mask = (n < WIDTH)[:, None] & (value < values)[None, :]
    tl.store(partial + to, acc.to(partial.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_dpos_kernel(dpos, dout, order, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(start + token), tl.load(start + token + 1)):
        row = tl.load(order + i).to(tl.int64)
        acc += tl.load(dout + row * WIDTH + n, mask=n < WIDTH, other=0).to(tl.float32)
    tl.store(dpos + token * WIDTH + n, acc.to(dpos.dtype.element_ty), mask=n < WIDTH)


def _clip(video, ids, t_patch, patch, mean, std):
    """What both products are told of a clip: numbers, and then constants."""
    _, channels, frames, height, width = video.shape
    rows, columns = height // patch, width // patch
    length = frames // t_patch * rows * columns
    numbers = (ids.shape[1], length, *video.stride(), 1 / (255 * std), -mean / std)
    return numbers, (rows, columns, channels, t_patch, patch)


def _sizes(kernel, dtype, tokens):
    if dtype == torch.float32:
        return configs.pick(kernel, "f32")
    return configs.pick(kernel, "many" if tokens >= 2**13 else "few")


def patch_embed_fwd(video, ids, weight, bias, pos, t_patch, patch, mean, std):
    """video [B, C, T, H, W], ids [B, K], weight [D, P], bias [D] or None, pos [L, D] -> [B, K, D],
    of the dtype that torch's sum of the product and the positions has."""
    tokens, width = ids.numel(), weight.shape[0]
    dtype = torch.promote_types(weight.dtype, pos.dtype)
    out = torch.empty((*ids.shape, width), dtype=dtype, device=video.device)
    if tokens:
        sizes = _sizes("patch_embed_fwd", weight.dtype, tokens)
        grid = (triton.cdiv(width, sizes["BLOCK_N"]), triton.cdiv(tokens, sizes["BLOCK_M"]))
        numbers, constants = _clip(video, ids, t_patch, patch, mean, std)
        _patch_embed_fwd_kernel[grid](
            out,
            video,
            ids.contiguous(),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            pos.contiguous(),
            tokens,
            *numbers,
            *constants,
            width,
            **sizes,
        )
    return out


def patch_embed_bwd(
    dout, video, ids, length, t_patch, patch, mean, std, dtype, pos_dtype, needs_weight, needs_pos
):
    """The gradients of weight [D, P], bias [D] and pos [length, D]; those not needed have no rows.

    dout [B, K, D]; `dtype` is that of weight and bias.
    """
    dout, ids, width = dout.contiguous(), ids.contiguous(), dout.shape[-1]
    dweight = _dweight(dout, video, ids, t_patch, patch, mean, std, dtype, needs_weight)
    dbias = dout.sum((0, 1), dtype=torch.float32).to(dtype)
    dpos = torch.empty((length if needs_pos else 0, width), dtype=pos_dtype, device=dout.device)
    if needs_pos:
        ids, order = ids.flatten().sort(stable=True)
        bounds = torch.arange(length + 1, dtype=ids.dtype, device=ids.device)
        start = torch.searchsorted(ids, bounds)
        sizes = configs.pick("patch_embed_dpos")
        grid = (length, triton.cdiv(width, sizes["BLOCK"]))
        _patch_embed_dpos_kernel[grid](dpos, dout, order, start, width, **sizes)
    return dweight, dbias, dpos


def _dweight(dout, video, ids, t_patch, patch, mean, std, dtype, needed):
    tokens, width = ids.numel(), dout.shape[-1]
    values = video.shape[1] * t_patch * patch * patch
    if not needed or not tokens:
        return torch.zeros((width if needed else 0, values), dtype=dtype, device=dout.device)
    sizes = _sizes("patch_embed_dweight", dtype, tokens)
    split, m = sizes["SPLIT"], sizes["BLOCK_M"]
    partial = torch.empty((split, width, values), dtype=torch.float32, device=dout.device)
    grid = (triton.cdiv(values, sizes["BLOCK_K"]), triton.cdiv(width, sizes["BLOCK_N"]), split)
    numbers, constants = _clip(video, ids, t_patch, patch, mean, std)
    _patch_embed_dweight_kernel[grid](
        partial,
        dout.to(dtype),
        video,
        ids,
        tokens,
        triton.cdiv(triton.cdiv(tokens, split), m) * m,
        *numbers,
        *constants,
        width,
        **sizes,
    )
    return partial.sum(0).to(dtype)
