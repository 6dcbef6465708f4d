"""The demo, cut down: a few steps on videos of one's own."""

import json

import pytest

from mae_fast import demo as demo_module
from mae_fast.config import Config
from mae_fast.demo import choose_steps, demo
from mae_fast.errors import ConfigError, Interrupted


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


def test_demo_does_not_touch_a_folder_of_something_else(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="something other"):
        demo(videos=str(folder), output=str(tmp_path), steps=20)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


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
