"""patch_embed on a GPU: the wanted patches (patchify_gather), torch's product, and positions.

Positions' gradients are summed token by token, in the order that a stable sort of the ids gives. An
id that is no token gives a row of NaN, reads nothing, and has no share in the gradients.

A product whose operand is made from the clip's bytes tile by tile was here before. On an H200 it
took longer than these passes, and two runs of it differed: Triton 3.6 to 3.9 write into registers
that a wgmma in flight still reads (Row.overwritten of tests/kernels/aot.py looks for that).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mae_fast.kernels import configs
from mae_fast.kernels.linear import linear_sums
from mae_fast.kernels.patchify_gather import patchify_gather_fwd

SIZES = {
    "patch_embed_add": {
        "any": [
            {"ROWS": 4, "num_warps": 4},
            {"ROWS": 2, "num_warps": 4},
            {"ROWS": 8, "num_warps": 8},
        ]
    },
    "patch_embed_dpos": {
        "any": [{"BLOCK": 256, "num_warps": 1}, {"BLOCK": 1024, "num_warps": 4}],
    },
}


@triton.jit(do_not_specialize=["total"])
def _patch_embed_add_kernel(
    out,
    embedded,
    ids,
    pos,
    total,
    length,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)[None, :]
    token = tl.load(ids + row, mask=row < total, other=-1)
    there = ((token >= 0) & (token < length))[:, None]
    mask = (row < total)[:, None] & (n < WIDTH)
    value = tl.load(embedded + row[:, None] * WIDTH + n, mask=mask, other=0).to(tl.float32)
    at = token.to(tl.int64)[:, None] * WIDTH + n
    value += tl.load(pos + at, mask=mask & there, other=0).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + n, value, mask=mask)  # NaN where there is no token


@triton.jit
def _patch_embed_dpos_kernel(dpos, dout, order, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(start + token), tl.load(start + token + 1)):
        row = tl.load(order + i).to(tl.int64)
        acc += tl.load(dout + row * WIDTH + n, mask=n < WIDTH, other=0).to(tl.float32)
    tl.store(dpos + token * WIDTH + n, acc.to(dpos.dtype.element_ty), mask=n < WIDTH)


def patch_embed_fwd(video, ids, weight, bias, pos, t_patch, patch, mean, std):
    """video [B, C, T, H, W] or its patches [B, K, P], ids [B, K], weight [D, P], bias [D] or None,
    pos [L, D] -> [B, K, D], of the dtype that torch's sum of the product and the positions has."""
    ids, width, length = ids.contiguous(), weight.shape[0], pos.shape[0]
    patches = video
    if video.dim() == 5:
        patches = patchify_gather_fwd(video, ids, t_patch, patch, mean, std, weight.dtype)
    embedded = F.linear(patches, weight, bias)
    dtype = torch.promote_types(weight.dtype, pos.dtype)
    out = torch.empty(embedded.shape, dtype=dtype, device=video.device)
    if ids.numel():
        sizes = configs.pick("patch_embed_add")
        grid = (triton.cdiv(ids.numel(), sizes["ROWS"]),)
        block = triton.next_power_of_2(width)
        _patch_embed_add_kernel[grid](
            out, embedded, ids, pos.contiguous(), ids.numel(), length, width, BLOCK=block, **sizes
        )
    return out


def patch_embed_bwd(
    dout, video, ids, length, t_patch, patch, mean, std, dtype, pos_dtype, needs_weight, needs_pos
):
    """The gradients of weight [D, P], bias [D] and pos [length, D]; those not needed have no rows.

    dout [B, K, D]; `dtype` is that of weight and bias.
    """
    dout, ids, width = dout.contiguous(), ids.contiguous(), dout.shape[-1]
    values = video.shape[2] if video.dim() == 3 else video.shape[1] * t_patch * patch * patch
    dweight = torch.empty((0, values), dtype=dtype, device=dout.device)
    if needs_weight:
        nowhere = ((ids < 0) | (ids >= length))[..., None]
        if video.dim() == 3:
            patches = video.masked_fill(nowhere, 0)
        else:
            patches = patchify_gather_fwd(video, ids, t_patch, patch, mean, std, dtype)
            patches.masked_fill_(nowhere, 0)
        dweight = dout.to(dtype).flatten(0, 1).t() @ patches.flatten(0, 1)
    dbias = linear_sums(dout.flatten(0, 1)).to(dtype)
    dpos = torch.empty((length if needs_pos else 0, width), dtype=pos_dtype, device=dout.device)
    if needs_pos:
        ids, order = ids.flatten().sort(stable=True)
        bounds = torch.arange(length + 1, dtype=ids.dtype, device=ids.device)
        start = torch.searchsorted(ids, bounds)
        sizes = configs.pick("patch_embed_dpos")
        grid = (length, triton.cdiv(width, sizes["BLOCK"]))
        _patch_embed_dpos_kernel[grid](dpos, dout, order, start, width, **sizes)
    return dweight, dbias, dpos
