"""What the stages of `make gpu` decide and write, on stand-ins."""

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import engines, predict, records, tables
from benchmarks.gpu.setting import Setting, model_of
from benchmarks.gpu.stages import accelerate, compile, kernels, profile, steps, tune
from mae_fast import cost
from mae_fast.bench.records import problems
from mae_fast.kernels import configs

ROOT = Path(__file__).resolve().parents[2]


def rehearsing(folder: Path) -> Setting:
    return Setting("cpu", records.Records(folder / "a.jsonl", "sources"), True, math.inf)


def test_tables_are_written_before_the_steps_that_use_them():
    names = [s.name for s in gpu.STAGES]
    assert names[:5] == ["smoke", "tune", "attention", "kernels", "steps"]
    first = [(m, b, e) for m, b, engines in steps.PLAN for e in engines]
    assert [e for m, b, e in first if (m, b) == ("vit_large", 64)] == list(steps.FIRST)
    assert "official_sdpa_compile" in steps.FIRST


def test_the_document_has_every_stage_in_its_order():
    text = predict.DOC.read_text().split("## The budget")[0]
    first, *others = gpu.STAGES
    stages = [(s.name, f"{s.seconds}") for s in (first, *gpu.BESIDE, *others)]
    assert re.findall(r"^\| (\w+) \| (\d+)", text, re.M) == stages


def test_an_item_that_fails_does_not_lose_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")

    def fail():
        raise ValueError(f"wrong\nat length, in {tmp_path}/venv/lib/torch.py")

    def decline():
        raise records.Declined("not here")

    ran = []

    def items():
        yield records.Item("fails", fail)
        yield records.Item("declines", decline)
        yield records.Item("works", lambda: ran.append("works") or {"value": 1})

    found = records.Records(tmp_path / "a.jsonl", "sources")
    records.work("stage", items(), found, math.inf)
    records.work("stage", items(), found, math.inf)  # nothing is left
    assert ran == ["works"]
    rows = {r["item"]: r for r in found.all()}
    assert rows["fails"]["reason"] == "ValueError: wrong\nat length, in lib/torch.py"
    assert "in fail" in rows["fails"]["traceback"]
    assert str(records.ROOT) not in (tmp_path / "a.jsonl").read_text()
    assert [r["status"] for r in rows.values()] == ["failed", "declined", "measured"]
    other = records.Records(tmp_path / "a.jsonl", "other sources", ())
    assert other.done("stage") == set()


def test_tables_say_how_much_faster_ours_is():
    """By clips a second, round by round: another batch and a slower step."""
    record = {"engine": "official_bf16", "seconds": {"official_bf16": [3.0, 6.0]}}
    record["seconds"]["mae_fast"] = [1.0, 2.0]
    record["engines"] = {"official_bf16": {"clips": 32}, "mae_fast": {"clips": 64}}
    assert tables.faster(record) == 6.0


def test_models_of_every_plan_are_known():
    plans = (
        *accelerate.PLAN,
        *((None, None, model, 0) for model, *_ in (*steps.PLAN, *steps.RUNGS)),
    )
    sizes = {model: model_of(model).num_patches for _, _, model, _ in plans}
    assert {"videomae_base", "vit_huge16"} <= sizes.keys() and {*sizes.values()} == {1568}


def test_other_peoples_models_are_timed_before_and_after(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    setting, built, made = rehearsing(tmp_path / "a GPU"), accelerate.built, {}

    def seen(*args):
        engine = made[args[2]] = built(*args)
        return engine

    monkeypatch.setattr(accelerate, "built", seen)
    records.work("accelerate", accelerate.items(setting), setting.records, math.inf)
    ((_, (row,)),) = tables.devices(tmp_path)
    assert problems(row) == []
    ways = {name: vars(engine.model).get("forward") for name, engine in made.items()}
    assert ways.pop(accelerate.BEFORE) is None
    how = {name: (way.keep, way.cuda_graph) for name, way in ways.items()}
    assert how == {
        "accelerated": (False, True),
        "keep=True": (True, True),
        "cuda_graph=False": (False, False),
    }
    assert len({id(engine.model) for engine in made.values()}) == len(made)
    samples = {name: len(s) for name, s in row["seconds_a_clip"].items()}
    assert samples == dict.fromkeys([*made, "mae_fast"], setting.rounds(10))
    (text,) = tables.tables(tmp_path)
    head, _, cells, *_ = (line.split(" | ") for line in text.splitlines() if line[:1] == "|")
    assert len(head) == len(cells) and "-" not in cells
    assert cells[2].endswith(", 1.00x")


def test_what_was_not_reached_hides_nothing_that_was_measured(tmp_path):
    found = records.Records(tmp_path / "a GPU/a.jsonl", "sources")
    environment = {"environment": {"commit": "0"}}
    found.add("tune", "an op", records.MEASURED, value=1, **environment)
    for n, status in enumerate((records.MEASURED, records.NOT_REACHED, records.FAILED)):
        found.add("steps", "a step", status, value=status, at=str(n), **environment)
    found.add("steps", "the stage", records.NOT_REACHED)
    ((_, rows),) = tables.devices(tmp_path)
    assert [(r["item"], r["value"]) for r in rows] == [("an op", 1), ("a step", "measured")]


def test_what_was_not_reached_is_run_next_time(tmp_path):
    found = records.Records(tmp_path / "a.jsonl", "sources")
    item = records.Item("late", dict)
    records.work("stage", iter([item]), found, deadline=0.0)
    (tmp_path / "a.jsonl").open("a").write('{"cut short by a cra')
    records.work("stage", iter([item]), found, math.inf)
    assert [r["status"] for r in found.all()] == ["not reached", "measured"]


def test_a_batch_that_does_not_fit_is_halved():
    tried = []

    def run(batch):
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError("too much")

        return 10 * batch

    assert engines.fitting(run, 12) == (3, 30) and tried == [12, 6, 3]
    with pytest.raises(torch.OutOfMemoryError):
        engines.fitting(lambda batch: run(4), 2)


def test_an_engine_with_another_loss_is_not_timed():
    model = torch.nn.Linear(1, 1)
    same, other = (
        mock.Mock(model=model, step=lambda clips, noise, loss=loss: loss) for loss in (1.0, 1.02)
    )
    state = model.state_dict()
    with pytest.raises(AssertionError, match=r"other gives loss 1\.02, expected 1\.0: not timed"):
        engines.first_losses({"mae_fast": same, "other": other}, None, None, state)


def test_memory_of_a_step_is_what_it_adds(tmp_path, monkeypatch):
    setting = rehearsing(tmp_path)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100 << 20)
    monkeypatch.setattr(Setting, "peak_mb", lambda self, call: call() or 300.0)
    reference = steps.Reference(setting, "vit_base", 2)
    assert reference.used_mb == 200.0 and len(reference.clips) == len(reference.noise) == 2
    record = steps.measure(setting, lambda: reference, "official_bf16", setting.limits())
    assert record["engines"]["official_bf16"]["peak_memory_mb"] == 200.0
    assert list(record["seconds"]) == ["official_bf16", "mae_fast"] and not record["limits"]


def test_cuda_kernels_are_built_where_nvcc_is(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "ROOT", tmp_path)
    monkeypatch.setattr(compile, "LOG", tmp_path / "build/log")
    setup = tmp_path / "setup.py"
    setup.write_text("import sys, os; print(*sys.argv[1:], os.environ['MAX_JOBS'])")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(records.Declined, match="is built without CUDA"):
        compile.ended(compile.start_nvcc())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(compile.cpp_extension, "CUDA_HOME", None)
    assert compile.start_nvcc() == "there is no nvcc"
    monkeypatch.setattr(compile.cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    assert compile.ended(compile.start_nvcc())["told"] == "-q build_ext --inplace 4"
    setup.write_text("raise SystemExit('error: no kernel')")
    with pytest.raises(AssertionError, match="ended with 1: error: no kernel"):
        compile.ended(compile.start_nvcc())


def test_a_kernel_that_is_wrong_is_a_failure(tmp_path):
    """Its item is: what else was timed is kept."""
    setting = rehearsing(tmp_path)
    item = records.Item("an op", lambda: {"wrong": {"triton": "result 0"}})
    records.work("kernels", iter([item]), setting.records, math.inf)
    (row,) = setting.records.all()
    assert row["status"] == records.FAILED and row["reason"].startswith("wrong, and not timed")


def test_the_fastest_candidate_is_that_of_the_whole_step():
    def record(count, **seconds):
        kernel = {"kernel": "k", "shape_class": "any"}
        kernel["seconds"] = {json.dumps({"BLOCK": int(n[1:])}): [s] for n, s in seconds.items()}
        return {"stage": "tune", "architecture": 90, "calls_a_step": count, "kernels": [kernel]}

    # 16 is best in most calls of a step, 8 does not launch everywhere.
    found = [record(1, b8=1.0, b16=3.0, b32=1.0), record(24, b16=1.0, b32=2.0)]
    assert tune.fastest(found) == {(configs.TRITON, "90", "k", "any"): {"BLOCK": 16}}
    assert tune.fastest([{"stage": "steps"}]) == {}


def test_a_chosen_size_is_what_its_kernel_gets(monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda: 90)
    pick = partial(configs.pick, "adamw_step")
    kept, other = configs.pick("adamw_norm"), {"BLOCK": 1, "num_warps": 1}
    assert tune.chosen({("adamw_step", "any"): other})(pick)() == other != pick()
    assert tune.chosen({("adamw_step", "any"): other})(configs.pick)("adamw_norm") == kept
    assert tune.picks(pick) == {("adamw_step", "any")}


def test_attention_is_ordered_by_all_calls_of_a_row():
    def record(count, **seconds):
        times = {name: [s] for name, s in seconds.items()}
        of = {"stage": "attention", "status": "measured", "architecture": 90, "seconds": times}
        return {**of, "row": "d32-s2048-bfloat16-forward", "calls_a_step": count}

    # xformers did not take the second call.
    found = kernels.rows([record(3, triton=1.0, xformers=0.5), record(1, triton=2.0, torch=9.0)])
    assert found == {("90", "d32-s2048-bfloat16-forward"): {"triton": 5000.0}}


def test_a_table_keeps_what_was_not_found_anew(tmp_path, monkeypatch):
    """A rehearsal's is its own, and nothing is written where nothing was found."""
    monkeypatch.setattr(configs, "MEASURED", tmp_path / "kernels/measured.json")
    table = configs.MEASURED.with_name("t.json")
    table.parent.mkdir()
    table.write_text('{"90": {"a": {"x": 1}, "b": {"x": 2}}, "80": {}}')
    tiny = rehearsing(tmp_path)
    tiny.write_table("t.json", {("90", "c"): {"y": 4}})
    assert json.loads((tmp_path / "t.json").read_text()) == {"90": {"c": {"y": 4}}}
    real = replace(tiny, tiny=False)
    real.write_table("t.json", {("90", "a"): {"y": 3}, ("100", "a"): {"z": 5}})
    expected = {"90": {"a": {"y": 3}, "b": {"x": 2}}, "80": {}, "100": {"a": {"z": 5}}}
    assert json.loads(table.read_text()) == expected
    assert (tmp_path / "t.json").read_text() == table.read_text()
    real.write_table("none.json", {})
    assert not list(tmp_path.rglob("none.json"))


@pytest.mark.parametrize(
    ("kernel", "op"),
    [
        ("_add_layer_norm_fwd_kernel", "add_layer_norm"),
        ("_layer_norm_bwd_kernel", "layer_norm"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("void cutlass::device_kernel<flash::enable_sm90>", "products"),
        ("fmha_cutlassF_bf16", "products"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add>", "elementwise"),
        ("vectorized_elementwise_kernel<4, at::native::FillFunctor<float>", "fills"),
        ("Memset (Device)", "fills"),
        ("vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda", "copies"),
        ("(anonymous namespace)::CatArrayBatchedCopy_vectorized<", "copies"),
        ("void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16", "sums"),
        ("_sum_parts_kernel", "sums"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>", "adamw"),
        ("at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16, int>", "indexing"),
        ("void at::native::vectorized_gather_kernel<16, int>", "indexing"),
        ("_crop_resize_patchify_gather_fwd_kernel", "crop_resize_patchify_gather"),
        ("void some_library::kernel", "other"),
    ],
)
def test_kernels_go_to_their_ops(kernel, op):
    assert profile.op_of(kernel) == op


def test_every_kernel_of_ours_has_a_kind():
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    names = re.findall(r"^def (_\w+_kernel)\(", text, re.M)
    assert len(names) > 20
    assert [name for name in names if profile.op_of(name) == "other"] == []


def test_spans_of_the_host_are_no_kernels():
    """On an H200 the shadows of our labels were two fifths of a step's time."""

    def event(key, microseconds, on, annotation=False):
        kind = mock.Mock()
        kind.name = on
        times = {"self_device_time_total": microseconds, "is_user_annotation": annotation}
        return mock.Mock(key=key, count=1, device_type=kind, **times)

    found = [
        event("_bias_gelu_fwd_kernel", 5.0, "CUDA"),
        event("mae_fast label:|bias_gelu", 5.0, "CUDA", annotation=True),
        event("Optimizer.step#AdamW.step", 7.0, "CUDA", annotation=True),
        event("mae_fast label:|bias_gelu", 5.0, "CPU", annotation=True),
        event("Memset (Device)", 6.0, "CUDA"),
    ]
    rows = profile.kernels_of(found, "cuda")
    assert [row["kernel"] for row in rows] == ["Memset (Device)", "_bias_gelu_fwd_kernel"]


def test_record_files_have_plain_names(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    path = records.open_records(rehearsal=False).path
    assert path.parent == tmp_path / "NVIDIA-H100-80GB-HBM3"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[0-9a-z-]+\.jsonl", path.name)


def test_predictions_are_those_of_the_model():
    """docs/gpu.md: python -m benchmarks.gpu.predict writes it again."""
    assert predict.tables() in predict.DOC.read_text()
    for model in predict.TARGETS:
        step = predict.Step(predict.model_of(model), predict.CLIPS, 0.9, predict.H100)
        assert {t.name: t.amount > 0 for t in step.terms()} == dict.fromkeys(cost.GPU_SHARES, True)
