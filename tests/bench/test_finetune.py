"""`mae-fast bench finetune`: what it refuses to time, and what it records."""

import json

import pytest
import torch

from mae_fast import cli
from mae_fast.bench import finetune, records
from mae_fast.bench.baselines.official_classifier import OfficialClassifier
from mae_fast.errors import MaeFastError

QUICK = ["bench", "finetune", "--model", "quick", "--rounds", "2", "--classes", "5"]


def test_every_engine_is_timed_and_recorded(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "r.jsonl"
    assert cli.main([*QUICK, "--out", str(out), "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in finetune.ENGINES)
    (record,) = records.read(out)
    assert record["kind"] == "finetune" and list(record["seconds"]) == list(finetune.ENGINES)
    assert record["engines"]["mae_fast_masked"]["ratio"] == 0.5 and record["batch_clips"] == 2
    assert records.ours(record) is None  # no step of pre-training
    assert cli.main([*QUICK, "--engines", "mae_fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "mae_fast"
    assert cli.main([*QUICK, "--engines", "nobody"]) == 2


def test_another_forward_is_not_timed(monkeypatch):
    """The check is of the official classifier's logits and gradients, from the same weights."""
    forward = OfficialClassifier.forward
    monkeypatch.setattr(OfficialClassifier, "forward", lambda *a: forward(*a) * 1.01)
    with pytest.raises(MaeFastError, match="nothing is timed"):
        finetune.finetune("quick", ("mae_fast",), classes=5, rounds=2)


def test_a_masked_step_sees_half_of_the_patches(monkeypatch):
    seen = []
    tokens = finetune.VideoClassifier.tokens

    def counted(self, video, ids=None):
        seen.append(self.cfg.model.num_patches if ids is None else ids.shape[1])
        return tokens(self, video, ids)

    monkeypatch.setattr(finetune.VideoClassifier, "tokens", counted)
    cfg = finetune.ClassifierConfig(finetune.config_of("quick"), num_classes=5)
    video, target = torch.randn(1, 3, 16, 64, 64), torch.full((1, 5), 0.2)
    for name in ("mae_fast", "mae_fast_masked"):
        finetune.stepper(name, cfg, video, target, "fp32")()
    assert seen == [128, 64]


def test_the_official_loop_has_the_official_optimizer():
    cfg = finetune.ClassifierConfig(finetune.config_of("quick"), num_classes=5)
    built = finetune.Theirs("official_sdpa", cfg, torch.full((1, 5), 0.2)).build(cfg.model)
    assert built.optimizer.defaults["foreach"] and not built.optimizer.defaults["fused"]


def test_an_engine_is_told_as_times_the_first():
    seconds = {"mae_fast": [1.0, 1.0], "official_sdpa": [3.0, 3.0]}
    first, other = finetune.tell({"baseline": "mae_fast", "seconds": seconds}).splitlines()
    assert first.endswith("1.00 times mae_fast's") and other.endswith("3.00 times mae_fast's")
