"""Where pixels come from when not from a clip in memory: the frames of a batch as they were
decoded, one flat buffer and a table of numbers, both of a size that stays from batch to batch.

A row of the table, int64 [COLUMNS + T]: the frames' height and width; the box that is cut out (top,
left, height, width); whether the clip is mirrored; the colours; and the byte of the buffer at which
each of the T frames begins. A frame is R, G, B pixel by pixel (PLANAR 0), or the planes Y, U, V of
8-bit 4:2:0, of which a sample of U and V stands for 2 x 2 pixels.

Colours are FFmpeg's to the bit (swscale's yuv420p to rgb24 on x86, for even heights): with y, u, v
= 8 Y - LUMA, 8 U - 1024, 8 V - 1024, and * the product's high 16 bits,
R = y * CY + v * CRV, G = y * CY + u * CGU + v * CGV, B = y * CY + u * CBU, cut to [0, 255].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HEIGHT, WIDTH, TOP, LEFT, BOX_HEIGHT, BOX_WIDTH, FLIP = range(7)
PLANAR, LUMA, CY, CRV, CGU, CGV, CBU, COLUMNS = range(7, 15)
RGB = (0,) * (COLUMNS - PLANAR)  # the columns from PLANAR on, of frames that are RGB
# swscale's: 65536 times what V adds to red, U to blue, and U and V take from green.
_MATRICES = {
    1: (117489, 138438, 13975, 34925),  # BT.709
    4: (104448, 132798, 24759, 53109),  # FCC
    7: (117579, 136230, 16907, 35559),  # SMPTE 240M
    9: (110013, 140363, 12277, 42626),  # BT.2020
    **dict.fromkeys((0, 2, 5, 6), (104597, 132201, 25675, 53279)),  # BT.601, and what is unsaid
}


def colours(matrix: int, full: bool) -> tuple[int, ...] | None:
    """The columns from PLANAR on of Y, U, V frames of this matrix (as in H.273) and range; None
    where FFmpeg knows no conversion."""
    if matrix not in _MATRICES:
        return None
    crv, cbu, cgu, cgv = _MATRICES[matrix]
    luma, cy = (0, 65536) if full else (128, 65536 * 255 // 219)
    if full:
        crv, cbu, cgu, cgv = (c * 224 // 255 for c in (crv, cbu, cgu, cgv))
    cy, crv, cgu, cgv, cbu = (c + 4 >> 3 for c in (cy, crv, -cgu, -cgv, cbu))
    return 1, luma, cy, crv, cgu, cgv, cbu


def frame_bytes(height: int, width: int, planar: bool) -> int:
    chroma = (height + 1) // 2 * ((width + 1) // 2)
    return height * width + 2 * chroma if planar else 3 * height * width


@dataclass(frozen=True)
class Source:
    """Clips [B, 3, T, size, size] that are made of decoded frames where they are asked for.

    flat: uint8 bytes; table: int64 [B, COLUMNS + T], on the same device; size: of the clips.
    """

    flat: Tensor
    table: Tensor
    size: int

    @property
    def shape(self) -> torch.Size:
        clips, columns = self.table.shape
        return torch.Size((clips, 3, columns - COLUMNS, self.size, self.size))

    @property
    def device(self) -> torch.device:
        return self.flat.device

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype

    def __len__(self) -> int:
        return self.table.shape[0]

    def __getitem__(self, clips: slice) -> "Source":
        """Some of the clips."""
        return Source(self.flat, self.table[clips], self.size)

    def of_frames(self, frames: Sequence[int]) -> "Source":
        """Of each clip the frames of these numbers."""
        if any(f < 0 or f >= self.shape[2] for f in frames):
            raise IndexError(f"frames {list(frames)} of clips of {self.shape[2]}")
        # One copy on the device; a tensor of frame numbers would come from the host.
        columns = [self.table[:, :COLUMNS], *(self.table[:, COLUMNS + f, None] for f in frames)]
        return Source(self.flat, torch.cat(columns, dim=1), self.size)

    def rgb(self) -> list[Tensor]:
        """The whole frames of each clip, uint8 [T, H, W, 3]: the reference's colours."""
        return [self._rgb(row) for row in self.table.tolist()]

    def _rgb(self, row: list[int]) -> Tensor:
        height, width, planar = row[HEIGHT], row[WIDTH], row[PLANAR]
        size = frame_bytes(height, width, bool(planar))
        if height < 1 or width < 1:
            raise ValueError(f"frames of {height}x{width}")
        for at in row[COLUMNS:]:
            if not 0 <= at <= self.flat.numel() - size:
                raise ValueError(
                    f"frames of {size} bytes at {at}, in a buffer of {self.flat.numel()}"
                )
        frames = torch.stack([self.flat[at : at + size] for at in row[COLUMNS:]])
        if not planar:
            return frames.view(-1, height, width, 3)
        sides = (height + 1) // 2, (width + 1) // 2
        parts = frames.int().split([height * width, *[sides[0] * sides[1]] * 2], dim=1)
        y = 8 * parts[0].view(-1, height, width) - row[LUMA]
        u, v = (
            (8 * p.view(-1, *sides) - 1024)
            .repeat_interleave(2, 1)
            .repeat_interleave(2, 2)[:, :height, :width]
            for p in parts[1:]
        )
        y = y * row[CY] >> 16
        red, blue = y + (v * row[CRV] >> 16), y + (u * row[CBU] >> 16)
        green = y + (u * row[CGU] >> 16) + (v * row[CGV] >> 16)
        return torch.stack([red, green, blue], dim=-1).clamp_(0, 255).to(torch.uint8)


def of_rgb(frames: list[Tensor], boxes: Tensor, flips: Tensor, size: int) -> Source:
    """Of clips uint8 [T, H, W, 3], boxes [B, 4] (top, left, height, width) and flips [B]."""
    rows, at = [], 0
    for f, box, flip in zip(frames, boxes.tolist(), flips.tolist(), strict=True):
        each = f[0].numel()
        begins = [at + i * each for i in range(len(f))]
        rows.append([*f.shape[1:3], *box, int(flip), *RGB, *begins])
        at += f.numel()
    flat = torch.cat([f.reshape(-1) for f in frames])
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(flat.device)
    return Source(flat, table, size)
