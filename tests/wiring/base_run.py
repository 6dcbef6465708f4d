"""The run that every test of the wiring changes something in, and what a run shows."""

import dataclasses
from pathlib import Path

import by_hand

from mae_fast.config import Config
from mae_fast.config_file import SECTIONS
from mae_fast.data import VideoRow, write_index

# Four steps: the rate is 0 (so the first checkpoint holds the first weights), half, whole, half.
BASE = {
    "model": dict(
        img_size=16,
        patch_size=8,
        num_frames=4,
        t_patch_size=2,
        pred_t_dim=2,
        embed_dim=16,
        depth=1,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    ),
    "mask": dict(ratio=0.5),
    "data": dict(repeat_aug=2, sampling_rate=2, crop_area=(0.3, 0.9), crop_aspect=(0.5, 1.5)),
    "train": dict(
        batch_size=2,
        accum_steps=2,
        steps=4,
        warmup_steps=2,
        blr=0.5,
        clip_grad=0.5,
        device="cpu",
        log_every=1,
        save_every=1,
        keep=99,
        seed=3,
    ),
    "eval": {},
}


def config(index, output, **changes) -> Config:
    """The base with changes, each named `section.field`."""
    values = {name: dict(fields) for name, fields in BASE.items()}
    values["data"]["index"] = index
    values["data"]["workers"] = 0
    for name, value in changes.items():
        section, field = name.split(".")
        values[section][field] = value
    return Config(
        output=str(output), **{name: cls(**values[name]) for name, cls in SECTIONS.items()}
    )


def observed(folder) -> dict:
    """What a run shows: two runs that differ in a field differ in some of these."""
    rows = [r for r in by_hand.rows_of(folder) if r["step"]]
    files = sorted(Path(folder).glob("checkpoint-*.safetensors"))
    numbers = [int(f.name[11:19]) for f in files]
    tensors = [by_hand.checkpoint(folder, n)[1] for n in numbers]

    def values(which, prefix):
        return [(k, v.tolist()) for k, v in by_hand.part(tensors[which], prefix).items()]

    return {
        "start": values(0, "model."),
        "loss": rows[0]["loss"],
        "norm": rows[0]["grad_norm"],
        "m": values(0, "optim.exp_avg."),
        "v": values(0, "optim.exp_avg_sq."),
        "lr": [r["lr"] for r in rows],
        "end": values(-1, "model."),
        "logged": [r["step"] for r in rows],
        "saved": numbers,
        "epoch": rows[-1]["epoch"] / rows[-1]["step"],
        "clips": round(rows[-1]["clips_per_s"] * rows[-1]["step_seconds"]),
        "held out": [r["val_loss"] for r in rows if "val_loss" in r],
    }


# What a change of the pixels or of the mask changes: the first loss and all that follows from it.
STEP = {"loss", "norm", "m", "v", "end"}
MODEL = STEP | {"start"}
BATCH = STEP | {"lr", "epoch", "clips"}
NOTHING: set[str] = set()


def copies(rows, folder) -> list[VideoRow]:
    """The same videos in another folder."""
    copies = []
    for row in rows:
        path = folder / Path(row.path).name
        path.write_bytes(Path(row.path).read_bytes())
        copies.append(dataclasses.replace(row, path=str(path)))
    return copies


def labelled(rows, folder) -> dict[str, str]:
    """Indexes for the probes, of the same videos: two classes."""
    named = [dataclasses.replace(r, label="ab"[i % 2]) for i, r in enumerate(rows)]
    for name, some in (("train", named[:4]), ("test", named[4:])):
        write_index(some, folder / f"probe_{name}.jsonl")
    return {f"eval.{name}_index": str(folder / f"probe_{name}.jsonl") for name in ("train", "test")}
