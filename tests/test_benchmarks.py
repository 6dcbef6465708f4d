"""The harness of the benchmarks: what it counts, what it compares, what it refuses to time."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks import markdown, tables
from benchmarks.gpu import tables as gpu_tables
from mae_fast import backends
from mae_fast.bench import ours, records, timing
from mae_fast.bench.baselines import OfficialMAE, normalise
from mae_fast.bench.baselines.training import CLIP_GRAD
from mae_fast.bench.cell import Setting, make_clips
from mae_fast.bench.flops import official_step_flop, step_flop
from mae_fast.bench.ours import encode_all_loss
from mae_fast.bench.ratio import ratio
from mae_fast.config import preset
from mae_fast.forward import SAVINGS, forward
from mae_fast.masking import ids_from_noise, num_keep
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS, dispatch
from mae_fast.ops.source import COLUMNS, Source
from mae_fast.ops.work import work
from mae_fast.remade import kept
from mae_fast.report.rows import step_rows

ROOT = Path(__file__).resolve().parents[1]
SETTING = Setting("cpu", "fp32", 0)
QUICK = preset("vit_tiny", img_size=64, depth=3, decoder_depth=2, decoder_embed_dim=96)
VARIANTS = {
    "mae_st": QUICK,
    "slowfast": dataclasses.replace(QUICK, variant="slowfast"),
    "one_decoder_block": dataclasses.replace(QUICK, decoder_depth=1),
    "no_cls": dataclasses.replace(QUICK, cls_embed=False),
}


def counted(function) -> int:
    """FLOP of a forward, whose loss is returned, and its backward, by torch's own count."""
    with FlopCounterMode(display=False) as counter:
        function().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("without", [None, *SAVINGS, "all", "encode_all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flop_is_what_torch_counts(variant, without, clips):
    cfg = VARIANTS[variant]
    model = MaskedAutoencoder(cfg)
    noise = torch.rand(clips, cfg.num_patches)
    ids = ids_from_noise(noise, num_keep("random", cfg.grid, 0.9))
    video = make_clips(cfg, clips, SETTING)
    off = list(SAVINGS) if without == "all" else [without] if without in SAVINGS else []

    def loss():
        if without == "encode_all":
            return encode_all_loss(model, video, *ids)
        return forward(model.params(), model.spec, video, *ids, without=off)[0]

    with backends(**dict.fromkeys(OPS, "reference")):  # torch does not see into our operators
        expected = counted(loss)
    got = step_flop(cfg, clips, 0.9, off, encode_all=without == "encode_all")
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_flop_is_what_torch_counts(variant):
    cfg = VARIANTS[variant]
    model, video = OfficialMAE(cfg), normalise(make_clips(cfg, 2, SETTING))
    expected = counted(lambda: model(video, 0.9)[0])
    assert official_step_flop(cfg, 2) == pytest.approx(expected, rel=0.01)  # cls into the decoder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_counts_our_operators(variant, precision):
    """Whatever backend runs: a user's own FlopCounterMode sees what the references would do."""
    cfg = VARIANTS[variant]
    model, video = MaskedAutoencoder(cfg), make_clips(cfg, 2, SETTING)
    ids = ids_from_noise(torch.rand(2, cfg.num_patches), num_keep("random", cfg.grid, 0.9))

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return forward(model.params(), model.spec, video, *ids)[0]

    joined = precision == "bf16" and not dispatch.load_amx()
    # One product of q, k and v gives the last decoder block's q of the visible tokens too.
    unasked = int(cfg.cls_embed) + len(ids[0][0]) if joined else 0
    assert counted(loss) == step_flop(cfg, 2, 0.9) + 6 * 2 * unasked * cfg.decoder_embed_dim**2


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CLIP, IDS = meta(2, 3, 16, 224, 224, dtype=torch.uint8), meta(2, 156, dtype=torch.int32)
X, ROW = meta(2, 1569, 512), meta(512)
PLANES = Source(meta(0, dtype=torch.uint8), meta(2, COLUMNS + 16), 224)
TOKENS = (
    meta(2, 156, 512),
    meta(2, 512),
    ROW,
    meta(1568, 512),
    IDS,
    meta(2, 1412, dtype=IDS.dtype),
)
# Forward and backward of ViT-B's calls on 2 clips in fp32, counted by hand.
BY_HAND = {
    "layer_norm": ((X, ROW, ROW, 1e-6), 0, 5 * 4 * 2 * 1569 * 512),
    "add_layer_norm": ((X, X, ROW, ROW, 1e-6), 0, 8 * 4 * 2 * 1569 * 512),
    "bias_gelu": ((meta(2, 1569, 2048), meta(2048)), 0, 5 * 4 * 2 * 1569 * 2048),
    "decoder_tokens": (TOKENS, 0, 4 * 512 * (2 * (156 + 2 * 1569) + 2 * 1568)),
    "masked_mse": ((meta(2, 1412, 768), CLIP, None), 0, 9 * 2 * 1412 * 768),
    "masked_hog_mse": (
        (meta(2, 1412, 108), CLIP, TOKENS[5], (), 16, 0.225),
        0,
        2 * 1412 * (8 * 108 + 3 * 18 * 18),
    ),
    "patchify_gather": ((CLIP, IDS, 2, 16, 0, 1, torch.float32), 0, 5 * 2 * 156 * 1536),
    "crop_resize_patchify_gather": (
        (PLANES, IDS, 2, 16, 0, 1, torch.float32),
        0,
        5 * 2 * 156 * 1536,
    ),
    "attention": ((meta(2, 1569, 16, 32),) * 3, 12 * 2 * 1569**2 * 512, 4 * 12 * 2 * 1569 * 512),
    "linear": (
        (X, meta(2048, 512), meta(2048)),
        6 * 2 * 1569 * 512 * 2048,
        4 * (3 * (2 * 1569 * 512 + 512 * 2048) + 2 * 2 * 1569 * 2048),
    ),
    "patch_embed": (
        (CLIP, IDS, meta(768, 1536), meta(768), meta(1568, 768), 2, 16, 0, 1),
        4 * 2 * 156 * 768 * 1536,
        2 * (2 * 156 * 1536 + 4 * 768 * (1536 + 2 * 156)) + 4 * 768 * (2 * 156 + 1568),
    ),
}


@pytest.mark.parametrize("op", BY_HAND)
def test_work_is_what_is_counted_by_hand(op):
    args, flop, moved = BY_HAND[op]
    forward, backward = work(op, args)
    assert forward + backward == (flop, moved)


def test_work_is_there_for_every_op():
    assert BY_HAND.keys() == OPS.keys() - {"adamw"}


def test_official_flop_of_vit_b_is_the_published_count():
    """273 GFLOP a clip; 0% masked costs 4.6 times as much (counted by hand, from the paper)."""
    assert official_step_flop(preset("vit_base"), 2) / 2 == pytest.approx(273e9, rel=0.005)


def test_on_a_cpu_ours_keeps_nothing(monkeypatch):
    found, inner = [], ours.forward
    monkeypatch.setattr(ours, "forward", lambda *a, **k: found.append(kept()) or inner(*a, **k))
    built = ours.Ours().build(QUICK)
    built.step(make_clips(QUICK, 1, SETTING), torch.rand(1, QUICK.num_patches))
    assert found == [False]


def test_interleave_calls_each_once_a_round_in_an_order_drawn_anew():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleave(functions, rounds=40)
    rounds = [calls[i : i + 3] for i in range(0, 120, 3)]
    assert {*map(tuple, map(sorted, rounds))} == {tuple("abc")}
    assert {order[0] for order in rounds} == {order[-1] for order in rounds} == {*"abc"}
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 40)


def test_ratio_is_taken_round_by_round():
    """A machine that slows down by 10 halfway changes medians, and not the ratio."""
    assert timing.ratio([2, 20, 2.2], [1, 10, 1]) == 2
    assert timing.spread([1.0, 2.0, 4.0]) == 1.5


def test_an_engine_of_a_gpu_that_took_fewer_clips_is_compared_by_clips():
    engines = {"mae_fast": {"clips": 64}, "official_sdpa": {"clips": 32}}
    seconds = {"mae_fast": [2.0, 2.0], "official_sdpa": [3.0, 3.0]}
    record = {"engine": "official_sdpa", "engines": engines, "seconds": seconds}
    assert gpu_tables.faster(record) == 3.0


def test_an_accelerated_model_that_had_no_graphs_is_told():
    """Steps that took 4 and 2 ms a clip; without graphs where none were asked for is no word."""
    names = ("before", "accelerated", "keep=True", "cuda_graph=False", "mae_fast")
    record = {
        "family": "videomae",
        "model": "vit_base",
        "engines": {n: {"clips": 8, "peak_memory_mb": 1024.0 * k} for k, n in enumerate(names)},
        "seconds_a_clip": {n: [0.002 if n == "accelerated" else 0.004] * 3 for n in names},
        "times": {n: 2.0 if n == "accelerated" else 1.0 for n in names},
        "launches": {n: {"cudaLaunchKernel": 9} for n in names[:4]},
    }
    record["launches"]["accelerated"] = {"cudaGraphLaunch": 2, "cudaMemcpyAsync": 1}
    assert gpu_tables.accelerate_cells(record) == [
        "videomae, vit_base",
        "8",
        "250, 1.00x",
        "500, 2.00x",
        "250, 1.00x (no graphs)",
        "250, 1.00x",
        "250, 1.00x",
        "9, 3, 9, 9",
        "0.0, 1.0, 2.0, 3.0, 4.0",
    ]


def test_share_of_the_limit_that_bounds():
    limits = {
        "copy": {"bytes": 100, "seconds": [1.0, 2.0, 1.0]},
        "engine_product": {"flop": 10, "seconds": [1.0, 1.0, 1.0]},
        "torch_mm": {"flop": 5, "seconds": [1.0, 1.0, 1.0]},
    }
    assert timing.share(limits, {"bytes": 300, "flop": 0}, [6.0, 12.0, 6.0]) == 0.5
    assert timing.share(limits, {"bytes": 100, "flop": 20}, [4.0] * 3) == 0.5
    assert timing.share(limits, {"bytes": 300, "flop": 20}, [4.0] * 3) == 0.75
    assert timing.share(limits, {"flop": 20}, [4.0] * 3, "torch_mm") == 1


def results(folder: Path) -> None:
    """Records of a machine that copies 1 GB/s and multiplies 1 GFLOP/s."""
    limits = {
        "copy": {"bytes": 1e9, "seconds": [1.0, 1.0]},
        "engine_product": {"flop": 1e9, "seconds": [1.0, 1.0]},
        "torch_mm": {"flop": 0.5e9, "seconds": [1.0, 1.0]},
    }
    common = {"limits": limits, "environment": {"cpu": "a CPU", "torch": "2", "commit": "c0ffee"}}
    run = {
        "kind": "steps",
        "model": "vit_base",
        "batch_clips": 2,
        "ratio": 0.9,
        "precision": "fp32",
    }

    def record(**engines: tuple[float, float]) -> dict:
        """name=(seconds of a step, peak MB)"""
        return (
            run
            | common
            | {
                "seconds": {name: [step, step] for name, (step, _) in engines.items()},
                "engines": {
                    name: {"until_update": [step, step], "flop": 0.9e9, "peak_memory_mb": memory}
                    for name, (step, memory) in engines.items()
                },
            }
        )

    first = record(mae_fast=(1.0, 500), official_eager=(9.0, 999))
    second = record(mae_fast=(1.0, 500), official_eager=(2.0, 1000))
    dense = [record(mae_fast=(1.0, 500)), record(mae_fast=(4.25, 800)) | {"ratio": 0.0}]
    ladders = [first, second, *dense, record() | {"model": "quick"}]
    op = {"kind": "op", "op": "masked_mse", "shape": "[2, 3]", "direction": "forward_backward"}
    op |= {"baseline": "official", "chosen": "cpp", "bytes": 0.7e9, "flop": 0}
    op["seconds"] = {"cpp": [1.0, 1.0], "reference": [2.0, 2.0], "official": [12.0, 12.0]}
    ways = {"public": [3e-6], "bare": [2e-6]}
    ops = [op | common, {"kind": "call", "op": "masked_mse", "seconds": ways} | common]
    for name, found in (("ladder", ladders), ("ops", ops)):
        lines = "".join(json.dumps(record) + "\n" for record in found)
        (folder / f"{name}.jsonl").write_text(lines)


def test_tables_tell_what_the_records_hold(tmp_path):
    results(tmp_path)
    text = tables.tables(tmp_path)
    for row in (
        "| step, against official eager | 2.5x | 2.00x | **no** |",  # of the newest
        "| step, against official + SDPA + fused AdamW | 1.1x | unmeasured | - |",
        "| peak memory of official eager, over ours | 2x | 2.00x | yes |",
        "| loss, against official | 10x | 12.00x | yes |",
        "| loss, share of copy bandwidth (stretch) | 60% | 70% | yes |",
        "| step, share of the rate of the engine's own products | 85% | 90% | yes |",
        "| step, share of the rate of torch's sgemm | 85% | 180% | yes |",
        "| `official_eager` | 2 | 2.000 | 0% | 2 | 2.00x | 2.00x | - | 1000 |",
        "| 12.00x official, [2, 3] (cpp, spread 0%) | 70% of copy bandwidth | 3, 2, - |",
        "| unmeasured | unmeasured | unmeasured |",
    ):
        assert row in text, row
    assert "x in FLOP | 4x | 4.25x | yes |" in text
    assert "9.00" not in text and "quick" not in text
    assert all(f"\n| `{op}` | {OPS[op].what} |" in text for op in OPS)


def test_tables_of_no_record_say_unmeasured(tmp_path):
    text = tables.tables(tmp_path)
    assert text.count("unmeasured") == 11 + 3 * len(OPS)


def run_quick(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, "--quick", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_savings_are_engines(tmp_path):
    """One exact saving off at a time, and how long each takes before its optimizer begins."""
    engines = ["ours", *(f"mae_fast_without_{saving}" for saving in SAVINGS), "official_eager"]
    ratio(("quick",), (0.9,), tuple(engines), batch=1, out=str(tmp_path), quick=True)
    (record,) = records.read(tmp_path / "ratio.jsonl")
    assert list(record["seconds"]) == ["mae_fast", *engines[1:]]
    for name, engine in record["engines"].items():
        pairs = zip(engine["until_update"], record["seconds"][name], strict=True)
        assert all(0 < a < b for a, b in pairs) and engine["flop"] > 0
    head, *_ = step_rows(record)
    assert head[0] == "mae_fast"


def test_the_curves_agree(tmp_path):
    out = tmp_path / "curves.jsonl"
    run_quick("benchmarks.curves", "--out", str(out))
    record = json.loads(out.read_text())
    assert [len(losses) for losses in record["losses"].values()] == [3, 3]
    assert record["greatest_relative_difference"] < 1e-5


@pytest.mark.skipif(
    "MAE_ST_REPOSITORY" not in os.environ,
    reason="set MAE_ST_REPOSITORY to a checkout of facebookresearch/mae_st",
)
def test_the_official_repository_gives_our_loss_and_gradients():
    from mae_fast.bench.baselines.official_repository import OfficialRepository

    modules = set(sys.modules)
    torch.manual_seed(0)
    built = OfficialRepository(os.environ["MAE_ST_REPOSITORY"]).build(QUICK)
    assert not [m for m in set(sys.modules) - modules if m.split(".")[0] in ("mae_st", "timm")]
    ours = MaskedAutoencoder(QUICK)
    ours.load_state_dict(built.model.state_dict())
    clips, noise = make_clips(QUICK, 2, SETTING), torch.rand(2, QUICK.num_patches)
    for group in built.optimizer.param_groups:
        group["lr"] = 0.0
    grads = {}
    built.optimizer.register_step_pre_hook(
        lambda *_: grads.update((n, p.grad.clone()) for n, p in built.model.named_parameters())
    )
    loss, _, _ = ours(clips, 0.9, noise=noise)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(ours.parameters(), CLIP_GRAD)
    assert built.step(clips, noise) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-6)


def test_what_a_checkout_imports_is_taken_away_again(tmp_path):
    from mae_fast.bench.baselines.official_repository import import_beside

    (tmp_path / "models_mae.py").write_text("from timm.models import Mlp")
    modules = dict(sys.modules)
    contents = {"mae_st": {"__path__": [str(tmp_path)]}, "timm": {}, "timm.models": {"Mlp": 5}}
    assert import_beside("mae_st.models_mae", contents).Mlp == 5
    assert sys.modules == modules


def test_the_official_repository_must_be_there(tmp_path):
    from mae_fast.bench.baselines.official_repository import import_models

    with pytest.raises(FileNotFoundError, match=r"has no models_mae.py"):
        import_models(str(tmp_path))


def test_a_table_names_every_version_that_it_is_of():
    def record(torch, commit, **gpu):
        return {"environment": {"cpu": "a CPU", "torch": torch, "commit": commit, **gpu}}

    gpu = {"cuda:0": "a GPU", "triton": "3.6"}
    found = [record("2.11", "a", **gpu), record("2.99", "b", **gpu), record("2.11", "c", **gpu)]
    assert markdown.where(found) == (
        "a GPU; torch 2.11, triton 3.6; commit a, c; a GPU; torch 2.99, triton 3.6; commit b"
    )
    assert markdown.where([record("2", "d")]) == "a CPU; torch 2; commit d"
