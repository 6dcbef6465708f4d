"""Others' models as engines, before and after accelerate: another loss is not timed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mae_fast.bench.baselines.official_repository import given_noise
from mae_fast.bench.engines import label, twin
from mae_fast.bench.ratio import ratio

FAMILY = "benchmarks.families:transformers_sdpa"


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    """benchmarks is not installed; processes of their own find it where they run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.chdir(Path(__file__).parents[1])


def run(out: Path) -> dict:
    engines = (FAMILY, f"{FAMILY}_accelerated")
    how = dict(strategies=("tube",), batch=2, rounds=2, quick=True, json=True)
    ratio(("quick",), (0.75,), engines, out=str(out), **how)


def test_twins():
    assert twin("m:videomae_accelerated@P") == "m:videomae@P" and twin("m:videomae@P") is None
    assert label("m:videomae_accelerated@P/x:y") == "videomae_accelerated"
    assert (
        twin("official_repository@P") == "mae_fast" and label("official_eager") == "official_eager"
    )


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_a_family_before_and_after(tmp_path, capsys):
    run(tmp_path)
    capsys.readouterr()
    (record,) = map(json.loads, (tmp_path / "ratio.jsonl").read_text().splitlines())
    assert list(record["engines"]) == ["transformers_sdpa", "transformers_sdpa_accelerated"]
    for name, engine in record["engines"].items():
        pairs = zip(engine["until_update"], record["seconds"][name], strict=True)
        assert all(0 < a < b for a, b in pairs)
    assert record["engines"]["transformers_sdpa_accelerated"]["peak_memory_mb"] > 50


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_nothing_is_timed_of_other_losses(tmp_path, monkeypatch, capsys):
    from mae_fast.bench import cell as cells
    from mae_fast.bench import ratio as module

    def probe(what, cell, setting, clips):
        found = cells.probe(cell, setting, clips)
        return found | {"loss": found["loss"] * (1.01 if "accelerated" in cell.engine else 1)}

    monkeypatch.setattr(module, "in_own_process", probe)
    run(tmp_path)
    told = json.loads(capsys.readouterr().out)
    assert [c["engine"] for c in told["cells"]] == ["transformers_sdpa"]
    (reason,) = told["skipped"].values()
    assert "not timed" in reason


def test_noise_that_is_given_is_of_the_clips_that_are_asked_for():
    """accelerate compares one clip of the first batch."""
    noise = torch.rand(2, 5)
    with given_noise(noise):
        one, two = (torch.rand(n, 5, device="cpu") for n in (1, 2))
    assert torch.equal(one, noise[:1]) and torch.equal(two, noise)


def test_noise_that_is_given_is_one_function():
    """An accelerated model that finds another torch.rand is compared anew: both forwards run."""
    found = []
    for _ in range(2):
        with given_noise(torch.rand(2, 5)):
            found.append(torch.rand)
    assert found[0] is found[1] is not torch.rand
