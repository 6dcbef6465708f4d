"""`mae-fast plan`: what a run will need before it is paid for. The formulas are mae_fast/cost.py's.

Everything printed is a prediction; what records hold of the same model and device stands beside it.
"""

import contextlib
import dataclasses
import json as jsonlib
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mae_fast import cost, figures, memory
from mae_fast.bench import machine, records
from mae_fast.bench.flops import BASE_RATIO, forward_flop, official_parts, step_parts
from mae_fast.bench.paper import PAPER
from mae_fast.bench.timing import interleave
from mae_fast.config import Variant
from mae_fast.config import preset as make_preset
from mae_fast.config_file import load_config
from mae_fast.errors import ConfigError
from mae_fast.fields import positive, require

VIDEOS = {"k400": 240_000, "ssv2": 168_913}  # of the training sets
# One core's time for 16 frames, every fourth of a 30 fps video, without resizing: 57-88 ms seen.
DECODE_SECONDS = 0.07
DRAWN = ("vit_base", "vit_large", "vit_huge")
TESTS = {"k400": 19_881, "ssv2": 24_777}  # of the validation sets
OF_USE = 0.8  # of a GPU's time, below which more of them hardly help
Task = Literal["pretrain", "finetune", "test", "features", "ava"]
_COSTS = {
    "features": "a forward of the averaged encoder over all tokens in each step",
    "tokens": "the tokenizer's own forward is NOT counted (the paper's dVAE: 1.6x as long)",
}


def plan(
    model: str = "vit_large",
    variant: Variant = "mae_st",
    ratio: float | None = None,
    device: Literal["h100", "h200", "a100", "b200", "this"] = "h100",
    gpus: int = 1,
    gpus_per_node: int = 8,
    batch: int = 0,
    shard: Literal["none", "optimizer", "full"] = "none",
    epochs: float | None = None,
    dataset: str = "k400",
    data_rate: str = "0",
    price: float = 0.0,
    results: str = "benchmarks/results",
    task: Task = "pretrain",
    views: int = 30,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "",
    json: bool = False,
) -> None:
    """Predict a run: FLOP, bytes, memory, step time by part, hours, what binds.

    Args:
        model: vit_tiny ... vit_huge, or the TOML file of a run of pre-training.
        variant: which of the two official models; a TOML file has its own.
        ratio: masked share in [0, 1), by default 0.9, and 0 of other tasks. At 0 the encoder sees
            every token, and the decoder and the loss are those of a 90% mask. Of finetune it is the
            share at first, which falls to 0 by a cosine.
        device: bf16 on a GPU; `this`: fp32 on this machine's CPU, whose ceilings are measured now.
        gpus: devices in all.
        gpus_per_node: devices that share a node and its loader.
        batch: clips a device and step; by default 64 (`this`: 2), or what fits.
        shard: what of the model lies apart on the devices, as train.shard.
        epochs: effective epochs: each takes one clip of every video; by default 800, and 100 of
            finetune (50 passes with two clips of each).
        dataset: k400, ssv2, or a number of videos.
        data_rate: clips a second that the loader of one node gives, or a file of `bench data -o`,
            whose machine's cores are then all taken; 0: taken to be enough.
        price: of one device for an hour, in any currency.
        results: folder of records, to stand beside the prediction.
        task: pretrain; finetune: a classifier on the same encoder; test: `views` of every video of
            a validation set; features: one view of every training video, for probes; ava: training
            and a test on AVA 2.2 at its size, and the bytes of a clip (30 epochs).
        views: of a video in a test.
        output: draw hours against the masking ratio by model into this PNG.
        json: print one JSON document and nothing else.
    """
    cfg = load_config(model).model if model.endswith(".toml") else make_preset(model, variant)
    ratio = (0.9 if task == "pretrain" else 0.0) if ratio is None else ratio
    epochs = {"pretrain": 800.0, "ava": 30.0}.get(task, 100.0) if epochs is None else epochs
    require(0 <= ratio < 1, "--ratio must be in [0, 1)", ratio)
    positive(gpus=gpus, gpus_per_node=gpus_per_node, epochs=epochs, views=views)
    positive(batch=batch or None, price=price or None)
    require(gpus <= 10**6, "--gpus must be at most 1000000", gpus)
    if device == "this" and gpus > 1:
        raise ConfigError(f"--device this is one machine, got --gpus {gpus}")
    if task != "pretrain" and (output or shard != "none"):
        raise ConfigError(f"--task {task} takes no --output and no --shard")
    if ratio and task not in ("pretrain", "finetune"):
        raise ConfigError(f"--task {task} sees every token, got --ratio {ratio}")
    where = this_device() if device == "this" else cost.DEVICES[device]
    part = {"pretrain": "all", "test": "forward", "features": "forward"}.get(task, "encoder")
    if not batch and task != "pretrain":
        batch = 16 if task == "ava" or device != "this" else 1
    step = cost.Step(cfg, batch, ratio, where, part, gpus, gpus_per_node, shard)
    if part == "encoder" and step.held().peak > memory.USABLE * where.memory:
        raise ConfigError(f"{batch} clips do not fit on one {device}: give a smaller --batch")
    if task == "ava":
        from mae_fast.tasks.ava.plan import plan as ava
        from mae_fast.tasks.ava.plan import tell as tell_ava

        found = ava(step, epochs)
        said = tell_ava(model, found)
    else:
        rate, videos = rate_of(data_rate), _videos(dataset, TESTS if task == "test" else VIDEOS)
        positive(data_rate=rate or None)
        found = {"model": model, "task": task}
        found |= predict(step, model, rate) if task == "pretrain" else downstream(step, rate)
        clips = videos * {"test": views, "features": 1}.get(task, epochs)
        hours = clips / found["clips_per_second"] / 3600
        found["run"] = {"clips": clips, "hours": hours, "gpu_hours": hours * gpus}
        found["run"]["cost"] = hours * gpus * price if price else None
        if task == "pretrain":
            found["run"] |= {"epochs": epochs, "dataset": dataset}
            found["ceilings"] = {k: v for k, v in where._asdict().items() if k != "name"}
            found["measured"] = measured(results, found)
            found["paper"] = PAPER if model == PAPER["model"] else None
        if output:
            draw(output, where, found["batch_clips"], epochs * videos)
        said = tell(found)
    print(jsonlib.dumps(found, indent=2) if json else said)


def _told(step: cost.Step, data_rate: float, compute: float) -> dict[str, Any]:
    """What is told of a step of any task: where it runs, and how long, loading included."""
    exposed = cost.exposed_seconds(step.communication, compute)
    a_node = step.clips * min(step.gpus, step.gpus_per_node)
    loading = a_node / data_rate if data_rate else 0.0
    seconds = max(compute + exposed, loading)
    slow = loading > compute + exposed
    return {
        "ratio": step.ratio,
        "device": step.device.name,
        "gpus": step.gpus,
        "batch_clips": step.clips,
        "precision": "bf16" if step.device.product_bytes == 2 else "fp32",
        "step": {
            "seconds": seconds,
            "compute": compute,
            "communication": step.communication,
            "communication_not_hidden": exposed,
            "loading": loading,
            "bound_by": "loader" if slow else "communication" if exposed else "compute",
        },
        "clips_per_second": step.gpus * step.clips / seconds,
    }


def predict(step: cost.Step, model: str, data_rate: float) -> dict[str, Any]:
    """Counts and times of a step of pre-training; of no clips: of so many as are usual, or fit.
    FLOP and bytes are of one clip, and of one step on one device."""
    cfg, ratio, device, p = step.cfg, step.ratio, step.device, step.device.product_bytes
    shards = step.gpus if step.shard != "none" else 1
    greatest = memory.greatest_batch(cfg, ratio, p, device.memory, shards, step.shard)
    if not greatest or step.clips > greatest:
        raise ConfigError(
            f"{step.clips or 1} clips of {model} do not fit on one {device.name}: at most "
            f"{greatest} do"
        )
    batch = step.clips or min(2 if device.name == "this" else 64, greatest)
    step = dataclasses.replace(step, clips=batch)
    held, official = step.held(), official_parts(cfg, 1, ratio)
    done = step_parts(cfg, batch, ratio or BASE_RATIO, encode_all=ratio == 0)
    pixels = dataclasses.replace(step, cfg=dataclasses.replace(cfg, target="pixels"))
    found = _told(step, data_rate, step.compute)
    found["step"]["parts"] = {t.name: t.seconds for t in step.terms()}
    need = batch * min(step.gpus, step.gpus_per_node) / step.seconds
    found |= {
        "variant": cfg.variant,
        "gpus_per_node": step.gpus_per_node,
        "shard": step.shard,
        "parameters": memory.parameters(cfg),
        # What is predicted, the loss's unit, and what that takes more than pixels do.
        "target": {
            "name": cfg.target,
            "unit": cfg.loss_unit,
            "seconds_more": step.compute - pixels.compute,
            "memory_more_mb": (held.peak - pixels.held().peak) / 2**20,
        },
        "forward_gflops": forward_flop(cfg, ratio) / 1e9,
        "flop_speedup": forward_flop(cfg, 0) / forward_flop(cfg, ratio),
        "gflop_a_clip": {
            part: {
                f"{who}{way}": getattr(flop[part], way) / clips / 1e9
                for who, flop, clips in (("official_", official, 1), ("", done, batch))
                for way in ("forward", "backward")
            }
            for part in official
        },
        "bytes_a_step": step.bytes(),
        "memory": {f"{k}_mb": v / 2**20 for k, v in held._asdict().items()},
        "loader": {
            "clips_per_second_a_node": need,
            "decode_cores_a_node": need * DECODE_SECONDS,
            "decode_seconds_a_clip": DECODE_SECONDS,
        },
    }
    found["memory"]["greatest_batch"] = greatest
    if device.name != "this":
        of_use = step.efficiencies()
        found["efficiency_by_gpus"] = {str(n): x for n, x in of_use.items()}
        found["gpus_of_use"] = max(n for n, x in of_use.items() if x >= OF_USE)
    return found


def downstream(step: cost.Step, data_rate: float) -> dict[str, Any]:
    """Fine-tuning, or a pass forward alone; the head is left out. Times of a masked run are means
    over its cosine: of ten parts of half a cosine from its ratio to 0, in the middle of each."""
    course = [step.ratio * (1 + math.cos(math.pi * (i + 0.5) / 10)) / 2 for i in range(10)]
    steps = [dataclasses.replace(step, ratio=r) for r in course] if step.ratio else [step]
    parts: dict[str, float] = {}
    for t in (t for at in steps for t in at.terms()):
        parts[t.name] = parts.get(t.name, 0.0) + t.seconds / len(steps)
    found = _told(step, data_rate, sum(parts.values()))
    found["step"] |= {"parts": parts, "not_hidden": found["step"]["communication_not_hidden"]}
    held = step.held().peak / 2**20 if step.part == "encoder" else None
    return found | {"memory_mb": held}


def this_device() -> cost.Device:
    """This machine's CPU: the rate of the engine's own products and of copies, measured now."""
    import torch

    if torch.cuda.is_available():
        raise ConfigError(
            f"--device this is for a CPU, and here is a {torch.cuda.get_device_name()}: name it"
        )
    limits = machine.limits()
    seconds = interleave({name: limit.run for name, limit in limits.items()}, rounds=5)
    rate = {name: limits[name].amount / statistics.median(s) for name, s in seconds.items()}
    return cpu_device(rate["engine_product"], rate["copy"])


def cpu_device(products: float, copy: float) -> cost.Device:
    """A CPU of these ceilings, in fp32. Its memory is what is free now; there is no network."""
    free = 2**20 * machine.free_mb("cpu")
    return cost.Device("this", products, copy, None, free, None, None, cost.CPU_SHARES, 4, 5)


def measured(folder: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What records say of the same model, ratio and precision on the same device, newest last."""
    from mae_fast.environment import devices

    here, rows = devices()["cpu"], []
    known = (r for f in records.files([folder]) if f.is_file() for r in records.read(f))
    for record in filter(records.measured, known):
        where = records.where(record)
        same = where == here if found["device"] == "this" else found["device"].upper() in where
        if not same or record.get("precision", "bf16") != found["precision"]:
            continue
        step = records.ours(record)
        if step and all(record[key] == found[key] for key in ("model", "ratio")):
            clips, seconds = step
            row = {"seconds": statistics.median(seconds), "batch_clips": clips}
            rows.append(row | {"device": where, "commit": record["environment"]["commit"]})
    return rows


def tell(found: dict[str, Any]) -> str:
    """The prediction in words and tables."""
    step, run, all_clips = found["step"], found["run"], found["gpus"] * found["batch_clips"]
    what, masked = found["model"], f", {found['ratio']:.0%} masked"
    if found["task"] == "pretrain":
        what = f"{what} ({found['variant']})"
    else:
        what, masked = f"{found['task']} of {what}", f"{masked} at first" if found["ratio"] else ""
    lines = [
        f"{what}{masked}, {found['gpus']} x {found['device']}, {found['batch_clips']} clips each, "
        f"{found['precision']}: predicted, not measured",
        "",
        *(_model(found) if "parameters" in found else ()),
        "  step, by part               ms   share",
    ]
    for part, seconds in step["parts"].items():
        lines.append(f"    {part:24} {1e3 * seconds:8.1f} {seconds / step['compute']:6.0%}")
    bound = {"loader": "the loader"}.get(step["bound_by"], step["bound_by"])
    of = f" ({run['epochs']:g} epochs of {run['dataset']})" if found["task"] == "pretrain" else ""
    lines += [
        f"    {'compute':24} {1e3 * step['compute']:8.1f}",
        f"    {'communication':24} {1e3 * step['communication']:8.1f}, not hidden "
        f"{1e3 * step['communication_not_hidden']:.1f}",
        f"    {'the step':24} {1e3 * step['seconds']:8.1f}, bound by {bound}",
        "",
        f"  speed             {found['clips_per_second']:.1f} clips/s, "
        f"{found['clips_per_second'] / found['gpus']:.1f} a device",
        f"  run               {run['clips'] / 1e6:.2f} M clips{of}: {run['hours']:.1f} h, "
        f"{run['gpu_hours']:.0f} device-hours"
        + (f", cost {run['cost']:.0f}" if run["cost"] else ""),
    ]
    if found.get("memory_mb"):
        lines.append(f"  memory            {found['memory_mb'] / 1024:.1f} GiB")
    if loader := found.get("loader"):
        lines.append(
            f"  loader            {loader['clips_per_second_a_node']:.0f} clips/s a node, "
            f"{loader['decode_cores_a_node']:.0f} cores that decode at "
            f"{loader['decode_seconds_a_clip'] * 1e3:.0f} ms a clip"
        )
    if shares := found.get("efficiency_by_gpus"):
        by_number = ", ".join(f"{n} {x:.0%}" for n, x in list(shares.items())[:12])
        lines.append(
            f"  GPUs              {all_clips} clips a step keep {found['gpus_of_use']} busy to "
            f"{OF_USE:.0%}; by number: {by_number}"
        )
    for row in found.get("measured", [])[-3:]:
        times = step["seconds"] / found["batch_clips"] / (row["seconds"] / row["batch_clips"])
        lines.append(
            f"  measured          {row['seconds']:.3g} s a step of {row['batch_clips']} clips "
            f"(commit {row['commit']}); a clip is predicted {times - 1:+.0%}"
        )
    if "measured" in found and not found["measured"]:
        lines.append("  measured          nothing yet on this device")
    if p := found.get("paper"):
        lines.append(
            f"  the paper's       {p['ratio']:.0%}, {p['gpus']} {p['device']}, official code: "
            f"{p['compute_hours']} h of compute, {p['with_data_hours']} h with loading; "
            f"{p['compute']}x and {p['with_data']}x less than at 0%"
        )
    return "\n".join(lines)


def _model(found: dict[str, Any]) -> Iterator[str]:
    """Lines on the model, whatever it takes: parameters, target, FLOP, memory."""
    held, target, compute = found["memory"], found["target"], found["step"]["compute"]
    yield f"  parameters        {found['parameters'] / 1e6:.1f} M"
    yield (
        f"  forward           {found['forward_gflops']:.1f} GFLOP a clip, "
        f"{found['flop_speedup']:.1f}x less than at 0% (official count)"
    )
    yield (
        f"  memory            {held['peak_mb'] / 1024:.1f} GiB of "
        f"{found['ceilings']['memory'] / 2**30:.0f}; {held['a_clip_mb']:.0f} MiB a clip, at most "
        f"{held['greatest_batch']} clips"
    )
    if target["name"] in _COSTS:
        more = target["seconds_more"] / (compute - target["seconds_more"])
        yield f"  target            {target['name']}: {_COSTS[target['name']]}"
        yield (
            f"                    {more:+.0%} of a step and {target['memory_more_mb'] / 1024:+.1f} "
            f"GiB against pixels; the loss is in {target['unit']}"
        )
    yield from ("", "  GFLOP a clip             official fwd      bwd  |  done fwd      bwd")
    for part, flop in found["gflop_a_clip"].items():
        a, b, c, d = flop.values()
        yield f"    {part:24} {a:10.1f} {b:8.1f}  | {c:9.1f} {d:8.1f}"
    yield ""


def draw(path: str, device: cost.Device, batch: int, clips: float) -> None:
    """Device-hours against the masking ratio, by model, with the paper's points."""
    figure, axis = figures.figure(7, 4.5)
    ratios = [r / 100 for r in range(0, 100, 5)]
    for model in DRAWN:
        cfg = make_preset(model)
        steps = (cost.Step(cfg, batch, r, device) for r in ratios)
        hours = [clips * step.compute / batch / 3600 for step in steps]
        axis.plot(ratios, hours, marker=".", label=f"{model}, {device.name}, predicted")
    for what, mark in (("compute", "x"), ("with_data", "+")):
        hours = PAPER[f"{what}_hours"]
        axis.plot(
            [PAPER["ratio"], 0.0],
            [PAPER["gpus"] * hours, PAPER["gpus"] * hours * PAPER[what]],
            linestyle="none",
            marker=mark,
            color="black",
            label=f"the paper, ViT-L, {PAPER['device']}, {what.replace('_', ' ')}",
        )
    title = f"{clips / 1e6:.0f} M clips; lines are predictions, loading not included"
    axis.set(xlabel="masked share", ylabel="device-hours", yscale="log", title=title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figures.write_figure(path, figure, dpi=130)


def _videos(dataset: str, known_sets: dict[str, int] = VIDEOS) -> int:
    if dataset in known_sets:
        return known_sets[dataset]
    if not re.fullmatch(r"[1-9]\d*", dataset):
        known = ", ".join(VIDEOS)
        raise ConfigError(f"--dataset must be {known} or a number of videos, got {dataset!r}")
    return int(dataset)


def rate_of(record: str) -> float:
    """Clips a second of one node, by a number or by a record: its rate times its cores."""
    with contextlib.suppress(ValueError):
        return float(record)
    try:
        found = jsonlib.loads(Path(record).read_text())
        return found["clips_per_s_core"] * found["cores"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"--data-rate must be clips a second or a file of `bench data -o`, got {record}: {e!r}"
        ) from None
