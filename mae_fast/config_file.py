"""A run's settings from a TOML file, and recipes.

Precedence, lowest first: the defaults in config.py, the recipe named in the file, the file, the
command line. An unknown key is refused with the nearest known one.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mae_fast.config import (
    Config,
    DataConfig,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    preset,
)
from mae_fast.errors import ConfigError
from mae_fast.fields import require, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTIONS = {
    "model": ModelConfig,
    "mask": MaskConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}

# mae_st: PRETRAIN.md of the official repository. The defaults above are the same, so that a run
# without a recipe trains the same way; here they are pinned by name.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "mae_st": {
        "mask": {"strategy": "random", "ratio": 0.9},
        "data": {"sampling_rate": 4, "repeat_aug": 4, "crop_area": (0.5, 1.0), "flip": 0.5},
        "train": {
            "batch_size": 2,
            "epochs": 100.0,
            "warmup_epochs": 5.0,
            "blr": 1.6e-3,
            "min_lr": 0.0,
            "weight_decay": 0.05,
            "betas": (0.9, 0.95),
            "clip_grad": 0.02,
            "precision": "fp32",
        },
    },
}


def load_config(
    path: str | Path, preset: str = "", build: Callable[[dict], Any] | None = None
) -> Config:
    """Read a run's TOML file; `preset` takes the place of the one in its [model], and `build` that
    of config_from_dict. Raises ConfigError, naming the key and the nearest known one."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        if preset and isinstance(tree.setdefault("model", {}), dict):
            tree["model"]["preset"] = preset
        return (build or config_from_dict)(tree)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        said = f"byte {e.object[e.start]:#x} at {e.start}: save it as UTF-8"
        raise ConfigError(f"{path}: not UTF-8, {said}") from e
    except RecursionError as e:
        raise ConfigError(f"{path}: nested too deeply") from e
    except ValueError as e:  # of TOML, of the configuration, or a path with a null character
        raise ConfigError(f"{path}: {' '.join(str(e).split())}") from e


def as_config(cfg: "Config | str | Path") -> Config:
    """The run meant by a Config or by the path of its TOML file. ConfigError for anything else."""
    if isinstance(cfg, str | Path):
        return load_config(cfg)
    require(isinstance(cfg, Config), "a run is a Config or the path of a TOML file", cfg)
    return cfg


def config_from_dict(
    tree: dict[str, Any],
    kind: type = Config,
    sections: Mapping[str, type] = SECTIONS,
    recipes: Mapping[str, dict] = RECIPES,
) -> Any:
    """Build a Config from nested tables. `recipe` at the top (the first by default) and `preset` in
    [model] fill in what the tables leave out. Another task's run has its own kind, sections and
    recipes."""
    require(isinstance(tree, dict), "a configuration must be a table", tree)
    tree = dict(tree)
    recipe = tree.pop("recipe", next(iter(recipes)))
    if not isinstance(recipe, str) or recipe not in recipes:
        raise ConfigError(unknown("recipe", recipe, recipes))
    _check_keys("", tree, kind)
    tables = {}
    for key, cls in sections.items():
        values = tree.pop(key, {})
        preset_like = key == "model" and isinstance(values, str)
        hint = f', as in [model] preset = "{values}"' if preset_like else ""
        require(isinstance(values, dict), f"[{key}] must be a table{hint}", values)
        tables[key] = {**recipes[recipe].get(key, {}), **values}
        _check_keys(key, tables[key], cls, also=("preset",) if key == "model" else ())
    model = tables.pop("model")
    name = model.pop("preset", "vit_large")
    made = {key: sections[key](**values) for key, values in tables.items()}
    return kind(model=preset(name, **model), **made, **tree)


def to_dict(cfg: Any) -> dict[str, Any]:
    """A dataclass as plain nested values, for JSON and checkpoints."""
    return dataclasses.asdict(cfg)


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of to_dict for a ModelConfig."""
    require(isinstance(values, dict), "[model] must be a table", values)
    _check_keys("model", values, ModelConfig)
    return ModelConfig(**values)


def _check_keys(section: str, values: dict, cls: type, also: tuple[str, ...] = ()) -> None:
    """Refuse unknown keys."""
    prefix = f"{section}." if section else ""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known and key not in also:
            raise ConfigError(unknown("key", f"{prefix}{key}", [prefix + k for k in known]))
