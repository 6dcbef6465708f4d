"""Videos in, uint8 clips out.

from mae_fast.config import DataConfig
from mae_fast.data import build_index, make_loader, read_index

build_index(["videos/"], "videos.jsonl")
rows = read_index("videos.jsonl")
for batch in make_loader(rows, DataConfig(), num_frames=16, batch_size=2, seed=0, steps=100):
    video = batch.to("cuda", non_blocking=True).video(224)  # [8, 3, 16, 224, 224], normalised
"""

from mae_fast.data.container import BadVideo
from mae_fast.data.decode import VideoReader, decoders, probe
from mae_fast.data.index import (
    IndexSummary,
    VideoRow,
    build_index,
    read_index,
    read_source,
    write_index,
)
from mae_fast.data.loader import BadVideos, Batch, ClipDataset, Loader, join, make_loader
from mae_fast.data.sampling import clip_indices, crop_box, draw, shrink
from mae_fast.ops.crop_resize_patchify_gather import crop_resize

__all__ = [
    "BadVideo",
    "BadVideos",
    "Batch",
    "ClipDataset",
    "IndexSummary",
    "Loader",
    "VideoReader",
    "VideoRow",
    "build_index",
    "clip_indices",
    "crop_box",
    "crop_resize",
    "decoders",
    "draw",
    "join",
    "make_loader",
    "probe",
    "read_index",
    "read_source",
    "shrink",
    "write_index",
]
