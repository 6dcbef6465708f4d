"""Which patches are hidden: every strategy as ids_keep and ids_mask of a count known beforehand.

A strategy gives each patch a key; the patches with the smallest keys are kept. Sorting keys is
how the official code masks at random, and it makes every other strategy a choice of keys. Token
order is t * h * w major: idx = (t * H + row) * W + column. docs/masks.md has a picture of each.
"""

import math
import random as python_random
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from mae_fast import mask_shapes
from mae_fast.config import Grid, MaskConfig, MaskStrategy, mask_cell, num_decoded, num_keep
from mae_fast.spans import spanned

STRATEGIES = get_args(MaskStrategy)
_CELL = (2, 2)  # running cell, as in VideoMAE V2
_VIEW = 48  # the bit above any run's numbers of clips, where a clip's masks are numbered
_CUBES = 64  # more than enough cubes to cover any share of the clip that block masking hides


@spanned("mask")
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


def ids_from_mask(mask: Tensor, balance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(ids_keep [B, K], ids_mask [B, L-K]) int32, ascending, of a given mask [B, L]: what is not
    0 is hidden.

    Raises ValueError where clips hide different numbers of patches. The official code takes their
    mean, and some clips then see hidden patches, others lose visible ones. With `balance`, noise
    [B, L], every clip sees as many as the one that sees fewest; the others' are hidden at random.
    """
    if mask.dim() != 2:
        raise ValueError(f"a mask must be [B, L], got {list(mask.shape)}")
    hidden = mask != 0
    kept = (~hidden).sum(dim=1)
    fewest, most = (int(x) for x in kept.aminmax())
    if balance is None:
        if fewest != most:
            raise ValueError(
                f"clips of one batch keep {fewest} to {most} patches: a batch has one count; "
                "balance= hides the rest at random"
            )
        order = hidden.int().argsort(dim=1, stable=True)
    else:
        if balance.shape != mask.shape:
            raise ValueError(f"balance must be {list(mask.shape)}, got {list(balance.shape)}")
        order = _in_turn(hidden, balance).argsort(dim=1, stable=True)
    if fewest == 0:
        raise ValueError("the mask leaves none of a clip's patches")
    keep = order[:, :fewest].sort(dim=1).values.int()
    return keep, order[:, fewest:].sort(dim=1).values.int()


def _in_turn(last: Tensor, noise: Tensor) -> Tensor:
    """Keys [B, L]: those that are not `last` first, each of the two groups in noise order."""
    ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks + last * ranks.shape[1]


def mask_from_keep(ids_keep: Tensor, num_patches: int) -> Tensor:
    """float32 mask [B, L], 0 keep and 1 removed, of ids_keep [B, K]."""
    mask = torch.ones(ids_keep.shape[0], num_patches, device=ids_keep.device)
    return mask.scatter_(1, ids_keep.long(), 0.0)


def draw_ids(
    strategy: str,
    grid: Grid,
    ratio: float,
    *,
    seed: int,
    step: int,
    samples: Tensor,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the masks of one batch: (ids_keep [B, K], ids_mask [B, M]) int32 on `device`, or on
    samples.device.

    `samples` [B] int64 numbers the clips. Each mask is a function of (seed, step, sample) alone,
    the same bits on every device, whatever else is in the batch, before and after a resume. cube,
    tube_blocks and multiblock are thrown on the host: it waits where samples are on a device.
    """
    keep = num_keep(strategy, grid, ratio)
    random = _Uniform(seed, step, samples, device)
    keys = _KEYS[strategy](random, grid, math.prod(grid) - keep)
    return ids_from_noise(keys, keep)


def draw_masks(
    cfg: MaskConfig,
    grid: Grid,
    *,
    seed: int,
    step: int,
    samples: Tensor,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """What a step's clips are masked with: (ids_keep [B * R, K], ids_mask [B * R, D]), where R is
    cfg.per_clip, the masks of one clip standing together, and D of M masked patches are decoded.
    """
    if cfg.per_clip > 1:
        views = torch.arange(cfg.per_clip, device=samples.device) << _VIEW
        samples = (samples[:, None] + views).flatten()
    drawn = dict(seed=seed, step=step, samples=samples, device=device)
    keep, mask = draw_ids(cfg.strategy, grid, cfg.ratio, **drawn)
    if cfg.decoder == "all":
        return keep, mask
    random = _Uniform(~seed, step, samples, device)
    keys = random(mask.shape[1])
    if cfg.decoder == "running_cell":
        start = (random(1)[:, 0] * 4).long()
        hidden = mask_shapes.running_cell(grid, int(4 * cfg.decoder_ratio), start).flatten(1)
        keys = _in_turn(hidden.gather(1, mask.long()), keys)
    first = keys.argsort(dim=1, stable=True)[:, : num_decoded(cfg, grid)]
    return keep, mask.gather(1, first)


class _Uniform:
    """fp32 numbers in [0, 1) from a counter hash (splitmix64) of (seed, step, sample, index)."""

    def __init__(self, seed: int, step: int, samples: Tensor, device=None) -> None:
        self.seed, self.step, self.samples = seed, step, samples
        samples = samples.to(device or samples.device, non_blocking=True)
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


def _thrown(random: _Uniform, throw) -> Tensor:
    """throw(rng, sample) -> bool [...] for each clip, made on the host, on the clips' device. rng
    gives the clip's own numbers."""
    found = []
    for sample in random.samples.tolist():
        rng = python_random.Random(f"{random.seed} {random.step} {sample}")
        found.append(throw(rng, sample))
    # From memory that is not pinned the host would wait for all that the device has to do.
    device = random.state.device
    shape, pinned = (len(found), *found[0].shape), device.type == "cuda"
    hidden = torch.empty(shape, dtype=torch.bool, device="cpu", pin_memory=pinned)
    np.stack(found, out=hidden.numpy())
    return hidden.to(device, non_blocking=True)


def _random_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    return random(math.prod(grid))


def _tube_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    t, h, w = grid
    # Ranks, not noise: two places with the same noise would tear a tube apart.
    rank = random(h * w).argsort(dim=1, stable=True).argsort(dim=1)
    return rank.repeat(1, t)


def _tube_ties_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    """PySlowFast's AUG.MASK_TUBE: one place is torn where the count is no multiple of t; its first
    time steps are kept, as argsort leaves ties in order on a CPU."""
    t, h, w = grid
    return random(h * w).repeat(1, t)


def _per_frame_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    t, h, w = grid
    noise = random(t * h * w).unflatten(1, (t, h * w))
    return noise.argsort(dim=-1, stable=True).argsort(dim=-1).flatten(1)


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


def _cell_keys(random: _Uniform, grid: Grid, hidden: Tensor) -> Tensor:
    """Of cells hidden [B, t or 1, h, w]: those that were given up are hidden at random, so that the
    count is the same in every clip."""
    keys = _in_turn(hidden.flatten(1), random(hidden[0].numel())).view(hidden.shape)
    cell = mask_cell(grid)
    keys = keys.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return keys.expand(-1, grid[0], -1, -1).flatten(1)


def _cube_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    (t, h, w), cell = grid, mask_cell(grid)
    window, cells = (t, h // cell, w // cell), masked // cell**2
    return _cell_keys(
        random, grid, _thrown(random, lambda rng, _: mask_shapes.cube(window, cells, rng))
    )


def _tube_blocks_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    (t, h, w), cell = grid, mask_cell(grid)
    window, cells = (h // cell, w // cell), masked // (t * cell**2)
    return _cell_keys(
        random,
        grid,
        _thrown(random, lambda rng, _: mask_shapes.tube_blocks(window, cells, rng)[None]),
    )


def _multiblock_keys(random: _Uniform, grid: Grid, masked: int) -> Tensor:
    """V-JEPA's two masks, clip about, or both of one clip with per_clip = 2. What its blocks leave
    is cut to the count at random, not in the order of patches; where too little is left, patches
    under blocks are kept at random."""

    def throw(rng: python_random.Random, sample: int) -> np.ndarray:
        blocks, scale = mask_shapes.MULTIBLOCK[((sample >> _VIEW) + sample) % 2]
        shared = python_random.Random(f"{random.seed} {random.step} blocks {blocks}")
        size = mask_shapes.multiblock_size(grid, scale, shared)
        return mask_shapes.multiblock(grid, size, blocks, rng)

    return _in_turn(_thrown(random, throw).flatten(1), random(math.prod(grid)))


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
    "tube_ties": _tube_ties_keys,
    "tube_blocks": _tube_blocks_keys,
    "per_frame": _per_frame_keys,
    "frame": _frame_keys,
    "block": _block_keys,
    "cube": _cube_keys,
    "multiblock": _multiblock_keys,
    "running_cell": _running_cell_keys,
}
