"""The least that each part of a profiled step must compute and move: that of its recorded calls,
put where the profile puts the time."""

import torch

from mae_fast import memory
from mae_fast.bench import engines
from mae_fast.bench.engines import OURS, Masking
from mae_fast.config import ModelConfig
from mae_fast.ops.work import ADAMW_BYTES, Work
from mae_fast.profile.trace import Where


def least(
    name: str, cfg: ModelConfig, clips: int, masking: Masking, dtype: torch.dtype = torch.float32
) -> dict[Where, Work]:
    """The work of a step of engine `name`, where there are formulas for it."""
    found: dict[Where, Work] = {}
    for (phase, op), both in (engines.work(name, cfg, clips, masking, dtype) or {}).items():
        if not name.startswith(OURS) and op == "add_layer_norm":
            # A baseline adds elsewhere. Its norm: sum -> out; dout, sum -> dx.
            op, both = "layer_norm", (both[0] * 0.5, both[1] * 0.75)
        for backward, work in enumerate(both):
            where = Where("decoder" if phase == "head" else phase, op, bool(backward))
            found[where] = found.get(where, Work()) + work
    if found:
        parameters = memory.parameters(engines.model_of(name, cfg))
        found[Where("optimizer", "adamw", False)] = Work(0, ADAMW_BYTES * parameters)
    return found
