"""A fine-tuning run's settings and the official recipes by name: TOML in the same form as
`pretrain`'s, with [classifier], [augment] and [test] beside [model], [data] and [train].
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mae_fast import config_file
from mae_fast.classifier import ClassifierConfig, FamilyName
from mae_fast.config import DataConfig, ModelConfig, TrainConfig, preset
from mae_fast.fields import check_fields, require
from mae_fast.tasks.ava.config import VIDEOMAE_AVA, AvaConfig
from mae_fast.tasks.randaugment import parse

Sampling = Literal["seconds", "frames", "uniform"]


@dataclass(frozen=True)
class HeadConfig:
    """The classifier on the encoder of [model]; see mae_fast.ClassifierConfig."""

    family: FamilyName = "mae_st"
    """whose order of pooling, norms, positions and pixels: mae_st, slowfast, videomae (V2 too) or
    transformers"""
    pool: Literal["mean", "first"] = "mean"
    """mean: of the patches, then the norm; first: the norm, then the first token"""
    drop_path: float = 0.2
    """stochastic depth, rising linearly over the blocks to this"""
    dropout: float = 0.3
    """before the head"""
    head_scale: float = 0.001
    """times the head's starting values; mae_st's are 2e-5 after loading, whatever this says"""

    def __post_init__(self) -> None:
        check_fields(self, "classifier")
        ClassifierConfig(
            preset("vit_tiny"), self.family, 2, self.pool, self.drop_path, self.dropout
        )
        require(self.head_scale > 0, "classifier.head_scale must be positive", self.head_scale)


@dataclass(frozen=True)
class AugmentConfig:
    """What is changed at random in a training clip and its label. Crops and flips: [data]."""

    randaugment: str = "rand-m7-mstd0.5-inc1"
    """timm's policy, one draw a clip; empty for none"""
    erasing: float = 0.25
    """probability of one erased box, the same in all frames, of normal noise"""
    mixup: float = 0.8
    """alpha of mixup, 0 for none (needs timm)"""
    cutmix: float = 1.0
    """alpha of cutmix, 0 for none (needs timm)"""
    mix_prob: float = 1.0
    """probability that a batch is mixed"""
    switch_prob: float = 0.5
    """probability of cutmix where both are on"""
    smoothing: float = 0.1
    """label smoothing"""

    def __post_init__(self) -> None:
        check_fields(self, "augment")
        for name in ("erasing", "mix_prob", "switch_prob", "smoothing"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"augment.{name} must be in [0, 1]", value)
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(value >= 0, f"augment.{name} must not be negative", value)
        if self.randaugment:
            parse(self.randaugment)


@dataclass(frozen=True)
class ClipsConfig(DataConfig):
    """[data] of a labelled run: pretrain's keys, and how a clip lies in its video."""

    repeat_aug: int = 2
    crop_area: tuple[float, float] = (0.08, 1.0)
    sampling: Sampling = "seconds"
    """seconds: a span at target_fps, as MAE-ST; frames: every sampling_rate-th frame, as VideoMAE;
    uniform: a random frame of each of num_frames equal parts (SSv2)"""
    same_frames: bool = False
    """the repeat_aug clips of a video are of the same frames, augmented apart (VideoMAE)"""
    classes: str = ""
    """a file that gives the classes' order: JSON {label: number}, or a label a line; by default
    the labels of the index, sorted"""


@dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """[train] of a fine-tuning run: pretrain's keys, and rates by layer."""

    epochs: float = 50.0
    blr: float = 2.4e-3
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 5.0
    layer_decay: float = 0.75
    """a layer's rate is this times that of the layer above; 1 for none"""
    count_repeats: bool = True
    """blr is scaled by clips, repeat_aug counted (MAE-ST's fine-tuning), or by videos (VideoMAE)"""
    scale_min_lr: bool = False
    """min_lr and warmup_lr are scaled as blr is"""
    warmup_lr: float = 0.0
    """the rate that warm-up begins from"""
    mask_ratio: float = 0.0
    """masked fine-tuning: the share of patches left out at first, falling to 0 by a cosine"""
    ema: float = 0.0
    """also keep an average of the weights, of this decay by the step (0.9999); 0: none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.layer_decay <= 1, "train.layer_decay must be in (0, 1]", self.layer_decay)
        require(0 <= self.ema < 1, "train.ema must be in [0, 1)", self.ema)
        require(0 <= self.mask_ratio < 1, "train.mask_ratio must be in [0, 1)", self.mask_ratio)
        require(self.warmup_lr >= 0, "train.warmup_lr must not be negative", self.warmup_lr)


@dataclass(frozen=True)
class ViewsConfig:
    """The views of a test: temporal x spatial of every video, and one in the middle."""

    temporal: int = 10
    """clips spread over the video; uniform sampling has 1 or 2"""
    spatial: int = 3
    """square crops along the longer side: 1 or 3"""
    short_side: int = 0
    """pixels that the short side is brought to; 0: the model's own side"""

    def __post_init__(self) -> None:
        check_fields(self, "test")
        require(0 < self.temporal <= 1000, "test.temporal must be in [1, 1000]", self.temporal)
        require(self.spatial in (1, 3), "test.spatial must be 1 or 3", self.spatial)
        require(self.short_side >= 0, "test.short_side must not be negative", self.short_side)

    def check_sampling(self, sampling: Sampling) -> None:
        if sampling == "uniform":
            words = "test.temporal must be 1 or 2 with uniform sampling"
            require(self.temporal <= 2, words, self.temporal)


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run. `output` is its folder; a run found there is resumed."""

    output: str = "runs/finetune"
    """the run's folder"""
    init: str = "scratch"
    """a checkpoint of any family, pre-trained or fine-tuned; scratch: the official start"""
    task: Literal["classify", "ava"] = "classify"
    """classify: a label for each video; ava: labels for each person in a movie, see [ava]"""
    model: ModelConfig = field(default_factory=lambda: preset("vit_large"))
    classifier: HeadConfig = field(default_factory=HeadConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: ClipsConfig = field(default_factory=ClipsConfig)
    train: TuneConfig = field(default_factory=TuneConfig)
    test: ViewsConfig = field(default_factory=ViewsConfig)
    ava: AvaConfig = field(default_factory=AvaConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.output != "", "output is empty: it is the run's folder", self.output)
        require(self.init != "", "init is empty: a checkpoint, or scratch", self.init)
        require(self.model.in_chans == 3, "model.in_chans must be 3", self.model.in_chans)
        shard = self.train.shard
        require(shard == "none", "train.shard must be none: a classifier fits one GPU", shard)
        span = self.data.span_seconds
        require(not span, "data.span_seconds must be 0: it is for pre-training", span)
        clips = self.train.batch_size * self.data.repeat_aug
        mixes = self.augment.mixup or self.augment.cutmix
        require(
            not mixes or clips % 2 == 0,
            "train.batch_size times data.repeat_aug must be even with mixup or cutmix",
            clips,
        )
        self.test.check_sampling(self.data.sampling)
        if self.task == "ava":
            self._check_ava()

    def _check_ava(self) -> None:
        """What labels of whole clips have, and boxes do not."""
        for section, name in (
            ("augment", "randaugment"), ("augment", "erasing"), ("augment", "mixup"),
            ("augment", "cutmix"), ("augment", "smoothing"), ("train", "mask_ratio"),
        ):  # fmt: skip
            value = getattr(getattr(self, section), name)
            require(not value, f'{section}.{name} must be off with task = "ava"', value)
        for section, name, only in (
            ("data", "sampling", "seconds"), ("data", "crop_area", ClipsConfig.crop_area),
            ("data", "crop_aspect", ClipsConfig.crop_aspect), ("test", "temporal", 1),
            ("test", "spatial", 1),
        ):  # fmt: skip
            value, words = getattr(getattr(self, section), name), 'with task = "ava": see [ava]'
            require(value == only, f"{section}.{name} must be {only} {words}", value)
        least, size = self.ava.short_sides[0], self.model.img_size
        require(least >= size, f"ava.short_sides must be model.img_size {size} or more", least)

    def classifier_of(self, classes: int) -> ClassifierConfig:
        c = self.classifier
        # On boxes the pre-trained norm is of all tokens.
        pool = "first" if self.task == "ava" else c.pool
        return ClassifierConfig(self.model, c.family, classes, pool, c.drop_path, c.dropout)


_SECTIONS = {
    "model": ModelConfig,
    "classifier": HeadConfig,
    "augment": AugmentConfig,
    "data": ClipsConfig,
    "train": TuneConfig,
    "test": ViewsConfig,
    "ava": AvaConfig,
}


def _recipe(model=None, classifier=None, augment=None, data=None, train=None, test=None) -> dict:
    given = locals()
    return {key: value for key, value in given.items() if value}


# facebookresearch/mae_st, FINETUNE.md and the defaults of main_finetune.py and main_test.py (ViT-L;
# a batch of 2 videos a GPU, twice each).
_MAE_ST = _recipe(
    classifier=dict(family="mae_st", pool="mean", drop_path=0.2, dropout=0.3),
    augment=dict(
        randaugment="rand-m7-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, mix_prob=1.0,
        switch_prob=0.5, smoothing=0.1,
    ),
    data=dict(
        sampling="seconds", sampling_rate=4, target_fps=30.0, repeat_aug=2, same_frames=False,
        short_side=256, crop_area=(0.08, 1.0), crop_aspect=(0.75, 1.3333), flip=0.5,
    ),
    train=dict(
        batch_size=2, epochs=50.0, warmup_epochs=5.0, blr=2.4e-3, min_lr=1e-6, warmup_lr=0.0,
        count_repeats=True, scale_min_lr=False, weight_decay=0.05, betas=(0.9, 0.999),
        clip_grad=5.0, layer_decay=0.75,
    ),
    test=dict(temporal=10, spatial=3),
)  # fmt: skip


def _slowfast(size: str, clips: int, lr: float, end: float, **changes: Any) -> dict:
    """facebookresearch/SlowFast, configs/masked_ssl/k400_VIT_*_16x4_FT.yaml. Its rates belong to
    one node of 8 GPUs (BASE_LR_SCALE_NUM_SHARDS), whose step has `clips`; here to 256 clips."""
    per = 256 / clips
    found = {key: dict(values) for key, values in _MAE_ST.items()}
    found["model"] = dict(preset=f"vit_{size}", variant="slowfast")
    found["classifier"] |= dict(family="slowfast", head_scale=0.001)
    found["data"] |= dict(short_side=320)
    found["train"] |= dict(
        batch_size=2, blr=lr * per, min_lr=end * per, warmup_lr=1e-8 * per, scale_min_lr=True
    )
    found["test"] |= dict(temporal=7)
    for key, value in changes.items():
        section, name = key.split("__")
        found[section][name] = value
    return found


# MCG-NJU/VideoMAE, scripts/kinetics/videomae_vit_base_..._epoch_1600/finetune.sh and the defaults
# of run_class_finetuning.py (batch 6 a GPU of 64, twice each; lr of 256 videos).
_VIDEOMAE = _recipe(
    model=dict(preset="vit_base"),
    classifier=dict(family="videomae", pool="mean", drop_path=0.1, dropout=0.0, head_scale=0.001),
    augment=_MAE_ST["augment"] | dict(randaugment="rand-m7-n4-mstd0.5-inc1"),
    data=dict(
        sampling="frames", sampling_rate=4, repeat_aug=2, same_frames=True, short_side=0,
        crop_area=(0.08, 1.0), crop_aspect=(0.75, 1.3333), flip=0.5,
    ),
    train=dict(
        batch_size=6, epochs=75.0, warmup_epochs=5.0, blr=5e-4, min_lr=1e-6, warmup_lr=1e-6,
        count_repeats=False, scale_min_lr=True, weight_decay=0.05, betas=(0.9, 0.999),
        clip_grad=0.0, layer_decay=0.75,
    ),
    test=dict(temporal=5, spatial=3),
)  # fmt: skip

RECIPES = {
    "mae_st_k400": _MAE_ST,
    # The file of B says a batch of 1 for 8 GPUs, which cannot be; as of L, 16.
    "slowfast_k400_b": _slowfast(
        "base", 32, 6e-4, 1e-5, classifier__drop_path=0.1, train__layer_decay=0.65,
        train__epochs=75.0,
    ),
    "slowfast_k400_l": _slowfast("large", 32, 3e-4, 1e-5),
    "slowfast_k400_h": _slowfast(
        "huge", 16, 3e-4, 1e-6, classifier__dropout=0.5, train__layer_decay=0.8,
        train__epochs=75.0, data__repeat_aug=1,
    ),
    "videomae_k400": _VIDEOMAE,
    # scripts/ssv2/videomae_vit_base_..._epoch_2400/finetune.sh; left and right are labels there.
    "videomae_ssv2": _VIDEOMAE | {
        "data": _VIDEOMAE["data"] | dict(sampling="uniform", flip=0.0),
        "train": _VIDEOMAE["train"] | dict(epochs=30.0),
        "test": dict(temporal=2, spatial=3),
    },
    "videomae_ava": VIDEOMAE_AVA,
}  # fmt: skip


def from_dict(tree: dict[str, Any]) -> FinetuneConfig:
    """A run from nested tables; the recipe is mae_st_k400, or of task "ava" videomae_ava, unless
    `recipe` names another."""
    if isinstance(tree, dict):
        if tree.get("task") == "ava":
            tree = {"recipe": "videomae_ava"} | tree
        elif tree.get("recipe") == "videomae_ava":
            tree = {"task": "ava"} | tree
    return config_file.config_from_dict(tree, FinetuneConfig, _SECTIONS, RECIPES)


load = functools.partial(config_file.load_config, build=from_dict)


def as_config(cfg: "FinetuneConfig | str | Path") -> FinetuneConfig:
    """The run meant by a FinetuneConfig or by the path of its TOML file."""
    if isinstance(cfg, str | Path):
        return load(cfg)
    require(isinstance(cfg, FinetuneConfig), "a run is a FinetuneConfig or a TOML file", cfg)
    return cfg


def from_state(values: dict[str, Any]) -> FinetuneConfig:
    """The inverse of to_dict: of a checkpoint's state."""
    made = {key: kind(**values[key]) for key, kind in _SECTIONS.items() if key in values}
    rest = {key: values[key] for key in ("output", "init", "task") if key in values}
    return FinetuneConfig(**rest, **made)
