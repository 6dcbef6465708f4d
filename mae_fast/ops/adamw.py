"""adamw: one AdamW step of a whole optimizer, gradients divided by `scale`, nothing done if `skip`.

For each parameter p with gradient g = grad / scale (Loshchilov & Hutter, as torch.optim.AdamW):
p *= 1 - lr * decay; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps). State under torch's names.
"""

import torch
from torch import Tensor

from mae_fast.ops import dispatch


@torch.no_grad()
def adamw_ref(optimizer: torch.optim.AdamW, scale: Tensor, skip: Tensor) -> None:
    """The specification; it reads `skip` on the host."""
    if skip:
        return
    for group in optimizer.param_groups:
        b1, b2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            t, m, v = float(state["step"]), state["exp_avg"], state["exp_avg_sq"]
            g = p.grad / scale.to(p.dtype)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).add_(g * g, alpha=1 - b2)
            denominator = (v / (1 - b2**t)).sqrt() + group["eps"]
            p.sub_(m / denominator, alpha=group["lr"] / (1 - b1**t))


def _adamw_torch(optimizer: torch.optim.AdamW, scale: Tensor, skip: Tensor) -> None:
    """torch's fused kernel divides by grad_scale and does nothing when found_inf is 1."""
    optimizer.grad_scale, optimizer.found_inf = scale, skip
    optimizer.step()


def _why_not_torch(optimizer: torch.optim.AdamW) -> str | None:
    if not all(group["fused"] for group in optimizer.param_groups):
        return "the optimizer was made without fused=True"
    return None


OP = dispatch.Op(
    "adamw",
    "clip and AdamW step without a host sync",
    {"torch": _why_not_torch, "reference": dispatch.anything},
)


def adamw(optimizer: torch.optim.AdamW, scale: Tensor, skip: Tensor) -> None:
    """One step with each group's lr; scale and skip (0 or 1) are fp32 scalars on the device."""
    step = adamw_ref if OP.choose(optimizer) == "reference" else _adamw_torch
    step(optimizer, scale, skip)
