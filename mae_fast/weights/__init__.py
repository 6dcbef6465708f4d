"""Weights in and out: files of every family, and one family's as another's.

Names and what can be carried: `families.py`; how, and what is lost: `translate.py`.
"""

import argparse
import json
import pickle
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae_fast import checkpoint
from mae_fast.config import ModelConfig, as_model
from mae_fast.config_file import model_from_dict
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.files import check_output
from mae_fast.model import MaskedAutoencoder
from mae_fast.weights.families import TARGET_ENCODER, identify, read, strip
from mae_fast.weights.translate import Name, Report, Size, translate

__all__ = ["Report", "Size", "convert", "load_model", "load_weights", "to_mae_st", "translate"]

# Where training scripts put the weights in what they save.
_TABLES = (
    *("model", "model_state", "model_state_dict", "module", "state_dict", "net"),
    *("model_ema", "ema"),  # averaged weights, where there are no others
)


class _Inert:
    """Stands for numbers of numpy that lie beside weights (rates, in an optimizer's groups): made
    of anything, holding nothing, so that none of numpy's code is run by a file."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_INERT = [
    (_Inert, f"numpy.{name}")
    for name in (
        "dtype",
        "ndarray",
        *(
            f"{core}.multiarray.{f}"
            for core in ("core", "_core")
            for f in ("scalar", "_reconstruct")
        ),
    )
]


def convert(
    input: Annotated[str, tyro.conf.arg(metavar="IN")],
    /,
    to: Name,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="OUT.safetensors")],
    source: Annotated[Name | Literal["auto"], tyro.conf.arg(name="from")] = "auto",
    img_size: int | None = None,
    num_frames: int | None = None,
    source_num_frames: int | None = None,
    t_patch_size: int = 2,
    encoder_only: bool = False,
) -> None:
    """Write a model's weights under another family's names; what could not be carried is printed,
    and kept in the file's metadata.

    Args:
        input: weights of any of the families, or a run's checkpoint: .safetensors, or what
            torch.load reads without running code.
        to: the family whose names the output has.
        output: the file to write, whole or not at all.
        source: the family of the input; auto tells it by its names.
        img_size: side of the target's clips in pixels; positions are interpolated, or made where
            the source has fixed ones (224 by default).
        num_frames: frames of the target's clips, likewise (16 by default).
        source_num_frames: frames of the source's clips, 16 by default: a joint table of positions
            does not tell.
        t_patch_size: frames of a patch that is made from an image model's.
        encoder_only: leave the decoder out.
    """
    if Path(output).suffix != ".safetensors":
        raise ConfigError(f"the output is a .safetensors file, got {output}")
    check_output(output, input)
    cfg, state = _read(Path(input))
    frames = cfg.num_frames if cfg else 16
    frames = frames if source_num_frames is None else source_num_frames
    size = Size(img_size, num_frames, frames, t_patch_size)
    state, report = translate(state, to, source, size, encoder_only)
    _save(Path(output), state, report)
    print(f"{input} ({report.source}) -> {output} ({report.target}), {len(state)} tensors")
    if cfg:
        print(f"heads: {cfg.num_heads}, and {cfg.decoder_num_heads} in the decoder")
    print("\n".join(report.lines()))


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
        if name.startswith(TARGET_ENCODER):
            continue
        value = p if what == "param" else p.grad
        if value is None:
            raise ValueError(f"{name} has no gradient: call backward first")
        found[name] = value.detach()
    return found


def load_weights(path: str | Path) -> tuple[ModelConfig | None, dict[str, Tensor]]:
    """(configuration, weights under the official names) of a checkpoint file of any family.

    A run's checkpoint knows its configuration. Other files do not, so None comes with them: shapes
    cannot betray a head count. Nothing is unpickled but tensors and argparse.Namespace. Names that
    no family has stay as they are.
    """
    cfg, state = _read(Path(path))
    state = strip(state)
    try:
        table, rest = read(state, identify(state))
    except CheckpointError:
        return cfg, state
    return cfg, {**table, **rest}


def load_model(path: str | Path, cfg: ModelConfig | str | None = None) -> MaskedAutoencoder:
    """The model of a checkpoint, in eval mode on the CPU.

    `cfg`, or a preset's name, is needed for files that do not hold their configuration. Raises
    ConfigError without it, and CheckpointError naming every key that is missing, left over, or of
    another shape.
    """
    cfg = None if cfg is None else as_model(cfg)
    stored, weights = load_weights(path)
    cfg = stored or cfg
    if cfg is None:
        raise ConfigError(f"{path} does not say which model it is: name it (--model vit_large)")
    model = MaskedAutoencoder(cfg)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        said = " ".join(str(e).partition(":\n")[2].split())
        raise CheckpointError(f"{path} does not fit the model: {said or e}") from e
    return model.eval()


def _read(path: Path) -> tuple[ModelConfig | None, dict[str, Tensor]]:
    """(configuration of a run's checkpoint or None, the table of weights as the file has it)."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".dcp":
        return _of_run(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_INERT]):
            tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises pickle, zip, EOF and runtime errors here
        said = str(e)
        if isinstance(e, pickle.UnpicklingError) and "Unsupported global" in said:
            what = said.partition("GLOBAL ")[2].partition(" ")[0]
            raise CheckpointError(
                f"{path} holds more than tensors ({what}), and reading it would run its code. If "
                f"you trust it: weights = torch.load({path.name!r}, weights_only=False)['model']; "
                f"safetensors.torch.save_file(weights, 'weights.safetensors'); and convert that"
            ) from e
        # What torch says before this is of its own options.
        said = said.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        what = "" if isinstance(e, OSError) else "not a whole file of torch.save: "
        raise CheckpointError(f"cannot read {path}: {what}{said or type(e).__name__}") from e
    for key in _TABLES:
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    table = isinstance(tree, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout is torch.strided
        for k, v in tree.items()
    )
    if not table or not tree:
        raise CheckpointError(f"{path} holds no table of weights")
    return None, tree


def _read_safetensors(path: Path) -> tuple[ModelConfig | None, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as f:
            ours = "mae_fast" in (f.metadata() or {})
            weights = {} if ours else {k: f.get_tensor(k) for k in f.keys()}
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    return _of_run(path) if ours else (None, weights)


def _of_run(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    state, tensors = checkpoint.read(path)
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    config = state.get("config")
    try:
        return model_from_dict(config.get("model") if isinstance(config, dict) else None), weights
    except ConfigError as e:
        raise CheckpointError(f"{path}: the model in its state is none: {e}") from e


def _save(path: Path, state: dict[str, Tensor], report: Report) -> None:
    """Write a file that transformers takes too ("format"), whole or not at all."""
    metadata = {"format": "pt", "mae_fast.convert": json.dumps(vars(report))}
    # Copies: a pickle's tensors may share memory, which the format cannot say.
    tensors = {k: v.clone() for k, v in state.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(path, tensors, metadata)
    except OSError as e:
        raise CheckpointError(f"cannot write {path}: {e}") from e
