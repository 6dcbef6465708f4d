"""The official repository itself (facebookresearch/mae_st, a checkout of it), as one more engine.

It imports itself as `mae_st` and needs timm, iopath and simplejson, of which it uses a handful of
names: stand-ins for these are made here while it is imported, and taken away again. Nothing is
written into the checkout.
"""

import contextlib
import hashlib
import importlib
import inspect
import io
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mae_fast.bench.baselines.official import EPS, normalise
from mae_fast.bench.baselines.training import Baseline, LossOf
from mae_fast.config import ModelConfig


@dataclass(frozen=True)
class OfficialRepository(Baseline):
    """models_mae.py of the checkout at `path`, trained as its engine_pretrain.py does."""

    path: str
    name: str = "official_repository"

    def parts(self, cfg: ModelConfig) -> tuple[nn.Module, LossOf, bool]:
        if cfg.variant != "mae_st":
            raise ValueError(f"the official repository has no variant {cfg.variant}")
        made = import_models(self.path).MaskedAutoencoderViT
        known = inspect.signature(made).parameters
        settings = {name: value for name, value in asdict(cfg).items() if name in known}
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it is there
            model = made(norm_layer=partial(nn.LayerNorm, eps=EPS), **settings)

        def loss_of(clips: Tensor, noise: Tensor, ratio: float, encode_all: bool = False) -> Tensor:
            if encode_all:
                raise ValueError("the official repository cannot encode every token")
            with given_noise(noise):
                return model(normalise(clips), ratio)[0]

        return model, loss_of, False

    def source(self) -> str:
        """A hash of the files that make the model, for records: a checkout may have no git."""
        files = (Path(self.path) / name for name in ("models_mae.py", "util/video_vit.py"))
        return "sha256 " + hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def given_noise(noise: Tensor) -> contextlib.AbstractContextManager:
    """Inside, the only random number of its forward is this one, of as many clips as are asked for
    (accelerate compares one first)."""
    _given.noise = noise
    return mock.patch.object(torch, "rand", _given)


def _given(n: int, *size: int, device: torch.device) -> Tensor:
    """In place of torch.rand, the same function at every step: an accelerated model that finds
    another one is compared anew."""
    return _given.noise[:n].to(device)


def import_models(path: str) -> ModuleType:
    """models_mae.py of the checkout. Raises FileNotFoundError where there is none."""
    if not (Path(path) / "models_mae.py").exists():
        raise FileNotFoundError(f"{path} has no models_mae.py: it is no checkout of mae_st")
    contents = {
        "mae_st": {"__path__": [path]},
        "timm.models.layers": {"to_2tuple": to_2tuple},
        "timm.models.vision_transformer": {"DropPath": None, "Mlp": _Mlp},  # no path is dropped
        "iopath.common.file_io": {"g_pathmgr": None},
        "simplejson": {},
    }
    return import_beside("mae_st.models_mae", contents)


def import_beside(name: str, contents: dict[str, dict[str, Any]]) -> ModuleType:
    """A module of a checkout, imported beside stand-ins of these names and contents, and of what
    they are in; sys.modules is then as it was."""
    made: dict[str, ModuleType] = {}
    for key, values in contents.items():
        for part in accumulate(key.split("."), "{}.{}".format):
            made.setdefault(part, ModuleType(part))
        made[key].__dict__.update(values)
    with mock.patch.dict(sys.modules, made):
        return importlib.import_module(name)


def to_2tuple(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x, x)


class _Mlp(nn.Module):
    """The MLP under timm's argument and parameter names."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: type[nn.Module], drop: float
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
