"""Which runs go on: settings that there were not yet had their defaults."""

from dataclasses import replace
from pathlib import Path

import pytest

from mae_fast import resume
from mae_fast.config import Config, TrainConfig, preset
from mae_fast.config_file import to_dict
from mae_fast.errors import ConfigError
from mae_fast.fields import defaults
from mae_fast.tasks.config import FinetuneConfig


def go_on(old: dict, cfg: Config | FinetuneConfig) -> None:
    states = [{"config": config, "world": 1, "step": 3} for config in (old, to_dict(cfg))]
    resume.check(Path("run"), *states, {}, defaults(cfg))


@pytest.mark.parametrize("kind", [Config, FinetuneConfig])
def test_a_run_of_before_a_setting_goes_on_with_its_default(kind):
    cfg = kind(output="run", model=preset("vit_tiny"))
    old = to_dict(cfg)
    go_on(old, cfg)
    del old["train"]["eps" if kind is Config else "ema"], old["model"]["target"]
    del old["train"]["backends"], old["data"]["crop_area"]
    for section in ("eval", "task", "ava"):
        old.pop(section, None)
    go_on(old, cfg)
    with pytest.raises(ConfigError, match=r"model\.target: pixels -> hog"):
        go_on(old, replace(cfg, model=replace(cfg.model, target="hog")))


def test_a_setting_that_is_not_its_default_is_not_what_was_done_before():
    old = to_dict(Config(output="run", model=preset("vit_tiny")))
    del old["train"]["eps"]
    with pytest.raises(ConfigError, match=r"train\.eps: 1e-08 -> 0\.001"):
        go_on(old, Config(output="run", model=preset("vit_tiny"), train=TrainConfig(eps=1e-3)))
