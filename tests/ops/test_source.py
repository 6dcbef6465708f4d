"""Ops that need pixels, from a source: what they give of the clips that it stands for."""

import pytest
import torch
from op_checks import BACKENDS, DEVICE, DTYPES, gradients, interpolated

import mae_fast
from mae_fast.config import ModelConfig, TrainConfig
from mae_fast.forward import masked_loss, targets
from mae_fast.graph import Graphed
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import dispatch
from mae_fast.ops.crop_resize_patchify_gather import crop_resized
from mae_fast.ops.masked_mse import NORM_PIX, masked_mse
from mae_fast.ops.patch_embed import patch_embed
from mae_fast.ops.source import Source, colours, frame_bytes
from mae_fast.optim import make_optimizer
from mae_fast.step import WARMUP, Step

PIXELS = (0.45, 0.225)
TINY = ModelConfig(
    img_size=16, patch_size=8, num_frames=4, t_patch_size=2, pred_t_dim=2, embed_dim=16, depth=2,
    num_heads=2, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2,
)  # fmt: skip


def source(sizes=((20, 30), (17, 21)), frames=4, size=16, room=0, seed=0):
    """Clips of Y, U, V frames of these heights and widths, every second one mirrored."""
    generator, rows, at = torch.Generator().manual_seed(seed), [], 0
    for i, (h, w) in enumerate(sizes):
        each, colour = frame_bytes(h, w, True), colours((1, 6)[i % 2], i % 3 == 1)
        begins = [at + t * each for t in range(frames)]
        rows.append([h, w, i, 2 * i, h - 2 * i, w - 3 * i, i % 2, *colour, *begins])
        at += frames * each
    how = dict(dtype=torch.uint8, generator=generator, device="cpu")
    flat = torch.randint(0, 256, (max(at, room),), **how)
    return Source(flat.to(DEVICE), torch.tensor(rows).to(DEVICE), size)


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = dispatch.load_cpp() if request.param == "cpp" else None
    if reason:
        pytest.skip(reason)
    return request.param


def close(got, want, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * float(w.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_embed_of_a_source(backend, dtype):
    dtype, s = DTYPES[dtype], source()
    ids = torch.tensor([[5, 0, 7], [2, 2, 6]], dtype=torch.int32, device=DEVICE)
    shapes = (12, 3 * 2 * 8 * 8), (12,), (8, 12)
    weights = [torch.randn(n, device=DEVICE).to(dtype).requires_grad_() for n in shapes]
    with mae_fast.backends(patch_embed=backend, crop_resize_patchify_gather=backend):
        ours = gradients(lambda *w: patch_embed(s, ids, *w, 2, 8, *PIXELS), weights)
    clip = crop_resized(s, torch.float32)
    with mae_fast.backends(patch_embed="reference"):
        want = gradients(lambda *w: patch_embed(clip, ids, *w, 2, 8, *PIXELS), weights)
    close(ours, want, dtype)


@pytest.mark.parametrize("norm_pix", NORM_PIX)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_mse_of_a_source(backend, dtype, norm_pix):
    """Of the target frames alone, two of five to a token."""
    dtype, s = DTYPES[dtype], source(frames=5)
    ids = torch.tensor([[3, 0, 1], [2, 2, 0]], dtype=torch.int32, device=DEVICE)
    pred = [torch.randn(2, 3, 384, device=DEVICE).to(dtype).requires_grad_()]
    how = ids, (1, 4), 2, 8, *PIXELS, norm_pix
    with mae_fast.backends(masked_mse=backend, crop_resize_patchify_gather=backend):
        ours = gradients(lambda p: masked_mse(p, s, *how), pred)
    clip = crop_resized(s, torch.float32)
    with mae_fast.backends(masked_mse="reference"):
        close(ours, gradients(lambda p: masked_mse(p, clip, *how), pred), dtype)


@pytest.mark.parametrize("target", ["pixels", "pixels_by_channel", "hog"])
def test_a_model_of_a_source(target):
    """Loss, prediction and every gradient; what a picture of it is drawn from."""
    torch.manual_seed(0)
    cfg = ModelConfig(**{**_fields(TINY), "target": target})
    model, s = MaskedAutoencoder(cfg), source()
    keep, masked = draw_ids("random", cfg.grid, 0.5, seed=0, step=0, samples=torch.arange(2))
    found = []
    for video in (s, interpolated(s, torch.float32, by=crop_resized)):
        loss, pred, _ = model(video, ids_keep=keep, ids_mask=masked)
        model.zero_grad()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        wanted = targets(model.spec, video, masked, torch.float32)
        found.append([loss, pred, wanted, masked_loss(model.spec, pred, video, masked), *grads])
    for g, w in zip(*found, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def _fields(cfg):
    return {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}


def test_steps_on_clips_of_five_sizes_are_replays(monkeypatch, caplog):
    """Shapes stay, so that every step after the capture is a replay, with the losses of steps that
    are none."""
    if dispatch.interpreting():
        pytest.skip("launchers in Python are no operators that a tape would call again")
    sizes = [(20, 30), (17, 21), (16, 16), (33, 18), (40, 50)]
    room = 2 * 4 * frame_bytes(40, 50, True)
    taken, call = [], Graphed.__call__
    monkeypatch.setattr(Graphed, "__call__", lambda g, *x: taken.append(g) or call(g, *x))
    found = {}
    for graph in (False, True):
        torch.manual_seed(0)
        model = MaskedAutoencoder(TINY)

        def loss(flat, table, keep, masked, model=model):
            return model(Source(flat, table, 16), ids_keep=keep, ids_mask=masked)[0]

        step = Step(model, make_optimizer(model, TrainConfig()), loss, clip=1.0, graph=graph)
        losses = []
        for i in range(WARMUP + 6):
            pair = (sizes[i % 5], sizes[(i + 2) % 5])
            s = source(pair, room=room, seed=i)
            samples = torch.tensor([2 * i, 2 * i + 1])
            ids = draw_ids("random", TINY.grid, 0.5, seed=0, step=i, samples=samples)
            step.micro(s.flat, s.table, *ids)
            losses.append(torch.stack(step.update(1e-2)))
        found[graph] = torch.stack(losses)
    assert torch.equal(found[False], found[True])
    assert len(taken) == 2 * 6 and "without its CUDA graph" not in caplog.text
