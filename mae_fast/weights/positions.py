"""Position tables: separable, joint or fixed, at one size or another.

A table is `pos_embed` [1, (1 +) t*h*w, D], cls first, or the sum of `pos_embed_spatial` [1, h*w, D]
and `pos_embed_temporal` [1, t, D], with `pos_embed_class` [1, 1, D]; the decoder's names begin with
`decoder_`. A grid is (t, h, w) in patches, with h = w.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.errors import ConfigError

Grid = tuple[int, int, int]
Table = dict[str, Tensor]


def sincos(length: int, dim: int) -> Tensor:
    """VideoMAE's fixed positions [1, L, D]: sin(l / 10000^(2j/D)) at 2j, the cosine at 2j + 1.

    In numpy's fp64 and rounded once, as its authors and transformers have it, to the bit.
    """
    column = np.arange(dim)
    angle = np.arange(length)[:, None] / np.power(10000, 2 * (column // 2) / dim)
    table = np.where(column % 2 == 0, np.sin(angle), np.cos(angle))
    return torch.from_numpy(table.astype(np.float32))[None]


def grid_of(table: Table, half: str, time_steps: int) -> Grid | None:
    """The grid of one half's table; `time_steps` says how a joint one divides. None without one."""
    name = half + "pos_embed"
    if name + "_spatial" in table:
        t, length = table[name + "_temporal"].shape[1], table[name + "_spatial"].shape[1]
    elif name in table:
        t, length = time_steps, table[name].shape[1] - _cls(table)
        if length % t:
            raise ConfigError(f"{name} has {length} positions, which are not {t} time steps")
        length //= t
    else:
        return None
    side = math.isqrt(length)
    if side * side != length:
        raise ConfigError(
            f"{name} has {length} positions a time step, which is no square: "
            f"--source-num-frames says how many frames its clips had"
        )
    return t, side, side


def resize(table: Table, half: str, old: Grid, new: Grid) -> None:
    """Interpolate one half's table in place: bicubic over space, then linear over time."""
    name = half + "pos_embed"
    if name in table:
        cls, pos = table[name].split([_cls(table), math.prod(old)], dim=1)
        pos = over_space(pos[0].unflatten(0, (old[0], -1)), new)  # [t, h*w, D]
        pos = _over_time(pos.flatten(1)[None], new).reshape(1, math.prod(new), -1)
        table[name] = torch.cat([cls, pos], dim=1)
    else:
        table[name + "_spatial"] = over_space(table[name + "_spatial"], new)
        table[name + "_temporal"] = _over_time(table[name + "_temporal"], new)


def join(table: Table, half: str) -> bool:
    """Make one half's separable table a joint one, in place; False where it was one."""
    name = half + "pos_embed"
    if name + "_spatial" not in table:
        return False
    spatial, temporal = table.pop(name + "_spatial"), table.pop(name + "_temporal")
    pos = (temporal[0, :, None] + spatial[0]).flatten(0, 1)[None]
    cls = [table.pop(name + "_class")] if _cls(table) else []
    table[name] = torch.cat([*cls, pos], dim=1)
    return True


def flatten_time(table: Table, time_steps: int) -> tuple[int, float]:
    """Make the encoder's table an image's, in place: the mean over time. Returns the time steps
    (`time_steps` where the table is joint) and how far their positions lie from the mean."""
    t, *_ = grid_of(table, "", time_steps)
    join(table, "")
    cls, pos = table["pos_embed"].split([_cls(table), table["pos_embed"].shape[1] - _cls(table)], 1)
    pos = pos.unflatten(1, (t, -1))
    # Equal rows stay what they are to the bit, which a sum over their number may not be.
    same = bool((pos == pos[:, :1]).all())
    mean = pos[:, 0] if same else pos.float().mean(dim=1).to(pos.dtype)
    table["pos_embed"] = torch.cat([cls, mean], dim=1)
    return t, float((pos - mean[:, None]).abs().max())


def unflatten_time(table: Table, time_steps: int) -> None:
    """Make an image's table a clip's, in place: the same at each time step (temporal zeros)."""
    pos = table.pop("pos_embed")
    if _cls(table):
        table["pos_embed_class"], pos = pos[:, :1].clone(), pos[:, 1:].clone()
    table["pos_embed_spatial"] = pos
    table["pos_embed_temporal"] = pos.new_zeros(1, time_steps, pos.shape[2])


def _cls(table: Table) -> int:
    return int("cls_token" in table)


def over_space(pos: Tensor, new: Grid) -> Tensor:
    """[n, h*w, D] -> [n, new h * new w, D]."""
    side = math.isqrt(pos.shape[1])
    if (side, side) == new[1:]:
        return pos
    wide = pos.to(torch.promote_types(pos.dtype, torch.float32))
    image = wide.transpose(1, 2).unflatten(2, (side, side))
    image = F.interpolate(image, new[1:], mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(pos.dtype)


def _over_time(pos: Tensor, new: Grid) -> Tensor:
    """[1, t, D] -> [1, new t, D]."""
    if pos.shape[1] == new[0]:
        return pos
    line = F.interpolate(pos.float().transpose(1, 2), new[0], mode="linear", align_corners=False)
    return line.transpose(1, 2).to(pos.dtype)
