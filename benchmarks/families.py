"""Other people's models as engines of `mae-fast bench ratio`, before and after mae_fast.accelerate.

    F=benchmarks.families
    mae-fast bench ratio --ratios 0.9 --strategies tube --model videomae_base --out DIR \
        --engines $F:videomae@PATH $F:videomae_accelerated@PATH

PATH is a checkout of the family's repository: mae_st and slowfast (--model vit_base), videomae,
videomae_v2; transformers_eager and transformers_sdpa have none. Each has the optimizer and loss of
its own loop, on clips that are normalised from uint8 within the step, before and after alike.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mae_fast
from mae_fast.adapters import videomae as own_videomae
from mae_fast.adapters import videomae_v2 as own_videomae_v2
from mae_fast.bench.baselines import official_repository as official
from mae_fast.bench.baselines import transformers_videomae as peer
from mae_fast.bench.baselines.official import normalise, normed_by_channel, patches
from mae_fast.config import ModelConfig
from mae_fast.masking import draw_ids, mask_from_keep

AFTER = "_accelerated"
DECODER_RATIO = 0.5  # of VideoMAE V2
# Of a clip as the loader gives it, [B, C, T, H, W]: (clips, noise, masked share) -> loss.
LossOf = Callable[[Tensor, Tensor, float], Tensor]
# (model, its own loss, that of a loop that uses mae_fast, whether the loop's AdamW is fused)
Made = tuple[nn.Module, LossOf, LossOf, bool]


def __getattr__(name: str) -> Callable[..., tuple[nn.Module, LossOf, bool]]:
    """An engine's maker, as mae_fast.bench.engines calls it: NAME, or NAME_accelerated."""
    family = name.removesuffix(AFTER)
    if family not in FAMILIES:
        raise AttributeError(f"no family {family} (known: {', '.join(FAMILIES)})")

    def made(cfg: ModelConfig, path: str = "") -> tuple[nn.Module, LossOf, bool]:
        model, loss, accelerated_loss, fused = FAMILIES[family](cfg, path)
        if name == family:
            return model, loss, fused
        mae_fast.accelerate(model)
        return model, accelerated_loss, fused

    return made


def _mae_st(cfg: ModelConfig, path: str) -> Made:
    model, loss, fused = official.OfficialRepository(path).parts(cfg)
    return model, loss, loss, fused


def _slowfast(cfg: ModelConfig, path: str) -> Made:
    """Its masks are its own: the noise is not used."""
    with mock.patch.object(sys, "path", [path, *sys.path]):
        settings = importlib.import_module("slowfast.config.defaults").get_cfg()
        code = importlib.import_module("slowfast.models.masked")
    folder = Path(path) / "configs" / "masked_ssl"
    settings.merge_from_file(str(folder / "k400_VIT_B_16x4_MAE_PT.yaml"))
    changes = ["NUM_GPUS", 0]
    changes += ["DATA.TRAIN_CROP_SIZE", cfg.img_size, "DATA.TEST_CROP_SIZE", cfg.img_size]
    changes += ["MVIT.EMBED_DIM", cfg.embed_dim, "MVIT.NUM_HEADS", cfg.num_heads]
    changes += ["MVIT.DEPTH", cfg.depth, "MASK.PRETRAIN_DEPTH", [cfg.depth - 1]]
    changes += ["MASK.DECODER_DEPTH", cfg.decoder_depth]
    settings.merge_from_list(changes)
    model = code.MaskMViT(settings)

    def loss(clips: Tensor, noise: Tensor, ratio: float) -> Tensor:
        torch.manual_seed(int(1e6 * float(noise[0, 0])))
        preds, labels = model([normalise(clips)])
        pairs = zip(preds, labels, strict=True)
        return sum(weight * F.mse_loss(p, label) for p, (label, weight) in pairs)

    return model, loss, loss, False


def _transformers(attention: str, cfg: ModelConfig, path: str) -> Made:
    """Trainer's default optimizer is torch's fused AdamW."""
    model, loss, _ = peer.TransformersVideoMAE(attention, attention).parts(peer.nearest(cfg))
    return model, loss, loss, True


def _videomae(cfg: ModelConfig, path: str) -> Made:
    cfg = peer.nearest(cfg)
    model = _pretrain_model(_module(path, "modeling_pretrain"), cfg)

    def loss(clips: Tensor, noise: Tensor, ratio: float) -> Tensor:
        clips, masked = peer.normalise(clips), peer.hidden(noise, ratio)
        labels = _labels(clips, cfg)[masked].unflatten(0, (len(clips), -1))
        return F.mse_loss(model(clips, masked), labels)

    def accelerated(clips: Tensor, noise: Tensor, ratio: float) -> Tensor:
        clips, masked = peer.normalise(clips), peer.hidden(noise, ratio)
        return own_videomae.loss(model(clips, masked), clips, masked, cfg.patch_size)

    return model, loss, accelerated, False


def _videomae_v2(cfg: ModelConfig, path: str) -> Made:
    cfg = peer.nearest(cfg)
    model = _pretrain_model(_module(path, "models.modeling_pretrain"), cfg)

    def masks(clips: Tensor, noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """What the encoder does not see, and what the decoder skips."""
        seed = int(1e6 * float(noise[0, 0]))
        drawn = dict(seed=seed, step=0, samples=torch.arange(len(clips)))
        keep, _ = draw_ids("running_cell", cfg.grid, DECODER_RATIO, **drawn)
        return peer.hidden(noise, ratio), mask_from_keep(keep, cfg.num_patches).bool()

    def loss(clips: Tensor, noise: Tensor, ratio: float) -> Tensor:
        clips, (masked, skipped) = peer.normalise(clips), masks(clips, noise, ratio)
        labels = _labels(clips, cfg)[~skipped].unflatten(0, (len(clips), -1))
        each = (model(clips, masked, skipped) - labels).square().mean(dim=-1)
        counted = masked[~skipped].view_as(each)
        return (each * counted).sum() / counted.sum()

    def accelerated(clips: Tensor, noise: Tensor, ratio: float) -> Tensor:
        clips, (masked, skipped) = peer.normalise(clips), masks(clips, noise, ratio)
        pred = model(clips, masked, skipped)
        return own_videomae_v2.loss(pred, clips, masked, skipped, cfg.patch_size)

    return model, loss, accelerated, False


def _pretrain_model(code: ModuleType, cfg: ModelConfig) -> nn.Module:
    return code.PretrainVisionTransformer(
        img_size=cfg.img_size,
        patch_size=cfg.patch_size,
        encoder_embed_dim=cfg.embed_dim,
        encoder_depth=cfg.depth,
        encoder_num_heads=cfg.num_heads,
        decoder_num_classes=cfg.pred_dim,
        decoder_embed_dim=cfg.decoder_embed_dim,
        decoder_depth=cfg.decoder_depth,
        decoder_num_heads=cfg.decoder_num_heads,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        tubelet_size=cfg.t_patch_size,
    )


@torch.no_grad()
def _labels(clips: Tensor, cfg: ModelConfig) -> Tensor:
    """What VideoMAE's loops compute as labels of every token: [B, L, P]."""
    mean, std = peer.imagenet(clips.device)
    pixels = patches(clips * std + mean, cfg.t_patch_size, cfg.patch_size, "nthwupqc").flatten(2)
    return normed_by_channel(pixels, cfg.in_chans)


def _module(path: str, name: str) -> ModuleType:
    """A module of a checkout, with stand-ins for the names of timm that it uses in pre-training."""
    layers = {"to_2tuple": official.to_2tuple, "trunc_normal_": nn.init.trunc_normal_}
    contents = {
        "timm.models.layers": {**layers, "drop_path": None},  # never called at a drop path of 0
        "timm.models.registry": {"register_model": lambda function: function},
    }
    with mock.patch.object(sys, "path", [path, *sys.path]):
        return official.import_beside(name, contents)


FAMILIES: dict[str, Callable[[ModelConfig, str], Made]] = {
    "mae_st": _mae_st,
    "slowfast": _slowfast,
    "transformers_eager": partial(_transformers, "eager"),
    "transformers_sdpa": partial(_transformers, "sdpa"),
    "videomae": _videomae,
    "videomae_v2": _videomae_v2,
}
