"""What else is done with a model: exported, differentiated twice, counted; right, or refused."""

import copy
import functools

import pytest
import torch
from families import FAMILIES
from foreign import clips, make
from torch.utils.flop_counter import FlopCounterMode

import mae_fast
from mae_fast import MaskedAutoencoder
from mae_fast.adapters import transformers as transformers_adapter
from mae_fast.comparison import tensors_of
from mae_fast.masking import draw_ids

EXPORTED = ["mae_st", "slowfast", "videomae", "videomae_v2"]  # transformers' own is not


@pytest.fixture
def pair(tiny_cfg, request):
    """(the model, accelerated and called once; a copy of it as it was; a call's arguments)."""
    model, args = FAMILIES[request.param](tiny_cfg)
    own = copy.deepcopy(model)
    mae_fast.accelerate(model)(*args)
    return model, own, args


def _loss(model, args, parameters=None):
    torch.manual_seed(3)
    out = torch.func.functional_call(model, parameters, args) if parameters else model(*args)
    out = tensors_of(out)[0]
    return out if out.dim() == 0 else out.square().mean()


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("pair", EXPORTED, indirect=True)
def test_export(pair, strict):
    model, _, args = pair
    exported = torch.export.export(model, args, strict=strict).module()
    found = []
    for each in (exported, model):
        torch.manual_seed(3)
        found.append([t.detach() for t in tensors_of(each(*args))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_export_before_the_first_call(tiny_cfg):
    model, args = FAMILIES["mae_st"](tiny_cfg)
    assert torch.export.export(mae_fast.accelerate(model), args)


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_a_second_derivative_is_refused(pair):
    """It was computed without what goes through saved activations: half of the truth."""
    model, _, args = pair
    with pytest.raises(RuntimeError, match=r"no second derivative .*restore\(model\)"):
        torch.autograd.grad(_loss(model, args), list(model.parameters()), create_graph=True)


def test_a_second_derivative_of_our_own_model_is_refused(tiny_cfg):
    model, video = MaskedAutoencoder(tiny_cfg), clips(tiny_cfg)
    ids = draw_ids("random", tiny_cfg.grid, 0.5, seed=0, step=0, samples=torch.arange(2))
    loss, _ = mae_fast.forward.forward(model.params(), model.spec, video, *ids)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_transforms_of_torch_func_are_the_own_forwards(pair, caplog):
    model, own, args = pair
    found = []
    for each in (model, own):
        parameters = {n: p.detach() for n, p in each.named_parameters()}
        loss = functools.partial(_loss, each, args)
        grads = torch.func.grad(loss)(parameters)
        twice = {n: torch.stack([p, p / 2]) for n, p in parameters.items()}
        found.append((grads, torch.vmap(loss, randomness="same")(twice)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert caplog.text.count("a transform of torch.func") == 1


def test_forward_mode_is_the_own_forwards(tiny_cfg):
    model, video = make(tiny_cfg), clips(tiny_cfg)
    found = []
    for each in (copy.deepcopy(model), mae_fast.accelerate(model)):
        parameters = {n: p.detach() for n, p in each.named_parameters()}
        tangents = {n: torch.ones_like(p) for n, p in parameters.items()}
        loss = functools.partial(_loss, each, (video,))
        found.append(torch.func.jvp(loss, (parameters,), (tangents,)))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore")  # that a trace holds constants, and is of the past
@pytest.mark.parametrize("pair", ["mae_st", "videomae"], indirect=True)
def test_a_trace_is_of_the_own_forward(pair):
    model, own, args = pair
    traced = torch.jit.trace(model, args, check_trace=False)
    found = []
    for each in (traced, own):
        torch.manual_seed(3)
        found.append([t.detach() for t in tensors_of(each(*args))])
    assert all(map(torch.equal, *found))


def test_what_counts_passes_through(tiny_cfg):
    model, video = make(tiny_cfg), clips(tiny_cfg)
    mae_fast.accelerate(model)
    counts = []
    for _ in range(2):  # the first call compares, and that counts as nothing
        with FlopCounterMode(display=False) as flops:
            model(video)[0].backward()
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_loss_of_half_precision_clips_under_autocast(tiny_cfg):
    """Also where the parameters are in half precision: a mean square is in fp32 all the same."""
    half, wide = torch.bfloat16, torch.float32
    for params, dtype in ((wide, half), (wide, wide), (half, half)):
        model, (clip, mask) = FAMILIES["transformers"](tiny_cfg)
        own = copy.deepcopy(model.to(params))
        mae_fast.accelerate(model)
        with torch.autocast("cpu", half):
            want, ours = own(clip.to(dtype), mask), model(clip.to(dtype), mask)
        assert ours.loss.dtype == want.loss.dtype == torch.float32
        torch.testing.assert_close(ours.loss, want.loss, rtol=2e-2, atol=0)


def test_a_comparison_is_made_as_the_model_is_run(tiny_cfg, monkeypatch):
    """A loss in another dtype under autocast alone is seen; so is a gradient that is missing."""
    model, (clip, mask) = FAMILIES["transformers"](tiny_cfg)
    forward = transformers_adapter.forward

    @functools.wraps(forward)
    def half(*args, **kwargs):
        out = forward(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            out.loss = out.loss.bfloat16()
        return out

    monkeypatch.setattr(transformers_adapter, "forward", half)
    mae_fast.accelerate(model)(clip, mask)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(mae_fast.errors.AccelerateError, match="computes something else"):
            model(clip, mask)

    @functools.wraps(forward)
    def detached(model, *args, **kwargs):
        held = vars(model.decoder.head)["_parameters"]
        bias, held["bias"] = held["bias"], held["bias"].detach()
        out = forward(model, *args, **kwargs)
        held["bias"] = bias
        return out

    monkeypatch.setattr(transformers_adapter, "forward", detached)
    with pytest.raises(mae_fast.errors.AccelerateError, match=r"gradient of decoder\.head\.bias"):
        mae_fast.accelerate(mae_fast.restore(model))(clip, mask)


def test_another_default_dtype(tiny_cfg):
    """It makes the mask of a model in it, which is no other shape or dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = make(tiny_cfg, torch.bfloat16)
        video = clips(tiny_cfg, dtype=torch.bfloat16)
        want = copy.deepcopy(model)(video)
        assert [t.dtype for t in mae_fast.accelerate(model)(video)] == [t.dtype for t in want]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", ["transformers", "videomae"])
def test_uint8_clips_in_fp64_without_norm_pix(tiny_cfg, family):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model, (clip, mask) = FAMILIES[family](tiny_cfg)
    if family == "transformers":
        model.config.norm_pix_loss = False
    pixels = (clip * 50 + 128).clamp(0, 255).byte()
    fast = mae_fast.accelerate(copy.deepcopy(model).double(), mean=mean, std=std)
    dim = 2 if family == "transformers" else 1
    mean, std = (
        torch.tensor(t, dtype=torch.float64).view([3 if d == dim else 1 for d in range(5)])
        for t in (mean, std)
    )
    want = tensors_of(model.double()((pixels.double() / 255 - mean) / std, mask))[0]
    torch.testing.assert_close(tensors_of(fast(pixels, mask))[0], want, rtol=1e-5, atol=1e-6)
