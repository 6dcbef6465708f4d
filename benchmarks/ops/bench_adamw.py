"""adamw: clipping and the step, on the decoder's blocks, against the official multi-tensor one."""

import torch
from torch import nn

from benchmarks.ops.case import Case, entry
from mae_fast.bench.baselines import training
from mae_fast.config import TrainConfig
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS
from mae_fast.ops.adamw import adamw, adamw_ref
from mae_fast.optim import clipped_step, make_optimizer


def decoder(cfg, clips):
    g = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = [p.shape for p in MaskedAutoencoder(cfg).decoder_blocks.parameters()]
    values, grads = ([torch.randn(s, generator=g) for s in shapes] for _ in range(2))

    def parameters():
        return nn.ParameterList(nn.Parameter(v.clone()) for v in values)

    def ours():
        params = parameters()
        optimizer = make_optimizer(params, TrainConfig())

        def run():
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            clipped_step(optimizer, training.LR, training.CLIP_GRAD)
            return [p.detach() for p in params]

        return run

    def official():
        params = parameters()
        optimizer = training.make_optimizer(params)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()  # clipped in place, to the norm at which clipping leaves it

        def run():
            nn.utils.clip_grad_norm_(params, training.CLIP_GRAD)
            optimizer.step()
            return [p.detach() for p in params]

        return run

    count = sum(v.numel() for v in values)
    return Case(
        "adamw",
        f"decoder blocks, {count / 1e6:.1f} M parameters",
        {name: ours() for name in OPS["adamw"].backends},
        official(),
        "official",
        bytes=32 * count,  # g for the norm; p, g, m, v -> p, m, v
    )


def smallest():
    param = nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    optimizer = torch.optim.AdamW([param], lr=0.0, fused=True)
    args = optimizer, torch.ones(()), torch.zeros(())

    def bare(optimizer, scale, skip):
        optimizer.step()

    return adamw, bare, adamw_ref, args


bench_adamw = entry("adamw", decoder, baseline="official")
