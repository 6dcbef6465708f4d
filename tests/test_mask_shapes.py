"""Masks of the official generators, for the same random numbers; what was recorded is theirs.

facebookresearch/SlowFast 287ec00 (MaskingGenerator, MaskingGenerator3D), OpenGVLab/VideoMAEv2
29eab1e (RunningCellMaskingGenerator), facebookresearch/vjepa2 (multiseq_multiblock3d).
"""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mae_fast import mask_shapes
from mae_fast.config import Config, ConfigError, MaskConfig, num_decoded, preset
from mae_fast.data import Batch
from mae_fast.distributed import World
from mae_fast.mask_pictures import draw
from mae_fast.masking import (
    STRATEGIES,
    draw_ids,
    draw_masks,
    ids_from_mask,
    mask_from_keep,
    num_keep,
)
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.source import Source
from mae_fast.train import Pretraining

GRID = (8, 14, 14)
# (window, ratio, seed of `random`): the hidden cells, packed.
CUBE = {
    ((8, 7, 7), 0.5, 0): "3c78f1e3c78c18f1e3c78f1e0c78f1e3c78f063c78f1e3c7831e3c78f1e3c18f1e3c78f1"
    "e0c78f1e3c78f060c183060c18",
    # It gave up: 352 of the 353 cells asked for.
    (
        (8, 7, 7),
        0.9,
        2,
    ): "00fdfbf7efdf807efdffffffff7fffffffffffbfffffffffffffffffffffffe"
    "ffffffffffff7fffffffffe01fbf7efdfbf",
    ((2, 3, 5), 0.75, 3): "f79def38",
}
TUBE_BLOCKS = {
    ((7, 7), 0.5, 0): "01dbb78f1c3800",  # 24 of 24
    ((7, 7), 0.9, 1): "f1fffffffffc80",  # 44 of 44
    ((14, 14), 0.75, 2): "ffffffffffffffffffffefff9ffe03f80fe03f80fe03f80e00",  # 146 of 147
}
# (grid, which of MULTIBLOCK, step, torch's seed): the context of three clips, cut to the shortest,
# and the number of patches to predict.
MULTIBLOCK = {
    ((2, 6, 6), 0, 0, 0): (
        [
            [0, 1, 2, 5, 6, 12, 18, 23, 24, 30, 36, 37, 38, 41, 42, 48, 54, 59, 60, 66],
            [2, 3, 4, 5, 12, 13, 18, 19, 20, 24, 30, 33, 38, 39, 40, 41, 48, 49, 54, 55],
            [0, 1, 2, 3, 4, 5, 9, 10, 11, 16, 17, 18, 22, 23, 29, 35, 36, 37, 38, 39],
        ],
        40,
    ),
    ((2, 6, 6), 1, 1, 1): ([[0, 6, 12, 18], [5, 30, 41, 66], [30, 31, 32, 33]], 60),
}
RUNNING_CELL = {
    (3, 2, 4, 2): ["a50f5a", "0f5af0", "5af0a5", "f0a50f"],
    (3, 2, 4, 3): ["f5af5f", "af5ffa", "5ffaf5", "faf5af"],
}


def _packed(cells):
    return np.packbits(np.asarray(cells)).tobytes().hex()


@pytest.mark.parametrize("case", CUBE, ids=str)
def test_cubes_are_pyslowfast_s(case):
    window, ratio, seed = case
    cells = mask_shapes.cube(window, round(math.prod(window) * ratio), random.Random(seed))
    assert _packed(cells) == CUBE[case]


@pytest.mark.parametrize("case", TUBE_BLOCKS, ids=str)
def test_blocks_of_tubes_are_pyslowfast_s(case):
    window, ratio, seed = case
    cells = mask_shapes.tube_blocks(window, round(math.prod(window) * ratio), random.Random(seed))
    assert _packed(cells) == TUBE_BLOCKS[case]


class _Torch:
    """The numbers of V-JEPA's generator: one of torch's, or torch's own."""

    def __init__(self, generator=None):
        self.generator = generator

    def uniform(self, a, b):
        return a + torch.rand(1, generator=self.generator).item() * (b - a)

    def randint(self, a, b):
        return torch.randint(a, b + 1, (1,)).item()


@pytest.mark.parametrize("case", MULTIBLOCK, ids=str)
def test_blocks_of_a_batch_are_v_jepa_s(case):
    grid, which, step, seed = case
    blocks, scale = mask_shapes.MULTIBLOCK[which]
    torch.manual_seed(seed)
    sizes = _Torch(torch.Generator().manual_seed(step))
    size = mask_shapes.multiblock_size(grid, scale, sizes)
    hidden = [mask_shapes.multiblock(grid, size, blocks, _Torch()).ravel() for _ in range(3)]
    shown = [np.flatnonzero(~h).tolist() for h in hidden]
    fewest = min(map(len, shown))
    assert [s[:fewest] for s in shown] == MULTIBLOCK[case][0]
    assert min(int(h.sum()) for h in hidden) == MULTIBLOCK[case][1]


@pytest.mark.parametrize("case", RUNNING_CELL, ids=str)
def test_running_cells_are_videomae_v2_s(case):
    *grid, masked = case
    maps = mask_shapes.running_cell(tuple(grid), masked, torch.arange(4))
    assert [_packed(m.numpy()) for m in maps] == RUNNING_CELL[case]


def _hidden(strategy, grid, ratio, samples, **changes):
    keep, mask = draw_masks(
        MaskConfig(strategy, ratio, **changes), grid, seed=5, step=2, samples=samples
    )
    length = math.prod(grid)
    shown = torch.zeros(len(mask), length).scatter(1, mask.long(), 1.0).bool()
    return mask_from_keep(keep, length).bool().unflatten(1, grid), shown.unflatten(1, grid)


@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9])
def test_cubes_hide_whole_cells_and_the_same_number_where_the_official_gives_up(ratio):
    samples = torch.arange(40)
    hidden, _ = _hidden("cube", GRID, ratio, samples)
    cells = hidden.unflatten(2, (7, 2)).unflatten(4, (7, 2))
    assert (cells.all(5).all(3) == cells.any(5).any(3)).all()
    asked = round(8 * 7 * 7 * ratio)
    assert hidden.flatten(1).sum(1).unique().tolist() == [4 * asked]
    given_up = 0
    for i, sample in enumerate(samples.tolist()):
        thrown = mask_shapes.cube((8, 7, 7), asked, random.Random(f"5 2 {sample}"))
        given_up += thrown.sum() < asked
        thrown = torch.from_numpy(thrown).repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert (hidden[i] >= thrown).all()
    assert ratio < 0.9 or given_up >= 3


def test_blocks_of_tubes_are_whole_and_constant_in_time():
    hidden, _ = _hidden("tube_blocks", GRID, 0.75, torch.arange(40))
    assert (hidden == hidden[:, :1]).all()
    assert hidden[:, 0].flatten(1).sum(1).unique().tolist() == [4 * round(49 * 0.75)]


def test_a_tube_with_ties_is_torn_at_one_place():
    """argsort of noise that is repeated in time, as PySlowFast's AUG.MASK_TUBE: 156 of 1568."""
    noise = torch.rand(3, 1, 196, generator=torch.Generator().manual_seed(0))
    official = torch.argsort(noise.repeat(1, 8, 1).flatten(1), dim=1, stable=True)[:, :156]
    torn = mask_from_keep(official.int(), 1568).unflatten(1, (8, 196))
    hidden, _ = _hidden("tube_ties", GRID, 0.9, torch.arange(3))
    for mask in (torn, hidden.flatten(2)):
        shown = (mask == 0).sum(1)  # [B, 196] time steps
        assert (shown == 8).sum(1).tolist() == [19] * 3  # 19 * 8 + 4 = 156
        assert [sorted(set(row.tolist())) for row in shown] == [[0, 4, 8]] * 3
        assert ((mask == 0)[:, :4].sum(1) >= shown / 2).all()  # the first ones are kept


def test_every_frame_has_its_own_mask_of_the_same_count():
    hidden, _ = _hidden("per_frame", GRID, 0.9, torch.arange(16))
    assert (~hidden).flatten(2).sum(2).unique().tolist() == [int(196 * (1 - 0.9))]
    assert (hidden[:, 1:] != hidden[:, :-1]).flatten(2).any(2).all()


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.97])
def test_multiblock_has_one_count_and_both_masks_of_each_clip(ratio):
    hidden, _ = _hidden("multiblock", GRID, ratio, torch.arange(6), per_clip=2)
    assert hidden.flatten(1).sum(1).unique().tolist() == [1568 - num_keep("random", GRID, ratio)]
    for clip in range(6):
        found = []
        for view in (0, 1):
            sample = clip + (view << 48)
            blocks, scale = mask_shapes.MULTIBLOCK[(clip + view) % 2]
            size = mask_shapes.multiblock_size(GRID, scale, random.Random(f"5 2 blocks {blocks}"))
            mask = mask_shapes.multiblock(GRID, size, blocks, random.Random(f"5 2 {sample}"))
            mask, ours = torch.from_numpy(mask), hidden[2 * clip + view]
            # Blocks are hidden unless they hide too many.
            assert (ours >= mask).all() or (ours <= mask).all()
            found.append(blocks)
        assert sorted(found) == [2, 8]


def test_what_v_jepa_cuts_by_order_is_cut_at_random():
    """Its cut to the shortest context loses the last time steps first."""
    hidden, _ = _hidden("multiblock", GRID, 0.9, torch.arange(200))
    shown = (~hidden).float().mean((0, 2, 3))
    assert shown.std() / shown.mean() < 0.05


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_are_drawn_without_reading_the_device(strategy):
    """From numbers on the host: reading a meta tensor is an error, and the host would wait."""
    samples = torch.arange(4)
    cfg = MaskConfig(strategy, 0.75, decoder="running_cell", per_clip=2)
    keep, mask = draw_masks(cfg, (4, 6, 6), seed=0, step=0, samples=samples, device="meta")
    assert keep.device.type == mask.device.type == "meta" and len(keep) == 8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_are_a_function_of_the_sample_alone(strategy):
    drawn = dict(seed=3, step=7)
    keep, _ = draw_ids(strategy, (4, 6, 6), 0.75, samples=torch.arange(9), **drawn)
    alone, _ = draw_ids(strategy, (4, 6, 6), 0.75, samples=torch.tensor([6]), **drawn)
    assert torch.equal(keep[6:7], alone)
    assert len({tuple(sorted(row)) for row in keep.tolist()}) > 1


@pytest.mark.parametrize(("left_out", "count"), [(0.25, 1056), (0.5, 704), (0.75, 352)])
def test_the_decoder_sees_videomae_v2_s_subset(left_out, count):
    """Of a tube mask, the running cell's own tokens: at its 50%, 704 of 1408 in every clip."""
    part = dict(decoder="running_cell", decoder_ratio=left_out)
    hidden, decoded = _hidden("tube", GRID, 0.9, torch.arange(12), **part)
    assert decoded.flatten(1).sum(1).unique().tolist() == [count]
    maps = mask_shapes.running_cell(GRID, int(4 * left_out), torch.arange(4))
    starts = [
        [s for s in range(4) if torch.equal(d, h & ~maps[s])]
        for d, h in zip(decoded, hidden, strict=True)
    ]
    assert all(len(s) == 1 for s in starts)
    assert len({s[0] for s in starts}) > 1


@pytest.mark.parametrize("decoder", ["random", "running_cell"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_decoded_subset_has_one_count_and_is_hidden(strategy, decoder):
    cfg = MaskConfig(strategy, 0.75, decoder=decoder, decoder_ratio=0.25)
    hidden, decoded = _hidden(
        strategy, (4, 6, 7), 0.75, torch.arange(9), decoder=decoder, decoder_ratio=0.25
    )
    assert (decoded <= hidden).all()
    masked = math.prod((4, 6, 7)) - num_keep(strategy, (4, 6, 7), 0.75)
    assert num_decoded(cfg, (4, 6, 7)) == masked - masked // 4
    assert decoded.flatten(1).sum(1).unique().tolist() == [num_decoded(cfg, (4, 6, 7))]


def test_masks_of_one_clip_stand_together_and_the_first_is_its_only_one():
    samples = torch.tensor([3, 8])
    drawn = dict(seed=1, step=1, samples=samples)
    keep, _ = draw_masks(MaskConfig(per_clip=3), GRID, **drawn)
    one, _ = draw_masks(MaskConfig(), GRID, **drawn)
    assert torch.equal(keep[::3], one) and len({tuple(row) for row in keep.tolist()}) == 6


def test_a_run_takes_each_clip_once_a_mask_and_decodes_a_part():
    mask = MaskConfig("tube", 0.5, decoder="running_cell", per_clip=3)
    cfg = Config(model=preset("vit_tiny", img_size=64, num_frames=8), mask=mask)
    frames = [torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8) for _ in range(2)]
    boxes = torch.tensor([[0, 0, 64, 64]] * 2, dtype=torch.int32)
    flips, samples = torch.zeros(2).bool(), torch.tensor([4, 9])
    batch = Batch.of_rgb(frames, boxes, flips, samples, ["a", "b"], [])
    run = SimpleNamespace(cfg=cfg, step=6, world=World(0, 1, torch.device("cpu")))
    flat, table, keep, decoded = Pretraining._inputs(run, batch)
    assert torch.equal(table[::3], table[1::3]) and not torch.equal(table[0], table[3])
    assert [len(x) for x in (table, keep, decoded)] == [6] * 3
    video = Source(flat, table, 64)
    drawn = draw_masks(mask, (4, 4, 4), seed=0, step=6, samples=torch.tensor([4, 9]))
    assert torch.equal(keep, drawn[0]) and torch.equal(decoded, drawn[1])
    assert (keep.shape[1], decoded.shape[1]) == (32, 16)
    with torch.no_grad():
        loss, pred, _ = MaskedAutoencoder(cfg.model)(video, ids_keep=keep, ids_mask=decoded)
    assert pred.shape[:2] == (6, 16) and loss.isfinite()


def test_given_masks_of_unlike_counts_are_refused_or_balanced():
    """The official code would hide the mean, 3 of each: it would show one that is hidden."""
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match="keep 2 to 4 patches"):
        ids_from_mask(mask)
    keep, hidden = ids_from_mask(mask, balance=torch.rand(2, 6))
    assert keep.tolist()[0] == [4, 5] and set(keep.tolist()[1]) <= {2, 3, 4, 5}
    assert hidden.shape == (2, 4) and hidden.dtype == torch.int32
    assert ids_from_mask(mask[:1])[1].tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="leaves none"):
        ids_from_mask(torch.ones(1, 4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(decoder="running_cell", decoder_ratio=0.6), r"0\.25, 0\.5 or 0\.75"),
        (dict(decoder="random", decoder_ratio=1.0), r"decoder_ratio must be in \[0, 1\)"),
        (dict(per_clip=0), "per_clip must be positive"),
    ],
    ids=["cell_of_4", "nothing_decoded", "no_mask"],
)
def test_masks_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        MaskConfig(**changes)


def test_the_picture_of_masks_has_them_all(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        draw(output=str(tmp_path / f"{seed} masks.png"), grid=(2, 6, 6), ratio=0.75, seed=seed)
    first, second = ((tmp_path / f"{seed} masks.png").read_bytes() for seed in (0, 1))
    assert len(first) > 10_000 and first != second  # the masks are the seed's
    said = capsys.readouterr().out
    assert all(f"{s} " in said for s in STRATEGIES) and "masks.png" in said


@pytest.mark.parametrize("grid", [(0, 4, 4), (65, 1, 1), (1, 10**6, 1)])
def test_a_grid_that_no_picture_holds_is_refused_before_it_is_drawn(grid, tmp_path, monkeypatch):
    monkeypatch.setattr("mae_fast.mask_pictures.num_keep", None)  # the first thing that it does
    with pytest.raises(ConfigError, match="--grid must be"):
        draw(output=str(tmp_path / "masks.png"), grid=grid)
