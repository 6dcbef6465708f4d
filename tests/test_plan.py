"""The cost model against torch's counts, measured memory and recorded times; `mae-fast plan`."""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_fast import backends, cli, cost, memory, plan
from mae_fast.bench import records
from mae_fast.bench.flops import forward_flop, official_parts, step_parts
from mae_fast.classifier import ClassifierConfig, VideoClassifier
from mae_fast.config import preset
from mae_fast.errors import ConfigError
from mae_fast.masking import ids_from_noise, num_keep
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
RUNTIME_MB = 435  # of Python, torch and its libraries in the recorded processes


@pytest.mark.parametrize("model", ["vit_tiny", "vit_base", "vit_large", "vit_huge"])
@pytest.mark.parametrize("variant", ["mae_st", "slowfast"])
def test_parameters_are_the_models(model, variant):
    cfg = preset(model, variant, depth=2)
    assert memory.parameters(cfg) == sum(p.numel() for p in MaskedAutoencoder(cfg).parameters())


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_forward_flop_is_what_torch_counts(ratio, tiny_cfg):
    model, video = MaskedAutoencoder(tiny_cfg), torch.zeros(3, 3, 8, 16, 16, dtype=torch.uint8)
    ids = ids_from_noise(
        torch.rand(3, tiny_cfg.num_patches), num_keep("random", tiny_cfg.grid, ratio)
    )
    with backends(**dict.fromkeys(OPS, "reference")), FlopCounterMode(display=False) as counter:
        model(video, ids_keep=ids[0], ids_mask=ids[1])
    got = sum(part.forward for part in step_parts(tiny_cfg, 3, ratio).values())
    assert got == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flop_is_the_papers():
    """ViT-L at 90%: 163 GFLOP forward and 7.7 times less than at 0% (the paper's count)."""
    cfg = preset("vit_large")
    assert forward_flop(cfg, 0.9) / 1e9 == pytest.approx(163.2, rel=0.001)
    for ratio, times in ((0.5, 2.1), (0.75, 3.9), (0.9, 7.7), (0.95, 11.0)):
        assert forward_flop(cfg, 0) / forward_flop(cfg, ratio) == pytest.approx(times, abs=0.05)
    parts = official_parts(cfg, 1, 0.9)
    assert parts["decoder attention"].forward / 1e9 == pytest.approx(20.2, abs=0.05)


def recorded():
    """(record, the CPU of its own rounds) of ViT-B where limits were timed."""
    for record in (r for f in ("ladder", "ratio") for r in records.read(RESULTS / f"{f}.jsonl")):
        limits = record.get("limits")
        if limits and record["model"] == "vit_base" and record["precision"] == "fp32":
            copy, products = limits["copy"], limits["engine_product"]
            rates = (
                products["flop"] / statistics.median(products["seconds"]),
                copy["bytes"] / statistics.median(copy["seconds"]),
            )
            yield record, plan.cpu_device(*rates)


def test_recorded_steps_are_predicted_within_20_percent():
    """At the median over the records of each ratio: one record is as noisy as its machine was."""
    errors: dict[float, list[float]] = {}
    for record, device in recorded():
        if step := records.ours(record):
            (clips, seconds), ratio = step, record["ratio"]
            got = cost.Step(preset("vit_base"), clips, ratio, device).compute
            errors.setdefault(ratio, []).append(got / statistics.median(seconds) - 1)
    assert {0.0, 0.5, 0.75, 0.9, 0.95} <= errors.keys()
    for ratio, found in errors.items():
        assert abs(statistics.median(found)) < 0.2, (ratio, found)


def test_recorded_memory_is_predicted_within_10_percent():
    """Of the newest record at each number of clips: older ones let malloc keep what was freed."""
    newest = {}
    for record, device in recorded():
        if step := records.ours(record):
            engine = record["engines"]["mae_fast"]
            newest[step[0], record["ratio"]] = engine["peak_memory_mb"], device
    assert len(newest) >= 6
    for (clips, ratio), (want, device) in newest.items():
        peak = memory.memory(preset("vit_base"), clips, ratio, device.product_bytes).peak / 2**20
        assert RUNTIME_MB + peak == pytest.approx(want, rel=0.1), (clips, ratio)


MEASURE = """
import torch
from pathlib import Path
from mae_fast.bench.ours import Ours
from mae_fast.config import preset
from mae_fast.metrics import memory_mb
cfg, clips = preset("vit_tiny", decoder_embed_dim=384, depth=2), 6
video = torch.randint(0, 256, (clips, 3, 16, 224, 224), dtype=torch.uint8)
built = Ours().build(preset("vit_tiny", img_size=32))
built.step(video[:, :, :, :32, :32].contiguous(), torch.rand(clips, 32))  # libraries are loaded
now = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
built = Ours().build(cfg)
for _ in range(2):
    built.step(video, torch.rand(clips, cfg.num_patches))
print(now, memory_mb(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_of_activations_is_what_a_process_takes():
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    before, peak = map(float, run.stdout.split())
    cfg, device = preset("vit_tiny", decoder_embed_dim=384, depth=2), plan.cpu_device(1.0, 1.0)
    held = memory.memory(cfg, 6, 0.9, device.product_bytes)
    assert 6 * held.a_clip > 5 * held.state  # activations are what is tested
    assert before + held.peak / 2**20 == pytest.approx(peak, rel=0.1)


def test_a_gpu_keeps_what_its_memory_holds():
    """Norms and activations, a third to a half more; the H200's peaks at 64 clips, in GB, less what
    its libraries hold: 12.4 of ViT-B, 21.2 of ViT-L."""
    for model, measured in (("vit_base", 12.4), ("vit_large", 21.2)):
        cfg = preset(model)
        lean, kept = (memory.memory(cfg, 64, 0.9, 2, keep=keep).peak for keep in (False, True))
        assert 1.2 * lean < kept < 1.6 * lean
        assert kept / 2**30 == pytest.approx(measured, rel=0.15)
        assert memory.keeps(cfg, 64, 0.9, 2, kept / memory.USABLE + 1)
        assert not memory.keeps(cfg, 64, 0.9, 2, kept / memory.USABLE - 1e6)


def test_a_target_encoder_computes_as_the_encoder_does():
    cfg, h100 = preset("vit_tiny", target="features"), cost.DEVICES["h100"]
    terms = {t.name: t for t in cost.Step(cfg, 2, 0.9, h100).terms()}
    for kind, like in (("products", "encoder products"), ("attention", "attention products")):
        term = terms[f"target encoder {kind}"]
        assert (term.share, term.ceiling) == (h100.shares[like], h100.products)
        assert term.amount > 0


def test_rows_are_of_the_model_s_own_depth(tiny_cfg):
    """Two blocks of the decoder, the last of masked tokens alone; at ratio 0 all are seen."""
    assert memory.rows(tiny_cfg, 0.5) == (8, 8, 9, 17, 17 + 8)
    assert memory.rows(tiny_cfg, 0).seen == 17


def test_bytes_of_casts_and_sums(tiny_cfg):
    """Of 10 values: in 16 bits two are written and three are read; in fp32 two sums of three. What
    stands between ops is the decoder's, and a GPU's."""
    assert cost._cast(10, 2) == 10 * (2 + 3) * 2
    assert cost._cast(10, 4) == 10 * 2 * (2 + 1) * 4
    assert (cost._between(10, 2), cost._between(10, 4)) == (10 * 15 * 2, 0)
    encoder = cost.Step(tiny_cfg, 2, 0.5, cost.DEVICES["h100"], "encoder").bytes()
    seen = memory.rows(tiny_cfg, 0.5).seen
    values = 2 * tiny_cfg.depth * seen * tiny_cfg.embed_dim
    assert encoder["casts and sums"] == cost._cast(values, 2)
    two, four = (cost.Step(tiny_cfg, n, 0.5, cost.DEVICES["h100"]).bytes() for n in (2, 4))
    assert four["casts and sums"] == 2 * two["casts and sums"] and four["adamw"] == two["adamw"]


def test_communication():
    step = cost.Step(preset("vit_large"), 2, 0.9, cost.DEVICES["h100"])
    assert step.communication == 0
    eight = dataclasses.replace(step, gpus=8)
    seconds = eight.communication
    assert seconds == pytest.approx(7 / 8 * 8 * memory.parameters(step.cfg) / 450e9)
    assert dataclasses.replace(step, gpus=16).communication > 8 * seconds
    assert dataclasses.replace(eight, part="forward").communication == 0
    # Gathering and scattering is what adding up is; `full` gathers the weights once more.
    optimizer, full = (dataclasses.replace(eight, shard=s) for s in ("optimizer", "full"))
    assert optimizer.communication == pytest.approx(seconds)
    assert full.communication == pytest.approx(1.5 * seconds)
    assert cost.exposed_seconds(3.0, 3.0) == 1.0 and cost.exposed_seconds(1.0, 3.0) == 0.0


def test_what_is_parted_takes_less_of_each_gpu():
    """A giant's state is more than 80 GB hold with a clip in fp32's masters, moments and copies."""
    cfg = preset("vit_giant")
    assert memory.parameters(cfg) > 2e9
    none, optimizer, full = (
        memory.memory(cfg, 1, 0.9, 2, shards, shard=shard).state
        for shards, shard in ((1, "none"), (8, "optimizer"), (8, "full"))
    )
    count = memory.parameters(cfg)
    assert none == 14 * count and optimizer == pytest.approx((12 / 8 + 4 + 2) * count)
    with torch.device("meta"):
        block = sum(p.numel() for p in MaskedAutoencoder(cfg).blocks[0].parameters())
    assert full == (12 / 8 + 2) * count + 2 * 4 * block  # the block that computes, and the next
    assert full < 0.6 * optimizer < optimizer < none


def test_an_averaged_encoder_is_held_and_moved():
    """In fp32, with a copy for products in 16 bits; of a pass over it two are read and one written.
    A classifier holds the encoder alone."""
    cfg = preset("vit_tiny", target="features")
    count, trained = memory.encoder_parameters(cfg), memory.parameters(cfg)
    for p, copied in ((2, 2), (4, 0)):
        held = (12 + copied) * trained + (4 + copied) * count
        assert memory.memory(cfg, 1, 0.9, p).state == held
        assert memory.tuning(cfg, 2, 0.0, p).state == (12 + copied) * count
    assert cost.Step(cfg, 2, 0.9, cost.DEVICES["h100"]).bytes()["ema"] == 3 * 4 * count


def test_gpus_of_use_at_a_batch(capsys):
    """More GPUs have fewer clips each, and the same gradients to add up."""
    found = told(capsys, "--gpus", "8", "--batch", "64", "--model", "vit_huge")
    shares = found["efficiency_by_gpus"]
    assert shares["1"] == 1 and list(map(int, shares)) == [1 << i for i in range(10)]
    assert shares["512"] < shares["64"] < shares["8"] <= 1
    assert found["gpus_of_use"] == max(int(n) for n, x in shares.items() if x >= 0.8)
    more = told(capsys, "--gpus", "64", "--batch", "64", "--model", "vit_huge")
    assert more["gpus_of_use"] > found["gpus_of_use"]
    assert cli.main(["plan", "--gpus", "8"]) == 0
    assert "512 clips a step keep" in capsys.readouterr().out


def test_what_does_not_divide_a_batch_is_of_no_use():
    """Of 7 clips 4 GPUs compute 4, in the time of one and what its gradients take."""
    seven = cost.Step(preset("vit_large"), 7, 0.9, cost.DEVICES["h100"])
    one = dataclasses.replace(seven, clips=1)
    sent = dataclasses.replace(seven, gpus=4).communication
    each = 4 * (one.compute + cost.exposed_seconds(sent, one.compute))
    assert seven.efficiencies()[4] == pytest.approx(seven.compute * 4 / 7 / each)


def test_greatest_batch_fits_and_the_next_does_not():
    cfg, h100 = preset("vit_huge"), cost.DEVICES["h100"]
    most = memory.greatest_batch(cfg, 0, 2, h100.memory)
    room = memory.USABLE * h100.memory
    assert memory.memory(cfg, most, 0, 2).peak <= room < memory.memory(cfg, most + 1, 0, 2).peak


def told(capsys, *argv: str) -> dict:
    assert cli.main(["plan", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_one_document(capsys):
    found = told(capsys, "--gpus", "128", "--price", "2")
    assert found["forward_gflops"] == pytest.approx(163.2, rel=0.001)
    assert found["flop_speedup"] == pytest.approx(7.7, abs=0.01)
    assert found["run"]["clips"] == 192e6
    assert found["run"]["cost"] == pytest.approx(2 * found["run"]["gpu_hours"])
    assert found["step"]["seconds"] == pytest.approx(sum(found["step"]["parts"].values()))
    assert found["step"]["bound_by"] == "compute"
    assert told(capsys, "--ratio", "0", "--device", "a100")["flop_speedup"] == 1


def test_what_binds(capsys):
    slow = told(capsys, "--gpus", "8", "--data-rate", "100")
    assert slow["step"]["bound_by"] == "loader"
    assert slow["clips_per_second"] == pytest.approx(100)
    two_nodes = told(capsys, "--gpus", "16", "--data-rate", "100")  # each has its own loader
    assert two_nodes["clips_per_second"] == pytest.approx(200)
    wide = told(capsys, "--gpus", "64", "--batch", "1", "--model", "vit_huge")
    assert wide["step"]["bound_by"] == "communication"


def test_a_record_stands_beside_the_prediction(capsys, tmp_path):
    record = {
        "kind": "steps",
        "what": "steps: vit_large",
        "stage": "steps",
        "item": "vit_large 64 clips mae_fast",
        "status": "measured",
        "sources": "x",
        "at": "2026-01-01T00:00:00",
        "model": "vit_large",
        "ratio": 0.9,
        "batch_clips": 64,
        "precision": "bf16",
        "device": "cuda",
        "engines": {"mae_fast": {"clips": 64}},
        "seconds": {"mae_fast": [0.1, 0.1]},
        "environment": dict.fromkeys(records.ENVIRONMENT, "x") | {"cuda:0": "NVIDIA H100 80GB"},
    }
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "samples.jsonl").write_text("not records\n")  # of a run of bench ratio
    assert told(capsys, "--results", str(tmp_path))["measured"][0]["seconds"] == 0.1
    assert told(capsys, "--results", str(tmp_path), "--device", "a100")["measured"] == []
    (tmp_path / "other").mkdir()
    other = json.dumps(record | {"precision": "fp32"}) + "\n"
    (tmp_path / "other/r.jsonl").write_text(other)
    assert told(capsys, "--results", str(tmp_path / "other"))["measured"] == []
    assert cli.main(["plan", "--results", str(tmp_path)]) == 0
    words = capsys.readouterr().out
    assert "predicted, not measured" in words.splitlines()[0]
    assert "measured          0.1 s a step of 64 clips" in words


def test_the_paper_s_hours_are_of_all_its_devices_at_both_ratios(monkeypatch):
    """24.5 h, and 35.8 h with loading, of 128; 5.8 and 4.1 times as long at 0%."""
    drawn = []
    monkeypatch.setattr(
        plan.figures, "write_figure", lambda path, figure, dpi: drawn.append(figure)
    )
    plan.draw("x.png", cost.DEVICES["h100"], 64, 1e6)
    theirs = {x.get_marker(): x for x in drawn[0].axes[0].lines if "paper" in x.get_label()}
    for mark, hours, times in (("x", 24.5, 5.8), ("+", 35.8, 4.1)):
        wanted = [[0.9, 128 * hours], [0.0, 128 * hours * times]]
        assert theirs[mark].get_xydata().tolist() == wanted


def test_the_picture(tmp_path, capsys):
    assert cli.main(["plan", "-o", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ratio", "1.0"], "must be in [0, 1), got 1.0"),
        (["--batch", "100000"], "do not fit on one h100: at most"),
        (["--dataset", "k4000"], "k400, ssv2 or a number of videos, got 'k4000'"),
        (["--device", "this", "--gpus", "2"], "one machine, got --gpus 2"),
        (["--model", "vit_titan"], "vit_titan"),
        (["--epochs", "0"], "--epochs must be positive, got 0"),
    ],
)
def test_plan_refuses(argv, said, capsys):
    assert cli.main(["plan", *argv]) == ConfigError.exit_code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_classifier_s_flop_is_what_torch_counts(ratio, tiny_cfg):
    """The cost model's share of a step that is the encoder's, forward; the head is left out."""
    net = VideoClassifier(ClassifierConfig(tiny_cfg, num_classes=1))
    video = torch.zeros(3, 3, 8, 16, 16, dtype=torch.uint8)
    ids = ids_from_noise(
        torch.rand(3, tiny_cfg.num_patches), num_keep("random", tiny_cfg.grid, ratio)
    )
    with backends(**dict.fromkeys(OPS, "reference")), FlopCounterMode(display=False) as counter:
        net(video, ids[0])
    step = cost.Step(tiny_cfg, 3, ratio, cost.DEVICES["h100"], "forward")
    terms = {t.name: t for t in step.terms()}
    got = terms["encoder products"].amount + terms["attention products"].amount
    assert got == pytest.approx(counter.get_total_flops(), rel=0.01)
    train = {t.name: t.amount for t in dataclasses.replace(step, part="encoder").terms()}
    # A score is one exponential forward, and one in each of two kernels of backward, which does 7
    # products where forward does 2.
    scores = 3 * tiny_cfg.depth * tiny_cfg.num_heads * memory.rows(tiny_cfg, ratio).seen ** 2
    assert terms["attention exponentials"].amount == scores
    assert train["attention exponentials"] == 3 * scores
    assert train["attention products"] == 4.5 * terms["attention products"].amount
    assert train["encoder products"] == pytest.approx(3 * terms["encoder products"].amount, rel=0.2)


def test_downstream_is_planned_and_called_predicted(capsys):
    def said(*args):
        assert cli.main(["plan", "--model", "vit_base", "--json", *args]) == 0
        return json.loads(capsys.readouterr().out)

    full, half = (said("--task", "finetune", "--ratio", r) for r in ("0", "0.5"))
    # A cosine from 50% leaves three quarters on the mean, and attention costs their square.
    assert 0.5 < half["step"]["seconds"] / full["step"]["seconds"] < 0.8
    assert full["run"]["clips"] == 100 * 240_000 and full["memory_mb"] > 3000
    # What is linear in tokens is so of their mean.
    cfg = preset("vit_base")
    mean = cost.Step(cfg, half["batch_clips"], 0.25, cost.DEVICES["h100"], "encoder").terms()
    (products,) = (t.seconds for t in mean if t.name == "encoder products")
    assert half["step"]["parts"]["encoder products"] == pytest.approx(products, rel=0.01)
    assert said("--task", "features", "--views", "21")["run"]["clips"] == 240_000
    test = said("--task", "test", "--views", "21")
    assert test["run"]["clips"] == 21 * 19_881 and "optimizer" not in test["step"]["parts"]
    assert test["step"]["seconds"] < full["step"]["seconds"] / 2
    slow = said("--task", "test", "--data-rate", "10")
    assert slow["step"]["seconds"] == pytest.approx(1.6)
    assert cli.main("plan --model vit_base --task finetune --data-rate 10".split()) == 0
    words = capsys.readouterr().out
    assert f"memory            {full['memory_mb'] / 1024:.1f} GiB" in words
    # Shares are of the time that computes, however long loading takes.
    assert sum(map(int, re.findall(r"(\d+)%$", words, re.M))) == pytest.approx(100, abs=3)
    assert cli.main(["plan", "--task", "features", "--model", "vit_base"]) == 0
    assert "predicted, not measured" in capsys.readouterr().out
    for args in (["--task", "test", "--ratio", "0.5"], ["--task", "finetune", "--batch", "9999"]):
        assert cli.main(["plan", "--model", "vit_base", *args]) == 2
