"""Training steps of other people's models, before and after mae_fast.accelerate(model).

    python -m benchmarks.bench_accelerate --batch 2 --mae-st PATH --videomae PATH \
        --videomae-v2 PATH --slowfast PATH --out benchmarks/results/accelerate.jsonl

Each family at its B size and its own defaults, 90% masked, on float clips as its loader gives them;
the paths are checkouts of the families' repositories, and a family without one is left out. Before
anything is timed, the same weights and masks must give the same loss before and after. Steps are
taken in turn, each with the optimizer of the family's own loop, the same before and after. Peak
memory is that of a process of its own.
`--quick` keeps the harness working and says nothing.
"""

import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import mae_fast
from benchmarks.steps import measure_memory, peak_memory, time_rounds
from mae_fast.adapters import videomae, videomae_v2
from mae_fast.bench.baselines.official_repository import OfficialRepository
from mae_fast.bench.baselines.training import Built, make_optimizer, make_step
from mae_fast.bench.baselines.transformers_videomae import VIDEOMAE_B, TransformersVideoMAE, nearest
from mae_fast.bench.records import append
from mae_fast.bench.timing import ratio
from mae_fast.config import ModelConfig, preset
from mae_fast.environment import environment
from mae_fast.masking import draw_ids, mask_from_keep

AFTER = "accelerated"
RATIO, DECODER_RATIO = 0.9, 0.5  # the second is VideoMAE V2's


@dataclass(frozen=True)
class Args:
    """Compare training steps before and after the one line.

    Args:
        families: mae_st, slowfast, transformers, videomae, videomae_v2; by default all that run.
        batch: clips a step.
        rounds: timed steps of each engine.
        precision: fp32, or bf16 by autocast.
        mae_st: a checkout of facebookresearch/mae_st.
        videomae: a checkout of MCG-NJU/VideoMAE.
        videomae_v2: a checkout of OpenGVLab/VideoMAEv2.
        slowfast: a checkout of facebookresearch/SlowFast, all that it imports being installed.
        out: append the records to this file.
        quick: tiny models and two rounds, to see that the harness works.
        memory: only run two steps of this engine of the one family, and print the peak memory.
    """

    families: tuple[str, ...] = ()
    batch: int = 2
    rounds: int = 7
    precision: str = "fp32"
    mae_st: str = ""
    videomae: str = ""
    videomae_v2: str = ""
    slowfast: str = ""
    out: str = ""
    quick: bool = False
    memory: str = ""


class Case(NamedTuple):
    """A family's model, the loss of its own loop, and that of a loop that uses mae_fast."""

    model: nn.Module
    cfg: ModelConfig
    loss: Callable[[nn.Module, Tensor], Tensor]
    accelerated_loss: Callable[[nn.Module, Tensor], Tensor]
    fused_adamw: bool


def main(args: Args) -> None:
    for family in args.families or [f for f in FAMILIES if _can_run(f, args)]:
        if args.memory:
            print(peak_memory(build(family, args.memory, args), make_clips(family, args)))
        else:
            compare(family, args)


def _can_run(family: str, args: Args) -> bool:
    return family == "transformers" or bool(getattr(args, family))


def compare(family: str, args: Args) -> None:
    """Check, time and record one family."""
    names = [*FAMILIES[family][0], AFTER]
    built = {name: build(family, name, args) for name in names}
    clips = make_clips(family, args)
    check_losses(built, clips, args.precision)
    step, forward_backward = time_rounds(built, lambda: (clips,), 2 if args.quick else args.rounds)
    built.clear()  # what follows needs the memory
    engines = {
        name: {
            "clips": args.batch,
            "until_update": forward_backward[name],
            "peak_memory_mb": measure(family, name, args),
        }
        for name in names
    }
    record = {
        "kind": "steps",
        "what": "training step before and after mae_fast.accelerate, float clips, interleaved",
        "model": "quick" if args.quick else "vit_base",
        "family": family,
        "batch_clips": args.batch,
        "ratio": RATIO,
        "precision": args.precision,
        "device": "cpu",
        "engines": engines,
        "seconds": step,
        "environment": environment(),
    }
    for name, engine in engines.items():
        faster = [ratio(of[name], of[AFTER]) for of in (step, forward_backward)]
        print(
            f"{family:13} {name:12} {statistics.median(step[name]):8.3f} s a step, accelerated "
            f"{faster[0]:5.2f}x, forward + backward {faster[1]:5.2f}x, "
            f"{engine['peak_memory_mb']:6.0f} MB"
        )
    if args.out:
        append(args.out, record)


def build(family: str, engine: str, args: Args) -> Built:
    """The family's model as `engine` has it, its optimizer and one training step."""
    engines, make = FAMILIES[family]
    accelerated = engine == AFTER
    torch.manual_seed(0)
    case = make(args, engines[-1] if accelerated else engine)
    model = case.model.train()
    if accelerated:
        mae_fast.accelerate(model)
    optimizer = make_optimizer(model, case.fused_adamw)
    loss = case.accelerated_loss if accelerated else case.loss

    def loss_of(clips: Tensor, *_) -> Tensor:
        return loss(model, clips)

    return Built(model, optimizer, make_step(model, optimizer, loss_of, RATIO, args.precision))


def make_clips(family: str, args: Args) -> Tensor:
    """Random clips [B, C, T, H, W], as normalised pixels."""
    cfg = _config(family, args)
    size = (args.batch, 3, cfg.num_frames, cfg.img_size, cfg.img_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def check_losses(built: dict[str, Built], clips: Tensor, precision: str) -> None:
    """The first step's loss, which also warms up: the same weights and masks, the same loss."""
    losses = {}
    state = {k: v.clone() for k, v in built[AFTER].model.state_dict().items()}
    for name, engine in built.items():
        engine.model.load_state_dict(state)
        torch.manual_seed(1)
        losses[name] = float(engine.step(clips))
    limit = 1e-5 if precision == "fp32" else 1e-2
    for name, loss in losses.items():
        if not abs(loss / losses[AFTER] - 1) <= limit:
            raise SystemExit(f"{name} gives loss {loss}, {AFTER} {losses[AFTER]}: nothing is timed")


def measure(family: str, engine: str, args: Args) -> float:
    """Peak resident memory in MB of a process of its own that does two steps of one engine."""
    found = ["--families", family, "--memory", engine]
    found += ["--batch", str(args.batch), "--precision", args.precision]
    for path in ("mae_st", "videomae", "videomae_v2", "slowfast"):
        found += ["--" + path.replace("_", "-"), getattr(args, path)]
    found += ["--quick"] if args.quick else []
    return measure_memory("benchmarks.bench_accelerate", found)


def _config(family: str, args: Args) -> ModelConfig:
    """The family's sizes; what else a configuration says is mae_st's."""
    if args.quick:
        cfg = preset("vit_tiny", img_size=32, depth=2, decoder_depth=2)
        official = family in ("mae_st", "slowfast")
        return cfg if official else nearest(cfg)
    return preset("vit_base") if family in ("mae_st", "slowfast") else VIDEOMAE_B


def _masked(strategy: str, cfg: ModelConfig, clips: Tensor, share: float) -> Tensor:
    """A mask [B, L] drawn anew, True where masked."""
    seed = int(torch.randint(1 << 30, ()))
    samples = torch.arange(len(clips), device=clips.device)
    keep, _ = draw_ids(strategy, cfg.grid, share, seed=seed, step=0, samples=samples)
    return mask_from_keep(keep, cfg.num_patches).bool()


def _mae_st(args: Args, engine: str) -> Case:
    cfg = _config("mae_st", args)
    model = OfficialRepository(args.mae_st).build(cfg, RATIO).model

    def loss(model: nn.Module, clips: Tensor) -> Tensor:
        return model(clips, mask_ratio=RATIO)[0]

    return Case(model, cfg, loss, loss, fused_adamw=False)


def _slowfast(args: Args, engine: str) -> Case:
    cfg = _config("slowfast", args)
    with mock.patch.object(sys, "path", [args.slowfast, *sys.path]):
        settings = importlib.import_module("slowfast.config.defaults").get_cfg()
        code = importlib.import_module("slowfast.models.masked")
    folder = Path(args.slowfast) / "configs" / "masked_ssl"
    settings.merge_from_file(str(folder / "k400_VIT_B_16x4_MAE_PT.yaml"))
    changes = ["NUM_GPUS", 0]
    if args.quick:
        changes += ["DATA.TRAIN_CROP_SIZE", cfg.img_size, "DATA.TEST_CROP_SIZE", cfg.img_size]
        changes += ["MVIT.EMBED_DIM", cfg.embed_dim, "MVIT.NUM_HEADS", cfg.num_heads]
        changes += ["MVIT.DEPTH", cfg.depth, "MASK.PRETRAIN_DEPTH", [cfg.depth - 1]]
        changes += ["MASK.DECODER_DEPTH", cfg.decoder_depth]
    settings.merge_from_list(changes)

    def loss(model: nn.Module, clips: Tensor) -> Tensor:
        preds, labels = model([clips])
        pairs = zip(preds, labels, strict=True)
        return sum(weight * F.mse_loss(p, label) for p, (label, weight) in pairs)

    return Case(code.MaskMViT(settings), cfg, loss, loss, fused_adamw=False)


def _transformers(args: Args, attention: str) -> Case:
    cfg = _config("transformers", args)
    model = TransformersVideoMAE(attention, attention).build(cfg, RATIO).model

    def loss(model: nn.Module, clips: Tensor) -> Tensor:
        masked = _masked("tube", cfg, clips, RATIO)
        return model(clips.transpose(1, 2), bool_masked_pos=masked).loss

    # Trainer's default optimizer is torch's fused AdamW.
    return Case(model, cfg, loss, loss, fused_adamw=True)


def _videomae(args: Args, engine: str) -> Case:
    cfg = _config("videomae", args)
    code = _module(args.videomae, "modeling_pretrain")
    model = _pretrain_model(code, cfg)

    def loss(model: nn.Module, clips: Tensor) -> Tensor:
        masked = _masked("tube", cfg, clips, RATIO)
        labels = _labels(clips, cfg)[masked].unflatten(0, (len(clips), -1))
        return F.mse_loss(model(clips, masked), labels)

    def accelerated(model: nn.Module, clips: Tensor) -> Tensor:
        masked = _masked("tube", cfg, clips, RATIO)
        return videomae.loss(model(clips, masked), clips, masked, cfg.patch_size)

    return Case(model, cfg, loss, accelerated, fused_adamw=False)


def _videomae_v2(args: Args, engine: str) -> Case:
    cfg = _config("videomae_v2", args)
    code = _module(args.videomae_v2, "models.modeling_pretrain")
    model = _pretrain_model(code, cfg)

    def masks(clips: Tensor) -> tuple[Tensor, Tensor]:
        strategies = (("tube", RATIO), ("running_cell", DECODER_RATIO))
        return tuple(_masked(s, cfg, clips, share) for s, share in strategies)

    def loss(model: nn.Module, clips: Tensor) -> Tensor:
        masked, skipped = masks(clips)
        labels = _labels(clips, cfg)[~skipped].unflatten(0, (len(clips), -1))
        each = (model(clips, masked, skipped) - labels).square().mean(dim=-1)
        counted = masked[~skipped].view_as(each)
        return (each * counted).sum() / counted.sum()

    def accelerated(model: nn.Module, clips: Tensor) -> Tensor:
        masked, skipped = masks(clips)
        pred = model(clips, masked, skipped)
        return videomae_v2.loss(pred, clips, masked, skipped, cfg.patch_size)

    return Case(model, cfg, loss, accelerated, fused_adamw=False)


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
    shape = (1, 3, 1, 1, 1)
    mean, std = (torch.tensor(t).view(shape).to(clips.device) for t in videomae.IMAGENET)
    pixels = (clips * std + mean).unflatten(2, (-1, cfg.t_patch_size))
    pixels = pixels.unflatten(4, (-1, cfg.patch_size)).unflatten(6, (-1, cfg.patch_size))
    cells = torch.einsum("bctuhpwq->bthwupqc", pixels).flatten(4, 6).flatten(1, 3)  # [B, L, n, C]
    centred = cells - cells.mean(dim=-2, keepdim=True)
    return (centred / (cells.var(dim=-2, keepdim=True).sqrt() + 1e-6)).flatten(2)


def _module(path: str, name: str) -> ModuleType:
    """A module of a checkout, with stand-ins for the names of timm that it uses in pre-training."""
    timm = {name: ModuleType(name) for name in ("timm.models.layers", "timm.models.registry")}
    timm["timm.models.layers"].__dict__.update(
        drop_path=None,  # never called at a drop path of 0
        to_2tuple=lambda x: x if isinstance(x, tuple) else (x, x),
        trunc_normal_=nn.init.trunc_normal_,
    )
    timm["timm.models.registry"].register_model = lambda function: function
    packages = {name: ModuleType(name) for name in ("timm", "timm.models")}
    paths = mock.patch.object(sys, "path", [path, *sys.path])
    with mock.patch.dict(sys.modules, packages | timm), paths:  # and as they were afterwards
        return importlib.import_module(name)


# How a family is built, and what it offers before: accelerated starts from the last one.
FAMILIES = {
    "mae_st": (["eager"], _mae_st),
    "slowfast": (["eager"], _slowfast),
    "transformers": (["eager", "sdpa"], _transformers),
    "videomae": (["eager"], _videomae),
    "videomae_v2": (["eager"], _videomae_v2),
}


if __name__ == "__main__":
    main(tyro.cli(Args))
