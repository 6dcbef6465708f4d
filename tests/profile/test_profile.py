"""`mae-fast profile`: every moment of a step belongs to a part, and parts are held to formulas."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mae_fast import cli, spans
from mae_fast.bench import engines, records
from mae_fast.bench.baselines.training import Built
from mae_fast.bench.cell import Cell, LoadedClips, Setting, build, make_clips, stepper
from mae_fast.bench.flops import official_step_flop, step_flop
from mae_fast.errors import ConfigError
from mae_fast.ops.work import Work
from mae_fast.profile import labels, memory
from mae_fast.profile import step as step_module
from mae_fast.profile.memory import timeline
from mae_fast.profile.step import least, parts, profile
from mae_fast.profile.trace import Where, trace

SETTING = Setting("cpu", "fp32", 0)
ENGINES = ["mae_fast", "official_eager", "official_sdpa", "transformers_sdpa"]


def built_step(engine: str, masked: float = 0.9):
    if engine.startswith("transformers"):
        pytest.importorskip("transformers")
    cell = Cell("quick", "random", masked, engine)
    built = build(cell, SETTING)
    step = stepper(cell, built, make_clips(cell.cfg, 2, SETTING), SETTING)
    step(), step()
    return cell, built, step


@pytest.mark.parametrize("engine", ENGINES)
def test_every_moment_has_a_place(engine):
    cell, built, step = built_step(engine)
    found = trace(built, step)
    assert sum(row.seconds for row in found.rows.values()) == pytest.approx(found.seconds)
    assert abs(found.phases()["idle"]) < 1e-6
    # What has a formula was seen, forward and backward.
    expected = {w for w, work in least(cell, 2, torch.float32).items() if any(work)}
    assert expected <= found.rows.keys()
    linears = {"encoder": 12, "decoder": 14}  # of 2 blocks of 6; decoder_embed and the head
    for phase, count in linears.items():
        both = [found.rows[Where(phase, "linear", backward)] for backward in (False, True)]
        # Ours computes q, k, v of mask tokens apart.
        more = 3 if engine == "mae_fast" and phase == "decoder" else 0
        assert both[0].calls == count + more
        assert both[1].calls >= count + more


def test_names_cost_nothing_when_nobody_looks(monkeypatch):
    _, built, step = built_step("mae_fast")
    _, official, official_step = built_step("official_eager")
    for engine, run in ((built, step), (official, official_step)):
        with labels.labelled(engine.model):
            run()
    monkeypatch.setattr(spans, "span", None)  # whoever names something fails
    step()
    official_step()
    assert not any(m._forward_hooks for m in official.model.modules())
    assert "step" not in vars(official.optimizer)


def test_backward_is_put_where_forward_was():
    """Of two products one is the decoder's: its backward is too, sums of gradients included."""
    weights = torch.nn.ParameterList(torch.randn(64, 64) for _ in range(2))
    optimizer = torch.optim.AdamW(weights)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.Linear(64, 64)
            self.decoder = torch.nn.Linear(64, 64)

    model = Model()

    def step():
        model.decoder(model.blocks(torch.randn(8, 64)).sin()).sum().backward()

    found = trace(Built(model, optimizer, step), step)
    calls = {where: row.calls for where, row in found.rows.items() if where.op == "linear"}
    assert calls[Where("encoder", "linear", False)] == 1
    assert calls[Where("decoder", "linear", False)] == 1
    for phase in ("encoder", "decoder"):
        assert found.rows[Where(phase, "linear", True)].seconds > 0


@pytest.mark.parametrize("masked", [0.0, 0.75])
def test_work_is_all_flop_of_the_step(masked):
    for engine, flop in (("mae_fast", step_flop), ("official_eager", official_step_flop)):
        cell = Cell("quick", "random", masked, engine)
        found = least(cell, 2, torch.float32)
        todo, norms = sum(found.values(), Work()), {w.op for w in found if "norm" in w.op}
        # A baseline adds elsewhere.
        assert norms == {"layer_norm", *(["add_layer_norm"] if engine == "mae_fast" else [])}
        if engine == "mae_fast":
            ratio = masked or engines.BASE_RATIO
            assert todo.flop == flop(cell.cfg, 2, ratio, encode_all=not masked)
        elif masked:
            assert todo.flop == flop(cell.cfg, 2, masked)
        assert todo.bytes > 32 * sum(p.numel() for p in build(cell, SETTING).model.parameters())


def test_a_baseline_s_norm_moves_what_a_norm_does():
    """Of two blocks five, the last norm included; our sums are not in them."""
    cell = Cell("quick", "random", 0.75, "official_eager")
    found = least(cell, 2, torch.float32)
    one = engines.work(cell.engine, cell.cfg, 2, cell.masking)["encoder", "layer_norm"]
    for way, work in zip((False, True), one, strict=True):
        assert found[Where("encoder", "layer_norm", way)] == work * 5


def test_the_state_of_adamw_is_weights_and_two_moments():
    _, built, _ = built_step("mae_fast")
    weights = sum(p.numel() for p in built.model.parameters())
    assert step_module.state_mb(built) == pytest.approx(3 * 4 * weights / 2**20, rel=1e-3)


def test_limits():
    assert Work(flop=100, bytes=10).seconds(10, 10) == 10
    assert Work(flop=10, bytes=100).seconds(10, 10) == 10


def test_parts_add_up_to_the_step():
    cell, built, step = built_step("mae_fast")
    found = [trace(built, step) for _ in range(3)]
    told = parts(found, 1.0, least(cell, 2, torch.float32), 1e11, 1e10)
    assert sum(part["seconds"] for part in told) == pytest.approx(1.0)
    assert told[-1]["phase"] == "unaccounted"
    linear = next(p for p in told if (p["phase"], p["op"]) == ("decoder", "linear"))
    where = Where("decoder", "linear", linear["direction"] == "backward")
    assert linear["seconds"] == sorted(t.rows[where].seconds for t in found)[1]
    alone = parts(found[:1], found[0].seconds, {}, 1e11, 1e10)
    assert alone[-1]["seconds"] == pytest.approx(0, abs=1e-6)
    assert linear["share_of_limit"] == linear["limit_seconds"] / linear["seconds"]


def test_rows_of_the_tables():
    work = {"flop": 3e9, "bytes": 2e9, "limit_seconds": 0.02}
    both = [("forward", 0.01, 1), ("backward", 0.04, 2)]
    parts = [
        {"phase": "decoder", "op": "linear", "direction": way, "seconds": s, "share": s, "calls": n}
        for way, s, n in both
    ]
    parts[0] |= work
    left = {"phase": "idle", "op": "", "direction": "", "seconds": 0.5, "share": 0.5}
    engine, other = {"parts": [*parts, left]}, {"parts": [parts[1]]}
    linear = ["decoder", "linear", "3", "10.0", "40.0", "5.0%", "3.0", "2000", "60", "40.0"]
    idle = ["idle", "", "-", "500.0", "-", "50.0%", *"------"]
    assert list(step_module.part_rows(engine)) == [[*linear, "40%", "30.0 ms"], idle]
    told = {"engines": {"a": engine, "b": other}, "seconds": {"a": [1.0], "b": [3.0]}}
    assert list(step_module._beside(told, "a", "b")) == [
        ["decoder", "linear", "50.0", "40.0", "0.80x"],
        ["idle", "", "500.0", "-", "-"],
        ["step", "", "1000.0", "3000.0", "3.00x"],
    ]


def test_memory_tells_who_holds_it():
    model = torch.nn.ModuleDict({"decoder": torch.nn.Linear(8, 8)})
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        kept = torch.empty(1 << 20)  # 4 MB
        for _ in range(3):
            torch.empty(1 << 18)  # 1 MB, gone at once
        model["decoder"](torch.empty(1 << 15, 8))  # 1 MB in, 1 MB out
        del kept

    found = timeline(trace(Built(model, optimizer, step), step, memory=True), "cpu")
    assert found.peak_mb == pytest.approx(6, abs=0.01)
    assert found.at_peak == pytest.approx({"rest": 5, "decoder linear": 1}, abs=0.01)
    assert max(map(sum, zip(*found.holders.values(), strict=True))) == pytest.approx(found.peak_mb)


def test_a_long_timeline_keeps_its_peaks():
    totals = [n % 7 for n in range(10 * memory.MOMENTS + 3)]
    totals[1234] = 99
    kept = memory._thinned(totals)
    assert 1234 in kept and kept == sorted(kept) and len(kept) <= memory.MOMENTS
    assert memory._thinned([5, 3]) == [0, 1] and memory._thinned([]) == []


def test_profile_writes_what_it_says(tmp_path, capsys):
    profile("quick", against="official_eager", out=str(tmp_path), json=True)
    told = json.loads(capsys.readouterr().out)
    assert list(told["engines"]) == ["mae_fast", "official_eager"]
    for name, engine in told["engines"].items():
        step = sorted(told["seconds"][name])[len(told["seconds"][name]) // 2]
        assert sum(p["seconds"] for p in engine["parts"]) == pytest.approx(step)
    names = {Path(f).name for f in told["files"]}
    assert names >= {"profile.json", "mae_fast.trace.json", "roofline.png", "memory.png"}
    assert all(Path(f).stat().st_size > 1000 for f in told["files"])
    profile("quick", out=str(tmp_path))
    printed = capsys.readouterr().out
    assert "decoder          attention" in printed and "unaccounted" in printed


def test_loading_is_a_part_of_the_step(folder, tmp_path, monkeypatch, capsys):
    right, taken = LoadedClips.next_batch, []

    @spans.spanned("data", "wait")
    def slow(clips):
        taken.append(clips)
        time.sleep(0.05)
        return right(clips)

    monkeypatch.setattr(LoadedClips, "next_batch", slow)
    command = ["profile", "--model", "quick", "--with-data", str(folder), "--workers", "1"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    # A worker has two batches ready: before each step that is timed and traced they are taken.
    assert len(taken) == 2 + step_module.ROUNDS * (2 + 2) + 1
    (found,) = records.read(tmp_path / "profile.json")
    assert "loaded by 1 processes" in records.title(found)
    (engine,) = found["engines"].values()
    parts = {(p["phase"], p["op"]): p["seconds"] for p in engine["parts"] if p["op"]}
    # Clips are made where they are asked for.
    crop = "crop_resize_patchify_gather"
    made = ("patch embedding", crop), ("loss", crop)
    for part in (("data", "wait"), ("host to device", "copy"), *made):
        assert parts[part] > 0
    assert 0.05 < parts["data", "wait"] < min(found["seconds"]["mae_fast"])
    assert parts.keys() >= {("decoder", "attention"), ("optimizer", "adamw")}
    assert capsys.readouterr().out.endswith(f"as a page: {tmp_path / 'report.html'}\n")
    assert "host to device" in (tmp_path / "report.html").read_text()


def test_nvtx_needs_a_gpu():
    with pytest.raises(ConfigError, match="nvtx needs --device cuda"):
        profile("quick", nvtx=True)


def test_a_compiled_graph_is_one_part():
    """Hooks would break it, and it has no modules."""
    compiled = engines.BASELINES["official_compile"]
    cell = Cell("quick", "random", 0.9, "official_eager")
    built = replace(compiled, compiler="aot_eager").build(cell.cfg)
    step = stepper(cell, built, make_clips(cell.cfg, 2, SETTING), SETTING)
    step(), step()
    found = trace(built, step)
    assert {w.phase for w in found.rows} == {"mask", "compiled", "optimizer", "rest"}
    assert found.rows[Where("compiled", "compiled", True)].seconds > 0
