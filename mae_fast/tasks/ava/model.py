"""The encoder with SlowFast's head on boxes: ResNetRoIHead on a ViT, as AlphAction's for VideoMAE.

The norm of all tokens, cls left out; the mean over time; RoIAlign to 7 x 7 (aligned, as many
samples as fit: detectron2's sampling ratio 0); the greatest of the 49; dropout; a linear layer. The
clip may have any size that patches divide: positions are interpolated over space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_fast.classifier import ClassifierConfig, VideoClassifier
from mae_fast.errors import ConfigError
from mae_fast.fields import require
from mae_fast.forward import Norm, Params, encode
from mae_fast.ops.layer_norm import layer_norm
from mae_fast.ops.linear import linear
from mae_fast.weights.positions import over_space

ROI = 7


def roi_align():
    """torchvision's, imported when it is needed: pre-training has no use for it."""
    try:
        from torchvision.ops import roi_align
    except ImportError as e:
        raise ConfigError(f'task = "ava" needs torchvision (pip install torchvision): {e}') from e
    return roi_align


class BoxClassifier(VideoClassifier):
    """logits = model(video, boxes): clips [B, C, T, H, W], uint8 or normalised, and boxes [P, 5] of
    (clip, x1, y1, x2, y2), in pixels -> [P, classes].
    """

    def __init__(self, cfg: ClassifierConfig) -> None:
        require(
            cfg.pool == "first", "boxes take the pre-trained norm: pool must be first", cfg.pool
        )
        roi_align()
        super().__init__(cfg)

    def _grid(self, video: Tensor) -> tuple[int, int, int]:
        m = self.cfg.model
        sides = video.shape[3:]
        fits = video.dim() == 5 and video.shape[1:3] == (m.in_chans, m.num_frames)
        if not fits or any(x % m.patch_size or not x for x in sides):
            raise ValueError(
                f"video must be [B, {m.in_chans}, {m.num_frames}, H, W] with sides that are "
                f"multiples of {m.patch_size}, got {list(video.shape)}"
            )
        return m.grid[0], sides[0] // m.patch_size, sides[1] // m.patch_size

    def _at(self, grid: tuple[int, int, int], uint8: bool) -> Params:
        """The encoder's parameters, its positions at this grid."""
        params, (t, h, w) = self.params(uint8), self.cfg.model.grid
        if (h, w) == grid[1:]:
            return params
        pos = over_space(params.pos.unflatten(0, (t, h * w)), grid)
        return params._replace(pos=pos.flatten(0, 1))

    def forward(self, video: Tensor, boxes: Tensor) -> Tensor:
        grid = self._grid(video)
        count = grid[0] * grid[1] * grid[2]
        ids = torch.arange(count, dtype=torch.int32, device=video.device).expand(len(video), -1)
        params = self._at(grid, video.dtype == torch.uint8)
        return self.on_boxes(encode(params, self.spec, video, ids), grid, boxes)

    def on_boxes(self, tokens: Tensor, grid: tuple[int, int, int], boxes: Tensor) -> Tensor:
        """The head: what the last block gives, [B, (1 +) t*h*w, D], and boxes -> [P, classes]."""
        x = layer_norm(tokens, *Norm.of(self.norm), None)
        x = x[:, int(self.has_cls) :].unflatten(1, grid).mean(dim=1).permute(0, 3, 1, 2)
        wide = torch.promote_types(x.dtype, torch.float32)
        how = dict(spatial_scale=1 / self.cfg.model.patch_size, sampling_ratio=0, aligned=True)
        rois = roi_align()(x.to(wide), boxes.to(wide), ROI, **how)
        features = self.dropout(F.max_pool2d(rois, ROI).flatten(1))
        return linear(features, self.head.weight, self.head.bias)


def box_loss(logits: Tensor, target: Tensor, clips: int) -> Tensor:
    """Binary cross entropy: the mean over classes, summed over boxes, over the number of clips.

    So every box weighs the same, whichever process has it. VideoMAE's is this times the clips of a
    GPU, SlowFast's is the mean over boxes; AdamW's step knows no factor.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.binary_cross_entropy_with_logits(wide, target.to(wide.dtype), reduction="none")
    return each.mean(dim=1).sum() / clips
