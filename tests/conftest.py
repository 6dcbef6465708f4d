"""Fixtures of every test: the golden figures recorded from the official code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mae_fast.config import ModelConfig
from mae_fast.model import MaskedAutoencoder

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)  # the tests run in two processes


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
