"""mae_fast: pre-train video masked autoencoders, exactly as the official code computes them.

    model = mae_fast.MaskedAutoencoder(mae_fast.preset("vit_base"))
    loss, pred, mask = model(video, mask_ratio=0.9)  # video uint8 [B, 3, 16, 224, 224]

Names are loaded on first use: importing mae_fast imports nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers; below is what runs
    from mae_fast import data as data
    from mae_fast import masking as masking
    from mae_fast.classifier import ClassifierConfig as ClassifierConfig
    from mae_fast.classifier import VideoClassifier as VideoClassifier
    from mae_fast.config import Config as Config
    from mae_fast.config import DataConfig as DataConfig
    from mae_fast.config import MaskConfig as MaskConfig
    from mae_fast.config import ModelConfig as ModelConfig
    from mae_fast.config import TrainConfig as TrainConfig
    from mae_fast.config import preset as preset
    from mae_fast.config_file import load_config as load_config
    from mae_fast.drop_in import accelerate as accelerate
    from mae_fast.drop_in import explain as explain
    from mae_fast.drop_in import restore as restore
    from mae_fast.model import MaskedAutoencoder as MaskedAutoencoder
    from mae_fast.ops.dispatch import backends as backends
    from mae_fast.reconstruction import reconstruct as reconstruct
    from mae_fast.train import pretrain as pretrain
    from mae_fast.weights import convert as convert
    from mae_fast.weights import load_model as load_model

_HOME = {
    "ClassifierConfig": "classifier",
    "Config": "config",
    "DataConfig": "config",
    "MaskConfig": "config",
    "ModelConfig": "config",
    "TrainConfig": "config",
    "VideoClassifier": "classifier",
    "preset": "config",
    "MaskedAutoencoder": "model",
    "accelerate": "drop_in",
    "backends": "ops.dispatch",
    "convert": "weights",
    "explain": "drop_in",
    "load_config": "config_file",
    "load_model": "weights",
    "pretrain": "train",
    "reconstruct": "reconstruction",
    "restore": "drop_in",
}
_MODULES = ("data", "masking")
__all__ = sorted([*_HOME, *_MODULES, "__version__"])


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"mae_fast.{name}")
    if name in _HOME:
        return getattr(import_module(f"mae_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mae_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
