"""Every exact saving, on and off: the same loss and the same gradients."""

import contextlib

import pytest
import torch

from mae_fast import MaskedAutoencoder, ModelConfig, backends
from mae_fast.forward import SAVINGS, forward
from mae_fast.masking import draw_ids
from mae_fast.ops import OPS

SEVERAL = [("no_unshuffle", "visible_embed"), tuple(SAVINGS)]


def _run(model, video, ids, without, full_pred=False):
    model.zero_grad()
    loss, pred = forward(model.params(), model.spec, video, *ids, full_pred, without)
    loss.backward()
    return loss.detach(), pred.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def _model(tiny_cfg, dtype, **changes):
    torch.manual_seed(0)
    model = MaskedAutoencoder(ModelConfig(**{**tiny_cfg.__dict__, **changes}))
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    model.to(dtype)
    video = torch.randint(0, 256, (5, 3, 8, 16, 16), dtype=torch.uint8)
    ids = draw_ids("random", (4, 2, 2), 0.7, seed=0, step=0, samples=torch.arange(5))
    return model, video, ids


@pytest.mark.parametrize("full_pred", [False, True], ids=["masked_only", "full_pred"])
@pytest.mark.parametrize("variant", ["mae_st", "slowfast"])
@pytest.mark.parametrize("cls_embed", [True, False], ids=["cls", "no_cls"])
@pytest.mark.parametrize("depth", [1, 3], ids=["one_block", "three_blocks"])
@pytest.mark.parametrize("off", [*((s,) for s in SAVINGS), *SEVERAL], ids="+".join)
def test_a_saving_changes_nothing_in_fp64(tiny_cfg, off, depth, cls_embed, variant, full_pred):
    changes = dict(variant=variant, cls_embed=cls_embed, decoder_depth=depth)
    model, video, ids = _model(tiny_cfg, torch.float64, **changes)
    on = _run(model, video, ids, (), full_pred)
    without = _run(model, video, ids, off, full_pred)
    torch.testing.assert_close(on, without, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("off", SAVINGS)
def test_a_saving_changes_only_rounding_in_fp32(tiny_cfg, off):
    exact = _run(*_model(tiny_cfg, torch.float64), ())
    on, without = (_run(*_model(tiny_cfg, torch.float32), w) for w in ((), {off}))

    def worst(run):
        errors = [
            float((g.double() - exact[2][n]).norm() / exact[2][n].norm())
            for n, g in run[2].items()
            if not n.endswith("attn.k.bias")
        ]
        return max(errors)

    assert worst(on) <= 2 * worst(without) + 1e-6
    assert worst(without) < 1e-4


@contextlib.contextmanager
def _counter():
    """Counts torch's own products: every op runs as its reference meanwhile."""
    from torch.utils.flop_counter import FlopCounterMode

    with (
        backends(**dict.fromkeys(OPS, "reference")),
        FlopCounterMode(display=False) as counter,
    ):
        yield counter


def test_savings_leave_work_out(tiny_cfg):
    flops = {}
    for off in ((), *({s} for s in SAVINGS)):
        model, video, ids = _model(tiny_cfg, torch.float64, decoder_depth=3)
        with _counter() as counter:
            _run(model, video, ids, off)
        flops["".join(off)] = counter.get_total_flops()
    assert all(flops[s] > flops[""] for s in SAVINGS), flops


def test_mask_tokens_are_not_shared_where_that_costs_more(tiny_cfg):
    # One clip has fewer mask tokens than there are positions: a table of all would be larger.
    flops = []
    for off in ((), {"shared_mask_tokens"}):
        model, video, ids = _model(tiny_cfg, torch.float64, decoder_depth=3)
        with _counter() as counter:
            _run(model, video[:1], [i[:1] for i in ids], off)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


def test_an_unknown_saving_is_refused(tiny_cfg):
    model, video, ids = _model(tiny_cfg, torch.float32)
    with pytest.raises(ValueError, match="no_such"):
        forward(model.params(), model.spec, video, *ids, without={"no_such"})
