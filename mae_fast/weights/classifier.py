"""Weights of any family into a VideoClassifier, by name, and a list of what did not fit."""

from pathlib import Path

import torch
from torch import Tensor

from mae_fast import weights
from mae_fast.classifier import VideoClassifier
from mae_fast.config import ModelConfig
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.weights import positions
from mae_fast.weights.families import TARGET_ENCODER, identify, read, strip
from mae_fast.weights.translate import check

Table = dict[str, Tensor]


def load(model: VideoClassifier, path: str | Path) -> list[str]:
    """Load pre-trained or fine-tuned weights in place; returns, line by line, what did not fit or
    was changed: positions interpolated, a head of other classes left as it was.

    Raises CheckpointError for a file that is no whole encoder of the model's sizes, or of a changed
    one (a block's scales, which would be left out), and ConfigError
    for a run's checkpoint with another number of heads.
    """
    found, state = weights._read(Path(path))
    if found and found.num_heads != model.cfg.model.num_heads:
        raise ConfigError(
            f"{path}: its encoder has {found.num_heads} heads, the classifier "
            f"{model.cfg.model.num_heads}"
        )
    state = strip(state)
    source = identify(state)
    table, rest = read(state, source)
    _check_pool(model, table, source, path)
    average = [name for name in rest if name.startswith(TARGET_ENCODER)]
    rest = [name for name in rest if name not in average]
    said = [f"{', '.join(rest)}: no part of a classifier"] if rest else []
    if average:
        said.append(f"the encoder's running average, {len(average)} tensors: not taken")
    decoder = [n for n in table if n.startswith(("decoder_", "mask_token"))]
    for name in decoder:
        del table[name]
    check(table, [name for name in rest if not name.startswith(("decoder", "pred_head"))])
    if decoder:
        said.append(f"the decoder, {len(decoder)} tensors: not needed")
    _pool_norm(model, table, said)
    _positions(model, table, found, said)
    _fit(model, table, said, path)
    return said


def _check_pool(model: VideoClassifier, table: Table, source: str, path: str | Path) -> None:
    """VideoMAE and transformers pool by the mean or take the first token, and the name of the norm
    tells which. Raises CheckpointError where the model would do the other with a whole classifier.
    """
    there = table.get("head.weight")
    if there is None or there.shape != model.head.weight.shape:
        return  # its head is not taken
    if "fc_norm.weight" in table and model.cfg.pool == "first":
        raise CheckpointError(
            f'{path}: its classifier takes the mean of the patches: give classifier.pool = "mean"'
        )
    first = source in ("videomae", "transformers") and "norm.weight" in table
    if first and model.cfg.pool == "mean":
        raise CheckpointError(
            f'{path}: its classifier takes the first token: give classifier.pool = "first"'
        )


def _pool_norm(model: VideoClassifier, table: Table, said: list[str]) -> None:
    """Of a fine-tuned classifier the norm around pooling, whatever its family calls it; of a
    pre-trained encoder its last norm, which VideoMAE's mean pooling replaces by a new one."""
    wanted, other = model.norm_name, "norm" if model.norm_name == "fc_norm" else "fc_norm"
    if f"{other}.weight" not in table:
        return
    tuned = "head.weight" in table and f"{wanted}.weight" not in table
    for kind in ("weight", "bias"):
        value = table.pop(f"{other}.{kind}")
        if tuned:
            table[f"{wanted}.{kind}"] = value
    said.append(f"{other}: taken for {wanted}" if tuned else f"{other}: {wanted} is in its place")


def _positions(
    model: VideoClassifier, table: Table, found: ModelConfig | None, said: list[str]
) -> None:
    cfg = model.cfg.model
    if not model.has_cls and table.pop("cls_token", None) is not None:
        if "pos_embed" in table:
            table["pos_embed"] = table["pos_embed"][:, 1:]
        table.pop("pos_embed_class", None)
        said.append("cls_token: the classifier has none")
    names = [n for n in table if n.startswith("pos_embed")]
    if not model.family.learned:
        for name in names:
            del table[name]
        if names:
            said.append(f"{', '.join(names)}: the classifier has fixed sines and cosines")
        return
    if not names:
        kept = [n for n, _ in model.named_parameters() if n.startswith(("pos_embed", "cls_token"))]
        said.append(f"{', '.join(kept)}: not in the file, left as they were")
        table |= {n: p.detach() for n, p in model.named_parameters() if n in kept}
        return
    if model.has_cls and "cls_token" not in table:
        table["cls_token"] = model.cls_token.detach()
        said.append("cls_token: not in the file, left as it was")
        zero = torch.zeros_like(model.cls_token.detach())
        if "pos_embed" in table:
            table["pos_embed"] = torch.cat([zero, table["pos_embed"]], dim=1)
        else:
            table["pos_embed_class"] = getattr(model, "pos_embed_class", zero).detach()
    steps = found.grid[0] if found else cfg.grid[0]
    old = positions.grid_of(table, "", steps)
    if old != cfg.grid:
        positions.resize(table, "", old, cfg.grid)
        times = (" x ".join(map(str, grid)) for grid in (old, cfg.grid))
        said.append(f"positions: interpolated, {' to '.join(times)}")
    if not cfg.sep_pos_embed:
        positions.join(table, "")
    elif "pos_embed" in table:
        raise CheckpointError(
            "the file has one joint table of positions: give the classifier's model "
            "sep_pos_embed = false"
        )


def _fit(model: VideoClassifier, table: Table, said: list[str], path: str | Path) -> None:
    """k's biases and the head as the model has them; the rest must fit to the last tensor."""
    own, added, dropped = model.state_dict(), 0, 0
    for i in range(model.cfg.model.depth):
        name = f"blocks.{i}.attn.k.bias"
        if name in own and name not in table and f"blocks.{i}.attn.q.bias" in table:
            table[name], added = torch.zeros_like(table[f"blocks.{i}.attn.q.bias"]), added + 1
        elif name in table and name not in own:
            dropped += int(table.pop(name).any())
    if added:
        said.append(f"attn.k.bias of {added} blocks: zero (exact)")
    if dropped:
        said.append(f"attn.k.bias of {dropped} blocks: there is none (exact)")
    new = [n for n in ("head.weight", "head.bias") if n not in table]
    other = [n for n in ("head.weight",) if n in table and table[n].shape != own[n].shape]
    if other:
        said.append(f"head: {len(table['head.weight'])} classes there, {len(own['head.weight'])} "
                    "here: left as it was")  # fmt: skip
        new = ["head.weight", "head.bias"]
    elif new:
        said.append("head: new")
    if model.norm_name == "fc_norm" and "fc_norm.weight" not in table:
        new += ["fc_norm.weight", "fc_norm.bias"]
        said.append("fc_norm: new")
    table |= {n: own[n] for n in new}
    missing = [n for n in own if n not in table]
    left = [n for n in table if n not in own]
    odd = [
        f"{n} {list(t.shape)} for {list(own[n].shape)}"
        for n, t in table.items()
        if n in own and t.shape != own[n].shape
    ]
    if missing or left or odd:
        parts = zip(("missing", "left over", "of another shape"), (missing, left, odd), strict=True)
        what = "; ".join(f"{w}: {', '.join(ns[:4])} ({len(ns)})" for w, ns in parts if ns)
        raise CheckpointError(f"{path} does not fit the classifier: {what}")
    model.load_state_dict(table)
