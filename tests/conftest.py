"""Fixtures of every test: golden figures of the official code, videos that say their number."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open

from mae_fast.config import ModelConfig
from mae_fast.data import build_index
from mae_fast.model import MaskedAutoencoder

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)  # the tests run in two processes
# The tests are the CPU's, and neither they nor what they start see a GPU. Those of the ops run on
# one where they are given it: by make test, which finds it, and make gpu.
if os.environ.get("MAE_FAST_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests under nohup would ignore it, and so would the runs that they start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Golden:
    """One golden file: its configuration, and what the official code computed."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
            config = json.loads(f.metadata()["config"])
            self.tensors = {k: f.get_tensor(k) for k in f.keys()}
        self.mask_ratio = config.pop("mask_ratio")
        assert (config.pop("pixel_mean"), config.pop("pixel_std")) == (0.45, 0.225)
        assert config.pop("norm_eps") == 1e-6
        self.cfg = ModelConfig(**config)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def state(self) -> dict[str, torch.Tensor]:
        return {k[6:]: v for k, v in self.tensors.items() if k.startswith("state.")}

    def model(self) -> MaskedAutoencoder:
        model = MaskedAutoencoder(self.cfg)
        model.load_state_dict(self.state())
        return model

    def float_video(self) -> torch.Tensor:
        return (self["video_u8"].float() / 255 - 0.45) / 0.225


@pytest.fixture(params=["mae_st_tiny", "mae_st_tiny_all_frames_raw_pixels"])
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.fixture
def tiny_cfg() -> ModelConfig:
    """The smallest model with every part: 4 x 2 x 2 patches of 2 x 8 x 8 pixels."""
    return ModelConfig(
        img_size=16,
        patch_size=8,
        num_frames=8,
        pred_t_dim=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=2,
        decoder_num_heads=2,
    )


def image(k: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame k: its number as eight vertical bars, lowest bit first; the last rows are brighter."""
    bars = np.array([200 if k >> bit & 1 else 50 for bit in range(8)], dtype=np.uint8)
    columns = np.arange(width) * 8 // width
    frame = np.repeat(bars[columns][None, :, None].repeat(height, 0), 3, axis=2)
    frame[-height // 4 :] += 40
    return frame


def number(frame) -> int:
    """The number of a frame that `image` made, from its upper half."""
    frame = np.asarray(frame).astype(float)
    top = frame[: frame.shape[0] // 2].mean(axis=(0, 2))
    edges = [(bit * 2 + 1) * len(top) // 16 for bit in range(8)]
    return sum(int(top[x] > 125) << bit for bit, x in enumerate(edges))


def write(
    path,
    n=40,
    *,
    codec="libx264",
    width=64,
    height=48,
    pix_fmt="yuv420p",
    rate=25,
    options=None,
    pts=None,
    bframes=2,
    gop=10,
    rotate=0,
    faststart=False,
    make=image,
):
    """Encode n frames; pts gives their timestamps in units of 1 / rate."""
    movflags = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=movflags) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.max_b_frames = bframes
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if codec == "mpeg4":
            stream.codec_context.qmax = 4
        if rotate:
            stream.set_display_rotation(rotate)
        for k in range(n):
            frame = av.VideoFrame.from_ndarray(make(k, height, width), format="rgb24")
            frame.pts = k if pts is None else pts[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path, cover=False):
    """A second of silence; with cover=True also an attached picture."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        sound.layout = "mono"
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(image(3), format="rgb24")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        for k in range(16):
            samples = np.zeros((1, 1000), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, k * 1000
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


@pytest.fixture(scope="session")
def video():
    """video.write, video.write_audio, video.image, video.number."""
    return SimpleNamespace(write=write, write_audio=write_audio, image=image, number=number)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Five good videos of 40 to 60 frames at 25 and 30 frames a second, read-only."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(5):
        write(root / f"v{i}.mp4", 40 + 5 * i, rate=25 if i % 2 else 30)
    return root


@pytest.fixture(scope="session")
def index(folder, tmp_path_factory):
    """An index of `folder`."""
    out = tmp_path_factory.mktemp("index") / "index.jsonl"
    build_index([folder], out, progress=False)
    return str(out)
