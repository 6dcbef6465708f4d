"""The demo, cut down: a few steps on videos of one's own."""

import json
import math

import pytest

from mae_fast import demo as demo_module
from mae_fast.config import Config
from mae_fast.demo import choose_steps, demo
from mae_fast.errors import ConfigError, Interrupted, WriteError


def test_demo_leaves_a_page_with_everything(folder, tmp_path, capsys):
    out = tmp_path / "demo"
    demo(videos=str(folder), output=str(out), img_size=32, steps=20)
    left = {p.name for p in out.iterdir()}
    assert {
        "checkpoint-00000020.safetensors",
        "curves.png",
        "reconstruction.png",
        "reconstruction.gif",
        "index.html",
        "metrics.jsonl",
    } <= left
    page = (out / "index.html").read_text()
    assert page.count("data:image/") == 3 and "held-out loss" in page
    assert "://" not in page  # one file, nothing fetched
    result = json.loads((out / "demo.json").read_text())
    assert result["end"] < result["start"]
    text = capsys.readouterr().out
    assert "predicting each patch's own mean" in text and "mae-fast reconstruct" in text
    # Again: an earlier demo is replaced.
    demo(videos=str(folder), output=str(out), img_size=32, steps=20)
    assert json.loads((out / "demo.json").read_text())["steps"] == 20


@pytest.mark.parametrize("kind", [{}, {"downstream": True}, {"ava": True}])
def test_demo_does_not_touch_a_folder_of_something_else(kind, folder, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="something other"):
        demo(videos=str(folder), output=str(tmp_path), steps=20, **kind)
    assert (tmp_path / "test/thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    "asked", [{"minutes": math.nan}, {"minutes": -1.0}, {"steps": -1}, {"img_size": 17}], ids=str
)
def test_an_earlier_demo_stays_where_a_value_is_refused(asked, folder, tmp_path):
    for name in ("demo.json", "index.html"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"must be positive|not divisible"):
        demo(videos=str(folder), output=str(tmp_path), **asked)
    assert len(list(tmp_path.iterdir())) == 2


def test_demo_into_a_file_is_one_line(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="Not a directory"):
        demo(videos=str(folder), output=str(tmp_path / "file"))


@pytest.mark.parametrize(
    "seconds, steps, minutes",
    [(0.5, 381, 3.5), (7.5, 100, 13.75)],
    ids=["as_many_as_fit", "busy_machine_never_too_few_to_learn"],
)
def test_steps_follow_from_a_measured_step(monkeypatch, seconds, steps, minutes):
    monkeypatch.setattr(demo_module, "time_run", lambda cfg, **_: ([seconds] * 4, []))
    assert choose_steps(Config(), 3.5) == (steps, pytest.approx(minutes, rel=0.01))


def test_demo_that_is_stopped_does_not_claim_to_go_on(folder, tmp_path, monkeypatch):
    def stopped(cfg):
        raise Interrupted("stopped by SIGINT after step 3; the same command goes on from there")

    monkeypatch.setattr(demo_module, "pretrain", stopped)
    with pytest.raises(Interrupted, match="starts it anew"):
        demo(videos=str(folder), output=str(tmp_path / "demo"), img_size=32, steps=20)


@pytest.mark.parametrize(("why_not", "precision"), [(None, "bf16"), ("no AMX", "fp32")])
def test_demo_trains_in_bf16_where_the_cpu_has_tiles(
    folder, tmp_path, monkeypatch, why_not, precision
):
    asked = []

    def stopped(cfg):
        asked.append(cfg.train.precision)
        raise Interrupted("enough")

    monkeypatch.setattr(demo_module, "pretrain", stopped)
    monkeypatch.setattr(demo_module.dispatch, "load_amx", lambda: why_not)
    with pytest.raises(Interrupted):
        demo(videos=str(folder), output=str(tmp_path / "demo"), img_size=32, steps=20)
    assert asked == [precision]
