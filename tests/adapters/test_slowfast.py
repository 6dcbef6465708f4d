"""PySlowFast's MaskMViT: the stand-in, and their own code where SLOWFAST_REPOSITORY names a
checkout that imports.
"""

import copy
import random
from pathlib import Path

import pytest
import torch
from compare import check, check_curves, repository, results, scattered
from op_checks import assert_as_good_as_torch
from stand_ins import MaskMViT
from torch import Tensor, nn

import mae_fast
from mae_fast import adapters
from mae_fast.errors import AccelerateError


def stand_in(seed: int = 0, **settings) -> nn.Module:
    torch.manual_seed(seed)
    return scattered(MaskMViT(**settings), seed)


def official(seed: int = 0, **settings) -> nn.Module:
    """The repository's model, its MAE configuration changed to the stand-in's settings."""
    s = dict(size=32, frames=8, patch=8, t_patch=2, dims=(24, 64), heads=(3, 1), depths=(2, 2))
    s |= dict(qkv_bias=True, cls=True, sep_pos_embed=True, decoder_sep_pos_embed=False)
    s |= dict(norm_pix=True, time_stride_loss=True, mask_ratio=0.7, tube=False) | settings
    code = repository("SLOWFAST_REPOSITORY", "slowfast.models.masked")
    cfg = repository("SLOWFAST_REPOSITORY", "slowfast.config.defaults").get_cfg()
    folder = Path(code.__file__).parents[2] / "configs" / "masked_ssl"
    cfg.merge_from_file(str(folder / "k400_VIT_B_16x4_MAE_PT.yaml"))
    size = [s["t_patch"], s["patch"], s["patch"]]
    changes = {
        "DATA.NUM_FRAMES": s["frames"],
        "DATA.TRAIN_CROP_SIZE": s["size"],
        "DATA.TEST_CROP_SIZE": s["size"],
        "MVIT.PATCH_KERNEL": size,
        "MVIT.PATCH_STRIDE": size,
        "MVIT.EMBED_DIM": s["dims"][0],
        "MVIT.NUM_HEADS": s["heads"][0],
        "MVIT.DEPTH": s["depths"][0],
        "MVIT.QKV_BIAS": s["qkv_bias"],
        "MVIT.CLS_EMBED_ON": s["cls"],
        "MVIT.SEP_POS_EMBED": s["sep_pos_embed"],
        "MASK.PRETRAIN_DEPTH": [s["depths"][0] - 1],
        "MASK.DECODER_DEPTH": s["depths"][1],
        "MASK.DECODER_EMBED_DIM": s["dims"][1],
        "MASK.DECODER_SEP_POS_EMBED": s["decoder_sep_pos_embed"],
        "MASK.NORM_PRED_PIXEL": s["norm_pix"],
        "MASK.TIME_STRIDE_LOSS": s["time_stride_loss"],
        "MASK.MAE_RND_MASK": s.get("random_mask", True),
        "MASK.PRED_HOG": s.get("hog", False),
        "AUG.MASK_RATIO": s["mask_ratio"],
        "AUG.MASK_TUBE": s["tube"],
        "NUM_GPUS": 0,
    }
    cfg.merge_from_list([x for change in changes.items() for x in change])
    torch.manual_seed(seed)
    return scattered(code.MaskMViT(cfg), seed)


def random_settings(seed: int) -> dict:
    """Odd sizes, a head whose width no kernel prefers, all that the configuration varies."""
    r = random.Random(seed)
    patch, t_patch, heads = r.choice([3, 5, 8]), r.choice([1, 2, 3]), r.randint(1, 3)
    return dict(
        patch=patch,
        t_patch=t_patch,
        size=patch * r.randint(2, 3),
        frames=t_patch * r.randint(2, 4),
        heads=(heads, 1),
        dims=(heads * r.choice([4, 10, 20]), r.choice([64, 100])),  # 64 a head, or one of all
        depths=(r.randint(1, 3), r.randint(1, 3)),
        qkv_bias=seed % 3 != 2,
        cls=seed % 4 != 3,
        sep_pos_embed=seed % 2 == 0,
        decoder_sep_pos_embed=seed % 5 == 4,
        norm_pix=seed % 3 != 0,
        time_stride_loss=seed % 4 < 2,
        tube=seed % 3 == 1,
    )


def batch(model: nn.Module, n: int = 3) -> list[Tensor]:
    """[clip], in fp64."""
    t, h, w = model.patch_dims
    u, p, _ = model.patch_embed.proj.kernel_size
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, t * u, h * p, w * p, generator=generator, dtype=torch.float64)]


def run_with(clip, meta=None, mask=None):
    def run(model):
        x = clip.to(model.mask_token.dtype)
        (pred,), ((label, weight, *_),) = model([x] if mask is None else [x, meta, mask])
        return [weight * nn.functional.mse_loss(pred, label), pred, label]

    return run


def loader_mask(model: nn.Module, n: int = 3, count: int = 9) -> Tensor:
    """A mask [n, T, H, W] of 0 and 1 as PySlowFast's loader makes it."""
    length = torch.tensor(model.patch_dims).prod()
    order = torch.rand(n, length, generator=torch.Generator().manual_seed(2)).argsort(1).argsort(1)
    return (order < count).float().view(n, *model.patch_dims)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", [stand_in, official])
def test_random_models(make, seed, record_property):
    model = make(seed, **random_settings(seed))
    assert adapters.find(model)[0].FAMILY == "slowfast"
    check(model, run_with(*batch(model)), record_property)


@pytest.mark.parametrize("make", [stand_in, official])
def test_masks_of_the_loader(make):
    model = make(random_mask=False)
    for count in (9, 40):  # of 64, where the ratio rounds in fp32
        mask = loader_mask(model, count=count)
        check(model, run_with(*batch(model), None, mask))
    check(model, run_with(*batch(model)))  # without one it draws its own


@pytest.mark.parametrize("make", [stand_in, official])
def test_hog_labels_are_the_models_own(make):
    model = make(hog=True, patch=16, size=32)  # whose histogram is in fp32, whatever the dtype
    run = run_with(*batch(model))
    plain = results(model, run)
    ours = results(mae_fast.accelerate(copy.deepcopy(model)), run)
    assert torch.equal(ours["output 2"], plain["output 2"])
    pixels, wide = make(patch=16, size=32).double(), make(hog=True, patch=16, size=32).double()
    label = plain["output 2"].double()
    pixels.pred_head.projections = wide.pred_head.projections
    pixels.load_state_dict(wide.state_dict(), strict=False)

    def exact(model):
        (pred,), _ = model([run.__closure__[0].cell_contents])
        return [nn.functional.mse_loss(pred, label), pred, label]

    want = results(pixels, exact)
    assert_as_good_as_torch(*(list(r.values()) for r in (ours, plain, want)))


@pytest.mark.parametrize("make", [stand_in, official])
def test_curves(make):
    model = make()
    check_curves(model, lambda model, step: run_with(*batch(model))(model)[0])


def test_what_its_forward_leaves_behind():
    model = mae_fast.accelerate(stand_in(), verify=False)
    (pred,), ((label, weight),) = model([batch(model)[0].float()], return_all=True)
    assert (model.counter, weight) == (1, 1.0) and not label.requires_grad
    assert model.patch_info == (3, 4, 32, 32, 8, 1, 4, 4, 4)
    assert pred.shape == label.shape == (3 * 45, 192)


def test_uint8_clips():
    model = stand_in()
    clip = (40 * batch(model)[0] + 128).clamp(0, 255).byte()
    for mean, std in ((0.45, 0.225), ((0.4, 0.45, 0.5), (0.2, 0.225, 0.25))):
        fast = mae_fast.accelerate(copy.deepcopy(model), mean=mean, std=std)
        mean, std = (torch.tensor(t).view(-1, 1, 1, 1) for t in (mean, std))
        for _ in range(2):  # the first call compares both forwards
            torch.manual_seed(0)
            (want,), ((want_label, _),) = model([(clip / 255 - mean) / std])
            torch.manual_seed(0)
            (pred,), ((label, _),) = fast([clip])
            torch.testing.assert_close(pred, want, rtol=0, atol=1e-4)
            torch.testing.assert_close(label, want_label, rtol=0, atol=1e-4)


def test_calls_that_are_left_to_the_own_forward(caplog):
    model = mae_fast.accelerate(stand_in())
    clip = batch(model)[0].float()
    model.cfg.VIS_MASK.ENABLE = True
    model([clip])
    assert "its own forward runs: cfg.VIS_MASK.ENABLE is on" in caplog.text
    model.cfg.VIS_MASK.ENABLE = False
    model.cfg.AUG.MASK_RATIO = 0.99
    model([clip])
    assert "its own forward runs: the mask leaves 0 tokens" in caplog.text


@pytest.mark.parametrize("make", [stand_in, official])
def test_hooks_of_blocks_see_the_shape_of_tokens(make):
    """Given and returned beside them: out[0] is the tokens, not the first clip's."""
    model, seen = make(), []
    for block in (model.blocks[0], model.pred_head.transforms[0][0]):
        block.register_forward_hook(lambda _, args, out: seen.append((*args, *out)))
    run_with(*batch(model))(model)
    theirs = [(x.shape, thw, y.shape, shape) for x, thw, y, shape in seen]
    fast = mae_fast.accelerate(model, verify=False)
    seen.clear()
    run_with(*batch(model))(fast)
    assert [(x.shape, thw, y.shape, shape) for x, thw, y, shape in seen] == theirs


def test_a_mask_of_fewer_tokens_is_no_mask_of_the_first_of_them():
    model = stand_in(random_mask=False)
    clip, mask = batch(model)[0].float(), loader_mask(model, count=40)
    fast = mae_fast.accelerate(copy.deepcopy(model))
    fast([clip, None, mask])
    for each in (model, fast):
        with pytest.raises(RuntimeError, match="must match the size"):
            each([clip, None, mask[:, :2]])


REFUSED = {
    "cfg.MASK.MAE_ON: is False": lambda m: setattr(m.cfg.MASK, "MAE_ON", False),
    "PER_FRAME_MASKING: is True": lambda m: setattr(m.cfg.MASK, "PER_FRAME_MASKING", True),
    "use_2d_patch: is True": lambda m: setattr(m, "use_2d_patch", True),
    "blocks.0.attn.pool_k: is a Conv3d": lambda m: m.blocks[0].attn.add_module(
        "pool_k", nn.Conv3d(8, 8, 3)
    ),
    "rel_pos_h: is no parameter": lambda m: m.blocks[1].attn.register_parameter(
        "rel_pos_h", nn.Parameter(torch.zeros(5, 8))
    ),
    "residual_pooling: is True": lambda m: setattr(m.blocks[1].attn, "residual_pooling", True),
    "transforms: is 2, not 1": lambda m: m.pred_head.transforms.append(nn.Sequential()),
    "pos_embed_temporal: is [1, 3, 24]": lambda m: setattr(
        m, "pos_embed_temporal", nn.Parameter(torch.zeros(1, 3, 24))
    ),
}


@pytest.mark.parametrize("why_not", REFUSED)
def test_refusals(why_not):
    model = stand_in()
    REFUSED[why_not](model)
    with pytest.raises(AccelerateError) as error:
        mae_fast.accelerate(model)
    assert why_not in str(error.value)
