"""What arms of a sweep are judged by, the same for each: the held-out loss, or probes of the frozen
encoder where arms' targets differ and their losses mean nothing beside each other."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mae_fast import probe
from mae_fast.config import Config
from mae_fast.config_file import to_dict
from mae_fast.data import VideoRow, read_index
from mae_fast.errors import ConfigError
from mae_fast.evaluate import held_out_loss
from mae_fast.fields import require, typed, unknown
from mae_fast.targets import Tokenizer
from mae_fast.tasks.config import ClipsConfig
from mae_fast.weights import load_model

# By name: what it is called on a page.
JUDGES = {"loss": "held-out loss", "knn": "kNN accuracy", "attentive": "attentive probe's accuracy"}


class Judge(NamedTuple):
    """`by`: some of JUDGES. cfg: whose mask, crops and clips the held-out loss has. Probes learn
    labels of `train_index` and tell those of `test_index`, of a view in each video's middle;
    `epochs` are the attentive one's."""

    cfg: Config
    by: tuple[str, ...]
    train_index: str
    test_index: str
    epochs: int

    def settings(self) -> dict[str, Any]:
        """What must be the same for two judgements to be compared."""
        held_out = {"mask": to_dict(self.cfg.mask), "data": to_dict(self.cfg.data)}
        return held_out | {k: v for k, v in self._asdict().items() if k != "cfg"}

    @property
    def probes(self) -> bool:
        return bool({*self.by} - {"loss"})


def read(table: dict[str, Any], cfg: Config) -> Judge:
    """The [judge] table of a sweep. Raises ConfigError for what it cannot be."""
    known = [f"judge.{field}" for field in Judge._fields if field != "cfg"]
    for key in (f"judge.{key}" for key in table):
        if key not in known:
            raise ConfigError(unknown("key", key, known))
    by = table.get("by", ["loss"])
    by = [by] if isinstance(by, str) else by
    require(isinstance(by, list) and by, "judge.by must name one at least", by)
    for name in by:
        require(name in JUDGES, f"judge.by must be of {', '.join(JUDGES)}", name)
    indices = (
        typed(f"judge.{key}", table.get(key) or getattr(cfg.eval, key) or own, str)
        for key, own in (("train_index", cfg.data.index), ("test_index", cfg.data.val_index))
    )
    epochs = typed("judge.epochs", table.get("epochs", 20), int)
    require(epochs > 0, "judge.epochs must be positive", epochs)
    return Judge(cfg, tuple(dict.fromkeys(by)), *indices, epochs)


def check(judge: Judge) -> None:
    """Raise ConfigError where a sweep could train, and not be judged."""
    if "loss" in judge.by and not judge.cfg.data.val_index:
        raise ConfigError("a sweep is judged by the held-out loss: data.val_index is empty")
    if not judge.probes:
        return
    train, test = (_labelled(judge, key) for key in ("train_index", "test_index"))
    unknown = {row.label for row in test} - {row.label for row in train}
    if unknown:
        label = min(unknown)
        raise ConfigError(f"{judge.test_index}: no video of {judge.train_index} is of {label!r}")


def _labelled(judge: Judge, key: str) -> list[VideoRow]:
    path = getattr(judge, key)
    require(path != "", f"a probe needs judge.{key}, an index with labels", path)
    rows = read_index(path, broken=key == "test_index")  # a broken one counts as wrong
    for row in rows:
        if row.label is None:
            raise ConfigError(f"{path}: {row.path} has no label, which a probe needs")
    return rows


def comparable(cfg: Config, judge: Judge) -> bool:
    """Whether the held-out loss of a run means something beside others': of one unit, and of
    targets that are not of each run's own making."""
    same = cfg.model.loss_unit == judge.cfg.model.loss_unit
    return same and cfg.model.target != "features"


def judged(checkpoint: Path, cfg: Config, judge: Judge, seed: int) -> dict[str, float | None]:
    """{name: what the judge says of a run's checkpoint; None where it says nothing}."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, float | None] = dict.fromkeys(judge.by)
    if "loss" in judge.by and comparable(cfg, judge):
        model = load_model(str(checkpoint)).to(device)
        if cfg.model.target == "tokens":
            model.tokenizer = Tokenizer.find(cfg.model.tokenizer)
            model.tokenizer.module.to(device)
        asked = dataclasses.replace(judge.cfg, model=cfg.model)
        rows = read_index(judge.cfg.data.val_index)
        found["loss"] = held_out_loss(model, rows, asked, device)["val_loss"]
    if judge.probes:
        d, same = cfg.data, "sampling_rate target_fps decoder strict workers"
        clips = ClipsConfig(short_side=0, **{name: getattr(d, name) for name in same.split()})
        net, kinds = probe.encoder(str(checkpoint)).to(device), [k for k in judge.by if k != "loss"]
        sets = (_labelled(judge, key) for key in ("train_index", "test_index"))
        found |= probe.judge(net, *sets, clips, kinds, epochs=judge.epochs, seed=seed)
    return found
