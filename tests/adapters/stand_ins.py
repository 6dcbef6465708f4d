"""Stand-ins for the families whose code is not installed: their names of parts, their arithmetic.

Written from what the repositories compute, as short as they can be; `test_<family>.py` also runs
the repositories' own code where an environment variable names a checkout.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    def __init__(self, chans: int, dim: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(chans, dim, size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: float, drops_twice: bool = False) -> None:
        super().__init__()
        self.drops_twice = drops_twice  # PySlowFast's and timm's
        self.fc1, self.act = nn.Linear(dim, int(dim * ratio)), nn.GELU()
        self.fc2, self.drop = nn.Linear(int(dim * ratio), dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.drop(self.fc2(self.drop(x) if self.drops_twice else x))


class Attention(nn.Module):
    """One fused product for q, k and v; its bias is VideoMAE's (q's and v's) or PySlowFast's."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, biases_apart: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and not biases_apart)
        self.biases_apart = biases_apart  # it calls no qkv
        if biases_apart:
            self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
            self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if self.biases_apart and self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias) if self.biases_apart else self.qkv(x)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: float, qkv_bias: bool, apart: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = Attention(dim, heads, qkv_bias, apart)
        self.drop_path = nn.Identity()
        self.mlp = Mlp(dim, ratio, drops_twice=not apart)
        self.gamma_1 = self.gamma_2 = None

    def forward(self, x: Tensor, thw: list[int] | None = None) -> Tensor | tuple[Tensor, list[int]]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return (x, thw) if thw else x  # PySlowFast's: with the shape of its tokens


def sinusoids(length: int, dim: int) -> Tensor:
    """[1, length, dim] as VideoMAE has them; a plain tensor, no buffer."""
    angles = torch.arange(length)[:, None] / 10000 ** (2 * (torch.arange(dim) // 2) / dim)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos()).float()[None]


class VideoMAE(nn.Module):
    """VideoMAE's PretrainVisionTransformer."""

    checkpoint_flag = "use_checkpoint"

    def __init__(
        self,
        size: tuple[int, int] = (32, 32),
        frames: int = 8,
        patch: int = 8,
        tubelet: int = 2,
        dims: tuple[int, int] = (24, 12),
        heads: tuple[int, int] = (3, 2),
        depths: tuple[int, int] = (2, 2),
        ratio: float = 4.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        length = frames // tubelet * (size[0] // patch) * (size[1] // patch)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        for part, dim, head, depth in zip(
            (self.encoder, self.decoder), dims, heads, depths, strict=True
        ):
            blocks = [Block(dim, head, ratio, qkv_bias, True) for _ in range(depth)]
            part.blocks, part.norm = nn.ModuleList(blocks), nn.LayerNorm(dim, eps=1e-6)
            setattr(part, self.checkpoint_flag, False)
        embed = PatchEmbed(3, dims[0], (tubelet, patch, patch))
        embed.img_size, embed.num_patches = size, length
        self.encoder.patch_embed, self.encoder.pos_embed = embed, sinusoids(length, dims[0])
        self.encoder.head = nn.Identity()
        self.decoder.head = nn.Linear(dims[1], 3 * tubelet * patch**2)
        self.encoder_to_decoder = nn.Linear(*dims, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dims[1]))
        self.pos_embed = sinusoids(length, dims[1])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.predict(x, mask, mask)

    def predict(self, x: Tensor, mask: Tensor, decoded: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.encoder.patch_embed(x) + self.encoder.pos_embed.type_as(x)
        x = x[~mask].reshape(batch, -1, x.shape[-1])
        for block in self.encoder.blocks:
            x = block(x)
        x = self.encoder_to_decoder(self.encoder.norm(x))
        pos = self.pos_embed.type_as(x).expand(batch, -1, -1)
        pos_kept, pos_decoded = (pos[m].reshape(batch, -1, x.shape[-1]) for m in (~mask, decoded))
        x = torch.cat([x + pos_kept, self.mask_token + pos_decoded], dim=1)
        for block in self.decoder.blocks:
            x = block(x)
        return self.decoder.head(self.decoder.norm(x[:, -pos_decoded.shape[1] :]))


class VideoMAEV2(VideoMAE):
    """VideoMAE V2's: the decoder may skip tokens, and decode some that the encoder sees."""

    checkpoint_flag = "with_cp"

    def forward(self, x: Tensor, mask: Tensor, decode_mask: Tensor | None = None) -> Tensor:
        return self.predict(x, mask, mask if decode_mask is None else ~decode_mask)


def videomae_labels(video: Tensor, mask: Tensor, patch: int, tubelet: int, norm: bool) -> Tensor:
    """The engine's labels of the tokens where mask [B, L] is True: [B, M, P], channel fastest."""
    mean, std = (
        torch.tensor(x).to(video).view(1, 3, 1, 1, 1)  # in fp32 first
        for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    x = video * std + mean
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // tubelet, tubelet, h // patch, patch, w // patch, patch)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, -1, tubelet * patch * patch, c)
    if norm:
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True).sqrt() + 1e-6)
    return x.flatten(2)[mask].reshape(b, -1, tubelet * patch * patch * c)


class MaskMViT(nn.Module):
    """PySlowFast's MaskMViT as its MAE configurations make it; `cfg` is what its forward reads."""

    def __init__(
        self,
        size: int = 32,
        frames: int = 8,
        patch: int = 8,
        t_patch: int = 2,
        dims: tuple[int, int] = (24, 64),
        heads: tuple[int, int] = (3, 1),
        depths: tuple[int, int] = (2, 2),
        qkv_bias: bool = True,
        cls: bool = True,
        sep_pos_embed: bool = True,
        decoder_sep_pos_embed: bool = False,
        norm_pix: bool = True,
        time_stride_loss: bool = True,
        mask_ratio: float = 0.7,
        tube: bool = False,
        random_mask: bool = True,
        hog: bool = False,
    ) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            AUG=SimpleNamespace(MASK_RATIO=mask_ratio, MASK_TUBE=tube),
            MVIT=SimpleNamespace(PATCH_STRIDE=[t_patch, patch, patch]),
            VIS_MASK=SimpleNamespace(ENABLE=False),
            MASK=SimpleNamespace(
                MAE_ON=True,
                MAE_RND_MASK=random_mask,
                PER_FRAME_MASKING=False,
                TIME_STRIDE_LOSS=time_stride_loss,
                NORM_PRED_PIXEL=norm_pix,
                PRED_HOG=hog,
            ),
        )
        self.use_2d_patch, self.use_abs_pos, self.use_fixed_sincos_pos = False, True, False
        self.enable_rev = False
        self.sep_pos_embed, self.sep_pos_embed_decoder = sep_pos_embed, decoder_sep_pos_embed
        self.cls_embed_on, self.patch_stride = cls, [t_patch, patch, patch]
        self.patch_dims = [frames // t_patch, size // patch, size // patch]
        self.T, self.H, self.W = self.patch_dims
        self.pretrain_depth, self.counter = [depths[0] - 1], 0
        self.pred_pixel_wt, self.pred_hog_wt = (0.0, 1.0) if hog else (1.0, 0.0)
        self.patch_embed = PatchEmbed(3, dims[0], (t_patch, patch, patch))
        if cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[0]))
        self._positions("pos_embed", "pos_embed", dims[0], sep_pos_embed)
        self._positions("decoder_pos_embed", "dec_pos_embed", dims[1], decoder_sep_pos_embed)
        self.blocks = nn.ModuleList(
            Block(dims[0], heads[0], 4.0, qkv_bias, False) for _ in range(depths[0])
        )
        self.norm, self.decoder_embed = nn.LayerNorm(dims[0], eps=1e-6), nn.Linear(*dims)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dims[1]))
        decoder = [Block(dims[1], heads[1], 4.0, qkv_bias, False) for _ in range(depths[1])]
        values = 27 if hog else (1 if time_stride_loss else t_patch) * patch**2 * 3
        self.pred_head = nn.Module()
        self.pred_head.transforms = nn.ModuleList(
            [nn.Sequential(*decoder, nn.LayerNorm(dims[1], eps=1e-6))]
        )
        self.pred_head.projections = nn.ModuleList([nn.Linear(dims[1], values)])

    def _positions(self, joint: str, apart: str, dim: int, separable: bool) -> None:
        t, hw = self.T, self.H * self.W
        shapes = {joint: t * hw + self.cls_embed_on}
        if separable:
            shapes = {apart + "_spatial": hw, apart + "_temporal": t}
            shapes |= {apart + "_class": 1} if self.cls_embed_on else {}
        for name, length in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, length, dim)))

    def _pos(self, joint: str, apart: str, separable: bool) -> Tensor:
        if not separable:
            return getattr(self, joint)
        spatial, temporal = getattr(self, apart + "_spatial"), getattr(self, apart + "_temporal")
        pos = spatial.repeat(1, self.T, 1) + temporal.repeat_interleave(self.H * self.W, dim=1)
        if self.cls_embed_on:
            pos = torch.cat([getattr(self, apart + "_class"), pos], dim=1)
        return pos

    def _get_hog_label_3d(self, frames: Tensor, masks: list[Tensor]):
        """Stands in for a histogram: 27 numbers of a token from its first frame."""
        p = self.patch_stride[1]
        cells = frames[:, :, :: self.patch_stride[0]].unflatten(-1, (-1, p)).unflatten(3, (-1, p))
        rows = cells.mean(dim=(4, 6)).flatten(2).transpose(1, 2).repeat(1, 1, 9)
        return [(rows[masks[0]], self.pred_hog_wt, "mse")]

    def _pixel_labels(self, frames: Tensor, mask: Tensor):
        t_patch, p, _ = self.patch_stride
        u = t_patch
        if self.cfg.MASK.TIME_STRIDE_LOSS:
            frames, u = frames[:, :, ::t_patch], 1
        b, c, t, h, w = frames.shape
        cells = frames.reshape(b, c, t // u, u, h // p, p, w // p, p)
        label = cells.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, -1, u * p * p * c)[mask]
        if self.cfg.MASK.NORM_PRED_PIXEL:
            centred = label - label.mean(dim=-1, keepdim=True)
            label = centred / (label.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
        return [(label, self.pred_pixel_wt)]

    def _mask(self, x: Tensor, given: Tensor | None):
        batch, length, ratio = x.shape[0], x.shape[1], self.cfg.AUG.MASK_RATIO
        if given is not None and not self.cfg.MASK.MAE_RND_MASK:
            noise = given.flatten(1)
            ratio = sum(noise.flatten()) / noise.numel()
        elif self.cfg.AUG.MASK_TUBE:
            noise = torch.rand(batch, 1, self.H * self.W, device=x.device)
            noise = noise.repeat(1, self.T, 1).reshape(batch, -1)
        else:
            noise = torch.rand(batch, length, device=x.device)
        shuffle = noise.argsort(dim=1)
        keep = int(length * (1 - ratio))
        mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        mask = mask.scatter(1, shuffle[:, :keep], False)
        return shuffle[:, :keep], shuffle, mask

    def forward(self, x: list[Tensor], return_all: bool = False):
        clip, given = (x[0], x[2]) if len(x) > 1 else (x[0], None)
        s = int(self.cls_embed_on)
        x = self.patch_embed(clip)
        keep, shuffle, mask = self._mask(x, given)
        pos = self._pos("pos_embed", "pos_embed", self.sep_pos_embed)
        x = (x + pos[:, s:]).gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        if s:
            x = torch.cat([(self.cls_token + pos[:, :1]).expand(len(x), -1, -1), x], dim=1)
        thw = self.patch_dims
        for block in self.blocks:
            x, thw = block(x, thw)
        x = self.decoder_embed(self.norm(x))
        hidden = self.mask_token.expand(len(x), shuffle.shape[1] + s - x.shape[1], -1)
        tokens = torch.cat([x[:, s:], hidden], dim=1)
        order = shuffle.argsort(dim=1)[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, :s], tokens.gather(1, order)], dim=1)
        x = x + self._pos("decoder_pos_embed", "dec_pos_embed", self.sep_pos_embed_decoder)
        for block in self.pred_head.transforms[0]:
            x, thw = block(x, thw) if isinstance(block, Block) else (block(x), thw)
        x = x[:, s:]
        pred = self.pred_head.projections[0](x if self.cfg.VIS_MASK.ENABLE else x[mask])
        self.counter += 1
        if self.pred_hog_wt:
            return [pred], self._get_hog_label_3d(clip, [mask])
        return [pred], self._pixel_labels(clip, mask)
