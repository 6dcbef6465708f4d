"""VideoMAE and VideoMAE V2: the stand-in, and their own code where a checkout is named.

VIDEOMAE_REPOSITORY=path VIDEOMAE_V2_REPOSITORY=path pytest tests/adapters/test_videomae.py
"""

import copy
import itertools
import random
from functools import partial

import pytest
import torch
from compare import check, check_curves, repository, scattered
from op_checks import assert_as_good_as_torch
from stand_ins import VideoMAE, VideoMAEV2, videomae_labels
from torch import nn

import mae_fast
from mae_fast import adapters
from mae_fast.adapters import videomae, videomae_v2
from mae_fast.adapters.parts import Unfused
from mae_fast.errors import AccelerateError

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FAMILIES = ["videomae", "videomae_v2"]


def stand_in(family: str, seed: int = 0, **settings) -> nn.Module:
    torch.manual_seed(seed)
    return scattered((VideoMAEV2 if family == "videomae_v2" else VideoMAE)(**settings), seed)


def official(family: str, seed: int = 0, **settings) -> nn.Module:
    """The model of the repository itself, of the stand-in's settings."""
    s = dict(size=(32, 32), frames=16, patch=8, tubelet=2, dims=(24, 12), heads=(3, 2))
    s |= dict(depths=(2, 2), ratio=4.0, qkv_bias=True) | settings
    if family == "videomae":
        assert s["frames"] == 16  # as it is there
        code, more = repository("VIDEOMAE_REPOSITORY", "modeling_pretrain"), {}
    else:
        code = repository("VIDEOMAE_V2_REPOSITORY", "models.modeling_pretrain")
        more = dict(all_frames=s["frames"])
    torch.manual_seed(seed)
    model = code.PretrainVisionTransformer(
        img_size=s["size"],
        patch_size=s["patch"],
        encoder_embed_dim=s["dims"][0],
        encoder_depth=s["depths"][0],
        encoder_num_heads=s["heads"][0],
        decoder_num_classes=3 * s["tubelet"] * s["patch"] ** 2,
        decoder_embed_dim=s["dims"][1],
        decoder_depth=s["depths"][1],
        decoder_num_heads=s["heads"][1],
        mlp_ratio=s["ratio"],
        qkv_bias=s["qkv_bias"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        tubelet_size=s["tubelet"],
        **more,
    )
    return scattered(model, seed)


def random_settings(seed: int) -> dict:
    """Odd sizes, heads of widths that no kernel prefers, with and without biases."""
    r = random.Random(seed)
    patch, heads = r.choice([3, 5, 8]), (r.randint(1, 3), r.randint(1, 3))
    return dict(
        size=(patch * r.randint(1, 3), patch * r.randint(2, 3)),
        frames=16,
        tubelet=r.choice([2, 4]),
        patch=patch,
        heads=heads,
        dims=(heads[0] * r.choice([4, 10, 20]), heads[1] * r.choice([2, 6, 12])),
        depths=(r.randint(1, 3), r.randint(1, 3)),
        ratio=r.choice([1.5, 48 / 11, 4]),
        qkv_bias=seed % 3 != 2,
    )


def batch(model: nn.Module, seed: int = 0, n: int = 3):
    """Clips [n, 3, T, H, W]; what is masked; what the decoder skips, of visible and masked."""
    generator = torch.Generator().manual_seed(seed)
    embed = model.encoder.patch_embed
    length, (u, p, _) = model.encoder.pos_embed.shape[1], embed.proj.kernel_size
    (h, w) = embed.img_size
    frames = length // (h // p * (w // p)) * u
    clips = torch.randn(n, 3, frames, h, w, generator=generator, dtype=torch.float64)
    ranks = [torch.rand(n, length, generator=generator).argsort(1).argsort(1) for _ in range(2)]
    return clips, ranks[0] >= max(1, length // 5), ranks[1] >= length // 2


def engine_loss(clips, pred, mask, decode_mask, model, norm: bool = True):
    """The loss of the family's engine, from labels of every token."""
    u, p, _ = model.encoder.patch_embed.proj.kernel_size
    if decode_mask is None:
        return nn.functional.mse_loss(pred, videomae_labels(clips, mask, p, u, norm))
    each = (pred - videomae_labels(clips, ~decode_mask, p, u, norm)).square().mean(dim=-1)
    counted = mask[~decode_mask].reshape(len(clips), -1)
    return (each * counted).sum() / counted.sum()


def run_with(clips, mask, decode_mask=None):
    def run(model):
        x = clips.to(model.mask_token.dtype)
        pred = model(x, mask, *(() if decode_mask is None else (decode_mask,)))
        return [engine_loss(x, pred, mask, decode_mask, model), pred]

    return run


def every_run(model: nn.Module, family: str, seed: int = 0):
    clips, mask, decode_mask = batch(model, seed)
    yield run_with(clips, mask)
    if family == "videomae_v2":
        yield run_with(clips, mask, decode_mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [stand_in, official])
def test_random_models(make, family, seed, record_property):
    model = make(family, seed, **random_settings(seed))
    assert adapters.find(model)[0].FAMILY == family
    for run in every_run(model, family, seed):
        check(model, run, record_property)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [stand_in, official])
def test_curves(make, family):
    def run(model, step):
        clips, mask, decode_mask = batch(model)
        masks = mask.roll(step, dims=1), decode_mask if family == "videomae_v2" else None
        return run_with(clips, *masks)(model)[0]

    check_curves(make(family), run)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "pixels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_engines(family, norm):
    model = stand_in(family)
    clips, mask, decode_mask = batch(model)
    masks = (mask, decode_mask) if family == "videomae_v2" else (mask,)
    theirs = partial(engine_loss, mask=mask, model=model, norm=norm)
    theirs = partial(theirs, decode_mask=decode_mask if family == "videomae_v2" else None)
    loss = videomae_v2.loss if family == "videomae_v2" else videomae.loss
    found = []
    for function, dtype in ((loss, clips.dtype), (theirs, clips.dtype)) * 2:
        dtype = torch.float32 if len(found) > 1 else dtype
        x = clips.to(dtype)
        pred = model.to(dtype)(x, *masks).detach().requires_grad_()
        if function is loss:
            value = loss(pred, x, *masks, patch_size=8, normlize_target=norm)
        else:
            value = theirs(x, pred)
        found.append([value.detach(), *torch.autograd.grad(value, pred)])
    for ours, exact in zip(*found[:2], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-14)
    assert_as_good_as_torch(found[2], found[3], found[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_uint8_clips(family):
    model = stand_in(family)
    clips, mask, decode_mask = batch(model)
    pixels = (60 * clips + 128).clamp(0, 255).byte()
    mean, std = (torch.tensor(t).view(3, 1, 1, 1) for t in IMAGENET.values())
    masks = (mask, decode_mask) if family == "videomae_v2" else (mask,)
    loss = videomae_v2.loss if family == "videomae_v2" else videomae.loss
    floats = (pixels / 255 - mean) / std
    fast = mae_fast.accelerate(copy.deepcopy(model), **IMAGENET)
    want = model(floats, *masks)
    for _ in range(2):  # the first call compares both forwards
        torch.testing.assert_close(fast(pixels, *masks), want, rtol=0, atol=1e-4)
    args = dict(patch_size=8)
    torch.testing.assert_close(
        loss(want, pixels, *masks, **args), loss(want, floats, *masks, **args)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_unequal_counts_are_the_own_forwards(family):
    model = stand_in(family)
    clips, mask, _ = batch(model, n=2)
    fast = mae_fast.accelerate(copy.deepcopy(model))
    mask[0] = ~mask[0]  # reshaped across clips
    assert torch.equal(fast(clips.float(), mask), model(clips.float(), mask))
    mask[0, 0] = ~mask[0, 0]
    for each in (model, fast):
        with pytest.raises(RuntimeError, match="shape"):
            each(clips.float(), mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_fewer_tokens_is_no_mask_of_the_first_of_them(family):
    """As of a shorter clip."""
    model = stand_in(family)
    clips, mask, decode_mask = batch(model)
    given = [(mask[:, :32],)]
    given += [(mask, decode_mask[:, :32])] if family == "videomae_v2" else []
    fast = mae_fast.accelerate(copy.deepcopy(model))
    for each, masks in itertools.product((model, fast), given):
        with pytest.raises(IndexError, match="shape of the mask"):
            each(clips.float(), *masks)
    loss = videomae_v2.loss if family == "videomae_v2" else videomae.loss
    pred = model(clips.float(), mask)
    masks = (mask, decode_mask) if family == "videomae_v2" else (mask,)
    with pytest.raises(Unfused, match=r"the mask is .* not bool \[B, 64\]"):
        loss(pred, clips.float(), *(m[:, :32] for m in masks), patch_size=8)


def test_fixed_positions_are_copied_once():
    table, elsewhere = torch.randn(1, 5, 3), (torch.float64, torch.device("meta"))
    with torch.inference_mode():
        copied = videomae.fixed(table, *elsewhere)
    assert not copied.is_inference()
    assert videomae.fixed(table, *elsewhere) is copied
    for change in (lambda: table.mul_(2), lambda: setattr(table, "data", 2 * table)):
        change()
        known, copied = copied, videomae.fixed(table, *elsewhere)
        assert copied is not known
    assert videomae.fixed(table, table.dtype, table.device).data_ptr() == table.data_ptr()


def test_to_examine_a_model_changes_no_buffer():
    model = stand_in("videomae").train()
    nn.utils.parametrizations.spectral_norm(model.encoder.blocks[0].attn.qkv)
    before = copy.deepcopy(model.state_dict())
    mae_fast.explain(model)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_written_through_data(family):
    """No version counts that."""
    model = stand_in(family)
    clips, mask, _ = batch(model)
    fast = mae_fast.accelerate(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        fast(clips.float(), mask)
        for each in (model, fast):
            each.encoder.pos_embed.data.mul_(10)
        want = model(clips.float(), mask)
        assert (fast(clips.float(), mask) - want).norm() < 0.05 * want.norm()


def _learned_scale(model):
    model.encoder.blocks[1].attn.scale = nn.Parameter(torch.ones(3, 1, 1))


def _layer_scale(model):
    model.decoder.blocks[0].gamma_1 = nn.Parameter(torch.ones(12))


def _learnable_positions(model):
    model.encoder.pos_embed = nn.Parameter(torch.zeros(1, 65, 24))


REFUSED = {
    "scale: is learned (attention by cosines)": _learned_scale,
    "gamma_1: is no parameter of the fused forward": _layer_scale,
    "encoder.pos_embed: is [1, 65, 24], not [1, 64, 24]": _learnable_positions,
    "drop: is a Dropout1d": lambda m: setattr(m.encoder.blocks[0].mlp, "drop", nn.Dropout1d(0.1)),
    "act: is a ReLU, not a GELU": lambda m: setattr(m.decoder.blocks[1].mlp, "act", nn.ReLU()),
    "encoder.head: is a Linear": lambda m: setattr(m.encoder, "head", nn.Linear(24, 5)),
    "scale: is 1.0, not": lambda m: setattr(m.decoder.blocks[1].attn, "scale", 1.0),
}


@pytest.mark.parametrize("why_not", REFUSED)
def test_refusals(why_not):
    model = stand_in("videomae_v2")
    REFUSED[why_not](model)
    with pytest.raises(AccelerateError) as error:
        mae_fast.accelerate(model)
    assert why_not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_keep_less(family):
    model, kept = mae_fast.accelerate(stand_in(family, size=(16, 16), patch=2)), []
    clips, mask, _ = batch(model)
    for flag in (False, False, True, True):  # the first call of each compares both forwards
        for part in (model.encoder, model.decoder):
            setattr(part, "with_cp" if family == "videomae_v2" else "use_checkpoint", flag)
        kept.append(0)

        def pack(t):
            kept[-1] += 0 if isinstance(t, nn.Parameter) else t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(clips.float(), mask)
    assert kept[3] < kept[1] / 2
