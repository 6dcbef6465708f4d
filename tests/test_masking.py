"""Masks: exact counts, permutations, uniformity, and what each strategy promises."""

import itertools

import pytest
import torch

from mae_fast.masking import (
    STRATEGIES,
    draw_ids,
    ids_from_keep,
    ids_from_noise,
    mask_from_keep,
    num_keep,
)

GRID = (8, 14, 14)
RATIOS = (0, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99)


def _kept(strategy, ratio, grid=GRID, n=8, seed=0, step=0):
    """bool [n, t, h, w], True where kept."""
    keep, _ = draw_ids(strategy, grid, ratio, seed=seed, step=step, samples=torch.arange(n))
    length = grid[0] * grid[1] * grid[2]
    return mask_from_keep(keep, length).unflatten(1, grid) == 0


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ids_are_a_permutation_of_the_count_told_before(strategy, ratio):
    for grid in (GRID, (3, 5, 7), (1, 8, 8)):
        length = grid[0] * grid[1] * grid[2]
        try:
            keep = num_keep(strategy, grid, ratio)
        except ValueError as e:
            assert "leaves none" in str(e) and (strategy == "frame" or ratio == 0.99)
            continue
        ids = draw_ids(strategy, grid, ratio, seed=3, step=1, samples=torch.arange(5))
        assert [i.shape[1] for i in ids] == [keep, length - keep]
        assert ids[0].dtype == ids[1].dtype == torch.int32
        everything = torch.cat(ids, 1).sort(1).values
        assert torch.equal(everything, torch.arange(length, dtype=torch.int32).expand(5, -1))


def test_random_is_the_official_argsort_of_noise():
    noise = torch.rand(4, 1568, generator=torch.Generator().manual_seed(0))
    keep, mask = ids_from_noise(noise, num_keep("random", GRID, 0.9))
    order = torch.argsort(noise, dim=1)
    assert torch.equal(keep.long(), order[:, :156]) and torch.equal(mask.long(), order[:, 156:])


@pytest.mark.parametrize("strategy", ["random", "tube", "frame", "running_cell"])
def test_every_place_is_kept_equally_often(strategy):
    ratio, n = 0.75, 4000
    grid = (4, 4, 4)
    kept = _kept(strategy, ratio, grid, n).float()
    share = num_keep(strategy, grid, ratio) / 64
    counts = kept.sum(0).flatten()
    deviation = (counts - n * share) / (n * share * (1 - share)) ** 0.5
    assert deviation.abs().max() < 4
    if strategy != "frame":  # whose places move in 4 groups: too few for a chi-square
        assert 0.5 < deviation.square().mean() < 1.6
    if strategy == "random":
        a, b = kept.flatten(1)[:, 5], kept.flatten(1)[:, 6]
        pair = num_keep(strategy, grid, ratio) * (num_keep(strategy, grid, ratio) - 1) / (64 * 63)
        assert abs((a * b).mean() - pair) < 4 * (pair / n) ** 0.5


def test_low_resolution_noise_would_be_seen():
    # 24 bits: over 1568 patches about 0.07 ties a clip. bf16 noise has more than a thousand.
    keep, _ = draw_ids("random", GRID, 0.9, seed=0, step=0, samples=torch.arange(256))
    first = keep[:, 0].float().mean()
    assert abs(first - 783.5) < 4 * 1568 / 12**0.5 / 16


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_tubes_are_constant_in_time(ratio):
    kept = _kept("tube", ratio)
    assert (kept == kept[:, :1]).all()
    assert kept[:, 0].flatten(1).sum(1).unique().tolist() == [196 - int(196 * ratio)]


def test_tube_of_90_percent_keeps_160_as_videomae_does():
    assert num_keep("tube", GRID, 0.9) == num_keep("running_cell", GRID, 0.9) == 160


@pytest.mark.parametrize(("ratio", "frames"), [(0.5, 4), (0.75, 2), (0.875, 1), (0.9, 1)])
def test_frames_are_kept_whole(ratio, frames):
    kept = _kept("frame", ratio).flatten(2)
    assert (kept.all(2) | ~kept.any(2)).all()
    assert kept.all(2).sum(1).unique().tolist() == [frames]


def _hidden_neighbours(kept):
    """How often the neighbour of a hidden patch, in time and in space, is hidden too."""
    hidden = ~kept
    time = (hidden[:, 1:] & hidden[:, :-1]).sum() / hidden[:, 1:].sum()
    space = (hidden[:, :, :, 1:] & hidden[:, :, :, :-1]).sum() / hidden[:, :, :, 1:].sum()
    return float(time), float(space)


def test_blocks_hide_large_regions():
    block, random = (_hidden_neighbours(_kept(s, 0.5, n=32)) for s in ("block", "random"))
    assert all(r == pytest.approx(0.5, abs=0.03) for r in random)
    assert all(b > 0.8 for b in block)


def test_running_cells_move_with_time():
    grid = (8, 6, 6)
    kept = _kept("running_cell", 0.75, grid, n=16)
    assert kept.flatten(2).sum(2).unique().tolist() == [9]
    cells = kept.unflatten(3, (3, 2)).unflatten(2, (3, 2)).permute(0, 2, 4, 1, 3, 5).flatten(4)
    assert cells.sum(-1).unique().tolist() == [1]  # one patch a cell in every time step
    # Over four time steps each of a cell's four patches is seen once.
    assert cells[..., :4, :].sum(3).unique().tolist() == [1]


def test_masks_depend_on_seed_step_and_sample_alone():
    samples = torch.tensor([7, 3, 11])
    keep, _ = draw_ids("random", GRID, 0.9, seed=1, step=5, samples=samples)
    alone, _ = draw_ids("random", GRID, 0.9, seed=1, step=5, samples=samples[1:2])
    assert torch.equal(keep[1:2], alone)
    others = [
        draw_ids("random", GRID, 0.9, seed=s, step=t, samples=torch.tensor([n]))[0]
        for s, t, n in ((2, 5, 3), (1, 6, 3), (1, 5, 4))
    ]
    for a, b in itertools.combinations([alone, *others], 2):
        assert not torch.equal(a, b)


def test_masks_are_the_same_bits_for_ever():
    # Recorded when written: a resumed run must draw what the first half would have drawn.
    keep, _ = draw_ids("random", (2, 4, 4), 0.75, seed=0, step=0, samples=torch.arange(2))
    assert keep.tolist() == RECORDED


RECORDED = [[28, 3, 20, 9, 26, 16, 0, 29], [18, 30, 2, 3, 26, 1, 19, 25]]


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=str(ratio)):
        num_keep("random", GRID, ratio)


@pytest.mark.parametrize("strategy", ["random", "frame", "block"])
def test_a_ratio_that_leaves_nothing_is_refused(strategy):
    with pytest.raises(ValueError, match="leaves none of 2x2x2"):
        num_keep(strategy, (2, 2, 2), 0.99)


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="tubes"):
        num_keep("tubes", GRID, 0.9)


def test_ids_from_keep_is_the_complement():
    keep = torch.tensor([[3, 0], [1, 2]])
    assert ids_from_keep(keep, 4).tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("ids", "words"),
    [([[0, 4]], "0 to 4"), ([[-1, 2]], "-1 to 2"), ([[1, 1]], "twice"), ([0, 1], "B, K")],
    ids=["too_large", "negative", "twice", "one_dimension"],
)
def test_bad_ids_are_refused(ids, words):
    with pytest.raises(ValueError, match=words):
        ids_from_keep(torch.tensor(ids), 4)
    with pytest.raises(ValueError, match="float"):
        ids_from_keep(torch.rand(1, 2), 4)
