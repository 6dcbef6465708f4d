"""Which patches are hidden: every strategy as ids_keep and ids_mask of a count known beforehand.

A strategy gives each patch a key; the patches with the smallest keys are kept. Sorting keys is
how the official code masks at random, and it makes every other strategy a choice of keys. Token
order is t * h * w major: idx = (t * H + row) * W + column.
"""

import math
from typing import get_args

import torch
from torch import Tensor

from mae_fast.config import Grid, MaskStrategy, num_keep

STRATEGIES = get_args(MaskStrategy)
_CELL = (2, 2)  # running cell, as in VideoMAE V2
_CUBES = 64  # more than enough cubes to cover any share of the clip that block masking hides


def ids_from_noise(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Sort `noise` [B, L] as the official code does: (ids_keep [B, keep], ids_mask [B, L-keep]).

    int32, in noise order. Equal keys keep their order, so that the result is the same everywhere.
    """
    ids = torch.argsort(noise, dim=1, stable=True).int()
    return ids[:, :keep], ids[:, keep:]


def ids_from_keep(ids_keep: Tensor, num_patches: int) -> Tensor:
    """ids_mask [B, L-K] int32, ascending: the patches that `ids_keep` [B, K] leaves out.

    Raises ValueError on an id out of range or twice in one row.
    """
    if ids_keep.dim() != 2 or ids_keep.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ids_keep must be int32 or int64 [B, K], got {ids_keep.dtype} {list(ids_keep.shape)}"
        )
    ids = ids_keep.long()
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_patches):
        raise ValueError(
            f"ids_keep must be in [0, {num_patches}), got {int(ids.min())} to {int(ids.max())}"
        )
    mask = mask_from_keep(ids_keep, num_patches)
    if int(mask.sum()) != mask.numel() - ids.numel():
        raise ValueError("ids_keep holds a patch twice in one row")
    order = torch.argsort(mask, dim=1, descending=True, stable=True).int()
    return order[:, : num_patches - ids.shape[1]]


def mask_from_keep(ids_keep: Tensor, num_patches: int) -> Tensor:
    """float32 mask [B, L], 0 keep and 1 removed, of ids_keep [B, K]."""
    mask = torch.ones(ids_keep.shape[0], num_patches, device=ids_keep.device)
    return mask.scatter_(1, ids_keep.long(), 0.0)


def draw_ids(
    strategy: str, grid: Grid, ratio: float, *, seed: int, step: int, samples: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw the masks of one batch: (ids_keep [B, K], ids_mask [B, M]) int32 on samples.device.

    `samples` [B] int64 numbers the clips. Each mask is a function of (seed, step, sample) alone,
    the same bits on every device, whatever else is in the batch, before and after a resume.
    """
    keep = num_keep(strategy, grid, ratio)
    random = _Uniform(seed, step, samples)
    keys = _KEYS[strategy](random, grid, math.prod(grid) - keep)
    return ids_from_noise(keys, keep)


class _Uniform:
    """fp32 numbers in [0, 1) from a counter hash (splitmix64) of (seed, step, sample, index)."""

    def __init__(self, seed: int, step: int, samples: Tensor) -> None:
        state = _mix(torch.full_like(samples, seed) + _GOLDEN)
        state = _mix(state + _wrap(step * _GOLDEN))
        self.state = _mix(state + samples * _GOLDEN)[:, None]  # [B, 1]
        self.used = 0

    def __call__(self, n: int) -> Tensor:
        """The next n numbers of every sample: [B, n]."""
        counter = torch.arange(self.used + 1, self.used + n + 1, device=self.state.device)
        self.used += n
        bits = _mix(self.state + counter * _GOLDEN)
        return _shift(bits, 40).float() * 2.0**-24


def _wrap(x: int) -> int:
    """A Python integer as a signed 64-bit one."""
    return (x + 2**63) % 2**64 - 2**63


_GOLDEN = _wrap(0x9E3779B97F4A7C15)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of an int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _wrap(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _random_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    return random(math.prod(grid))


def _tube_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    t, h, w = grid
    # Ranks, not noise: two places with the same noise would tear a tube apart.
    rank = random(h * w).argsort(dim=1, stable=True).argsort(dim=1)
    return rank.repeat(1, t)


def _frame_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    t, h, w = grid
    rank = random(t).argsort(dim=1, stable=True).argsort(dim=1)
    return rank.repeat_interleave(h * w, dim=1)


def _block_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    """Cubes thrown one after another until enough is hidden, the last one cut to the exact count.

    A cube spans 1 to t time steps and 5% to 40% of the frame, with a log-uniform aspect between
    0.3 and 1/0.3 (BEiT's blockwise masking, in spacetime). Patches under an earlier cube are
    hidden first; those under none last, in random order.
    """
    t, h, w = grid
    n = _CUBES
    shape = random(n * 3).unflatten(1, (3, n))  # time, area, aspect
    place = random(n * 3).unflatten(1, (3, n))  # time, row, column
    area = (0.05 + 0.35 * shape[:, 1]) * h * w
    aspect = torch.exp((2 * shape[:, 2] - 1) * math.log(0.3))
    sizes = (
        (shape[:, 0] * t).floor() + 1,
        (area * aspect).sqrt().round().clamp(1, h),
        (area / aspect).sqrt().round().clamp(1, w),
    )
    inside = []
    for axis, length in enumerate(grid):
        start = (place[:, axis] * (length - sizes[axis] + 1)).floor()  # [B, n]
        at = torch.arange(length, device=start.device)
        inside.append((at >= start[..., None]) & (at < (start + sizes[axis])[..., None]))
    in_t, in_h, in_w = inside
    covered = in_t[..., None, None] & in_h[:, :, None, :, None] & in_w[:, :, None, None, :]
    covered = covered.flatten(2)  # [B, n, L]
    first = torch.where(covered.any(1), covered.int().argmax(1), n)
    return -(first + random(t * h * w) * (first == n))


def _running_cell_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    """Every time step keeps the same number of patches, which run through 2 x 2 cells with time.

    Within a cell the four places take turns in a random order, so that each is seen once in four
    time steps when a quarter is kept (VideoMAE V2, section 3.2).
    """
    t, h, w = grid
    ch, cw = -(-h // _CELL[0]), -(-w // _CELL[1])
    size = _CELL[0] * _CELL[1]
    turn = random(ch * cw * size).unflatten(1, (ch, cw, *_CELL)).flatten(3)
    turn = turn.argsort(dim=-1, stable=True).argsort(dim=-1)  # a random order in each cell
    turn = turn.unflatten(-1, _CELL).permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
    rank = random(ch * cw).unflatten(1, (ch, 1, cw, 1)).expand(-1, -1, _CELL[0], -1, _CELL[1])
    rank = rank.flatten(3, 4).flatten(1, 2)
    turn, rank = turn[:, :h, :w].flatten(1), rank[:, :h, :w].flatten(1)  # [B, h * w]
    time = torch.arange(t, device=turn.device)[:, None]
    key = (turn[:, None] + time) % size + rank[:, None]  # [B, t, h * w]
    # The count is the same in every time step, so sort within each.
    return key.argsort(dim=-1, stable=True).argsort(dim=-1).flatten(1)


_KEYS = {
    "random": _random_keys,
    "tube": _tube_keys,
    "frame": _frame_keys,
    "block": _block_keys,
    "running_cell": _running_cell_keys,
}
