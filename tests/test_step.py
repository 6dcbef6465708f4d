"""The training step: what it computes, and that as graphs it computes the same, bit for bit."""

import contextlib
import copy

import pytest
import torch

from mae_fast.config import TrainConfig
from mae_fast.graph import Graphed
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.optim import clipped_step, make_optimizer
from mae_fast.step import WARMUP, Step

STEPS = 10


def _trainer(cfg, **settings):
    torch.manual_seed(0)
    model = MaskedAutoencoder(cfg)
    optimizer = make_optimizer(model, TrainConfig())

    def loss(video, ids_keep, ids_mask):
        return model(video, ids_keep=ids_keep, ids_mask=ids_mask)[0]

    return Step(model, optimizer, loss, **settings)


def _inputs(cfg, batch, clips=2):
    generator = torch.Generator().manual_seed(batch)
    size = (clips, 3, cfg.num_frames, cfg.img_size, cfg.img_size)
    video = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    samples = torch.arange(batch * clips, (batch + 1) * clips)
    return video, *draw_ids("random", cfg.grid, 0.5, seed=0, step=batch, samples=samples)


def _take(step, cfg, clips_of=lambda step, micro: 2, steps=STEPS):
    """(loss, norm) of each step; the rate rises."""
    found = []
    for i in range(steps):
        for micro in range(step.accum):
            step.micro(*_inputs(cfg, i * step.accum + micro, clips_of(i, micro)))
        found.append(torch.stack(step.update(1e-3 * (i + 1))))
    return torch.stack(found)


def _same_weights(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_gradients_are_those_of_the_mean_over_the_micro_steps(tiny_cfg):
    step = _trainer(tiny_cfg, accum=3, clip=1e9)
    model = copy.deepcopy(step.model)
    batches = [_inputs(tiny_cfg, i) for i in range(3)]
    losses = [model(b[0], ids_keep=b[1], ids_mask=b[2])[0] for b in batches]
    torch.stack(losses).mean().backward()
    for batch in batches:
        step.micro(*batch)
    for p, q in zip(model.parameters(), step.model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    loss, norm = step.update(0.0)
    assert loss.item() == pytest.approx(sum(x.item() for x in losses) / 3)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(norm, expected)
    assert all(p.grad is None for p in step.model.parameters())


def test_rate_clip_and_precision_change_the_step(tiny_cfg):
    settings = {"as it is": {}, "clip": {"clip": 1e-3}, "precision": {"precision": "bf16"}}
    found = {}
    for name, each in settings.items():
        step = _trainer(tiny_cfg, **each)
        found[name] = (_take(step, tiny_cfg, steps=2), step)
    start = _trainer(tiny_cfg)
    assert not any(_same_weights(step, start) for _, step in found.values())
    first = {name: losses[0] for name, (losses, _) in found.items()}
    assert torch.equal(first["clip"], first["as it is"])  # loss and norm are those before it
    assert not _same_weights(found["clip"][1], found["as it is"][1])
    assert not torch.equal(first["precision"], first["as it is"])
    torch.testing.assert_close(first["precision"], first["as it is"], rtol=5e-2, atol=0)
    still = _trainer(tiny_cfg)
    still.micro(*_inputs(tiny_cfg, 0))
    still.update(0.0)
    assert _same_weights(still, start)


def test_micro_steps_and_the_update_come_in_turn(tiny_cfg):
    step = _trainer(tiny_cfg, accum=2)
    step.micro(*_inputs(tiny_cfg, 0))
    with pytest.raises(RuntimeError, match="1 of 2 micro-steps are done"):
        step.update(0.1)
    step.micro(*_inputs(tiny_cfg, 1))
    with pytest.raises(RuntimeError, match="2 micro-steps are done: the update is next"):
        step.micro(*_inputs(tiny_cfg, 2))
    step.update(0.1)


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_steps_as_graphs_are_the_eager_ones_bit_for_bit(accum, precision, tiny_cfg):
    eager, graphed = (
        _trainer(tiny_cfg, accum=accum, clip=1.0, precision=precision, graph=graph)
        for graph in (False, True)
    )
    expected = _take(eager, tiny_cfg)
    assert torch.equal(_take(graphed, tiny_cfg), expected)
    parts = graphed.micros[True, False], graphed.micros[False, False], graphed.end
    captured = [part.graph is not None for part in parts]
    assert captured == [True, accum > 1, True] and expected[0, 0] > expected[-1, 0]
    assert _same_weights(eager, graphed)
    assert all(p.grad is None for p in graphed.model.parameters())


def test_what_a_graph_replays_is_not_computed_in_python(tiny_cfg):
    """The first steps run as they are, the next is captured, and later ones leave the model be."""
    step = _trainer(tiny_cfg, graph=True)
    calls, beside = [], []

    @contextlib.contextmanager
    def on_its_stream():
        beside.append(len(calls))
        yield

    step.side.beside = on_its_stream
    step.model.register_forward_pre_hook(lambda *_: calls.append(1))
    _take(step, tiny_cfg)
    assert len(calls) == WARMUP + 1
    assert beside == [0, 1, 1, 2, 2, 3]  # both parts of each step of the warm-up, and none later


def test_a_frozen_number_shows_in_the_rehearsal(tiny_cfg):
    """A learning rate that is a Python number stays what it was at the capture."""
    expected = _take(_trainer(tiny_cfg), tiny_cfg)
    step = _trainer(tiny_cfg, graph=True)
    step.end.function = lambda: clipped_step(step.optimizer, step.lr.tolist(), 0.0)
    got = _take(step, tiny_cfg)
    # Steps 0 to 2 are warm-up, 3 is captured, and 4 is the first with another's rate.
    assert torch.equal(got[:5], expected[:5]) and not torch.allclose(got[5:], expected[5:])


@pytest.mark.parametrize(
    ("at", "micros"),
    [(1, (0,)), (3, (0, 1, 2)), (5, (0, 1, 2)), (5, (0,)), (5, (1,)), (5, (2,)), (6, (1, 2))],
)
def test_a_batch_of_another_size_runs_without_and_changes_nothing_else(
    at, micros, tiny_cfg, caplog
):
    """In warm-up, at the capture, and later: in the first micro-step, within, in the last."""

    def clips_of(step, micro):
        return 3 if step == at and micro in micros else 2

    eager, graphed = (_trainer(tiny_cfg, accum=3, clip=1.0, graph=g) for g in (False, True))
    expected = _take(eager, tiny_cfg, clips_of)
    if at == 3:  # what is captured has the odd size, and every later step runs without
        clips_of = lambda step, micro: 3 if step == at else 2  # noqa: E731
    assert torch.equal(_take(graphed, tiny_cfg, clips_of), expected)
    assert _same_weights(eager, graphed)
    told = [r.getMessage() for r in caplog.records if "without its CUDA graph" in r.getMessage()]
    assert len(told) == (at > WARMUP - 1)


def test_a_step_that_is_not_finite_is_skipped_inside_the_graph(tiny_cfg):
    step, weights, norms = _trainer(tiny_cfg, clip=1.0, graph=True), [], []
    for i in range(8):
        video, *ids = _inputs(tiny_cfg, i)
        step.micro(video / 255 + (float("nan") if i == 5 else 0), *ids)
        norms.append(step.update(1e-3)[1])
        weights.append([p.detach().clone() for p in step.model.parameters()])
    assert step.end.graph is not None
    assert [bool(norm.isnan()) for norm in norms] == [i == 5 for i in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(weights[4], weights[5], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[5], weights[6], strict=True))


def test_a_step_lets_go_of_every_graph(tiny_cfg, monkeypatch):
    closed = []
    monkeypatch.setattr(Graphed, "close", lambda part: closed.append(part))
    _trainer(tiny_cfg).close()
    step = _trainer(tiny_cfg, graph=True)
    step.close()
    assert closed == [*step.micros.values(), step.end]
