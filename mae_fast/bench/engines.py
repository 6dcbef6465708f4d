"""Training steps by name: ours, the official code rung by rung, a peer's, or anybody's.

built = build("official_sdpa", cfg)
built.step(clips, noise, mask_ratio=0.75)
built.step(clips, noise, mask_ratio=0.9, encode_all=True)  # masking at 0%
"""

import functools
import importlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mae_fast.bench.baselines import BASELINES, OFFICIAL, PEERS
from mae_fast.bench.baselines.official_repository import OfficialRepository
from mae_fast.bench.baselines.training import Baseline, Built, LossOf
from mae_fast.bench.baselines.transformers_videomae import VIDEOMAE_B, nearest
from mae_fast.bench.flops import BASE_RATIO, forward_flop, step_work
from mae_fast.bench.ours import Ours
from mae_fast.config import ModelConfig, preset
from mae_fast.config_file import load_config
from mae_fast.errors import ConfigError
from mae_fast.forward import SAVINGS
from mae_fast.masking import draw_ids, num_keep
from mae_fast.ops.work import Both

OURS, QUICK = "mae_fast", "quick"
WITHOUT = OURS + "_without_"  # one exact saving switched off
REPOSITORY = "official_repository"  # @PATH: a checkout of facebookresearch/mae_st
FP32 = "_fp32"  # after an engine's name: in fp32, whatever the others compute in
ALIASES = {"ours": OURS, "transformers": "transformers_sdpa"}


@dataclass(frozen=True)
class Masking:
    """What a step is given to hide `ratio` of the patches by a strategy: `keep` of them stay, and
    `encode_all` shows the encoder all of them."""

    strategy: str
    ratio: float
    keep: int
    encode_all: bool

    @classmethod
    def of(cls, cfg: ModelConfig, ratio: float, strategy: str = "random") -> "Masking":
        return cls(strategy, ratio, num_keep(strategy, cfg.grid, ratio or BASE_RATIO), ratio == 0)

    def step_ratio(self, cfg: ModelConfig) -> float:
        """The ratio at which int(L * (1 - ratio)), the official rule, keeps `keep` patches."""
        return 1 - (self.keep + 0.5) / cfg.num_patches

    def official_ratio(self, cfg: ModelConfig) -> float:
        """The ratio by which the official FLOP are counted: 0 where the encoder sees all."""
        return 0.0 if self.encode_all else self.step_ratio(cfg)

    def noise(self, cfg: ModelConfig, clips: int, seed: int, step: int, device: str) -> Tensor:
        """Keys [clips, L] whose order is the mask: those of the kept patches are the smallest."""
        samples = torch.arange(clips, device=device)
        ratio = self.ratio or BASE_RATIO
        ids = draw_ids(self.strategy, cfg.grid, ratio, seed=seed, step=step, samples=samples)
        order = torch.cat(ids, dim=1).long()
        ranks = torch.arange(order.shape[1], device=device) / order.shape[1]
        return torch.empty(order.shape, device=device).scatter_(1, order, ranks.expand_as(order))


@functools.cache
def config_of(model: str) -> ModelConfig:
    """A model by name. ConfigError where there is none."""
    if model == QUICK:
        return preset("vit_tiny", img_size=64, depth=2, decoder_depth=2)
    if model == "videomae_base":
        return VIDEOMAE_B
    if model.endswith(".toml"):
        return load_config(model).model
    name, _, variant = model.partition("/")
    return preset(name, *([variant] if variant else []))


def name_of(engine: str) -> str:
    """An engine's own name. ConfigError where there is no such engine."""
    name = ALIASES.get(engine, engine)
    plain = plainly(name)
    known = [OURS, *(WITHOUT + saving for saving in SAVINGS), *BASELINES]
    if plain not in known and ":" not in name and not plain.startswith(f"{REPOSITORY}@"):
        known = ", ".join([*known, f"{REPOSITORY}@PATH"])
        raise ConfigError(
            f"unknown engine {engine!r} (known: {known}, or MODULE:FUNCTION[@PATH]; NAME{FP32} is "
            "one in fp32, whatever the others compute in)"
        )
    return name


def plainly(name: str) -> str:
    """An engine without its own precision: NAME[@PATH] of NAME_fp32[@PATH]."""
    where, at, path = name.partition("@")
    return where.removesuffix(FP32) + at + path


def label(name: str) -> str:
    """An engine in records: no path, no module."""
    return name.partition("@")[0].rpartition(":")[2]


def model_of(name: str, cfg: ModelConfig) -> ModelConfig:
    """The model that an engine trains where `cfg` is asked for: a peer's is only the nearest."""
    return nearest(cfg) if plainly(name) in PEERS else cfg


def why_not(name: str, cfg: ModelConfig, masking: Masking) -> str | None:
    """Why an engine has no step of this kind, or None."""
    name = plainly(name)
    if name in PEERS and cfg.variant != "mae_st":
        return f"a peer of mae_st, not of {cfg.variant}"
    if (":" in name or name.startswith((WITHOUT, REPOSITORY))) and masking.encode_all:
        return "0% is known of our own engines only"
    return None


@dataclass(frozen=True)
class Foreign(Baseline):
    """MODULE:FUNCTION[@PATH], which is called with cfg (and PATH), and gives (model, loss_of[,
    fused]): loss_of(clips uint8, noise [B, L], mask_ratio) is the loss of one forward; the model's
    parameters are trained by the official optimizer, fused or not. The model may be one of
    mae_fast.accelerate."""

    name: str

    def parts(self, cfg: ModelConfig) -> tuple[nn.Module, LossOf, bool]:
        where, _, path = self.name.partition("@")
        module, _, function = where.partition(":")
        try:
            made = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as e:
            raise ConfigError(f"engine {self.name}: {e}") from e
        model, loss_of, *fused = made(cfg, *([path] if path else []))
        return model, lambda *args: loss_of(*args[:3]), (fused or [True])[0]


def build(name: str, cfg: ModelConfig, device: str = "cpu", precision: str = "fp32") -> Built:
    """An engine with its own starting values."""
    where, _, path = name.partition("@")
    if where.endswith(FP32):
        return build(plainly(name), cfg, device, "fp32")
    if where.startswith(OURS):
        engine = Ours([where.removeprefix(WITHOUT)] if where != OURS else ())
    elif where == REPOSITORY:
        engine = OfficialRepository(path)
    else:
        engine = BASELINES.get(where) or Foreign(name)
    return engine.build(model_of(name, cfg), device=device, precision=precision)


def twin(name: str) -> str | None:
    """The engine whose loss this one's is to be, from the same weights and mask: ours; of another's
    accelerated model, the same as it was."""
    name = plainly(name)
    if ":" not in name:
        ours = name.startswith((OURS, REPOSITORY)) or name in OFFICIAL
        return OURS if ours else None
    before = label(name).removesuffix("_accelerated")
    return name.replace(label(name), before) if before != label(name) else None


def source_of(name: str) -> str | None:
    """Of the code of an engine that is a checkout, for records."""
    where, _, path = plainly(name).partition("@")
    return OfficialRepository(path).source() if where == REPOSITORY else None


@torch.no_grad()
def same_weights(built: Built) -> None:
    """Matrices drawn anew by their names, so that engines of one model begin at one place."""
    generator = torch.Generator().manual_seed(0)
    for _, p in sorted(built.model.named_parameters()):
        if p.ndim > 1:
            values = torch.empty(p.shape, device="cpu").normal_(0, 0.02, generator=generator)
            p.copy_(values)


def work(
    name: str, cfg: ModelConfig, clips: int, masking: Masking, dtype: torch.dtype = torch.float32
) -> dict[tuple[str, str], Both] | None:
    """What a step really does at the least; None for a model that is not counted. A baseline does
    what ours does without its savings, at its own number of tokens."""
    name = plainly(name)
    if ":" in name:
        return None
    ratio, cfg = masking.step_ratio(cfg), model_of(name, cfg)
    official = name in OFFICIAL or name.startswith(REPOSITORY)
    every = official and cfg.variant == "mae_st"
    without = SAVINGS
    if name.startswith(OURS):
        without = () if name == OURS else (name.removeprefix(WITHOUT),)
    return step_work(cfg, clips, ratio, without, masking.encode_all, every, dtype)


def flop_limit(cfg: ModelConfig, masking: Masking) -> float:
    """How much faster than 0% the forward would be by its FLOP alone, by the official count."""
    return forward_flop(cfg, 0.0) / forward_flop(cfg, masking.official_ratio(cfg))
