"""The bytes that memory-bound operators load and store, against what they must and what plain torch
moves, for an eighth of a clip of ViT-B. Counted by the sanitizer: no cache is modelled."""

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from cases import DTYPES, ON_TRITON, Call, calls, launcher, op_of, tensors
from sanitizer import Record, sanitized
from torch import Tensor, nn

from mae_fast.bench import calls as step
from mae_fast.bench.baselines import training
from mae_fast.bench.baselines.ops import baseline
from mae_fast.config import ModelConfig, preset
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import dispatch
from mae_fast.ops.source import BOX_HEIGHT, BOX_WIDTH
from mae_fast.ops.work import ADAMW_BYTES

TABLE = Path(__file__).with_name("traffic.jsonl")
MODEL, FRAMES = "vit_b_eighth_clip", 2
COMPUTE_BOUND = {"attention", "linear", "patch_embed"}
MEMORY_BOUND = [op for op in ON_TRITON if op not in COMPUTE_BOUND]
AT_MOST = 1.15  # of the least bytes


@dataclass
class Row:
    """One operator's bytes. `least`: every element of inputs and outputs once; `moved`: what the
    programs of a launch share counts once; `requested`: all lanes of all programs."""

    operator: str
    case: str
    dtype: str
    least: int
    moved: int
    requested: int

    @property
    def op(self) -> str:
        return op_of(self.operator)


@dataclass
class Eager:
    """Bytes of an op's forward and backward in fp32: ours, and those that the operators of plain
    torch, as the official code calls them, read and write."""

    op: str
    moved: int
    eager: int


def _size(values) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(values))


def least(call: Call, outs: Sequence[Tensor]) -> int:
    """Every element that an operator takes and gives, once; of a clip the wanted patches' bytes, or
    the part of the crop's box that they are resampled from."""
    if call.operator == "adamw_norm":
        return _size([grad for group in call.args[0] for _, grad, *_ in group])
    crop = call.operator.startswith("crop")
    clips = [t for t in tensors(call.args) if t.dtype == torch.uint8 and (crop or t.dim() > 3)]
    total = _size(call.args) + _size(list(outs)) - _size(clips)
    if clips:
        values = next(t.numel() for t in outs if t.dim() == 3)
        if crop:  # a byte and a half a pixel, where a patch has three values
            _, table, _, size = call.args[:4]
            boxes = table[:, BOX_HEIGHT] * table[:, BOX_WIDTH]
            values *= int(boxes.sum()) / (2 * len(table) * size**2)
        elif call.operator.startswith("masked_hog"):  # a patch and the pixels around it
            _, _, ids, _, patch = call.args[:5]
            values = ids.numel() * clips[0].shape[1] * (patch + 2) ** 2
        total += int(values)
    return total


def watched(args: Sequence, seed: int = 0) -> AbstractContextManager[Record]:
    """The sanitizer, for an operator of these arguments; tensors in lists go by their addresses."""
    return sanitized(seed, extra=[t for a in args if isinstance(a, list) for t in tensors(a)])


def run(operator: str, args: Sequence, seed: int = 0) -> tuple[list[Tensor], Record]:
    """(the outputs of an operator's launcher and what it changed, the sanitizer's record)."""
    args = copy.deepcopy(args)
    launch = launcher(operator)
    with watched(args, seed) as record:
        out = launch(*args)
    if operator == "adamw_step":  # in place: parameters, their moments, and copies
        out = tuple(t for group in args[0] for p, _, m, v, _, _ in group for t in (p, m, v))
    return [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None], record


def rows(op: str, dtype: str) -> list[Row]:
    """The bytes of an op's operators."""
    found = []
    for case, made in calls(op, MODEL, dtype, "cpu", watched).items():
        for call in made:
            outs, record = run(*call)
            bytes_ = (least(call, outs), record.moved, record.requested)
            found.append(Row(call.operator, case, dtype, *bytes_))
    return found


def eager(op: str, ours: Sequence[Row]) -> Eager:
    """Against the baseline of the op's benchmark, which is of the last of the op's cases."""
    cfg = preset("vit_base", num_frames=FRAMES, pred_t_dim=FRAMES // 2)
    run, bytes_ = _official_adamw(cfg) if op == "adamw" else _replaced(op, cfg)
    run()  # it makes the moments, and the outputs' gradients
    with sanitized() as record:
        run()
    ours = [row for row in ours if row.dtype == "f32"]
    name = ours[0].case if op.startswith("crop") else ours[-1].case
    ours = [row for row in ours if row.case == name]
    moved, theirs = sum(row.moved for row in ours), record.torch_bytes
    # Of more parameters, and more tokens, by bytes that both must move.
    if op in ("adamw", "masked_hog_mse"):
        least = sum(row.least for row in ours if not row.operator.endswith("_bwd"))
        theirs = theirs * least // bytes_
    return Eager(op, moved, theirs)


def _replaced(op: str, cfg: ModelConfig) -> tuple[Callable, float]:
    """(what the official code computes in place of the op's largest call, the call's bytes)."""
    found = [c for c in step.calls(cfg, 1, 0.9, torch.float32) if c.op == op]
    call = max(found, key=lambda c: sum(w.bytes for w in c.work())).real()
    bytes_ = int(sum(w.bytes for w in call.work()))
    made = baseline(op, call.args)
    return replace(call, args=made.args).both(made.function, made.theirs), bytes_


def _official_adamw(cfg: ModelConfig) -> tuple[Callable, int]:
    """(clip and step of the decoder's blocks, the bytes that they must move)."""
    params = nn.ParameterList(
        nn.Parameter(p.detach().clone()) for p in MaskedAutoencoder(cfg).decoder_blocks.parameters()
    )
    optimizer = training.make_optimizer(params)
    for p in params:
        p.grad = torch.randn_like(p)

    def run() -> None:
        nn.utils.clip_grad_norm_(params, training.CLIP_GRAD)
        optimizer.step()

    return run, ADAMW_BYTES * sum(p.numel() for p in params)


def committed() -> tuple[list[Row], list[Eager]]:
    """The committed table."""
    lines = [json.loads(line) for line in TABLE.read_text().splitlines()]
    return [Row(**x) for x in lines if "dtype" in x], [Eager(**x) for x in lines if "op" in x]


def main() -> None:
    """Write the table."""
    dispatch.load_triton()
    found = {op: [row for dtype in DTYPES for row in rows(op, dtype)] for op in MEMORY_BOUND}
    lines = [row for made in found.values() for row in made]
    lines += [eager(op, made) for op, made in found.items()]
    TABLE.write_text("".join(json.dumps(asdict(x)) + "\n" for x in lines))


if __name__ == "__main__":
    main()
