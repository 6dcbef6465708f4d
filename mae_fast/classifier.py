"""The video classifier: the encoder of any family, pooled as that family pools, and a linear head.

One set of parameters, under mae_st's names, for all families; what differs stands in FAMILIES.
Tokens go through the same functional forward as in pre-training, all of them or the visible ones.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mae_fast.config import Grid, ModelConfig, as_model, preset
from mae_fast.fields import check_fields, require
from mae_fast.forward import Affine, Block, Norm, Params, Spec, encode
from mae_fast.model import TransformerBlock
from mae_fast.ops.layer_norm import layer_norm
from mae_fast.ops.linear import linear
from mae_fast.weights.positions import sincos

FamilyName = Literal["mae_st", "slowfast", "videomae", "transformers"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = ((0.45,) * 3, (0.225,) * 3)


@dataclass(frozen=True)
class Family:
    """What a family's classifier computes beyond its parameters' shapes.

    eps of the blocks' norms; norm: the parameter's name and eps of the norm around pooling;
    learned: positions and cls token as the ModelConfig says, otherwise fixed sines and cosines;
    pixels: (mean, std) by channel; undecayed: positions and cls token have no weight decay.
    """

    eps: float
    norm: tuple[str, float]
    learned: bool
    pixels: tuple[tuple[float, ...], tuple[float, ...]]
    undecayed: bool


FAMILIES = {
    "mae_st": Family(1e-6, ("norm", 1e-6), True, GREY, undecayed=True),
    "slowfast": Family(1e-6, ("norm", 1e-6), True, GREY, undecayed=False),
    "videomae": Family(1e-6, ("fc_norm", 1e-6), False, IMAGENET, undecayed=True),  # and V2
    # Its VideoMAEConfig has 1e-12, and fc_norm is made without: torch's 1e-5.
    "transformers": Family(1e-12, ("fc_norm", 1e-5), False, IMAGENET, undecayed=True),
}


@dataclass(frozen=True)
class ClassifierConfig:
    """A classifier on the encoder of `model`, as `family` has it (videomae: V2 too).

    pool "mean" is the official fine-tuning: the mean of the patches, then the norm (the pre-trained
    one in mae_st and slowfast, a new one in videomae and transformers); "first" is the pre-trained
    norm, then the first token (the cls token, where there is one), as the official codes have it
    without mean pooling; then the mean of all in slowfast without a cls token. drop_path rises
    linearly over the blocks, by the sample; dropout acts before the head.
    """

    model: ModelConfig = field(default_factory=lambda: preset("vit_base"))
    family: FamilyName = "mae_st"
    num_classes: int = 400
    pool: Literal["mean", "first"] = "mean"
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_model(self.model))
        check_fields(self, "classifier")
        most = 2**20
        require(
            0 < self.num_classes <= most,
            f"classifier.num_classes must be in [1, {most}]",
            self.num_classes,
        )
        for name in ("drop_path", "dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"classifier.{name} must be in [0, 1)", value)


class DropPath(nn.Module):
    """Stochastic depth: each sample's branch is zero with probability p, else over 1 - p. The
    random numbers are those of timm's drop_path."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop_prob = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), *(1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class VideoClassifier(nn.Module):
    """logits = model(video): clips [B, C, T, H, W], uint8 or float and normalised -> [B, classes].

    With ids_keep [B, K] the encoder sees those tokens only, and pools over them.
    """

    def __init__(self, cfg: ClassifierConfig) -> None:
        super().__init__()
        require(isinstance(cfg, ClassifierConfig), "a classifier is a ClassifierConfig", cfg)
        self.cfg = cfg
        m, self.family = cfg.model, FAMILIES[cfg.family]
        dim, (t, h, w) = m.embed_dim, m.grid
        self.has_cls = self.family.learned and m.cls_embed
        if self.has_cls:
            self.cls_token = _zeros(1, 1, dim)
        if not self.family.learned:
            self.register_buffer("fixed_pos", sincos(m.num_patches, dim), persistent=False)
        elif m.sep_pos_embed:
            self.pos_embed_spatial = _zeros(1, h * w, dim)
            self.pos_embed_temporal = _zeros(1, t, dim)
            if self.has_cls:
                self.pos_embed_class = _zeros(1, 1, dim)
        else:
            self.pos_embed = _zeros(1, m.num_patches + self.has_cls, dim)
        size = (m.t_patch_size, m.patch_size, m.patch_size)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(m.in_chans, dim, kernel_size=size, stride=size)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, m.mlp_ratio, not m.no_qkv_bias) for _ in range(m.depth)
        )
        for block in self.blocks:
            block.norm1.eps = block.norm2.eps = self.family.eps
            if not self.family.learned:  # VideoMAE's keys have no bias: a softmax ignores one
                block.attn.k.bias = None
        rates = torch.linspace(0, cfg.drop_path, m.depth, device="cpu").tolist()
        self.drop_paths = nn.ModuleList(DropPath(p) for p in rates)
        name, eps = self.family.norm if cfg.pool == "mean" else ("norm", self.family.eps)
        self.norm_name = name
        self.register_module(name, nn.LayerNorm(dim, eps=eps))
        self.dropout = nn.Dropout(cfg.dropout)
        self.head = nn.Linear(dim, cfg.num_classes)
        self.spec = Spec(
            t_patch=m.t_patch_size,
            patch=m.patch_size,
            num_heads=m.num_heads,
            decoder_num_heads=1,
            target_frames=(),
            pred_t_patch=1,
            norm_pix="none",
            keep_encoder_cls=False,
            mean=0.0,
            std=1.0,
        )
        init_scratch(self)

    @property
    def grid(self) -> Grid:
        return self.cfg.model.grid

    def params(self, uint8: bool = False) -> Params:
        """The encoder's parameters as `encode` takes them, without its last norm."""
        proj = self.patch_embed.proj
        embed = Affine(proj.weight.flatten(1), proj.bias)
        nothing = dict.fromkeys(Params._fields)
        pos, cls = self._pos()
        found = dict(
            patch_embed=self._fold(embed) if uint8 else embed,
            pos=pos,
            cls=cls,
            blocks=[self._block(*pair) for pair in zip(self.blocks, self.drop_paths, strict=True)],
        )
        return Params(**nothing | found)

    def _fold(self, embed: Affine) -> Affine:
        """The embedding of x / 255 that gives what `embed` gives of the normalised clip."""
        mean, std = (embed.weight.new_tensor(t) for t in self.family.pixels)
        weight = embed.weight.unflatten(1, (self.cfg.model.in_chans, -1)) / std[:, None]
        shift = (weight.sum(2) * mean).sum(1)
        return Affine(weight.flatten(1), embed.bias - shift)

    def _pos(self) -> tuple[Tensor, Tensor | None]:
        if not self.family.learned:
            return self.fixed_pos[0].to(self.head.weight.dtype), None
        joint = getattr(self, "pos_embed", None)
        if joint is None:
            spatial, temporal = self.pos_embed_spatial, self.pos_embed_temporal
            pos = (temporal[0, :, None] + spatial[0]).flatten(0, 1)
            cls = self.pos_embed_class[0, 0] if self.has_cls else None
        else:
            pos, cls = (joint[0, 1:], joint[0, 0]) if self.has_cls else (joint[0], None)
        return pos, cls + self.cls_token[0, 0] if self.has_cls else None

    def _block(self, block: TransformerBlock, path: DropPath) -> Block:
        p = block.params()
        if not (path.training and path.drop_prob):
            return p
        return p._replace(proj=[p.proj, path], fc2=[p.fc2, path])

    def tokens(self, video: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """What the last block gives, before any norm: [B, (1 +) K, D], cls first."""
        m = self.cfg.model
        expected = (m.in_chans, m.num_frames, m.img_size, m.img_size)
        if video.dim() != 5 or video.shape[1:] != expected:
            raise ValueError(
                f"video must be [B, {', '.join(map(str, expected))}], got {list(video.shape)}"
            )
        if ids_keep is None:
            ids_keep = torch.arange(m.num_patches, dtype=torch.int32, device=video.device)
            ids_keep = ids_keep.expand(len(video), -1)
        return encode(self.params(video.dtype == torch.uint8), self.spec, video, ids_keep)

    def pool(self, tokens: Tensor) -> Tensor:
        """Features [B, D] of tokens, as the head takes them."""
        norm, family = Norm.of(getattr(self, self.norm_name)), self.cfg.family
        if self.cfg.pool == "first":
            if family == "slowfast" and not self.has_cls:
                return layer_norm(tokens, *norm, None).mean(dim=1)
            return layer_norm(tokens[:, :1].contiguous(), *norm, None)[:, 0]
        # The cls token is left out of the mean; by mae_st the first token, whatever it is.
        mean = tokens[:, int(self.has_cls or family == "mae_st") :].mean(dim=1)
        return layer_norm(mean[:, None], *norm, None)[:, 0]

    def forward(self, video: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        features = self.dropout(self.pool(self.tokens(video, ids_keep)))
        return linear(features, self.head.weight, self.head.bias)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=torch.get_default_device()))


@torch.no_grad()
def init_scratch(model: VideoClassifier) -> None:
    """Each official model's own starting values, before a checkpoint is loaded.

    mae_st: torch's defaults, positions and cls token zero, head normal 0.02 (models_vit.py has no
    other initialisation). slowfast: trunc_normal 0.02, biases and norms' biases 0.02, torch's
    default for the patch embedding's bias. videomae: trunc_normal 0.02 of linear layers, biases
    zero, torch's default for the patch embedding. transformers: normal 0.02, biases zero.
    """
    trunc, family = nn.init.trunc_normal_, model.cfg.family
    if family == "mae_st":
        nn.init.normal_(model.head.weight, std=0.02)
        return
    bias = 0.02 if family == "slowfast" else 0.0
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            (nn.init.normal_ if family == "transformers" else trunc)(layer.weight, std=0.02)
            if layer.bias is not None:
                layer.bias.fill_(bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.bias.fill_(bias)
        elif isinstance(layer, nn.Conv3d) and family in ("slowfast", "transformers"):
            (trunc if family == "slowfast" else nn.init.normal_)(layer.weight, std=0.02)
            if family == "transformers":
                layer.bias.zero_()
    for name, p in model.named_parameters():
        if "pos_embed" in name or name == "cls_token":
            trunc(p, std=0.02)


@torch.no_grad()
def init_head(model: VideoClassifier, scale: float) -> None:
    """The head of fine-tuning. mae_st, after loading: trunc_normal 2e-5, whatever the scale, and
    torch's default bias; the others, before: what init_scratch made, times the scale."""
    if model.cfg.family == "mae_st":
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        return
    model.head.weight.mul_(scale)
    model.head.bias.mul_(scale)


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter for layer decay: 0 embeddings, i + 1 block i, depth + 1 the rest."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def param_groups(model: VideoClassifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """AdamW groups by layer: `lr_scale` = layer_decay ** (depth + 1 - layer), as all official codes
    have it; no weight decay for vectors and, but for slowfast, positions and cls token."""
    depth, groups = model.cfg.model.depth, {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        token = name == "cls_token" or name.startswith("pos_embed")
        plain = p.ndim == 1 or name.endswith(".bias") or (token and model.family.undecayed)
        layer = layer_of(name, depth)
        group = groups.setdefault(
            (layer, plain),
            {
                "params": [],
                "weight_decay": 0.0 if plain else weight_decay,
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "layer": layer,
            },
        )
        group["params"].append(p)
    return list(groups.values())
