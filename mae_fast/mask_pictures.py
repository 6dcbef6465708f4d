"""`mae-fast masks`: every mask of one clip in a picture, as docs/masks.md shows it."""

import math
from typing import Annotated

import torch
import tyro

from mae_fast.config import Grid, MaskConfig, num_decoded, num_keep
from mae_fast.errors import ConfigError
from mae_fast.fields import check_seed, require
from mae_fast.figures import figure, write_figure
from mae_fast.masking import STRATEGIES, draw_masks

# V-JEPA's two masks take turns: both are drawn.
_CLIPS = {"multiblock": (0, 1)}
_COLOURS = ("#f4e9c1", "#27476e", "#9db4ce")  # visible, hidden and decoded, hidden only


def draw(
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "masks.png",
    grid: Grid = (8, 14, 14),
    ratio: float = 0.75,
    seed: int = 0,
) -> None:
    """Draw every mask strategy, one row each, a column for each time step, and print what each
    keeps of a clip.

    Args:
        output: the picture; its name's end is its format (.png, .pdf, .svg). Needs matplotlib.
        grid: time steps, rows and columns of patches, 64 at the most.
        ratio: masked share, in [0, 1).
        seed: of the masks.
    """
    require(0 < min(grid) and max(grid) <= 64, "--grid must be three numbers in [1, 64]", grid)
    check_seed(seed)
    rows = []
    for strategy in STRATEGIES:
        try:
            kept = num_keep(strategy, grid, ratio)
        except ConfigError as e:
            print(f"{strategy} is not drawn: {e}")
            continue
        print(f"{strategy:13} keeps {kept} of {math.prod(grid)}")
        rows += [(strategy, MaskConfig(strategy, ratio), n) for n in _CLIPS.get(strategy, (0,))]
    for decoder in ("running_cell", "random"):
        cfg = MaskConfig("tube", ratio, decoder=decoder)
        rows.append((f"tube, decoder {decoder}", cfg, 0))
        print(f"{'tube':13} decodes {num_decoded(cfg, grid)} of what it hides: {decoder}")
    write_figure(output, _figure(rows, grid, seed), dpi=100)
    print(output)


def _figure(rows: list[tuple[str, MaskConfig, int]], grid: Grid, seed: int):
    t, h, w = grid
    drawing, panels = figure(2.0 + 1.05 * t, 1.15 * len(rows) * h / w + 0.4, len(rows), t)
    from matplotlib.colors import ListedColormap

    for line, (name, cfg, clip) in zip(panels, rows, strict=True):
        drawn = draw_masks(cfg, grid, seed=seed, step=0, samples=torch.tensor([clip], device="cpu"))
        kinds = torch.full((t * h * w,), 2, device="cpu")
        for kind, ids in enumerate(drawn):
            kinds[ids[0].long()] = kind
        for axis, picture in zip(line, kinds.view(grid).numpy(), strict=True):
            axis.imshow(picture, cmap=ListedColormap(_COLOURS), vmin=0, vmax=2)
            axis.set(xticks=[], yticks=[])
        label = name.replace(", ", "\n").replace("decoder ", "decoder\n")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for step, axis in enumerate(panels[0]):
        axis.set_title(f"t = {step}", fontsize=8)
    return drawing
