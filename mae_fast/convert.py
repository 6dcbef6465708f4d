"""Weights in and out, under the official names."""

import argparse
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae_fast import checkpoint
from mae_fast.config import ModelConfig, model_from_dict
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.model import MaskedAutoencoder


def to_mae_st(
    model: MaskedAutoencoder, what: Literal["param", "grad"] = "param"
) -> dict[str, Tensor]:
    """The parameters, or their gradients, under the official names: 467 of them for ViT-L.

    Tensors share memory with the model's. Raises ValueError for another `what` or a parameter
    without a gradient. A slowfast model has the same names less decoder_cls_token, and one joint
    decoder_pos_embed.
    """
    if what not in ("param", "grad"):
        raise ValueError(f"what must be 'param' or 'grad', got {what!r}")
    found = {}
    for name, p in model.named_parameters():
        value = p if what == "param" else p.grad
        if value is None:
            raise ValueError(f"{name} has no gradient: call backward first")
        found[name] = value.detach()
    return found


def load_weights(path: str | Path) -> tuple[ModelConfig | None, dict[str, Tensor]]:
    """(configuration, weights under the official names) of a checkpoint file.

    A run's checkpoint knows its configuration. An official .pth ({model: ...} or {model_state:
    ...}) and plain .safetensors weights do not, so None comes with them: shapes cannot betray a
    head count. Nothing is unpickled but tensors and argparse.Namespace.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises pickle, zip, EOF and runtime errors here
        raise CheckpointError(
            f"cannot read {path}: {str(e).partition(chr(10))[0] or type(e).__name__}"
        ) from e
    for key in ("model", "model_state"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not all(isinstance(v, Tensor) for v in tree.values()):
        raise CheckpointError(f"{path} holds no table of weights")
    return None, tree


def load_model(path: str | Path, cfg: ModelConfig | None = None) -> MaskedAutoencoder:
    """The model of a checkpoint, in eval mode on the CPU.

    `cfg` is needed for files that do not hold their configuration. Raises ConfigError without it,
    and CheckpointError naming every key that is missing, left over, or of another shape.
    """
    stored, weights = load_weights(path)
    cfg = stored or cfg
    if cfg is None:
        raise ConfigError(f"{path} does not say which model it is: name it (--model vit_large)")
    model = MaskedAutoencoder(cfg)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise CheckpointError(f"{path} does not fit the model: {e}") from e
    return model.eval()


def _load_safetensors(path: Path) -> tuple[ModelConfig | None, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as f:
            ours = "mae_fast" in (f.metadata() or {})
            weights = {} if ours else {k: f.get_tensor(k) for k in f.keys()}
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    if not ours:
        return None, weights
    state, tensors = checkpoint.read(path)
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    return model_from_dict(state["config"]["model"]), weights
