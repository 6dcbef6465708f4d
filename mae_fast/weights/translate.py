"""One family's weights as another's, and a report of what could not be carried.

Read it as a list of passes over one table under mae_st's names: positions, time of the patches,
cls token, norm, biases, head. Each changes the table in place and says what it did.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.fields import check_fields, require
from mae_fast.weights import positions
from mae_fast.weights.families import (
    FAMILIES,
    TARGET_ENCODER,
    depths,
    identify,
    read,
    strip,
    write,
)

Name = Literal["mae_st", "slowfast", "videomae", "transformers", "timm-vit"]
Table = dict[str, Tensor]
_NO_PART = "no part of a masked autoencoder of these families"


@dataclass
class Report:
    """What became of the weights: `lost`, of the source without a place in the target, and `made`,
    of the target without a source. Lines that end in (exact) change no output."""

    source: str
    target: str
    lost: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        unsaid = (
            f"{n} has {FAMILIES[n].unsaid}" for n in dict.fromkeys((self.source, self.target))
        )
        return [
            *(f"lost: {line}" for line in self.lost),
            *(f"made: {line}" for line in self.made),
            f"not in weights, to be set by you: heads; {'; '.join(unsaid)}",
        ]


@dataclass(frozen=True)
class Size:
    """Sizes of the clips asked for, where they are (None: as the source's, or 224 and 16), the
    frames of the source's clips, and the frames of a patch that is made from an image's."""

    img_size: int | None = None
    num_frames: int | None = None
    source_num_frames: int = 16
    t_patch_size: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in vars(self).items():
            require(value is None or 0 < value < 2**31, f"{name} must be positive", value)


def translate(
    state: Table,
    to: Name,
    source: Name | Literal["auto"] = "auto",
    size: Size = Size(),
    encoder_only: bool = False,
) -> tuple[Table, Report]:
    """(the weights under the names of family `to`, the report).

    Raises CheckpointError for weights that are no whole encoder of the source's family, or of a
    changed block, and ConfigError for a size that the patches do not divide.
    """
    state = strip(state)
    source = identify(state) if source == "auto" else source
    table, rest = read(state, source)
    table, report = dict(table), Report(source, to)
    average = [name for name in rest if name.startswith(TARGET_ENCODER)]
    rest = {name: value for name, value in rest.items() if name not in average}
    if average:
        report.lost.append(f"the encoder's running average, {len(average)} tensors: not carried")
    check(table, rest)
    patch = table["patch_embed.proj.weight"].shape
    if size.img_size:
        _divide("img_size", size.img_size, patch[-1])
    if size.num_frames and to != "timm-vit":
        _divide("num_frames", size.num_frames, patch[2] if len(patch) == 5 else size.t_patch_size)
    if rest:
        report.lost.append(f"{', '.join(rest)}: {_NO_PART}")
    if depths(table)[1] and (encoder_only or to == "timm-vit"):
        decoder = [n for n in table if n.startswith(("decoder_", "mask_token"))]
        why = "left out as asked" if encoder_only else "an image model has none"
        report.lost.append(f"the decoder, {len(decoder)} tensors: {why}")
        table = {n: t for n, t in table.items() if n not in decoder}
    _positions(table, report, size)
    _patches(table, report, size.t_patch_size)
    _cls(table, report)
    _classifier(table, report)
    _norm(table, report)
    _biases(table, report)
    _head(table, report)
    # PySlowFast's SEPARATE_QKV: three products stay three.
    apart = source == to == "slowfast" and not any("attn.qkv" in name for name in state)
    return write(table, to, apart), report


def check(table: Table, rest: Iterable[str]) -> None:
    """A whole encoder, and a whole decoder or none; nothing in a block that another lacks. Raises
    CheckpointError."""
    changed = [
        n for n in rest if re.search(r"(^|\.)(blocks|layer|transforms|norm_pre|norm_stem)\b", n)
    ]
    if changed:
        raise CheckpointError(
            f"{changed[0]} ({len(changed)} such tensors) is part of a changed encoder or decoder: "
            f"no other family computes it"
        )
    stems = {"patch_embed.proj"}
    for half, depth in zip(("", "decoder_"), depths(table), strict=True):
        for i in range(depth):
            parts = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            stems |= {f"{half}blocks.{i}.{part}" for part in parts}
            needed = [f"{half}blocks.{i}.attn.{x}.weight" for x in "qkv"]
            _require(table, needed)
    if depths(table)[1]:
        stems.add("decoder_norm")
        _require(table, ["decoder_embed.weight", "mask_token"])
    _require(table, [f"{stem}.{kind}" for stem in sorted(stems) for kind in ("weight", "bias")])
    _shapes(table)


def _shapes(table: Table) -> None:
    """Every tensor of the rank that its name has, and as wide as its half of the model."""
    patch = table["patch_embed.proj.weight"]
    if patch.dim() not in (4, 5) or patch.shape[-1] != patch.shape[-2] or not patch.numel():
        raise CheckpointError(
            f"patch_embed.proj.weight {_times(patch.shape)} is no patch embedding"
        )
    widths = {"": len(patch)}
    if depths(table)[1]:
        widths["decoder_"] = table["decoder_blocks.0.norm1.bias"].numel()
    for name, value in table.items():
        if name == "patch_embed.proj.weight":
            continue
        half = "decoder_" if name.startswith(("decoder_", "mask_token")) else ""
        plain = name.removeprefix("decoder_").split(".")[0]
        token = plain in ("cls_token", "mask_token") or plain.startswith("pos_embed")
        rank = 3 if token else 2 if name.endswith("weight") and "norm" not in name else 1
        ok = value.dim() == rank and value.numel() and value.is_floating_point()
        if ok and (token or ".norm" in name or ".attn." in name):
            ok = value.shape[-1] == widths[half]
        if not ok:
            shape = _times(value.shape) or "no shape"
            raise CheckpointError(
                f"{name}: {value.dtype} of {shape} fits no model of width {widths[half]}"
            )


def _require(table: Table, names: list[str]) -> None:
    missing = [name for name in names if name not in table]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} (of mae_st's names): not in the weights")


def _positions(table: Table, report: Report, size: Size) -> None:
    """To the size asked for, and into a form that the target has."""
    weight, fixed = table["patch_embed.proj.weight"], FAMILIES[report.target].positions == "sincos"
    image_in, image_out = weight.dim() == 4, report.target == "timm-vit"
    u, p = size.t_patch_size if image_in else weight.shape[2], weight.shape[-1]
    frames = size.num_frames or size.source_num_frames
    if image_in and not image_out and "pos_embed" in table:
        positions.unflatten_time(table, _divide("num_frames", frames, u))
        report.made.append("pos_embed_temporal: zero, an image's positions at every time step")
    for half in _halves(table):
        name = half + "pos_embed"
        if name not in table and name + "_spatial" not in table:
            if not fixed:
                side = _divide("img_size", size.img_size or 224, p)
                grid = (_divide("num_frames", frames, u), side, side)
                pos = positions.sincos(math.prod(grid), _width(table, half))
                table[name] = pos.to(weight.dtype)
                report.made.append(f"{name}: the fixed sines and cosines of {_times(grid)} (exact)")
        elif (size.img_size or size.num_frames) and not fixed:
            source_t = 1 if image_in else _divide("source_num_frames", size.source_num_frames, u)
            old = new = positions.grid_of(table, half, source_t)
            if size.num_frames and not (image_in and image_out):
                new = (_divide("num_frames", frames, u), *new[1:])
            if size.img_size:
                new = (new[0], *[_divide("img_size", size.img_size, p)] * 2)
            if new != old:
                positions.resize(table, half, old, new)
                report.made.append(f"{name}: interpolated, {_times(old)} to {_times(new)}")
    _form(table, report, frames // u)


def _form(table: Table, report: Report, time_steps: int) -> None:
    """Fixed, of one form for both halves, or an image's, as the target's positions are."""
    forms, halves = FAMILIES[report.target].positions, _halves(table)
    joint = [half for half in halves if half + "pos_embed" in table]
    if forms == "learned" and joint and len(joint) < len(halves):
        for half in set(halves) - set(joint):
            positions.join(table, half)
            report.made.append(
                f"{half}pos_embed: its spatial and temporal tables added, as {report.target} has "
                f"one form for encoder and decoder (exact)"
            )
    if report.target == "timm-vit" and report.source != "timm-vit":
        steps, rest = positions.flatten_time(table, time_steps)
        if rest:
            report.lost.append(
                f"pos_embed: the mean over {steps} time steps, which lie up to {rest:.2g} from it"
            )
    if forms == "sincos":
        for half in halves:
            positions.join(table, half)
            pos = table.pop(half + "pos_embed", None)
            if pos is None:
                continue
            pos = pos[:, int("cls_token" in table) :]
            fixed = positions.sincos(*pos.shape[1:]).to(pos.dtype)
            if not torch.equal(pos, fixed):
                report.lost.append(
                    f"{half}pos_embed: {report.target} has fixed sines and cosines, and these are "
                    f"others (by up to {(pos - fixed).abs().max():.2g}): outputs differ"
                )


def _patches(table: Table, report: Report, t_patch_size: int) -> None:
    """Image to clip, w / u in each of u frames, and back, their sum: a still clip is its image."""
    weight = table["patch_embed.proj.weight"]
    if report.target == "timm-vit" and weight.dim() == 5:
        table["patch_embed.proj.weight"] = weight.sum(dim=2)
        if weight.shape[2] > 1 and not (weight == weight[:, :, :1]).all():
            report.lost.append(
                f"patch_embed.proj.weight: summed over its {weight.shape[2]} frames, as for a clip "
                f"that stands still; what tells them apart is lost"
            )
    elif report.target != "timm-vit" and weight.dim() == 4:
        spread = (weight / t_patch_size).unsqueeze(2).repeat(1, 1, t_patch_size, 1, 1)
        table["patch_embed.proj.weight"] = spread
        report.made.append(
            f"patch_embed.proj.weight: the image's over {t_patch_size}, in each of as many frames: "
            f"exact for a clip that stands still"
        )


def _cls(table: Table, report: Report) -> None:
    """Out where the target has none; the decoder's own, where one of the two has it."""
    if "cls_token" in table and not FAMILIES[report.target].cls:
        for name in ("cls_token", "decoder_cls_token"):
            table.pop(name, None)
        report.lost.append(f"cls_token: {report.target} has none: outputs differ")
    if "cls_token" not in table or not depths(table)[1]:
        return
    if report.target == "slowfast" and table.pop("decoder_cls_token", None) is not None:
        report.lost.append(
            "decoder_cls_token: slowfast's decoder takes the encoder's: decoder outputs differ"
        )
    elif report.target == "mae_st" and "decoder_cls_token" not in table:
        table["decoder_cls_token"] = torch.zeros_like(table["mask_token"])
        report.made.append(
            "decoder_cls_token: zero, where slowfast takes the encoder's: decoder outputs differ"
        )


def _classifier(table: Table, report: Report) -> None:
    """The norm that follows the mean over tokens: `norm` in mae_st and slowfast, which have no
    other, and `fc_norm` in the rest, whose `norm` comes before the first token alone is taken."""
    if "head.weight" not in table:
        dropped = [n for n in list(table) if n.startswith("fc_norm.") and table.pop(n) is not None]
        if dropped:
            report.lost.append(f"{', '.join(dropped)}: {_NO_PART}")
        return
    if not FAMILIES[report.target].classifier:
        dropped = [n for n in table if n.startswith(("head.", "fc_norm."))]
        report.lost.append(f"{', '.join(dropped)}: an image model's classifier is another")
        for name in dropped:
            del table[name]
        return
    mean = "fc_norm.weight" in table or report.source in ("mae_st", "slowfast")
    old, new = ("fc_norm", "norm") if "fc_norm.weight" in table else ("norm", "fc_norm")
    wanted = "norm" if report.target in ("mae_st", "slowfast") else "fc_norm"
    if not mean and wanted == "norm":
        report.lost.append("the first token is classified there, here the mean: outputs differ")
    elif mean and new == wanted:
        for kind in ("weight", "bias"):
            table[f"{new}.{kind}"] = table.pop(f"{old}.{kind}")
    if report.target == "transformers":
        report.made.append(f"head: its configuration needs use_mean_pooling={mean}")
    if mean and (report.source == "transformers") != (report.target == "transformers"):
        report.made.append("fc_norm: its eps is 1e-5 in transformers and 1e-6 elsewhere")


def _norm(table: Table, report: Report) -> None:
    """The norm after the encoder, which only transformers and classifiers may lack."""
    if "head.weight" in table:
        return
    if "norm.weight" not in table and report.target != "transformers":
        bias = table["blocks.0.norm1.bias"]
        table |= {"norm.weight": torch.ones_like(bias), "norm.bias": torch.zeros_like(bias)}
        report.made.append("norm: 1 and 0; the source has no such norm: outputs differ")


def _biases(table: Table, report: Report) -> None:
    """Of q, k, v and decoder_embed: zeros where the target needs one; k's dropped where it has
    none, which changes nothing: it adds one number to all scores of a query."""
    kept = "qv" if FAMILIES[report.target].biases.endswith("qv") else "qkv"
    dropped = added = 0
    for half, depth in zip(("", "decoder_"), depths(table), strict=True):
        for i in range(depth):
            names = {x: f"{half}blocks.{i}.attn.{x}.bias" for x in "qkv"}
            there = [x for x in names if names[x] in table]
            for x in there:
                if x not in kept:
                    dropped += int(table.pop(names[x]).any())
            for x in kept if there else ():
                if names[x] not in table:
                    like = table[f"{half}blocks.{i}.norm1.bias"]
                    table[names[x]], added = torch.zeros_like(like), added + 1
    if dropped:
        report.lost.append(
            f"attn.k.bias of {dropped} blocks: it adds one number to all scores of a query, which "
            f"a softmax ignores (exact)"
        )
    if added:
        report.made.append(f"attn.k.bias of {added} blocks: zero (exact)")
    if not depths(table)[1]:
        return
    if FAMILIES[report.target].positions == "sincos":
        bias = table.pop("decoder_embed.bias", None)
        if bias is not None and bias.any():
            report.lost.append("decoder_embed.bias: there is none: decoder outputs differ")
    elif "decoder_embed.bias" not in table:
        table["decoder_embed.bias"] = torch.zeros_like(table["decoder_norm.bias"])
        report.made.append("decoder_embed.bias: zero (exact)")


def _head(table: Table, report: Report) -> None:
    """The prediction of other frames or of no pixels does not fit a target that cannot have it."""
    if not depths(table)[1]:
        return
    if "decoder_pred.bias" not in table:  # as this pass leaves it
        report.lost.append("decoder_pred: not in the source: the target's own stays")
        return
    values, patch = len(table["decoder_pred.bias"]), table["patch_embed.proj.weight"][0]
    whole, frame = patch.numel(), patch[:, 0].numel()
    pixels, all_pixels = values % frame == 0, values == whole
    fits = {"mae_st": pixels, "videomae": all_pixels, "transformers": all_pixels}
    if not fits.get(report.target, True):
        del table["decoder_pred.weight"], table["decoder_pred.bias"]
        report.lost.append(
            f"decoder_pred: it predicts {values} values of a patch of {whole}, which "
            f"{report.target} cannot"
        )


def _times(grid: Iterable[int]) -> str:
    return " x ".join(map(str, grid))


def _halves(table: Table) -> list[str]:
    return ["", "decoder_"] if depths(table)[1] else [""]


def _width(table: Table, half: str) -> int:
    return len(table[f"{half}blocks.0.norm1.bias"])


def _divide(what: str, size: int, by: int) -> int:
    if size % by or size <= 0:
        raise ConfigError(f"{what} {size} is not a multiple of the patches' {by}")
    return size // by
