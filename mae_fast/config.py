"""Every setting of pre-training: frozen dataclasses, checked wherever they are made, and the
models' presets. config_file.py reads them from TOML."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mae_fast.errors import ConfigError
from mae_fast.fields import check_fields, require, typed, unknown

Variant = Literal["mae_st", "slowfast"]
MaskStrategy = Literal[
    "random",
    "tube",
    "tube_ties",
    "tube_blocks",
    "per_frame",
    "frame",
    "block",
    "cube",
    "multiblock",
    "running_cell",
]
Grid = tuple[int, int, int]
_MOST = 2**31 - 1  # of every number but a seed: beyond it indices and counts overflow
_WORKERS = 1024  # processes on one machine: more is a slip of the hand


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _check(cfg: Any, section: str, positive: str = "", not_negative: str = "") -> None:
    """Types, then ranges of the numbers named; every number is at most _MOST."""
    check_fields(cfg, section)
    for names, ok, words in (
        (positive, lambda v: v > 0, "be positive"),
        (not_negative, lambda v: v >= 0, "not be negative"),
    ):
        for name in names.split():
            require(ok(getattr(cfg, name)), f"{section}.{name} must {words}", getattr(cfg, name))
    for name, value in vars(cfg).items():
        if isinstance(value, int | float) and name != "seed":
            require(value <= _MOST, f"{section}.{name} must be at most {_MOST}", value)


@dataclass(frozen=True)
class ModelConfig:
    """A masked autoencoder, in the official constructor's names. The default is the paper's ViT-L.

    The variant `slowfast` predicts frames 0, 2, 4, ... (mae_st: evenly spaced with
    the last one included), gives the decoder the encoder's cls token and one joint position table,
    and starts from PySlowFast's initialisation. Sources: models_mae.py, slowfast/models/masked.py.
    """

    variant: Variant = "mae_st"
    """which of the two official models, where no other field tells: mae_st or slowfast"""
    img_size: int = 224
    """side of a clip, pixels"""
    patch_size: int = 16
    """side of a patch, pixels"""
    in_chans: int = 3
    """channels of a clip"""
    num_frames: int = 16
    """frames of a clip"""
    t_patch_size: int = 2
    """frames of a patch"""
    pred_t_dim: int = 8
    """frames of a clip that are predicted"""
    embed_dim: int = 1024
    """channels of the encoder"""
    depth: int = 24
    """blocks of the encoder"""
    num_heads: int = 16
    """attention heads of the encoder"""
    decoder_embed_dim: int = 512
    """channels of the decoder"""
    decoder_depth: int = 4
    """blocks of the decoder"""
    decoder_num_heads: int = 16
    """attention heads of the decoder"""
    mlp_ratio: float = 4.0
    """hidden channels of a block's MLP, as a multiple of its channels"""
    norm_pix_loss: bool = True
    """predict each patch's pixels normalised by its own mean and variance"""
    target: Literal["pixels", "pixels_by_channel", "hog", "tokens", "features"] = "pixels"
    """what is predicted: pixels, normalised over a patch (MAE-ST) or each channel of it alone
    (VideoMAE); PySlowFast's HOG of each time step's first frame; tokens of a frozen tokenizer; or
    V-JEPA's features, those of the encoder's own running average"""
    tokenizer: str = ""
    """of target tokens: package.module:callable, which gives a module of clips [B, C, T, H, W] in
    [0, 1] that returns a class for each patch, [B, t, h, w]"""
    vocabulary: int = 8192
    """of target tokens: how many classes the tokenizer has"""
    sep_pos_embed: bool = True
    """one table of positions in time and one in space, added, in place of a joint one"""
    cls_embed: bool = True
    """give the encoder a cls token"""
    no_qkv_bias: bool = False
    """leave out the biases of q, k and v"""
    trunc_init: bool = False
    """draw matrices from a truncated normal distribution in place of Xavier's uniform"""

    def __post_init__(self) -> None:
        sizes = "img_size patch_size in_chans num_frames t_patch_size pred_t_dim embed_dim depth"
        decoder = "num_heads decoder_embed_dim decoder_depth decoder_num_heads mlp_ratio vocabulary"
        _check(self, "model", positive=f"{sizes} {decoder}")
        _require(
            self.img_size % self.patch_size == 0,
            f"model.img_size {self.img_size} is not divisible by patch_size {self.patch_size}",
        )
        _require(
            self.num_frames % self.t_patch_size == 0,
            f"model.num_frames {self.num_frames} is not divisible by t_patch_size "
            f"{self.t_patch_size}",
        )
        for width, heads in (
            ("embed_dim", "num_heads"),
            ("decoder_embed_dim", "decoder_num_heads"),
        ):
            w, h = getattr(self, width), getattr(self, heads)
            _require(w % h == 0, f"model.{width} {w} is not divisible by {heads} {h}")
            _require(
                int(w * self.mlp_ratio) > 0,
                f"model.mlp_ratio {self.mlp_ratio} leaves no channel of {width} {w}",
            )
        _require(
            self.pred_t_dim <= self.num_frames,
            f"model.pred_t_dim {self.pred_t_dim} is more than num_frames {self.num_frames}",
        )
        _require(
            self.num_patches <= _MOST,
            f"model.img_size {self.img_size} and num_frames {self.num_frames} make "
            f"{self.num_patches} patches, more than {_MOST}",
        )
        _require(
            self.t_patch_size * self.pred_t_dim % self.num_frames == 0,
            f"model.pred_t_dim {self.pred_t_dim} is not a whole number of frames for each of the "
            f"{self.grid[0]} time steps (num_frames {self.num_frames})",
        )
        _require(
            self.norm_pix_loss or self.target != "pixels_by_channel",
            "model.target pixels_by_channel is normalised: model.norm_pix_loss must be true",
        )
        if self.target == "tokens":
            good = re.fullmatch(r"[\w.]+:[\w.]+", self.tokenizer)
            words = "model.target tokens needs model.tokenizer, package.module:callable"
            require(bool(good), words, self.tokenizer)
        if self.target == "hog":
            _require(
                self.patch_size % 8 == 0,
                f"model.target hog has cells of 8 pixels: model.patch_size must be a multiple of "
                f"8, got {self.patch_size}",
            )
            _require(
                self.pred_t_dim == self.grid[0],
                f"model.target hog is of one frame a time step: model.pred_t_dim must be "
                f"{self.grid[0]}, got {self.pred_t_dim}",
            )
        if self.variant == "slowfast":
            _require(
                self.pred_t_dim == self.grid[0],
                f"slowfast predicts one frame a time step: model.pred_t_dim must be "
                f"{self.grid[0]}, got {self.pred_t_dim}",
            )

    @property
    def grid(self) -> Grid:
        """Time steps, rows and columns of patches (t, h, w)."""
        side = self.img_size // self.patch_size
        return self.num_frames // self.t_patch_size, side, side

    @property
    def num_patches(self) -> int:
        """L, the number of tokens of a whole clip, without cls."""
        t, h, w = self.grid
        return t * h * w

    @property
    def target_frames(self) -> tuple[int, ...]:
        """Which input frames are predicted.

        mae_st: linspace(0, T-1, pred_t_dim) truncated, in fp32 as the official code has it, so
        the last frame is always one of them (0, 2, ..., 12, 15). slowfast, and HOG in either: every
        t_patch_size-th.
        """
        if self.variant == "slowfast" or self.target == "hog":
            return tuple(range(0, self.num_frames, self.t_patch_size))
        import torch

        frames = torch.linspace(0, self.num_frames - 1, self.pred_t_dim, device="cpu")
        return tuple(frames.long().tolist())

    @property
    def pred_t_patch_size(self) -> int:
        """u, the target frames of one token."""
        return self.t_patch_size * self.pred_t_dim // self.num_frames

    @property
    def pred_dim(self) -> int:
        """P, the target values of one token."""
        if self.target in ("tokens", "features"):
            return self.vocabulary if self.target == "tokens" else self.embed_dim
        if self.target == "hog":
            return self.in_chans * 9 * (self.patch_size // 8) ** 2
        return self.pred_t_patch_size * self.patch_size**2 * self.in_chans

    @property
    def loss_unit(self) -> str:
        """What the loss is a mean of: losses of other units are not to be compared, and those of
        features with those of no other run, whose averaged encoder is another."""
        if self.target == "tokens":
            return f"nats for a token, of {self.vocabulary} classes of {self.tokenizer}"
        if self.target == "features":
            return "absolute error of features of the run's own averaged encoder, in deviations"
        if self.target == "hog":
            return "squared error of HOG, whose cells have norm 1"
        if not self.norm_pix_loss:
            return "squared error of pixels, in deviations of 0.225"
        per = "channel of a patch" if self.target == "pixels_by_channel" else "patch"
        return f"squared error of pixels, in deviations of their {per}"


def _preset(
    embed_dim: int, depth: int, num_heads: int, decoder_embed_dim: int, patch_size: int = 16
) -> dict[str, int]:
    return dict(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        decoder_embed_dim=decoder_embed_dim,
        patch_size=patch_size,
    )


# base, large and huge are the paper's; tiny and small are ours, for small machines, and giant, with
# 2 billion parameters, for many (train.shard).
PRESETS = {
    "vit_tiny": _preset(192, 12, 3, 192),
    "vit_small": _preset(384, 12, 6, 256),
    "vit_base": _preset(768, 12, 12, 512),
    "vit_large": _preset(1024, 24, 16, 512),
    "vit_huge": _preset(1280, 32, 16, 512, patch_size=14),
    "vit_giant": _preset(1792, 52, 28, 512, patch_size=14),
}
# mae_st has decoder heads of 32, slowfast of 64 (dim // 64); see facts in the docstring's sources.
_DECODER_HEAD_DIM = {"mae_st": 32, "slowfast": 64}


def preset(name: str, variant: Variant = "mae_st", **changes: Any) -> ModelConfig:
    """The model called `name` (vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant) in
    one of the two official variants, with any field changed. ConfigError on an unknown name or
    field."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(unknown("model", name, PRESETS))
    typed("model.variant", variant, Variant)
    known = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
    for key, value in changes.items():
        if key not in known:
            raise ConfigError(unknown("field of ModelConfig", key, known))
        changes[key] = typed(f"model.{key}", value, known[key])
    fields = dict(PRESETS[name], variant=variant)
    if variant == "slowfast":
        fields["patch_size"] = 16
    width = changes.get("decoder_embed_dim", fields["decoder_embed_dim"])
    fields["decoder_num_heads"] = max(1, width // _DECODER_HEAD_DIM[variant])
    # One predicted frame for each time step, unless the caller says otherwise.
    frames = changes.get("num_frames", ModelConfig.num_frames)
    # What cannot be divided is refused by ModelConfig itself, with its name.
    fields["pred_t_dim"] = frames // (changes.get("t_patch_size") or ModelConfig.t_patch_size) or 1
    return ModelConfig(**{**fields, **changes})


def as_model(cfg: "ModelConfig | str") -> ModelConfig:
    """The model meant by a ModelConfig or a preset's name. ConfigError for anything else."""
    if isinstance(cfg, str):
        return preset(cfg)
    require(isinstance(cfg, ModelConfig), "a model is a ModelConfig or a preset's name", cfg)
    return cfg


def mask_cell(grid: Grid) -> int:
    """Patches on a side of the cells that cube and tube_blocks hide: 2, as PySlowFast's window of
    8x7x7 in a grid of 8x14x14; 1 in a grid that cells of 2 do not fill, or one of them does."""
    return 2 if grid[1] % 2 == grid[2] % 2 == 0 and min(grid[1:]) > 2 else 1


def num_keep(strategy: str, grid: Grid, ratio: float) -> int:
    """K, the patches kept of a clip whose grid is (t, h, w), for a masked share `ratio`.

    random, tube_ties, block, multiblock: int(L * (1 - ratio)), the official rule in Python floats
    (156 of 1568 at 0.9, 313 at 0.8). per_frame: the same rule in every time step. tube,
    running_cell: h * w - int(h * w * ratio) in every time step, VideoMAE's rule (160 at 0.9).
    frame, cube, tube_blocks: PySlowFast's, round(n * ratio) are hidden of n time steps, of n
    cells, of n cells of a time step. Raises ConfigError, a ValueError, when nothing would be left,
    or the ratio is not in [0, 1).
    """
    typed("mask strategy", strategy, MaskStrategy)
    if not 0 <= typed("mask ratio", ratio, float) < 1:
        raise ConfigError(f"mask ratio must be in [0, 1), got {ratio}")
    t, h, w = grid
    cell = mask_cell(grid) ** 2
    if strategy in ("tube", "running_cell"):
        keep = t * (h * w - int(h * w * ratio))
    elif strategy == "per_frame":
        keep = t * int(h * w * (1 - ratio))
    elif strategy == "frame":
        keep = (t - round(t * ratio)) * h * w
    elif strategy == "cube":
        keep = t * h * w - round(t * h * w // cell * ratio) * cell
    elif strategy == "tube_blocks":
        keep = t * (h * w - round(h * w // cell * ratio) * cell)
    else:
        keep = int(t * h * w * (1 - ratio))
    if keep < 1:
        raise ConfigError(f"mask ratio {ratio} leaves none of {t}x{h}x{w} patches ({strategy})")
    return keep


@dataclass(frozen=True)
class MaskConfig:
    """Which patches are hidden; with `decoder` and `per_clip`, what is asked of a clip."""

    strategy: MaskStrategy = "random"
    """how the hidden patches are chosen"""
    ratio: float = 0.9
    """the share of patches that is hidden, in [0, 1)"""
    decoder: Literal["all", "random", "running_cell"] = "all"
    """changes the objective: decode, and take the loss of, all hidden patches or a part of them, at
    random or VideoMAE V2's"""
    decoder_ratio: float = 0.5
    """the share of hidden patches that a part leaves out; running_cell: 0.25, 0.5 or 0.75"""
    per_clip: int = 1
    """changes the objective: masks of one clip, each a sample of its own in the step"""

    def __post_init__(self) -> None:
        _check(self, "mask", positive="per_clip")
        require(0 <= self.ratio < 1, "mask.ratio must be in [0, 1)", self.ratio)
        share = self.decoder_ratio
        require(0 <= share < 1, "mask.decoder_ratio must be in [0, 1)", share)
        if self.decoder == "running_cell":
            words = "mask.decoder_ratio must be 0.25, 0.5 or 0.75 with running_cell"
            require(share in (0.25, 0.5, 0.75), words, share)


def num_decoded(cfg: MaskConfig, grid: Grid) -> int:
    """The hidden patches of a clip that are decoded: in a batch all clips have the same number.

    As many as VideoMAE V2 decodes of a tube mask, if 4 divides the time steps (704 of 1408).
    """
    masked = math.prod(grid) - num_keep(cfg.strategy, grid, cfg.ratio)
    return masked if cfg.decoder == "all" else masked - int(masked * cfg.decoder_ratio)


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from and how one is cut out of a video."""

    index: str = ""
    """file made by `mae-fast index`"""
    val_index: str = ""
    """an index of held-out videos, whose loss is taken at the start, with every checkpoint
    and at the end"""
    sampling_rate: int = 4
    """frames from one frame of a clip to the next, at target_fps"""
    target_fps: float = 30.0
    """the frames a second in which sampling_rate counts"""
    repeat_aug: int = 4
    """clips taken from each video, which is decoded once for them"""
    span_seconds: float = 0.0
    """seconds of the one window within which a video's clips lie, which costs less to
    decode; 0, the official sampling: anywhere in the video"""
    short_side: int = 256
    """frames whose short side has more pixels are shrunk to it after decoding; 0: never"""
    crop_area: tuple[float, float] = (0.5, 1.0)
    """range of a clip's crop box: its share of the frame's area"""
    crop_aspect: tuple[float, float] = (0.75, 1.3333)
    """range of a clip's crop box: its width over its height"""
    flip: float = 0.5
    """the share of clips that are mirrored"""
    decoder: Literal["auto", "pyav", "torchcodec"] = "auto"
    """the library that decodes; auto: the first that is installed"""
    strict: bool = True
    """replace clips of frames that FFmpeg flags as damaged, or that may be predicted from such"""
    workers: int = 2
    """processes that load clips; 0: the training process itself"""
    max_bad_share: float = 0.05
    """the share of videos that may turn out broken before the run stops"""

    def __post_init__(self) -> None:
        counts = "span_seconds short_side workers"
        _check(self, "data", positive="sampling_rate target_fps repeat_aug", not_negative=counts)
        for name in ("flip", "max_bad_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name} must be in [0, 1]", value)
        require(self.workers <= _WORKERS, f"data.workers must be at most {_WORKERS}", self.workers)
        lo, hi = self.crop_area
        require(0 < lo <= hi <= 1, "data.crop_area must rise within (0, 1]", self.crop_area)
        lo, hi = self.crop_aspect
        require(0 < lo <= hi, "data.crop_aspect must rise from above 0", self.crop_aspect)


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained; the defaults are the official recipe."""

    batch_size: int = 2
    """videos of a process and micro-step (clips: times data.repeat_aug)"""
    accum_steps: int = 1
    """micro-steps of an optimizer step"""
    epochs: float = 100.0
    """passes over the index; may be a fraction"""
    warmup_epochs: float = 5.0
    """passes over which the learning rate rises from 0"""
    steps: int = 0
    """optimizer steps, in place of epochs; 0: count epochs"""
    warmup_steps: int = 0
    """steps over which the learning rate rises from 0, where steps is given"""
    blr: float = 1.6e-3
    """learning rate of 256 videos a step: the rate is blr * batch_size * accum_steps * processes
    / 256, without repeat_aug, as in the official code"""
    min_lr: float = 0.0
    """the learning rate at the end"""
    weight_decay: float = 0.05
    """AdamW's decay of matrices, tokens and tables of positions"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages of gradients and of their squares"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    clip_grad: float = 0.02
    """greatest norm of all gradients; 0: no clipping"""
    ema_momentum: float = 0.99925
    """of model.target features: what the averaged encoder keeps of itself in a step; V-JEPA 2's"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16: autocast with fp32 weights"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model trains; auto: a GPU where there is one"""
    shard: Literal["none", "optimizer", "full"] = "none"
    """what of a model that is too large for one GPU lies apart on the processes: gradients and the
    optimizer's state, or the weights of all blocks but the one that computes too"""
    give_up: float = 1800.0
    """seconds that a process waits for another that is alive, before it saves and leaves; one that
    is dead is noticed within a minute"""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """run each step as CUDA graphs, which the host launches at once; auto: on one GPU, where that
    can be, not on several, where it is untried; the log says why not"""
    seed: int = 0
    """of weights, clips and masks"""
    log_every: int = 20
    """steps from one row of metrics to the next"""
    save_every: int = 1000
    """steps from one checkpoint to the next"""
    async_save: bool = True
    """write checkpoints while steps go on, from a copy in the host's memory"""
    keep: int = 3
    """how many checkpoints are kept"""
    max_nonfinite: int = 10
    """steps that may be skipped, for gradients that are not finite, before the run stops"""
    tensorboard: bool = False
    """write metrics for TensorBoard too (needs tensorboard)"""
    wandb: bool = False
    """send metrics to Weights & Biases too (needs wandb)"""
    backends: dict[str, str] = field(default_factory=dict)
    """an op's backend by name, {"attention": "sdpa"}; `mae-fast info` lists them"""

    def __post_init__(self) -> None:
        counts = "steps warmup_steps epochs warmup_epochs min_lr weight_decay clip_grad"
        _check(
            self,
            "train",
            positive="batch_size accum_steps log_every save_every keep blr eps give_up",
            not_negative=f"{counts} max_nonfinite seed",
        )
        require(all(0 <= b < 1 for b in self.betas), "train.betas must be in [0, 1)", self.betas)
        momentum = self.ema_momentum
        require(0 <= momentum <= 1, "train.ema_momentum must be in [0, 1]", momentum)
        require(self.seed < 2**63, "train.seed must be below 2^63", self.seed)
        if self.steps:
            _require(
                self.warmup_steps <= self.steps,
                f"train.warmup_steps {self.warmup_steps} is more than train.steps {self.steps}",
            )
            return
        require(self.epochs > 0, "train.epochs must be positive", self.epochs)
        _require(
            self.warmup_epochs <= self.epochs,
            f"train.warmup_epochs {self.warmup_epochs} is more than train.epochs {self.epochs}",
        )


@dataclass(frozen=True)
class EvalConfig:
    """How a run is judged on the way by what its frozen encoder knows of labels: kNN and a linear
    probe, in minutes. They change nothing in the run."""

    probe: int = 0
    """steps from one probe to the next, and at the end; 0: never"""
    train_index: str = ""
    """videos with labels that the probes learn from"""
    test_index: str = ""
    """other videos with labels, on which they are tested"""

    def __post_init__(self) -> None:
        _check(self, "eval", not_negative="probe")
        _require(
            not self.probe or bool(self.train_index and self.test_index),
            f"eval.probe {self.probe} needs eval.train_index and eval.test_index",
        )


@dataclass(frozen=True)
class Config:
    """One pre-training run."""

    output: str = "runs/pretrain"
    """the run's folder; a run found there is resumed"""
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_model(self.model))
        check_fields(self)
        _require(self.output != "", "output is empty: it is the run's folder")
        kept = num_keep(self.mask.strategy, self.model.grid, self.mask.ratio)
        t, h, w = self.model.grid
        _require(
            kept < t * h * w,
            f"mask.ratio {self.mask.ratio} leaves nothing to predict of {t}x{h}x{w} patches",
        )
        require(
            self.model.in_chans == 3,
            "model.in_chans must be 3 to train on video",
            self.model.in_chans,
        )
        shard, whole = self.train.shard, self.model.target in ("features", "tokens")
        require(
            shard == "none" or not (whole or self.eval.probe),
            "train.shard must be none with eval.probe, or a target that a network computes: they "
            "need whole models",
            shard,
        )
