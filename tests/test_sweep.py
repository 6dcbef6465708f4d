"""`mae-fast sweep`: the same draws, one judge, resumption, a table that says what is not known."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest
import torch

from mae_fast import cli, evaluate, metrics, sweep, sweep_judge, sweep_page
from mae_fast.checkpoint import read
from mae_fast.data import VideoRow, build_index, write_index
from mae_fast.errors import ConfigError, Interrupted, NonFiniteError, OutOfMemory
from mae_fast.sweep_ready import READY

RUN = """
[model]
img_size = 32
patch_size = 8
num_frames = 4
pred_t_dim = 2
embed_dim = 32
depth = 1
num_heads = 2
decoder_embed_dim = 32
decoder_depth = 1
decoder_num_heads = 2
[mask]
ratio = 0.5
[data]
index = "{index}"
val_index = "{index}"
repeat_aug = 2
workers = 0
sampling_rate = 2
[train]
batch_size = 1
steps = 3
warmup_steps = 1
log_every = 1
blr = 0.1
device = "cpu"
"""


def test_a_gpu_that_nothing_is_predicted_of_may_run_a_sweep(made, monkeypatch, capsys):
    def none():
        raise ConfigError("--device this is for a CPU, and here is an RTX: name it")

    monkeypatch.setattr(sweep.plan, "this_device", none)
    file = made("[arms.a]")
    assert cli.main(["sweep", str(file), "--plan-only"]) == 2
    assert cli.main(["sweep", str(file)]) == 0
    assert "no prediction: --device this is for a CPU" in capsys.readouterr().out


@pytest.fixture
def made(index, tmp_path, monkeypatch):
    """make(text of a sweep) -> its file; the runs are tiny, and the machine is not timed."""
    (tmp_path / "run.toml").write_text(RUN.format(index=index))
    monkeypatch.setattr(sweep.plan, "this_device", lambda: sweep.cost.DEVICES["h100"])
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)
    monkeypatch.setattr(evaluate, "CLIPS", 8)

    def make(text):
        path = tmp_path / "sweep.toml"
        path.write_text(f'config = "run.toml"\noutput = "{tmp_path}/out"\n{text}')
        return path

    return make


ARMS = """seeds = [0, 1]
[arms."half"]
"mask.ratio" = 0.5
[arms."three quarters"]
mask = { ratio = 0.75 }
[arms.hog]
model = { target = "hog" }
"""


def test_arms_are_run_judged_by_one_loss_and_laid_in_one_table(made, tmp_path, capsys):
    assert cli.main(["sweep", str(made(ARMS))]) == 0
    said = capsys.readouterr().out
    assert said.startswith("6 runs, predicted ") and "three quarters" in said
    rows = {r["arm"]: r for r in json.loads((tmp_path / "out/sweep.json").read_text())}
    half, more, hog = rows["half"], rows["three quarters"], rows["hog"]
    # The first arm is the configuration itself: what it is judged by is its own held-out loss.
    own, other = (
        [metrics.last(tmp_path / f"out/{arm}/seed-{s}/metrics.jsonl")["val_loss"] for s in (0, 1)]
        for arm in ("half", "three-quarters")
    )
    at, found = half["judged"]["loss"], more["judged"]["loss"]
    assert abs(found[0] - sum(other) / 2) > 1e-5  # another mask's held-out loss
    assert at[0] == pytest.approx(sum(own) / 2, rel=1e-5)
    assert at[1] == pytest.approx(12.706 * abs(own[0] - own[1]) / 2, rel=1e-3)
    assert half["against_first"] == {}
    assert more["against_first"]["loss"][0] == pytest.approx(found[0] - at[0], rel=1e-6)
    assert hog["judged"] == {} and hog["unit"] != half["unit"]  # another unit has no judge
    assert "a dash: a loss of another unit" in said
    page = (tmp_path / "out/index.html").read_text()
    assert "three quarters" in page and hog["unit"] in page

    trained = (tmp_path / "out/half/seed-0/metrics.jsonl").read_text()
    assert cli.main(["sweep", str(made(ARMS))]) == 0  # all is done
    assert (tmp_path / "out/half/seed-0/metrics.jsonl").read_text() == trained


def test_a_sweep_that_is_stopped_goes_on_where_it_was(made, tmp_path, monkeypatch, capsys):
    text = ARMS.replace("seeds = [0, 1]", "seeds = [0]")
    ran, pretrain = [], sweep.pretrain

    def stopped(cfg):
        ran.append(cfg.output)
        if len(ran) == 2:
            raise Interrupted("stopped by SIGTERM")
        return pretrain(cfg)

    monkeypatch.setattr(sweep, "pretrain", stopped)
    assert cli.main(["sweep", str(made(text))]) == 75
    assert not (tmp_path / "out/sweep.json").exists()
    assert cli.main(["sweep", str(made(text))]) == 0
    assert len(ran) == 4 and ran[1] == ran[2]  # the first arm is not run again
    assert len(json.loads((tmp_path / "out/sweep.json").read_text())) == 3
    # What is there is of other settings:
    other = made(text)
    run = tmp_path / "run.toml"
    run.write_text(run.read_text().replace("blr = 0.1", "blr = 0.2"))
    assert cli.main(["sweep", str(other)]) == 2
    assert "result.json is of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(NonFiniteError, 70), (OutOfMemory, 71)])
def test_an_arm_that_cannot_be_trained_does_not_keep_the_rest_from_it(
    error, code, made, tmp_path, monkeypatch, capsys
):
    pretrain = sweep.pretrain

    def failing(cfg):
        if "half" in cfg.output:
            raise error("it is too much")
        return pretrain(cfg)

    monkeypatch.setattr(sweep, "pretrain", failing)
    assert cli.main(["sweep", str(made(ARMS.replace("[0, 1]", "[0]")))]) == code
    said = capsys.readouterr()
    assert "failed: it is too much" in said.out and said.err.endswith("error: it is too much\n")
    done = {p.parent.parent.name for p in tmp_path.glob("out/*/seed-0/result.json")}
    assert done == {"three-quarters", "hog"} and not (tmp_path / "out/sweep.json").exists()


KILLED = """
import os, sys
from mae_fast import cli, evaluate, metrics, sweep, train

sweep.plan.this_device = lambda: sweep.cost.DEVICES["h100"]
metrics.draw_curves = lambda *args: None
evaluate.CLIPS = 8

def killed(kind, name, call):
    "A sweep in a process of its own, which dies by SIGKILL when kind.name is called that time."
    if (child := os.fork()) == 0:
        own, calls = getattr(kind, name), []
        def last(*given, **options):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), 9)
            return own(*given, **options)
        setattr(kind, name, last)
        os._exit(cli.main(["sweep", sys.argv[1]]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9

killed(train.Pretraining, "_inputs", 6)  # the second run's third step
killed(sweep.sweep_judge, "judged", 1)  # that run's end, which is trained and not judged
sys.exit(cli.main(["sweep", sys.argv[1]]))
"""


def test_a_sweep_that_is_killed_goes_on_and_ends_as_an_undisturbed_one(made, tmp_path):
    """kill -9 in the middle of the second run, and again before its judge has said anything."""
    run = tmp_path / "run.toml"
    run.write_text(run.read_text().replace("steps = 3", "steps = 3\nsave_every = 1"))
    file = made("[arms.half]\n[arms.more]\n'mask.ratio' = 0.75\n")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("(2 of 2)") == 3 and done.stderr.count("step 1/3") == 2  # each once
    file.write_text(file.read_text().replace("/out", "/whole"))
    assert cli.main(["sweep", str(file)]) == 0
    tables = [json.loads((tmp_path / f / "sweep.json").read_text()) for f in ("out", "whole")]
    for row in (row for table in tables for row in table):
        assert row.pop("seconds")[0] > 0 and row.pop("step_seconds") > 0
    assert json.dumps(tables[0]) == json.dumps(tables[1]) and len(tables[0]) == 2
    weights = [read(tmp_path / f / "more/seed-0/checkpoint-00000003.safetensors")[1]
               for f in ("out", "whole")]  # fmt: skip
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])


def test_parts_are_all_runs_once_and_the_last_writes_the_table(made, tmp_path, capsys):
    file = str(
        made(
            ARMS.replace("[arms.hog]", "[arms.tube]").replace(
                'model = { target = "hog" }', 'mask.strategy = "tube"'
            )
        )
    )
    assert cli.main(["sweep", file, "--part", "0/2"]) == 0
    assert "3 of 6 runs are still to be done" in capsys.readouterr().out
    assert cli.main(["sweep", file, "--part", "1/2"]) == 0
    assert (tmp_path / "out/index.html").exists()
    assert cli.main(["sweep", file, "--part", "2/2"]) == 2


def test_arms_of_one_seed_draw_the_same(made):
    """Clips, crops and, of one strategy, masks follow from seed, step and clip alone."""
    found = sweep.read(made('seeds = [4]\nready = "decoder_depth"'))
    cfgs = [found.config(arm, 4) for arm in found.arms]
    assert {c.train.seed for c in cfgs} == {4} and len({c.output for c in cfgs}) == 4
    assert len({(c.data, c.mask) for c in cfgs}) == 1


def test_grids_are_products(made):
    found = sweep.read(made('[grid]\n"mask.ratio" = [0.5, 0.75]\n"model.decoder_depth" = [1, 2]'))
    assert list(found.arms) == [
        f"ratio {r}, decoder_depth {d}" for r in (0.5, 0.75) for d in (1, 2)
    ]
    cfg = found.config("ratio 0.75, decoder_depth 2", 0)
    assert (cfg.mask.ratio, cfg.model.decoder_depth) == (0.75, 2)


def test_the_paper_s_22_arms_are_planned(capsys):
    """Its default is an arm of each of six tables, and one run."""
    options = ["--plan-only", "--device", "h100", "--gpus", "8", "--price", "2.5"]
    assert cli.main(["sweep", "paper", *options]) == 0
    first, *arms = capsys.readouterr().out.splitlines()
    assert first.startswith("17 runs (22 arms, 5 of which are the run of another), predicted ")
    assert "on 8 x h100" in first
    of_devices, paid = re.search(r": (\S+) hours of a device, (\d+) at 2.5 an hour", first).groups()
    assert float(paid) == pytest.approx(2.5 * float(of_devices), rel=0.01)
    hours = [float(line.split(" h a run")[0].split()[-1]) for line in arms if " h a run" in line]
    assert (len(arms), len(hours)) == (22, 17)
    assert float(first.split("predicted ")[1].split()[0]) == pytest.approx(sum(hours), rel=0.01)
    cfg = sweep.paper().config("repeats 2", 0)
    assert cfg.train.epochs * cfg.data.repeat_aug == 800
    assert cfg.train.batch_size * cfg.data.repeat_aug == 64


def test_arms_that_are_the_same_are_one_run(made, tmp_path, capsys, monkeypatch):
    ran, pretrain = [], sweep.pretrain
    monkeypatch.setattr(sweep, "pretrain", lambda cfg: ran.append(cfg.output) or pretrain(cfg))
    arms = "[arms.a]\n'mask.ratio' = 0.5\n[arms.b]\n'mask.ratio' = 0.75\n[arms.c]\n"
    assert cli.main(["sweep", str(made(arms))]) == 0
    assert [path[-8:] for path in ran] == ["a/seed-0", "b/seed-0"]
    a, b, c = json.loads((tmp_path / "out/sweep.json").read_text())
    assert a["loss"] == c["loss"] != b["loss"] and "the run of a" in capsys.readouterr().out


@pytest.fixture(scope="module")
def labelled(folder, tmp_path_factory):
    """Five videos of two classes, which the index names by their folders."""
    root = tmp_path_factory.mktemp("labelled")
    for i, path in enumerate(sorted(folder.glob("*.mp4"))):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        (root / "ab"[i % 2] / path.name).symlink_to(path)
    build_index([root], root / "i.jsonl", progress=False)
    return root / "i.jsonl"


def test_arms_of_different_targets_are_judged_by_probes(made, labelled, tmp_path, monkeypatch):
    """The same videos taught and told: a nearest neighbour is a video itself."""
    probe, arms = sweep.sweep_judge.probe, "[arms.pixels]\n[arms.own]\nmodel.target = 'features'\n"
    nearest = probe.knn
    monkeypatch.setattr(probe, "knn", lambda *args: nearest(*args[:-1], 1))
    of = f'train_index = "{labelled}", test_index = "{labelled}"'
    judge = f'judge = {{ by = ["knn", "attentive", "loss"], {of}, epochs = 1 }}\n'
    assert cli.main(["sweep", str(made(judge + arms))]) == 0
    pixels, own = json.loads((tmp_path / "out/sweep.json").read_text())
    assert pixels["judged"]["knn"][0] == own["judged"]["knn"][0] == 1.0
    assert own["against_first"]["knn"][0] == 0.0
    assert 0 <= own["judged"]["attentive"][0] <= 1
    assert "loss" in pixels["judged"] and "loss" not in own["judged"]
    page = (tmp_path / "out/index.html").read_text()
    assert "kNN accuracy" in page and "averaged encoder" in page
    other = made(judge.replace("epochs = 1", "epochs = 2") + arms)
    assert cli.main(["sweep", str(other)]) == 2  # was judged otherwise


def test_two_runs_of_features_have_no_loss_in_common(made):
    """Their unit is one, and their targets are each one's own."""
    found = sweep.read(made("[arms.a]\nmodel.target = 'features'\n"))
    cfg = found.config("a", 0)
    judge = sweep.sweep_judge.read({}, cfg)
    assert cfg.model.loss_unit == judge.cfg.model.loss_unit
    assert not sweep.sweep_judge.comparable(cfg, judge)


def test_the_paper_s_accuracies_stand_apart_in_the_picture(made):
    """A panel of what was measured, a panel of theirs against predicted hours; none of one arm."""
    found = sweep.read(made('ready = "decoder_depth"'))
    judge = sweep.sweep_judge.read({}, found.config(None, 0))
    rows = [
        dict(arm=arm, seconds=(1.0, 0.1), judged={"loss": (0.5, 0.1)}, paper=found.arms[arm].paper)
        for arm in found.arms
    ]
    figure = sweep_page.trade_off(rows, judge, lambda arm: 10.0 * int(arm))
    ours, theirs = figure.axes
    assert ours.get_xlabel() == "seconds of training" and "measured here" in ours.get_title()
    assert "the paper's accuracy, not ours" in theirs.get_title()
    assert "predicted" in theirs.get_xlabel() and theirs.get_ylabel() == "the paper's top-1"
    assert [line.get_xydata()[0].tolist() for line in theirs.lines if len(line.get_xdata())] == [
        [10.0, 83.2], [20.0, 83.6], [40.0, 84.4], [80.0, 84.3],
    ]  # fmt: skip
    assert len(sweep_page.trade_off(rows[:1], judge, lambda arm: 1.0).axes) == 1


def test_every_arm_is_held_against_the_first(made):
    found = sweep.read(made("[arms.a]\n[arms.b]\n'mask.ratio' = 0.6\n[arms.c]\n'mask.ratio' = 0.7"))
    judge = sweep.sweep_judge.read({}, found.config(None, 0))
    same = {"loss": 1.0, "train_seconds": 1.0, "step_seconds": 1.0}
    judged = {"a": 1.0, "b": 2.0, "c": 4.0}
    results = {(arm, 0): same | {"judged": {"loss": x}} for arm, x in judged.items()}
    rows = sweep.table(found, results, judge)
    assert [row["against_first"].get("loss", (None,))[0] for row in rows] == [None, 1.0, 3.0]


def test_seconds_of_training_are_of_every_step(made, monkeypatch):
    """Of a run that tells of its second and its fifth."""
    cfg = sweep.read(made("[arms.a]")).config("a", 0)
    judge = sweep.sweep_judge.read({}, cfg)
    rows = [dict(step=2, loss=1.0, step_seconds=1.0), dict(step=5, loss=1.0, step_seconds=2.0)]

    def trained(cfg):
        folder = Path(cfg.output)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(sweep, "pretrain", trained)
    monkeypatch.setattr(sweep, "checkpoints", lambda folder: [folder])
    monkeypatch.setattr(sweep.sweep_judge, "judged", lambda *given: {"loss": 1.0})
    sweep._run(cfg, judge)
    assert sweep._result(cfg, judge)["train_seconds"] == 2 * 1.0 + 3 * 2.0


def test_hours_are_of_every_mask_and_micro_step(made):
    """Predicted: twice as many clips, of one clip or of a step, take twice as long."""
    one, two = (sweep._hours(sweep.Arm({"mask": {"per_clip": n}})) for n in (1, 2))
    assert two == pytest.approx(2 * one)
    found = sweep.read(made("[arms.a]\n[arms.b]\n'train.accum_steps' = 2\n"))
    said = sweep._prediction(found, found.configs(), "h100", 1, "k400", 0.0).splitlines()[1:]
    one, two = (float(line.split(" h a run")[0].split()[-1]) for line in said)
    assert two == pytest.approx(2 * one, rel=0.01)


def test_intervals_are_student_s():
    mean, half = sweep.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(sweep.interval([1.0])[1])
    for n, t in ((11, 2.2281), (12, 2.2010), (16, 2.1314), (31, 2.0423)):
        values = [0.0] * (n - 1) + [1.0]
        assert sweep.interval(values)[1] * math.sqrt(n) / stdev(values) == pytest.approx(t, 1e-3)


def test_a_video_known_to_be_broken_is_judged_wrong(tmp_path):
    """It learns of none, and is told as any other."""
    rows = [VideoRow("a.mp4", "x", error="none"), VideoRow("b.mp4", "x", frames=9, fps=9.0)]
    write_index(rows, tmp_path / "index.jsonl")
    judge = sweep_judge.Judge(None, ("knn",), *[str(tmp_path / "index.jsonl")] * 2, 1)
    counts = [len(sweep_judge._labelled(judge, f"{which}_index")) for which in ("train", "test")]
    assert counts == [1, 2]


@pytest.mark.parametrize("name", READY)
def test_ready_sweeps_are_configurations(name, made, tmp_path):
    (tmp_path / "run.toml").write_text("[model]\npreset = 'vit_large'\n")
    found = sweep.read(made(f'ready = "{name}"'))
    assert all(found.config(arm, 0) and found.arms[arm].paper for arm in found.arms)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('ready = "mask"', "unknown ready sweep 'mask'; did you mean 'masks'? (known: ratio"),
        ("", "there are no arms"),
        ("arm = 3", "unknown key 'arm'"),
        ("seeds = [1, 1]\nready = 'ratio'", "seeds must be different"),
        ("seeds = 1\nready = 'ratio'", "seeds must be list, got 1"),
        ("[grid]\n'mask.ratio' = 0.5", "lists of values"),
        (
            "[grid]\n'train.seed' = [1, 2]",
            "are the sweep's own, not an arm's, got 'seed 1'",
        ),
        ('[arms.bad]\n"mask.ratio" = 2.0', "arm bad: mask.ratio must be in [0, 1)"),
        ("judge.by = 'accuracy'\n[arms.a]", "must be of loss, knn, attentive, got 'accuracy'"),
        ("judge.by = []\n[arms.a]", "judge.by must name one at least"),
        ("judge.epochs = 0\n[arms.a]", "judge.epochs must be positive"),
        ("judge.videos = 'x'\n[arms.a]", "unknown key 'judge.videos'"),
        ("judge.by = 'knn'\n[arms.a]", "has no label, which a probe needs"),
    ],
    ids="unknown no_arms unknown_key a_seed_twice no_seeds no_list an_arm_s_seed bad_arm "
    "unknown_judge no_judge no_epoch judge_s_unknown_key no_labels".split(),
)
def test_what_cannot_be_is_refused_before_anything_runs(text, words, made, tmp_path, capsys):
    assert cli.main(["sweep", str(made(text))]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["hog", "pixels_by_channel"])
def test_a_target_is_trained_for(target, made):
    """Its loss falls, and its prediction has its values."""
    from mae_fast import MaskedAutoencoder

    torch.manual_seed(0)
    cfg = sweep.read(made(f'[arms.a]\nmodel = {{ target = "{target}" }}')).config("a", 0).model
    model = MaskedAutoencoder(cfg)
    video = torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(12):
        loss, pred, _ = model(video, 0.5, generator=torch.Generator().manual_seed(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert pred.shape[-1] == {"hog": 27, "pixels_by_channel": 192}[target]
    assert losses[-1] < 0.9 * losses[0]
