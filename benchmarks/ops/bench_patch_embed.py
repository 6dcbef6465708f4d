"""Patch embedding at 90%: visible tokens from uint8, against the official convolution over all."""

import pytest
import torch
import torch.nn.functional as F

from mae_fast import preset
from mae_fast.masking import draw_ids
from mae_fast.ops.linear import linear
from mae_fast.ops.patchify_gather import patchify_gather_ref

CFG = preset("vit_base")
BATCH = 2


def ours(video, ids, weight, bias):
    patches = patchify_gather_ref(video, ids, 2, 16, 0.45, 0.225, weight.dtype)
    return linear(patches, weight.flatten(1), bias)


def official(video, ids, weight, bias):
    """The clip is normalised by the loader, for free."""
    x = F.conv3d(video, weight, bias, stride=(2, 16, 16)).flatten(2).transpose(1, 2)
    return x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[-1]))


@pytest.mark.parametrize("form", [ours, official], ids=lambda f: f.__name__)
def bench_patch_embed(benchmark, form):
    torch.manual_seed(0)
    video = torch.randint(0, 256, (BATCH, 3, 16, 224, 224), dtype=torch.uint8)
    ids, _ = draw_ids("random", CFG.grid, 0.9, seed=0, step=0, samples=torch.arange(BATCH))
    weight = torch.randn(768, 3, 2, 16, 16).mul_(0.02).requires_grad_()
    bias = torch.zeros(768, requires_grad=True)
    gradient = torch.randn(BATCH, ids.shape[1], 768)

    normal = (video.float() / 255 - 0.45) / 0.225
    clip = video if form is ours else normal

    def forward_backward():
        out = form(clip, ids, weight, bias)
        return out, torch.autograd.grad(out, (weight, bias), gradient)

    expected = official(normal, ids, weight, bias)
    torch.testing.assert_close(forward_backward()[0], expected, rtol=1e-4, atol=1e-4)
    benchmark.extra_info.update(batch=BATCH, ratio=0.9, dtype="uint8 -> fp32")
    benchmark(forward_backward)
