"""The two official models as the official code computes them: plain PyTorch, nothing saved.

Written from the specification (MAE-ST, arXiv 2205.09113; PySlowFast's MaskMViT for `slowfast`),
as the bar to measure against and as an oracle: it shares no code with mae_fast, only the settings
and the parameters' names, so `OfficialMAE(cfg).load_state_dict(model.state_dict())` works.
Where PySlowFast fuses q, k and v into one layer, this keeps mae_st's three.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_fast.config import ModelConfig

EPS = 1e-6  # of every norm


def normalise(video: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A uint8 clip as the official loader hands it over: (x / 255 - 0.45) / 0.225; floats are."""
    if video.dtype != torch.uint8:
        return video
    return (video.to(dtype) / 255.0 - 0.45) / 0.225


def patches(video: Tensor, t_patch: int, patch: int, order: str) -> Tensor:
    """[N, C, t*u, h*p, w*q], cut into cells, as [N, L, ...]: of its "nctuhpwq" in this order, which
    begins with "nthw"."""
    x = video.unflatten(2, (-1, t_patch)).unflatten(4, (-1, patch)).unflatten(6, (-1, patch))
    return torch.einsum(f"nctuhpwq->{order}", x).flatten(1, 3)


def normed(target: Tensor) -> Tensor:
    """Each patch [..., P] by its mean and unbiased variance."""
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    return (target - mean) / (var + EPS) ** 0.5


def normed_by_channel(target: Tensor, chans: int) -> Tensor:
    """VideoMAE's: each channel of a patch by itself, and EPS on its deviation."""
    x = target.unflatten(-1, (-1, chans))
    x = (x - x.mean(dim=-2, keepdim=True)) / (x.var(dim=-2, keepdim=True).sqrt() + EPS)
    return x.flatten(-2)


class Attention(nn.Module):
    """Self-attention, its scores materialised ("eager") or torch's ("sdpa")."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.scale = (dim // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [N, S, D] -> [N, S, D]
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.kind == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q @ k.transpose(-2, -1)) * self.scale  # [N, heads, S, S]
            out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, cfg: ModelConfig, kind: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, not cfg.no_qkv_bias, kind)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * cfg.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A Conv3d over the whole clip."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        size = (cfg.t_patch_size, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(cfg.in_chans, cfg.embed_dim, kernel_size=size, stride=size)

    def forward(self, video: Tensor) -> Tensor:  # [N, C, T, H, W] -> [N, L, D]
        x = self.proj(video).flatten(3)
        return torch.einsum("ncts->ntsc", x).flatten(1, 2)


class Trunk(nn.Module):
    """What a model and its classifier share: the encoder's parts, and positions. decoder_cls: the
    width of a decoder's own cls, whose place among the parameters is the second."""

    def __init__(
        self, cfg: ModelConfig, attention: Literal["eager", "sdpa"], decoder_cls: int = 0
    ) -> None:
        super().__init__()
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"attention must be eager or sdpa, got {attention!r}")
        self.cfg, dim = cfg, cfg.embed_dim
        self.steps, self.cells = cfg.grid[0], cfg.grid[1] * cfg.grid[2]
        if cfg.cls_embed:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            if decoder_cls:
                self.decoder_cls_token = nn.Parameter(torch.zeros(1, 1, decoder_cls))
        self._add_pos("pos_embed", dim, cfg.sep_pos_embed)
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(
            Block(dim, cfg.num_heads, cfg, attention) for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def _add_pos(self, name: str, dim: int, separable: bool) -> None:
        cls = int(self.cfg.cls_embed)
        if not separable:  # the cls token's is at index 0
            shapes = {name: self.steps * self.cells + cls}
        else:
            shapes = {f"{name}_spatial": self.cells, f"{name}_temporal": self.steps}
            if cls:
                shapes[f"{name}_class"] = 1
        for key, length in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.zeros(1, length, dim)))

    def _pos(self, name: str) -> Tensor:
        """The table [1, (1 +) L, D], the cls token's position first."""
        if hasattr(self, name):
            return getattr(self, name)
        spatial = getattr(self, f"{name}_spatial").repeat(1, self.steps, 1)
        temporal = getattr(self, f"{name}_temporal").repeat_interleave(self.cells, dim=1)
        pos = spatial + temporal
        if self.cfg.cls_embed:
            pos = torch.cat([getattr(self, f"{name}_class"), pos], dim=1)
        return pos


class OfficialMAE(Trunk):
    """loss, pred, mask = model(video, mask_ratio, noise, encode_all), the official slow way.

    video [N, C, T, H, W] float, normalised; noise [N, L] (drawn when None); mask [N, L] is 0 for
    kept and 1 for removed. pred is [N, L, P] for mae_st, and for slowfast, which projects masked
    tokens only, [N, M, P], both in patch order. encode_all is not in the official code: the encoder
    sees every token, and the decoder gets those that the mask keeps.
    """

    def __init__(self, cfg: ModelConfig, attention: Literal["eager", "sdpa"] = "eager") -> None:
        dim, dec, slowfast = cfg.embed_dim, cfg.decoder_embed_dim, cfg.variant == "slowfast"
        super().__init__(cfg, attention, 0 if slowfast else dec)
        self.slowfast = slowfast
        self._add_pos("decoder_pos_embed", dec, cfg.sep_pos_embed and not self.slowfast)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec))
        self.decoder_embed = nn.Linear(dim, dec)
        self.decoder_blocks = nn.ModuleList(
            Block(dec, cfg.decoder_num_heads, cfg, attention) for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dec, eps=EPS)
        self.pred_t_patch = cfg.t_patch_size * cfg.pred_t_dim // cfg.num_frames
        self.decoder_pred = nn.Linear(dec, self.pred_t_patch * cfg.patch_size**2 * cfg.in_chans)

    def forward(
        self,
        video: Tensor,
        mask_ratio: float = 0.9,
        noise: Tensor | None = None,
        encode_all: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        latent, mask, ids_restore = self.encode(video, 0.0 if encode_all else mask_ratio, noise)
        if encode_all:
            keep = int(mask.shape[1] * (1 - mask_ratio))
            mask = (ids_restore >= keep).float()
            latent = latent[:, : int(self.cfg.cls_embed) + keep]  # these stand first
        pred = self.decode(latent, ids_restore, mask)
        return self.loss(video, pred, mask), pred, mask

    def encode(
        self, video: Tensor, mask_ratio: float, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(latent [N, (1 +) K, D], mask [N, L], ids_restore [N, L])."""
        x = self.patch_embed(video)  # all L tokens
        n, length, dim = x.shape
        if noise is None:
            noise = torch.rand(n, length, device=x.device)
        keep = int(length * (1 - mask_ratio))
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        ids_keep = ids_shuffle[:, :keep, None].expand(-1, -1, dim)
        mask = torch.ones(n, length, device=x.device)
        mask[:, :keep] = 0
        mask = mask.gather(1, ids_restore)

        cls = int(self.cfg.cls_embed)
        x = x.gather(1, ids_keep)
        pos = self._pos("pos_embed").expand(n, -1, -1)
        pos = torch.cat([pos[:, :cls], pos[:, cls:].gather(1, ids_keep)], dim=1)
        if cls:
            x = torch.cat([self.cls_token.expand(n, -1, -1), x], dim=1)
        x = x + pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def decode(self, latent: Tensor, ids_restore: Tensor, mask: Tensor) -> Tensor:
        """pred [N, L, P]; for slowfast [N, M, P]."""
        cls = int(self.cfg.cls_embed)
        n, length = ids_restore.shape
        if self.slowfast:
            x = self.decoder_embed(latent)
            first, x = x[:, :cls], x[:, cls:]
        else:
            x = self.decoder_embed(latent[:, cls:])
            first = self.decoder_cls_token.expand(n, -1, -1) if cls else x[:, :0]
        x = torch.cat([x, self.mask_token.repeat(n, length - x.shape[1], 1)], dim=1)
        x = x.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[-1]))  # unshuffle
        x = torch.cat([first, x], dim=1) + self._pos("decoder_pos_embed")
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)
        if self.slowfast:
            return self.decoder_pred(x[:, cls:][mask.bool()].unflatten(0, (n, -1)))
        return self.decoder_pred(x)[:, cls:]

    def loss(self, video: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the masked tokens against their pixels."""
        cfg = self.cfg
        if self.slowfast:
            frames = video[:, :, :: cfg.t_patch_size]
        else:
            index = torch.linspace(0, cfg.num_frames - 1, cfg.pred_t_dim).long()
            frames = video.index_select(2, index.to(video.device))
        # [N, C, t*u, H, W] -> [N, L, u*p*p*C], channel fastest.
        target = patches(frames, self.pred_t_patch, cfg.patch_size, "nthwupqc").flatten(2)
        if self.slowfast:
            target = target[mask.bool()].unflatten(0, (len(video), -1))
        if cfg.norm_pix_loss:
            target = normed(target)
        loss = ((pred - target) ** 2).mean(dim=-1)
        return loss.mean() if self.slowfast else (loss * mask).sum() / mask.sum()
