"""What mae_fast is measured against: the official code, one improvement a rung, and a peer.

model, optimizer, step = BASELINES["official_sdpa"].build(cfg)
loss = step(clips, noise)  # uint8 [B, C, T, H, W], keys of the mask [B, L]
"""

import contextlib
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mae_fast.bench.baselines.official import OfficialMAE, normalise
from mae_fast.bench.baselines.training import Baseline, LossOf
from mae_fast.bench.baselines.transformers_videomae import PEERS
from mae_fast.config import ModelConfig
from mae_fast.model import init_weights
from mae_fast.spans import span

if __name__ != "mae_fast.bench.baselines":
    raise ImportError(f"import mae_fast.bench.baselines, not {__name__}", name=__name__)


@dataclass(frozen=True)
class Official(Baseline):
    """One rung: the official model, and what has been improved in it."""

    name: str
    attention: Literal["eager", "sdpa"] = "eager"
    fused_adamw: bool = False
    compiled: bool = False
    compiler: str = "inductor"

    def parts(self, cfg: ModelConfig) -> tuple[nn.Module, LossOf, bool]:
        model = OfficialMAE(cfg, self.attention)
        init_weights(model)
        if self.compiled:
            # In place, so that parameters keep their names; a graph for each shape.
            model.compile(dynamic=False, backend=self.compiler)

        def loss_of(clips: Tensor, noise: Tensor, ratio: float, encode_all: bool) -> Tensor:
            with span("compiled", "compiled") if self.compiled else contextlib.nullcontext():
                return model(normalise(clips), ratio, noise, encode_all)[0]

        return model, loss_of, self.fused_adamw


OFFICIAL = {
    rung.name: rung
    for rung in (
        Official("official_eager"),
        Official("official_sdpa", attention="sdpa"),
        Official("official_sdpa_fused_adamw", attention="sdpa", fused_adamw=True),
        Official("official_compile", compiled=True),
        Official("official_sdpa_compile", attention="sdpa", compiled=True),
    )
}
BASELINES = {**OFFICIAL, **PEERS}
