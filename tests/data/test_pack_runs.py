"""Runs on a pack, and how fast it loads: `pretrain`, `bench data`, `plan --data-rate`."""

import dataclasses
import json
import shutil

import pytest
import torch

from mae_fast import checkpoint, cli
from mae_fast.config import Config, DataConfig, TrainConfig
from mae_fast.data import build_index
from mae_fast.data.pack import write_pack
from mae_fast.data.packed import HOW
from mae_fast.errors import ConfigError
from mae_fast.plan import rate_of
from mae_fast.train import pretrain

MADE = {"short_side": 40, "crf": 20, "gop": 1, "copy": False, "shard": 3}


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    build_index([folder], root / "i.jsonl", workers=1, progress=False)
    write_pack(root / "i.jsonl", root / "pack", MADE, 1)
    return root


def test_a_run_on_a_pack_goes_on_bit_for_bit_and_takes_no_other(packed, tmp_path, tiny_cfg):
    data = DataConfig(
        index=str(packed / "pack"), val_index=str(packed / "pack"), repeat_aug=2, workers=0
    )
    data = dataclasses.replace(data, short_side=40, sampling_rate=2)
    train = TrainConfig(steps=4, warmup_steps=1, save_every=2, keep=9, log_every=2)
    cfg = Config(output=str(tmp_path / "a"), model=tiny_cfg, data=data, train=train)
    pretrain(cfg)
    [how] = json.loads((tmp_path / "a" / "config.json").read_text())["packs"].values()
    assert (how["short_side"], how["crf"], how["videos"]) == (40, 20, 5) and "shards" not in how
    # As if killed after its second step: nothing of what came later is there.
    (tmp_path / "b").mkdir()
    shutil.copy(checkpoint.file(tmp_path / "a", 2), tmp_path / "b")
    pretrain(dataclasses.replace(cfg, output=str(tmp_path / "b")))
    a, b = (checkpoint.latest(tmp_path / name)[1] for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    def resumed(index, size=40):
        other = dataclasses.replace(data, index=str(index), short_side=size)
        return dataclasses.replace(cfg, data=other)

    write_pack(packed / "i.jsonl", tmp_path / "other", {**MADE, "crf": 35}, 1)
    for index in (tmp_path / "other", packed / "i.jsonl"):
        with pytest.raises(ConfigError, match=r"is not the data.index that the run .* began with"):
            pretrain(resumed(index))
    with pytest.raises(ConfigError, match=r"short_side 48 is more than .* holds"):
        pretrain(dataclasses.replace(resumed(packed / "pack", 48), output=str(tmp_path / "c")))
    assert not (tmp_path / "c").exists()


def test_bench_data_and_what_plan_makes_of_it(packed, tmp_path, capsys):
    rates, out = {}, tmp_path / "record.json"
    quick = ["--seconds", "0.05", "--rounds", "1", "--short-side", "40", "--json", "-o", str(out)]
    for kind in ("i.jsonl", "pack"):
        assert cli.main(["bench", "data", str(packed / kind), *quick]) == 0
        found = json.loads(capsys.readouterr().out)
        assert json.loads(out.read_text()) == found
        assert found["kind"] == ("pack" if kind == "pack" else "files")
        need, rate = found["needs"]["vit_large"], found["clips_per_s_core"]
        assert need["cores"] * rate == pytest.approx(need["clips_per_s_predicted"])
        assert found["bytes_a_clip"] > 0
        rates[kind] = found["clips_per_s_core"]
        stages = ["read"] if kind == "pack" else ["open"]
        stages += ["decode", "planes", "sample, copy, join", "patches"]
        assert list(found["stages_ms"]) == stages and min(found["stages_ms"].values()) > 0
    assert min(rates.values()) > 0
    assert rate_of(str(out)) == found["clips_per_s_core"] * found["cores"]
    assert rate_of("100") == 100
    (tmp_path / "no.json").write_text("[]")
    for wrong in ("no.json", "nowhere.json"):
        with pytest.raises(ConfigError, match="--data-rate must be clips a second or a file of"):
            rate_of(str(tmp_path / wrong))
    assert (packed / "pack" / HOW).exists()
