"""`mae-fast bench ratio`: what a cell is, what is measured once, and what the numbers say."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mae_fast.bench import cell as cell_module
from mae_fast.bench import engines, ratio, ratio_table, step
from mae_fast.bench.cell import Cell, Setting, build, in_own_process, make_clips, stepper
from mae_fast.bench.engines import OURS, Masking
from mae_fast.bench.ratio import Run
from mae_fast.bench.records import problems
from mae_fast.bench.table import text_table
from mae_fast.config import Config, DataConfig, preset
from mae_fast.errors import ConfigError
from mae_fast.masking import STRATEGIES, draw_ids
from mae_fast.profile.trace import trace

SETTING = Setting("cpu", "fp32", 0)
OFFICIAL = "official_eager"
QUICK = engines.config_of(engines.QUICK)


@pytest.fixture
def here(monkeypatch):
    """What would have a process of its own runs in this one."""

    def run(what, cell, setting, **arguments):
        return getattr(cell_module, what)(cell, setting, **arguments)

    monkeypatch.setattr(ratio, "in_own_process", run)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_noise_is_the_mask_of_the_strategy(strategy):
    masking = Masking.of(QUICK, 0.75, strategy)
    noise = masking.noise(QUICK, 3, seed=1, step=2, device="cpu")
    keep, _ = draw_ids(strategy, QUICK.grid, 0.75, seed=1, step=2, samples=torch.arange(3))
    assert int(QUICK.num_patches * (1 - masking.step_ratio(QUICK))) == masking.keep == keep.shape[1]
    assert torch.equal(noise.argsort(dim=1)[:, : masking.keep], keep.long())


@pytest.mark.parametrize(
    ("model", "masked", "limit"),
    [("vit_base", 0.9, 4.6), ("vit_large", 0.9, 7.7), ("vit_large", 0.75, 3.9)],
)
def test_flop_limit_is_that_of_the_paper(model, masked, limit):
    cfg = preset(model)
    assert round(engines.flop_limit(cfg, Masking.of(cfg, masked)), 1) == limit


@pytest.mark.parametrize("masked", [0.0, 0.75])
@pytest.mark.parametrize("name", ["official_eager", "official_sdpa"])
def test_engines_of_one_model_have_one_loss(masked, name):
    losses = [
        cell_module.probe(Cell("quick", "tube", masked, engine), SETTING, 2)["loss"]
        for engine in (OURS, name)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_peer_at_0_encodes_every_token():
    pytest.importorskip("transformers")
    cell = Cell("quick", "random", 0.0, "transformers_sdpa")
    built, seen = build(cell, SETTING), []
    hook = lambda module, inputs, output: seen.append(output.last_hidden_state.shape[1])  # noqa: E731
    built.model.videomae.encoder.register_forward_hook(hook)
    stepper(cell, built, make_clips(cell.cfg, 2, SETTING), SETTING)()
    assert seen == [QUICK.num_patches]


def test_an_engine_of_ones_own(tmp_path, monkeypatch):
    """An accelerated one: its loss is that of the same model as it was, and its parts are found."""
    pytest.importorskip("transformers")
    (tmp_path / "my_models.py").write_text(
        "import mae_fast\n"
        "from mae_fast.bench import engines\n"
        "def made(cfg):\n"
        "    built = engines.build('transformers_sdpa', cfg)\n"
        "    model = mae_fast.accelerate(built.model)\n"
        "    def loss_of(clips, noise, ratio):\n"
        "        keep = int(cfg.num_patches * (1 - ratio))\n"
        "        masked = noise.argsort(dim=1).argsort(dim=1) >= keep\n"
        "        return model(normalise(clips).transpose(1, 2), bool_masked_pos=masked).loss\n"
        "    return model, loss_of\n"
        "from mae_fast.bench.baselines.transformers_videomae import normalise\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    losses = []
    for engine in ("transformers_sdpa", "my_models:made"):
        cell = Cell("quick", "random", 0.75, engines.name_of(engine))
        built = build(cell, SETTING)
        engines.same_weights(built)
        step = stepper(cell, built, make_clips(QUICK, 2, SETTING), SETTING)
        losses.append(float(step()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    phases = trace(built, step).phases()
    assert min(phases[name] for name in ("patch embedding", "encoder", "decoder", "loss")) > 0
    assert engines.why_not("my_models:made", QUICK, Masking.of(QUICK, 0.0))
    with pytest.raises(ConfigError, match="my_models"):
        engines.build("my_models:other", QUICK)


def test_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match="unknown engine 'officail_fp32'"):
        engines.name_of("officail_fp32")
    with pytest.raises(ConfigError, match="unknown engine 'officail'"):
        engines.name_of("officail")


def run_ratio(out, **options) -> Path | None:
    options = {"model": ("quick",), "engines": ("ours", OFFICIAL), "rounds": 2} | options
    return ratio.ratio(ratios=(0.0, 0.75), batch=1, out=str(out), **options)


def test_a_run_tells_every_cell(here, tmp_path, capsys):
    run_ratio(tmp_path, json=True)
    told = json.loads(capsys.readouterr().out)
    cells = {(c["ratio"], c["engine"]): c for c in told["cells"]}
    assert cells.keys() == {(r, e) for r in (0.0, 0.75) for e in (OURS, OFFICIAL)}
    ours = cells[0.75, OURS]
    assert ours["samples"] == 2 and ours["seconds_a_step"] > 0 and ours["peak_memory_mb"] > 0
    assert ours["share_of_product_rate"] > 0  # above 1 where others held up so short a product
    assert cells[0.0, OURS]["against_itself_at_0"] == {"times": 1.0, "apart": False}
    assert ours["lost"].keys() == {"decoder", "patch embedding", "optimizer", "overhead"}
    assert sum(ours["parts_a_clip"].values()) == pytest.approx(ours["seconds_a_clip"])
    records = [json.loads(line) for line in (tmp_path / "ratio.jsonl").read_text().splitlines()]
    assert [problems(r) for r in records] == [[], []]
    assert told["paper"]["with_data_hours"] == 35.8


def test_bench_step_is_a_cell_and_keeps_its_record(tmp_path, monkeypatch, capsys):
    """Of a model's own name: plan finds it beside its prediction."""

    def fake(run, cells):
        return [cell.key for cell in cells]

    monkeypatch.setattr(ratio.Run, "measure", fake)
    monkeypatch.setattr(ratio.Run, "told", lambda run, found: found)
    monkeypatch.setattr(step, "print_tables", print)
    monkeypatch.setattr(step, "append", lambda out, record: Path(out).write_text(record))
    for variant, name in (("mae_st", "vit_tiny"), ("slowfast", "vit_tiny/slowfast")):
        step.step("vit_tiny", variant, out=str(tmp_path / variant))
        key = f"{name}|random|0.9|mae_fast"
        assert (tmp_path / variant).read_text() == key
        assert capsys.readouterr().out == f"['{key}']\n"


def test_steps_from_video_are_those_after_the_warm_up(monkeypatch):
    """And the run is so much longer that its workers are still at work in the last."""

    def fake(cfg):
        assert cfg.train.steps == 2 + 3 + 2 + 2 * 1
        rows = ({"step": n, "step_seconds": n, "data_wait": n / 10} for n in range(1, 10))
        Path(cfg.output, "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(step, "pretrain", fake)
    cfg = Config(data=DataConfig(workers=1))
    assert step.time_run(cfg, steps=3, warmup=2) == ([3, 4, 5], [0.3, 0.4, 0.5])


def test_until_update_ends_where_the_optimizer_begins(monkeypatch):
    optimizer, found = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), {}
    times = iter((10.0, 13.0, 20.0))
    monkeypatch.setattr(ratio.time, "perf_counter", lambda: next(times))
    ratio.until_update(SimpleNamespace(optimizer=optimizer), optimizer.step, "a", found)()
    assert found == {"a": 3.0}


def test_what_is_there_is_not_measured_again(here, tmp_path, monkeypatch, capsys):
    run_ratio(tmp_path)
    first = capsys.readouterr().out
    lines = (tmp_path / "samples.jsonl").read_text()

    def refused(*args, **kwargs):
        raise AssertionError("measured again")

    with monkeypatch.context() as m:
        m.setattr(ratio, "in_own_process", refused)
        m.setattr(ratio, "interleave", refused)
        made = run_ratio(tmp_path)
    assert capsys.readouterr().out == first
    assert made == tmp_path / "ratio.jsonl"
    assert (tmp_path / "samples.jsonl").read_text() == lines
    found = (tmp_path / "ratio.jsonl").read_text()
    (tmp_path / "ratio.jsonl").unlink()
    run_ratio(tmp_path)  # the records are made again of the samples
    assert (tmp_path / "ratio.jsonl").read_text() == found
    run_ratio(tmp_path, rounds=3)  # one more round, and nothing else
    added = (tmp_path / "samples.jsonl").read_text()[len(lines) :].splitlines()
    assert len(added) == 1 and len(json.loads(added[0])["seconds"]) == 4
    kept = (tmp_path / "samples.jsonl").read_text().splitlines()
    without = [line for line in kept if '"parts"' not in line]
    assert len(kept) - len(without) == 4
    (tmp_path / "samples.jsonl").write_text("\n".join(without) + "\n")
    run_ratio(tmp_path, rounds=3)  # what is missing is measured, and nothing else
    added = (tmp_path / "samples.jsonl").read_text().splitlines()[len(without) :]
    assert len(added) == 4 and all("parts" in json.loads(line) for line in added)
    with pytest.raises(ConfigError, match="another run"):
        run_ratio(tmp_path, seed=1)


def test_an_interrupted_run_goes_on(here, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(ratio, "warm_up", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_ratio(tmp_path)
    before = (tmp_path / "samples.jsonl").read_text()
    assert before.count('"probe"') == 4
    run_ratio(tmp_path)
    assert (tmp_path / "samples.jsonl").read_text()[len(before) :].count('"probe"') == 0


def test_a_batch_that_does_not_fit_is_halved_and_told(here, tmp_path, monkeypatch, capsys):
    def probe(what, cell, setting, clips):
        if clips > 3 and cell.ratio == 0:
            return {"memory": "no room"}
        return cell_module.probe(cell, setting, clips)

    monkeypatch.setattr(ratio, "in_own_process", probe)
    ratio.ratio(("quick",), (0.0, 0.75), ("ours",), batch=8, rounds=2, out=str(tmp_path))
    assert "mae_fast at 0%: 2 clips a step, not 8, which do not fit" in capsys.readouterr().out


def test_a_wrong_loss_is_not_timed(here, tmp_path, monkeypatch, capsys):
    def probe(what, cell, setting, clips):
        found = cell_module.probe(cell, setting, clips)
        return found | {"loss": found["loss"] * (1.01 if cell.engine == OFFICIAL else 1)}

    monkeypatch.setattr(ratio, "in_own_process", probe)
    run_ratio(tmp_path, json=True)
    told = json.loads(capsys.readouterr().out)
    assert {c["engine"] for c in told["cells"]} == {OURS}
    assert all("not timed" in reason for reason in told["skipped"].values())


def test_memory_that_is_not_there_is_told_by_the_process(tmp_path):
    found = in_own_process("probe", Cell("quick", "random", 0.9, OURS), SETTING, clips=10**6)
    assert "can't allocate memory" in found["memory"]


@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError("can't allocate memory: y")])
def test_only_want_of_memory_is_told_as_such(error, monkeypatch, capsys):
    order = json.dumps(["probe", vars(Cell("quick", "random", 0.9, OURS)), vars(SETTING), {}])

    def probe(cell, setting):
        assert (cell.ratio, setting) == (0.9, SETTING)
        raise error

    monkeypatch.setattr(cell_module, "limit_memory", lambda: None)
    monkeypatch.setattr(cell_module, "probe", probe)
    cell_module.main(order)
    assert json.loads(capsys.readouterr().out) == {"memory": str(error)}
    error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        cell_module.main(order)


def test_steps_with_data(folder):
    cell = Cell("quick", "random", 0.75, OFFICIAL)
    found = cell_module.with_data(cell, SETTING, 2, str(folder), 0)
    assert len(found["seconds"]) == len(found["waits"]) == cell_module.TIMED
    assert all(0 < w < s for w, s in zip(found["waits"], found["seconds"], strict=True))


def record(masked, seconds, rounds, clips=2, parts=None, data=None) -> dict:
    parts = parts or {"encoder": 0.6, "decoder": 0.4}
    limits = {"product": {"flop": 1e9, "seconds": [0.1] * len(rounds)}}
    each = {
        "rounds": rounds,
        "clips": clips,
        "peak_memory_mb": 1.0,
        "flop": 1e9 * clips,
        "parts": parts,
        "data": data,
    }
    return {
        "model": "m",
        "strategy": "random",
        "ratio": masked,
        "precision": "fp32",
        "device": "cpu",
        "asked_clips": 2,
        "seconds": {OURS: seconds},
        "engines": {OURS: each},
        "rounds": rounds,
        "limits": limits,
        "flop_limit": 2.0,
        "forward_gflop": 1.0,
        "environment": {},
    }


def test_ratios_are_of_clips_and_of_the_same_rounds():
    dense = record(0.0, [8.0, 80.0, 8.0], [0, 1, 2], clips=1)
    masked = record(0.9, [4.0, 40.0, 5.0], [0, 1, 3], clips=2)
    assert ratio_table.faster(dense, OURS, masked, OURS) == {"times": 4.0, "apart": False}
    apart = record(0.9, [4.0, 4.0], [7, 8])
    assert ratio_table.faster(dense, OURS, apart, OURS) == {"times": 4.0, "apart": True}
    assert ratio_table.faster(dense, OFFICIAL, apart, OURS) is None


def test_what_is_lost_and_noise():
    dense = record(0.0, [10.0, 10.0], [0, 1], parts={"encoder": 0.9, "decoder": 0.1})
    data = {"clips": 2, "seconds": [4.0, 4.0], "waits": [1.0, 1.0], "repeat": 2}
    masked = record(0.9, [2.0, 2.4], [0, 1], parts={"encoder": 0.5, "decoder": 0.5}, data=data)
    told = ratio_table.summary([dense, masked])["cells"][1]
    assert told["noisy"] and told["spread"] == pytest.approx(0.4 / 2.2)
    assert told["share_of_product_rate"] == pytest.approx(2e9 / 2.2 / 1e10, rel=0.02)
    assert told["lost"]["decoder"]["share"] == pytest.approx(0.5)
    # 10 s, of which 1 are the decoder's, to 2.2, of which 1.1 are.
    assert told["lost"]["decoder"]["speed_up_without"] == pytest.approx(9 / 1.1)
    assert told["lost"]["data"]["share"] == pytest.approx(1.8 / 4)
    assert told["data"]["waiting"] == 0.25


def test_a_cell_is_held_against_0_of_its_own_strategy_and_limits_of_its_own_rounds():
    other = record(0.0, [40.0, 40.0], [0, 1]) | {"strategy": "tube"}
    dense, masked = record(0.0, [8.0, 8.0], [0, 1]), record(0.9, [2.0], [1])
    masked["rounds"] = [0, 1]
    masked["limits"]["product"]["seconds"] = [0.1, 0.2]
    told = ratio_table.summary([other, dense, masked])["cells"][2]
    assert told["against_itself_at_0"]["times"] == 4.0
    assert told["share_of_product_rate"] == pytest.approx(2e9 * 0.2 / 1e9 / 2.0)


def test_the_papers_table_is_of_the_ratio_nearest_to_90():
    found = [(0.0, 8.0), (0.5, 6.0), (0.9, 4.0), (0.98, 1.0)]
    cells = ratio_table.summary([record(r, [s, s], [0, 1]) for r, s in found])["cells"]
    head, _, ours, _ = ratio_table.paper_table(cells).strip().splitlines()
    assert head.startswith("90% over 0%")
    # 2 s a clip, a million of them.
    told = ["mae_fast, here", "2.0x", "2.00x", "unmeasured", "556 h a million clips"]
    assert re.split(r"  +", ours) == told


def test_columns_hold_what_their_heads_say():
    numbers = {"ratio": 0.9, "clips": 3, "seconds_a_step": 1.5, "spread": 0.2, "noisy": True}
    numbers |= {"clips_a_second": 2.0, "peak_memory_mb": 700.0, "gflop_a_clip": 50.0}
    times = {
        f"against_{name}": {"times": times, "apart": times == 4.0}
        for name, times in (("itself_at_0", 4.0), ("official_at_0", 5.0), ("official", 2.0))
    }
    cell = {"engine": "ours", **numbers, **times, "share_of_product_rate": None, "flop_limit": 7.7}
    head, line, row = text_table([*ratio_table.CELL], [ratio_table.cell_row(cell)]).splitlines()
    assert head.startswith("masked  engine  clips  s a step  spread") and set(line) == {"-", " "}
    names, found = (re.split(r"  +", x) for x in (head, row))
    assert dict(zip(names, found, strict=True)) == {
        "masked": "90%",
        "engine": "ours",
        "clips": "3",
        "s a step": "1.500",
        "spread": "20%!",
        "clips/s": "2",
        "peak MB": "700",
        "GFLOP a clip": "50",
        "of rate": "-",
        "over itself at 0%": "4.00x*",
        "official at 0%": "5.00x",
        "official here": "2.00x",
        "FLOP limit": "7.7x",
    }


def test_two_columns_stand_to_the_left():
    table = text_table(["a", "name", "of it"], [["left", "b", "1"], ["c", "longer", "22"]])
    assert table.splitlines() == [
        "a     name    of it",
        "----  ------  -----",
        "left  b           1",
        "c     longer     22",
    ]


def test_engines_that_do_not_fit_together_are_apart(tmp_path, monkeypatch):
    run = Run(SETTING, 1, 2, tmp_path)
    cells = [Cell("quick", "random", 0.9, name) for name in ("a", "b", "c")]
    for cell in cells:
        run.log["probe"][cell.key] = {"state_mb": 400.0, "peak_memory_mb": 600.0}
    monkeypatch.setattr(ratio.machine, "free_mb", lambda device: 2000.0)
    assert [[c.engine for c in group] for group in run.groups(cells)] == [["a", "b"], ["c"]]


@pytest.mark.parametrize("name", ["official_eager", "mae_fast", "official_repository"])
def test_an_engine_may_have_a_precision_of_its_own(name, monkeypatch):
    """official_eager_fp32 beside others in bf16 is what official_eager is in fp32."""
    cfg, built = engines.config_of(engines.QUICK), []
    real = engines.build

    def recorded(engine, cfg, device="cpu", precision="fp32"):
        built.append((engine, precision))
        return None if "@" in engine else real(engine, cfg, device, precision)

    monkeypatch.setattr(engines, "build", recorded)
    at = "@somewhere" if name == "official_repository" else ""
    if at:
        monkeypatch.setattr(engines, "OfficialRepository", lambda path: SimpleNamespace())
        real(f"{name}_fp32{at}", cfg, "cpu", "bf16")
        assert built == [(name + at, "fp32")]
        return
    losses = {}
    for engine, precision in ((name, "fp32"), (f"{name}_fp32", "bf16"), (name, "bf16")):
        torch.manual_seed(0)
        made = real(engine, cfg, "cpu", precision)
        engines.same_weights(made)
        clips = torch.full((1, 3, cfg.num_frames, cfg.img_size, cfg.img_size), 7).to(torch.uint8)
        clips[:, :, ::2, ::3] = 200
        noise = torch.linspace(0, 1, cfg.num_patches)[None]
        losses[engine, precision] = float(made.step(clips, noise))
    assert losses[name, "fp32"] == losses[f"{name}_fp32", "bf16"] != losses[name, "bf16"]
    assert engines.label(f"{name}_fp32") == f"{name}_fp32"
    assert engines.twin(f"{name}_fp32") == engines.OURS
