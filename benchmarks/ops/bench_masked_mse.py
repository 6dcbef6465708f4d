"""The loss at 90%: masked patches only, from uint8, against the official one over all patches."""

import pytest
import torch

from mae_fast import preset
from mae_fast.masking import draw_ids, mask_from_keep
from mae_fast.ops.masked_mse import masked_mse_ref, target_patches

CFG = preset("vit_base")
BATCH = 2


def ours(video, keep, masked, pred):
    """pred [B, M, 768] in mask order."""
    target = target_patches(video, masked, CFG.target_frames, 1, 16, 0.45, 0.225, pred.dtype)
    return masked_mse_ref(pred, target, norm_pix_loss=True)


def official(video, keep, masked, pred):
    """pred [B, L, 768] in patch order; the clip is normalised by the loader, for free."""
    x = video.index_select(2, torch.tensor(CFG.target_frames))
    x = x.reshape(BATCH, 3, 8, 1, 14, 16, 14, 16)
    target = torch.einsum("nctuhpwq->nthwupqc", x).reshape(BATCH, 1568, 768)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (var + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(-1)
    mask = mask_from_keep(keep, 1568)
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("form", [ours, official], ids=lambda f: f.__name__)
def bench_masked_mse(benchmark, form):
    torch.manual_seed(0)
    video = torch.randint(0, 256, (BATCH, 3, 16, 224, 224), dtype=torch.uint8)
    normal = (video.float() / 255 - 0.45) / 0.225
    keep, masked = draw_ids("random", CFG.grid, 0.9, seed=0, step=0, samples=torch.arange(BATCH))
    full = torch.randn(BATCH, 1568, 768)
    some = full.gather(1, masked.long()[..., None].expand(-1, -1, 768))
    forms = {ours: (video, some.requires_grad_()), official: (normal, full.requires_grad_())}
    torch.testing.assert_close(*(f(clip, keep, masked, pred) for f, (clip, pred) in forms.items()))
    clip, pred = forms[form]

    def forward_backward():
        loss = form(clip, keep, masked, pred)
        return torch.autograd.grad(loss, pred)

    benchmark.extra_info.update(batch=BATCH, ratio=0.9, dtype="uint8 -> fp32")
    benchmark(forward_backward)
