"""The native model: parameters under the official names, handed to the one forward.

Read it top to bottom: what a block owns, what the autoencoder owns, how they start, what goes
into `forward`. Names and shapes are those of MAE-ST's models_mae.py, so its checkpoints load.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mae_fast.config import ModelConfig, as_model
from mae_fast.forward import Affine, Block, Norm, OwnBlock, Params, Spec, features, forward
from mae_fast.masking import ids_from_keep, ids_from_noise, mask_from_keep, num_keep
from mae_fast.ops.crop_resize_patchify_gather import whole
from mae_fast.ops.dispatch import check_device, check_ids
from mae_fast.ops.masked_mse import unpatchify
from mae_fast.ops.source import Source
from mae_fast.targets import Tokenizer, copy_of_encoder

PIXEL_MEAN, PIXEL_STD = 0.45, 0.225
NORM_EPS = 1e-6
_NORM_PIX = {"pixels": "patch", "pixels_by_channel": "channel"}


class Attention(nn.Module):
    """q, k, v and proj of one block."""

    def __init__(self, dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """fc1 and fc2 of one block."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)


class TransformerBlock(nn.Module):
    """The parameters of one pre-norm block."""

    def __init__(self, dim: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def params(self) -> Block:
        a, m = self.attn, self.mlp
        q, k, v, proj, fc1, fc2 = map(Affine.of, (a.q, a.k, a.v, a.proj, m.fc1, m.fc2))
        return Block(Norm.of(self.norm1), q, k, v, proj, Norm.of(self.norm2), fc1, fc2)

    def forward(self, x: Tensor, y: Tensor | None, fused: Callable):
        """What the fused forward makes of (x, y) with this block's parameters: called where hooks
        are to bring these first (fully_shard)."""
        return fused(x, y, self.params())

    def run(self) -> Block | OwnBlock:
        """The parameters, or how the block runs where they are not here yet."""
        if not isinstance(self, FSDPModule):
            return self.params()
        return lambda x, y, first, fused: self(x, y, fused)


class PatchEmbed(nn.Module):
    """Holds the patch embedding under its official name; it is never run as a convolution."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        size = (cfg.t_patch_size, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(cfg.in_chans, cfg.embed_dim, kernel_size=size, stride=size)


def _zeros(*shape: int) -> nn.Parameter:
    """On the default device, as torch's own layers are made."""
    return nn.Parameter(torch.zeros(shape, device=torch.get_default_device()))


class MaskedAutoencoder(nn.Module):
    """A video masked autoencoder (MAE-ST, arXiv 2205.09113) with the official parameters.

    loss, pred, mask = model(video, mask_ratio=0.9)
    """

    def __init__(self, cfg: ModelConfig | str) -> None:
        """A preset's name stands for its ModelConfig."""
        super().__init__()
        self.cfg = cfg = as_model(cfg)
        dim, dec = cfg.embed_dim, cfg.decoder_embed_dim
        own_cls = cfg.cls_embed and cfg.variant == "mae_st"
        if cfg.cls_embed:
            self.cls_token = _zeros(1, 1, dim)
        if own_cls:
            self.decoder_cls_token = _zeros(1, 1, dec)
        # PySlowFast's decoder has one joint position table, whatever the encoder's is.
        self._make_pos("pos_embed", dim, cfg.sep_pos_embed)
        self._make_pos("decoder_pos_embed", dec, cfg.sep_pos_embed and cfg.variant == "mae_st")
        self.mask_token = _zeros(1, 1, dec)
        self.patch_embed = PatchEmbed(cfg)
        block = dict(mlp_ratio=cfg.mlp_ratio, qkv_bias=not cfg.no_qkv_bias)
        self.blocks = nn.ModuleList(TransformerBlock(dim, **block) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(dim, dec)
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(dec, **block) for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dec, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(dec, cfg.pred_dim)
        self.spec = Spec(
            t_patch=cfg.t_patch_size,
            patch=cfg.patch_size,
            num_heads=cfg.num_heads,
            decoder_num_heads=cfg.decoder_num_heads,
            target_frames=cfg.target_frames,
            pred_t_patch=cfg.pred_t_patch_size,
            norm_pix=_NORM_PIX.get(cfg.target, "none") if cfg.norm_pix_loss else "none",
            hog=cfg.target == "hog",
            keep_encoder_cls=cfg.cls_embed and not own_cls,
            mean=PIXEL_MEAN,
            std=PIXEL_STD,
        )
        init_weights(self)
        self.tokenizer: Tokenizer | None = None  # of target tokens, no part of the state
        if cfg.target == "features":
            self.target_encoder = copy_of_encoder(self)

    def _make_pos(self, name: str, dim: int, separable: bool) -> None:
        t, h, w = self.cfg.grid
        cls = int(self.cfg.cls_embed)
        shapes = {"": t * h * w + cls}
        if separable:
            shapes = {"_spatial": h * w, "_temporal": t} | ({"_class": 1} if cls else {})
        for part, length in shapes.items():
            self.register_parameter(name + part, _zeros(1, length, dim))

    def _pos(self, owner: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
        """Positions [L, D] and the cls token's [D] (None without one)."""
        joint = getattr(owner, name, None)
        if joint is not None:
            return (joint[0, 1:], joint[0, 0]) if self.cfg.cls_embed else (joint[0], None)
        spatial, temporal = getattr(owner, name + "_spatial"), getattr(owner, name + "_temporal")
        pos = (temporal[0, :, None] + spatial[0]).flatten(0, 1)
        return pos, getattr(owner, name + "_class")[0, 0] if self.cfg.cls_embed else None

    def _encoder(self, owner: nn.Module) -> dict[str, Any]:
        """The encoder's part of Params: this model's own, or that of its target_encoder."""
        pos, cls = self._pos(owner, "pos_embed")
        proj = owner.patch_embed.proj
        return dict(
            patch_embed=Affine(proj.weight.flatten(1), proj.bias),
            pos=pos,
            cls=None if cls is None else cls + owner.cls_token[0, 0],
            blocks=[b.run() for b in owner.blocks],
            norm=Norm.of(owner.norm),
        )

    def params(self) -> Params:
        """The parameters as `forward` takes them; no parameter is copied."""
        decoder_pos, decoder_cls = self._pos(self, "decoder_pos_embed")
        if decoder_cls is not None and not self.spec.keep_encoder_cls:
            decoder_cls = decoder_cls + self.decoder_cls_token[0, 0]
        return Params(
            **self._encoder(self),
            decoder_embed=Affine.of(self.decoder_embed),
            mask_token=self.mask_token[0, 0],
            decoder_pos=decoder_pos,
            decoder_cls=decoder_cls,
            decoder_blocks=[b.run() for b in self.decoder_blocks],
            decoder_norm=Norm.of(self.decoder_norm),
            head=Affine.of(self.decoder_pred),
        )

    @torch.no_grad()
    def target(self, video: Tensor | Source) -> Tensor | None:
        """What is asked of all tokens of clips, as of forward.masked_loss: classes [B, L], features
        [B, L, D]; None where the clip's pixels tell. ValueError without a tokenizer."""
        if self.cfg.target == "features":
            params = self.params()._replace(**self._encoder(self.target_encoder))
            return features(params, self.spec, video)
        if self.cfg.target != "tokens":
            return None
        if self.tokenizer is None:
            raise ValueError("model.target is tokens: set the model's tokenizer, a Tokenizer")
        if isinstance(video, Source):
            video = whole(video, self.cfg.patch_size, PIXEL_MEAN, PIXEL_STD)
        bytes_ = video.dtype == torch.uint8
        clips = video.float() / 255 if bytes_ else video.float() * PIXEL_STD + PIXEL_MEAN
        return self.tokenizer(clips, self.cfg.grid, self.cfg.vocabulary)

    def forward(
        self,
        video: Tensor | Source,
        mask_ratio: float = 0.9,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        full_pred: bool = False,
        ids_keep: Tensor | None = None,
        ids_mask: Tensor | None = None,
        target: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, pred, mask) of clips [B, C, T, H, W], uint8 or float already normalised, or the
        source of such clips.

        The mask comes from `ids_keep` [B, K] (and `ids_mask` [B, M], trusted, as masking.draw_ids
        gives them), else from `noise` [B, L], else from fp32 noise drawn with `generator`. mask
        [B, L] is 0 for kept and 1 for removed patches. pred is [B, L, P] in patch order with
        full_pred, otherwise only what the loss needs: [B, M, P], masked patches in mask order
        (that of `noise` or ids_mask). `target`: what self.target gives of these clips, where the
        caller has it. Raises ValueError on a shape that does not fit.
        """
        cfg = self.cfg
        expected = (cfg.in_chans, cfg.num_frames, cfg.img_size, cfg.img_size)
        if video.shape[1:] != expected:
            raise ValueError(
                f"video must be [B, {', '.join(map(str, expected))}], got {list(video.shape)}"
            )
        if not (video.dtype == torch.uint8 or video.dtype.is_floating_point):
            raise ValueError(f"video must be uint8, or float and normalised, got {video.dtype}")
        batch, length = video.shape[0], cfg.num_patches
        given = {"video": video, "noise": noise, "ids_keep": ids_keep, "ids_mask": ids_mask}
        given["parameters"] = self.mask_token
        check_device("MaskedAutoencoder", **given)
        if ids_keep is None:
            if ids_mask is not None:
                raise ValueError("ids_mask is given without ids_keep")
            if noise is None:
                noise = torch.rand(batch, length, device=video.device, generator=generator)
            if noise.shape != (batch, length):
                raise ValueError(f"noise must be [{batch}, {length}], got {list(noise.shape)}")
            kept = num_keep("random", cfg.grid, mask_ratio)
            if kept == length:
                raise ValueError(f"mask_ratio {mask_ratio} leaves nothing to predict")
            ids_keep, ids_mask = ids_from_noise(noise, kept)
        check_ids(ids_keep)
        if ids_mask is None:
            ids_mask = ids_from_keep(ids_keep, length)
        check_ids(ids_mask)
        if not (ids_keep.shape[0] == ids_mask.shape[0] == batch):
            rows = f"{ids_keep.shape[0]} and {ids_mask.shape[0]}"
            raise ValueError(f"ids_keep and ids_mask have {rows} rows for {batch} clips")
        target = self.target(video) if target is None else target
        how = dict(full_pred=full_pred, target=target)
        loss, pred = forward(self.params(), self.spec, video, ids_keep, ids_mask, **how)
        return loss, pred, mask_from_keep(ids_keep, length)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Predicted patches [B, L, P] -> video [B, C, target frames, H, W]; keeps no state."""
        return unpatchify(patches, self.cfg.grid, self.cfg.patch_size, self.cfg.in_chans)


@torch.no_grad()
def init_weights(model: MaskedAutoencoder) -> None:
    """The official starting values of the model's variant (traps included).

    mae_st: Linear xavier_uniform with q, k and v apart, patch embedding xavier_uniform as a
    matrix, tokens and positions trunc_normal 0.02, mask token normal 0.02, decoder cls zero, the
    patch embedding's bias PyTorch's default; with trunc_init Linear trunc_normal 0.02 and the
    patch embedding's std 1.0. slowfast: trunc_normal 0.02, encoder biases 0.02.
    """
    slowfast = model.cfg.variant == "slowfast"
    trunc = nn.init.trunc_normal_
    for name, p in model.named_parameters():
        if "pos_embed" in name or name == "cls_token":
            trunc(p, std=0.02)
    patch = model.patch_embed.proj.weight
    if slowfast:
        trunc(model.mask_token, std=0.02)
        trunc(patch, std=0.02)
    else:
        nn.init.normal_(model.mask_token, std=0.02)
        if model.cfg.trunc_init:
            trunc(patch, std=1.0)
        else:
            bound = math.sqrt(6 / (patch.shape[0] + patch[0].numel()))
            patch.uniform_(-bound, bound)
    for name, layer in model.named_modules():
        # PySlowFast fills its encoder first and builds the decoder's entry afterwards.
        encoder = slowfast and name.startswith("blocks.")
        if isinstance(layer, nn.Linear) and not (slowfast and name == "decoder_embed"):
            if slowfast or model.cfg.trunc_init:
                trunc(layer.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, 0.02 if encoder else 0.0)
        elif isinstance(layer, nn.LayerNorm) and encoder:
            nn.init.constant_(layer.bias, 0.02)
