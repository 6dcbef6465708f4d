"""A step in bf16 by autocast: one norm in bf16 feeds all its products, as if each had cast it."""

from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import mae_fast
import mae_fast.forward
from mae_fast import MaskedAutoencoder, ModelConfig
from mae_fast.adapters.videomae import product_dtype
from mae_fast.masking import draw_ids
from mae_fast.ops import dispatch
from mae_fast.remade import keeping

NORMS = {"mae_fast::layer_norm_fwd": 0, "mae_fast::add_layer_norm_fwd": 1}  # which output is it
GRADIENTS = {"mae_fast::layer_norm_bwd": 0, "mae_fast::add_layer_norm_bwd": 1}  # which input
FLOOR = 2e-3  # of the greatest norm of a gradient, besides twice the error: tests/ops/op_checks.py


class Watch(TorchDispatchMode):
    """What becomes of norms: the casts of their results, the dtypes of these results' gradients,
    and the casts of any activations [B, S, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.casts_of_norms, self.gradients, self.casts = [], 0, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name in NORMS:
            self.norms.append(StorageWeakRef(out[NORMS[name]].untyped_storage()))
        elif name in GRADIENTS:
            self.gradients.add(args[GRADIENTS[name]].dtype)
        elif name == "aten::_to_copy" and args[0].dtype != out.dtype:
            self.casts += args[0].dim() == 3
            self.casts_of_norms += StorageWeakRef(args[0].untyped_storage()) in self.norms
        return out


@pytest.fixture
def apart(monkeypatch):
    """As it was: norms in fp32, cast by each product for itself."""

    def change():
        monkeypatch.setattr(mae_fast.forward, "_product_dtype", lambda x: None)

    return change


def step(
    cfg: ModelConfig, dtype: torch.dtype, autocast: bool, keep: bool = False
) -> SimpleNamespace:
    """Loss, pred and gradients of a step, and what was watched; norms alive before the backward,
    and made in it."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(cfg)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    model.to(dtype)
    video = torch.randint(0, 256, (5, 3, 8, 16, 16), dtype=torch.uint8)
    ids = draw_ids("random", (4, 2, 2), 0.7, seed=0, step=0, samples=torch.arange(5))
    with Watch() as watch:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), keeping(keep):
            loss, pred = mae_fast.forward.forward(model.params(), model.spec, video, *ids)
        first = len(watch.norms)
        alive = sum(not norm.expired() for norm in watch.norms)
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    again = len(watch.norms) - first
    return SimpleNamespace(
        loss=loss, pred=pred, grads=grads, watch=watch, first=first, alive=alive, again=again
    )


@pytest.fixture
def cfg(tiny_cfg) -> ModelConfig:
    return ModelConfig(**{**tiny_cfg.__dict__, "decoder_depth": 3})


@pytest.fixture
def operators():
    """Norms are operators, which a mode sees."""
    reason = None if dispatch.interpreting() else dispatch.load_cpp()
    if reason:
        pytest.skip(reason)


def test_products_get_the_bits_of_a_norm_cast_by_each(cfg, apart):
    one = step(cfg, torch.float32, autocast=True)
    apart()
    each = step(cfg, torch.float32, autocast=True)
    assert torch.equal(one.loss, each.loss) and torch.equal(one.pred, each.pred)


def test_gradients_are_as_good_as_those_of_a_norm_cast_by_each(cfg, apart):
    """Those of q, k and v are now summed in bf16."""
    exact = step(cfg, torch.float64, autocast=False).grads
    one = step(cfg, torch.float32, autocast=True).grads
    apart()
    each = step(cfg, torch.float32, autocast=True).grads
    floor = FLOOR * max(g.norm() for g in exact.values())
    for name, e in exact.items():
        assert one[name].dtype == torch.float32
        error, allowed = (one[name] - e).norm(), 2 * (each[name] - e).norm() + floor
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize(("products", "casts"), [("reference", (25, 46)), ("half", (13, 26))])
def test_no_product_casts_a_norm(cfg, apart, operators, products, casts):
    """Where q, k and v are products of their own, and where they are one (`half`)."""
    if products == "half" and dispatch.load_amx():
        pytest.skip(dispatch.load_amx())
    with mae_fast.backends(**({} if products == "half" else {"linear": products})):
        one = step(cfg, torch.float32, autocast=True).watch
        apart()
        each = step(cfg, torch.float32, autocast=True).watch
    assert (each.casts_of_norms, each.casts, each.gradients) == (*casts, {torch.float32})
    # A norm's backward gives the gradient of the product added to the sum. Left are those of
    # latents: of the decoder's input, and of what shares its first norm with no mask token.
    assert (one.casts_of_norms, one.casts, one.gradients) == (0, 2, {torch.bfloat16})


def test_norms_are_made_again_and_not_kept(cfg, apart, operators):
    in_fp32 = step(cfg, torch.float32, autocast=False)
    one = step(cfg, torch.float32, autocast=True)
    apart()
    each = step(cfg, torch.float32, autocast=True)
    # 4 of 13 feed no block's products, or those that all clips share.
    assert (in_fp32.first, in_fp32.alive, in_fp32.again) == (13, 4, 9)
    assert (one.first, one.alive, one.again) == (13, 4, 9)
    assert (each.first, each.alive, each.again) == (13, 0, 0)  # the casts were kept


def test_what_is_kept_is_not_made_again(cfg, operators):
    """As on a GPU whose memory holds it: the same bits."""
    again, kept = (step(cfg, torch.float32, autocast=True, keep=keep) for keep in (False, True))
    assert (kept.first, kept.alive, kept.again) == (13, 13, 0)
    assert torch.equal(kept.loss, again.loss)
    assert all(torch.equal(g, again.grads[n]) for n, g in kept.grads.items())


def test_positions_of_a_table_are_rounded_as_its_products_are():
    """transformers and VideoMAE add a fixed table to what autocast's product gives."""
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert product_dtype(single) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(single) == torch.bfloat16
        assert product_dtype(double) == torch.float64
