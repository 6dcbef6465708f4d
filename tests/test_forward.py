"""Every exact saving, on and off: the same loss and the same gradients."""

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F

from mae_fast import MaskedAutoencoder, ModelConfig, backends
from mae_fast.forward import SAVINGS, Norm, encode, forward, masked_loss
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


@pytest.mark.parametrize("off", [(), *((s,) for s in SAVINGS), tuple(SAVINGS)], ids="+".join)
def test_some_of_the_masked_tokens(tiny_cfg, off):
    # Tokens that are named nowhere take no part: a model that has no others gives the same.
    model, video, (keep, mask) = _model(tiny_cfg, torch.float64, decoder_depth=3)
    some = mask[:, ::2]
    loss, pred, grads = _run(model, video, (keep, some), off)
    _, full, _ = _run(model, video, (keep, some), off, full_pred=True)
    ids = torch.cat([keep, some], dim=1).sort(dim=1).values
    at = torch.searchsorted(ids.contiguous(), some.contiguous())
    torch.testing.assert_close(full.gather(1, at[..., None].expand_as(pred)), pred)
    other = _run(model, video, (keep, some.flip(1)), ("shared_mask_tokens",))
    torch.testing.assert_close(pred, other[1].flip(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((loss, grads), (other[0], other[2]), rtol=1e-10, atol=1e-12)
    everything = _run(model, video, (keep, mask), off)
    assert not torch.allclose(pred, everything[1][:, ::2])


def test_targets_are_of_the_clip_named(tiny_cfg):
    model, video, ids = _model(tiny_cfg, torch.float64)
    other = video.flip(0)
    args = model.params(), model.spec, video, *ids
    loss, pred = forward(*args, pixels=other)
    assert torch.equal(pred, forward(*args)[1])
    assert (
        torch.equal(loss, masked_loss(model.spec, pred, other, ids[1]))
        and loss != forward(*args)[0]
    )


def test_every_norm_has_its_eps_and_the_encoder_may_have_none(tiny_cfg):
    model, video, (keep, _) = _model(tiny_cfg, torch.float64)
    params = model.params()
    bare = encode(params._replace(norm=None), model.spec, video, keep)
    weight, bias, _ = params.norm
    for eps in (1e-6, 0.5):
        out = encode(params._replace(norm=Norm(weight, bias, eps)), model.spec, video, keep)
        torch.testing.assert_close(out, F.layer_norm(bare, weight.shape, weight, bias, eps))
    block = params.blocks[1]._replace(norm2=params.blocks[1].norm2._replace(eps=0.5))
    other = encode(params._replace(blocks=[params.blocks[0], block]), model.spec, video, keep)
    assert not torch.allclose(other, encode(params, model.spec, video, keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_checkpointed_block_keeps_its_input_only(tiny_cfg, dtype, monkeypatch):
    import mae_fast.forward as module

    model, video, ids = _model(tiny_cfg, dtype)
    before = _run(model, video, ids, ())
    outputs, attention = [], module.attention

    def watched(*qkv):
        out = attention(*qkv)
        outputs.append(weakref.ref(out))
        return out

    made, gelu = [], module.bias_gelu
    monkeypatch.setattr(module, "attention", watched)
    monkeypatch.setattr(module, "bias_gelu", lambda *args: made.append(1) or gelu(*args))
    for checkpoint, alive, calls in ((False, 4, 4), (True, 0, 8)):
        model.spec = model.spec._replace(checkpoint=checkpoint)
        model.zero_grad()
        outputs.clear(), made.clear()
        loss, pred = forward(model.params(), model.spec, video, *ids)
        assert sum(r() is not None for r in outputs) == alive
        loss.backward()
        assert len(outputs) == calls and len(made) == 8  # of a block made again it is kept
        after = loss.detach(), pred.detach(), {n: p.grad for n, p in model.named_parameters()}
        torch.testing.assert_close(after, before, rtol=0, atol=0)
