"""adamw in Triton: one launch a pass for all of an optimizer's parameters, by a table of addresses.

Pass 1 sums the squares of all gradients; pass 2 updates parameters and moments, and writes the bf16
copies. Tensors are cut into chunks. The step counts, the learning rate where it is a tensor, scale
and skip are read on the device, so that nothing waits and a CUDA graph may hold it all.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl

from mae_fast.kernels import configs

CHUNK = 8192
# A row of the table: five addresses and that of the copy or 0; the number of values; whether all
# of it may be read 16 bytes at a time.
PARAM, GRAD, MEAN, SQUARE, STEP, COPY, SIZE, WIDE = (tl.constexpr(i) for i in range(8))
# A row of the numbers that a tensor's update takes: 1 - lr * decay, lr / (1 - beta1^t),
# 1 / sqrt(1 - beta2^t), beta1, 1 - beta1, beta2, 1 - beta2, eps.
NUMBERS = 8

SIZES = {
    "adamw_norm": {
        "any": [
            {"BLOCK": 1024, "PROGRAMS": 2112, "num_warps": 4},
            {"BLOCK": 2048, "PROGRAMS": 1056, "num_warps": 4},
            {"BLOCK": 4096, "PROGRAMS": 528, "num_warps": 8},
        ]
    },
    "adamw_step": {
        "any": [
            {"BLOCK": 1024, "num_warps": 4},
            {"BLOCK": 512, "num_warps": 4},
            {"BLOCK": 2048, "num_warps": 8},
        ]
    },
}


@triton.jit
def _pointer(address, WIDE: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if WIDE else pointer


@triton.jit
def _size(row, WIDE: tl.constexpr):
    size = tl.load(row + SIZE)
    return tl.multiple_of(size, 8) if WIDE else size


@triton.jit
def _locate(table, chunks, chunk, CHUNK: tl.constexpr):
    """(tensor, its row of the table, where its chunk begins and ends)"""
    tensor = tl.load(chunks + 2 * chunk)
    first = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * CHUNK
    row = table + tensor * 8
    return tensor, row, first, tl.minimum(first + CHUNK, tl.load(row + SIZE))


@triton.jit
def _squares(row, first, stop, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    grad, size = _pointer(tl.load(row + GRAD), WIDE), _size(row, WIDE)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < size, other=0.0)
        total += g * g
    return total


@triton.jit(do_not_specialize=["count"])
def _grad_norm_kernel(table, chunks, parts, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(tl.program_id(0), count, tl.num_programs(0)):
        _, row, first, stop = _locate(table, chunks, chunk, CHUNK)
        if tl.load(row + WIDE) != 0:
            total += _squares(row, first, stop, True, BLOCK)
        else:
            total += _squares(row, first, stop, False, BLOCK)
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def _clip_kernel(parts, norm, scale, skip, count, clip, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.sqrt_rn(tl.sum(tl.load(parts + at, mask=at < count, other=0.0), 0))
    ratio = tl.where(clip > 0, tl.div_rn(value + 1e-6, clip), 1.0)
    tl.store(norm, value)
    tl.store(scale, tl.maximum(ratio, 1.0))
    tl.store(skip, tl.where(value < float("inf"), 0.0, 1.0))


@triton.jit(do_not_specialize=["tensor"])
def _advance_kernel(
    table,
    numbers,
    skip,
    tensor,
    lr,
    decay,
    beta1,
    rest1,
    log1,
    beta2,
    rest2,
    log2,
    eps,
    LR_ON_DEVICE: tl.constexpr,
):
    tensor += tl.program_id(0)
    step = tl.load(table + tensor * 8 + STEP).to(tl.pointer_type(tl.float32))
    t = tl.load(step) + 1.0 - tl.load(skip)
    tl.store(step, t)
    if LR_ON_DEVICE:
        lr = tl.load(lr).to(tl.float32)
    # fp32 would lose 1 - 0.999.
    t = t.to(tl.float64)
    correction1 = (1.0 - tl.exp(t * log1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(t * log2)).to(tl.float32)
    to = numbers + tensor * 8
    tl.store(to, 1.0 - lr * decay)
    tl.store(to + 1, tl.div_rn(lr, correction1))
    tl.store(to + 2, tl.div_rn(1.0, tl.sqrt_rn(correction2)))
    tl.store(to + 3, beta1)
    tl.store(to + 4, rest1)
    tl.store(to + 5, beta2)
    tl.store(to + 6, rest2)
    tl.store(to + 7, eps)


@triton.jit
def _update(row, numbers, scale, first, stop, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    param, grad = _pointer(tl.load(row + PARAM), WIDE), _pointer(tl.load(row + GRAD), WIDE)
    mean, square = _pointer(tl.load(row + MEAN), WIDE), _pointer(tl.load(row + SQUARE), WIDE)
    copy, size = tl.load(row + COPY), _size(row, WIDE)
    shrink, rate, correction = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    beta1, rest1 = tl.load(numbers + 3), tl.load(numbers + 4)
    beta2, rest2, eps = tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < size
        p, g = tl.load(param + at, mask=mask, other=0.0), tl.load(grad + at, mask=mask, other=0.0)
        m, v = tl.load(mean + at, mask=mask, other=0.0), tl.load(square + at, mask=mask, other=0.0)
        g = tl.div_rn(g, scale)
        m = m * beta1 + g * rest1
        v = v * beta2 + g * g * rest2
        p = p * shrink - tl.div_rn(rate * m, tl.sqrt_rn(v) * correction + eps)
        tl.store(param + at, p, mask=mask)
        tl.store(mean + at, m, mask=mask)
        tl.store(square + at, v, mask=mask)
        if copy != 0:
            to = _pointer(copy, WIDE, tl.bfloat16) + at
            tl.store(to, p.to(tl.bfloat16), mask=mask)


@triton.jit
def _adamw_step_kernel(
    table, chunks, numbers, scale, skip, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    if tl.load(skip) == 0.0:
        tensor, row, first, stop = _locate(table, chunks, tl.program_id(0), CHUNK)
        numbers += tensor * 8
        divisor = tl.load(scale)
        if tl.load(row + WIDE) != 0:
            _update(row, numbers, divisor, first, stop, True, BLOCK)
        else:
            _update(row, numbers, divisor, first, stop, False, BLOCK)


class Table:
    """Where an optimizer's tensors lie, on the device, and how they are cut into chunks.

    groups: for each parameter group, (param, grad, mean, square, step, bf16 copy or None) of each
    parameter, contiguous fp32. A table does not change: `fits` says whether it still holds. One
    that a CUDA graph reads must live as long as the graph.
    """

    def __init__(self, groups, before=None):
        self.addresses = _addresses(groups)
        tensors = [row for group in groups for row in group]
        device = tensors[0][0].device
        sizes = [row[0].numel() for row in tensors]
        rows = np.zeros((len(tensors), 8), dtype=np.int64)
        rows[:, :6] = np.array(self.addresses, dtype=np.int64).reshape(-1, 6)
        rows[:, SIZE.value] = sizes
        rows[:, WIDE.value] = (rows[:, :4] % 16 == 0).all(1) & (rows[:, 5] % 16 == 0)
        rows[:, WIDE.value] &= rows[:, SIZE.value] % 8 == 0
        # Kept: the copy to the device reads it later, and a CUDA graph at every replay.
        self.host = _on_host(rows, device)
        self.rows = self.host.to(device, non_blocking=True)
        self.first = np.cumsum([0, *(len(group) for group in groups)]).tolist()
        if before is not None and before.sizes == sizes:
            self.sizes, self.chunks, self.numbers = sizes, before.chunks, before.numbers
            self.host_chunks = before.host_chunks
            return
        self.sizes = sizes
        self.numbers = torch.empty((len(tensors), NUMBERS), dtype=torch.float32, device=device)
        counts = [-(-n // CHUNK) for n in sizes]
        numbered = [np.arange(n) for n in counts]
        chunks = np.stack([np.repeat(np.arange(len(counts)), counts), np.concatenate(numbered)], 1)
        self.host_chunks = _on_host(chunks.astype(np.int32), device)
        self.chunks = self.host_chunks.to(device, non_blocking=True)

    def fits(self, groups) -> bool:
        """Whether all these tensors lie where this table says."""
        return self.addresses == _addresses(groups)


def _addresses(groups):
    return [[t.data_ptr() if t is not None else 0 for t in row] for g in groups for row in g]


def _on_host(values, device):
    """A CPU tensor of a numpy array, pinned where a GPU will read it."""
    pin, dtype = device.type == "cuda", _DTYPES[values.dtype]
    host = torch.empty(values.shape, dtype=dtype, device="cpu", pin_memory=pin)
    host.numpy()[...] = values
    return host


_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


def grad_norm(table, clip):
    """(norm of all gradients, what to divide them by so that it is `clip` at most, 1 if the norm is
    not finite, else 0): fp32 scalars on the device. clip 0 is no clipping."""
    device, sizes = table.rows.device, dict(configs.pick("adamw_norm"))
    programs = max(1, min(sizes.pop("PROGRAMS"), len(table.chunks)))
    parts = torch.empty(programs, dtype=torch.float32, device=device)
    norm, scale, skip = (torch.empty((), dtype=torch.float32, device=device) for _ in range(3))
    _grad_norm_kernel[programs,](table.rows, table.chunks, parts, len(table.chunks), CHUNK, **sizes)
    block = triton.next_power_of_2(programs)
    _clip_kernel[1,](parts, norm, scale, skip, programs, float(clip), block)
    return norm, scale, skip


def adamw_step(table, groups, scale, skip):
    """One step of every tensor; `groups` are the optimizer's options, scale and skip on the device.

    Where skip is not 0 nothing changes.
    """
    for i, group in enumerate(groups):
        lr, betas = group["lr"], (float(b) for b in group["betas"])
        on_device = torch.is_tensor(lr) and lr.device == scale.device
        count = table.first[i + 1] - table.first[i]
        if count:
            _advance_kernel[count,](
                table.rows,
                table.numbers,
                skip,
                table.first[i],
                lr if on_device else float(lr),
                float(group["weight_decay"]),
                *(x for b in betas for x in (b, 1 - b, math.log(b) if b else -math.inf)),
                float(group["eps"]),
                on_device,
                num_warps=1,
            )
    if len(table.chunks):
        _adamw_step_kernel[len(table.chunks),](
            table.rows,
            table.chunks,
            table.numbers,
            scale,
            skip,
            CHUNK,
            **configs.pick("adamw_step"),
        )
