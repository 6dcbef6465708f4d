"""Pre-training by hand: what a run must leave behind, computed without the engine's loop.

Of the engine only the model and the masks are used, which have proofs of their own. Draws, clips,
crops, learning rate, accumulation, ranks, clipping and AdamW are written out here from the
documents. Each step starts from the run's own checkpoint before it, so errors do not add up.
"""

import functools
import json
import math
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
import toy_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from mae_fast.masking import draw_masks
from mae_fast.model import MaskedAutoencoder
from mae_fast.targets import Tokenizer

HELD_OUT_SEED, HELD_OUT_CLIPS = 20220518, 64


@functools.cache
def frames_of(path):
    """Every frame of a file, uint8 [n, H, W, 3]."""
    with av.open(path) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def frame_numbers(rng, row, data, num_frames):
    """The frames of each of a video's repeat_aug clips, and where they may lie."""
    clip = data.sampling_rate * num_frames / data.target_fps * row.fps  # in frames of the file
    lo, hi = 0.0, float(row.frames)
    if data.span_seconds:
        span = max(data.span_seconds * row.fps, clip)
        lo = rng.uniform(0.0, max(row.frames - span, 0.0))
        hi = min(lo + span, row.frames)
    clips = []
    for _ in range(data.repeat_aug):
        start = rng.uniform(lo, max(hi - clip, lo))
        at = torch.linspace(start, start + clip - 1, num_frames).tolist()
        clips.append([row.start + min(max(int(x), 0), row.frames - 1) for x in at])
    return clips


def crop_box(rng, height, width, data):
    """(top, left, height, width); crop_aspect is width over height."""
    low, high = data.crop_aspect
    for _ in range(10):
        area = height * width * rng.uniform(data.crop_area[0], data.crop_area[1])
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


def shrunk(pixels, short_side):
    height, width = pixels.shape[1:3]
    short = min(height, width)
    if not 0 < short_side < short:
        return pixels
    size = (height * short_side // short, width * short_side // short)
    planes = pixels.permute(0, 3, 1, 2)
    return F.interpolate(planes, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def draw(cfg, rows, seed, g, bad=()):
    """The clips of global draw g: [(sample, path, float [3, T, S, S])]. `bad` paths are replaced
    by what (seed, epoch, video, attempt) chooses."""
    data = cfg.data
    epoch, place = divmod(g, len(rows))
    drawn = video = int(np.random.default_rng((seed, epoch)).permutation(len(rows))[place])
    rng, attempt = np.random.default_rng((seed, epoch, drawn)), 0
    while rows[video].path in bad:
        attempt += 1
        rng = np.random.default_rng((seed, epoch, drawn, attempt))
        video = int(rng.integers(len(rows)))
    row = rows[video]
    numbers = frame_numbers(rng, row, data, cfg.model.num_frames)
    clips = []
    for i, ids in enumerate(numbers):
        pixels = shrunk(torch.from_numpy(frames_of(row.path)[ids]), data.short_side)
        top, left, h, w = crop_box(rng, *pixels.shape[1:3], data)
        flip = rng.random() < data.flip
        x = pixels[:, top : top + h, left : left + w].permute(3, 0, 1, 2).float() / 255
        x = F.interpolate((x - 0.45) / 0.225, (cfg.model.img_size,) * 2, mode="bilinear")
        clips.append((g * data.repeat_aug + i, row.path, x.flip(3) if flip else x))
    return clips


def batch(cfg, rows, seed, step, draws, bad=()):
    """(video, ids_keep, ids_mask, paths) of some draws, with the masks of (seed, step, sample)."""
    samples, paths, video = zip(*[c for g in draws for c in draw(cfg, rows, seed, g, bad)])  # noqa: B905
    grid = (
        cfg.model.num_frames // cfg.model.t_patch_size,
        *(cfg.model.img_size // cfg.model.patch_size,) * 2,
    )
    ids = draw_masks(cfg.mask, grid, seed=seed, step=step, samples=torch.tensor(samples))
    video = [clip for clip in video for _ in range(cfg.mask.per_clip)]
    return torch.stack(video), *ids, list(paths)


def videos_a_step(cfg, world):
    return cfg.train.batch_size * cfg.train.accum_steps * world


def total_steps(cfg, videos, world):
    if cfg.train.steps:
        return cfg.train.steps
    return max(1, math.floor(cfg.train.epochs * videos / videos_a_step(cfg, world)))


def learning_rate(cfg, step, videos, world):
    """Of the step numbered from 0: a line from 0 over the warm-up, then half a cosine to min_lr."""
    t = cfg.train
    warm = t.warmup_steps if t.steps else t.warmup_epochs * videos / videos_a_step(cfg, world)
    peak = t.blr * videos_a_step(cfg, world) / 256
    if step < warm:
        return peak * step / warm
    done = (step - warm) / (total_steps(cfg, videos, world) - warm)
    return t.min_lr + (peak - t.min_lr) * (1 + math.cos(math.pi * done)) / 2


def gradients(cfg, rows, model, step, world, bad=()):
    """(mean loss, {name: gradient}, paths) of a step: of the mean over all its micro-batches."""
    count = cfg.train.accum_steps * world
    losses, paths = [], []
    model.zero_grad()
    for micro in range(count):
        first = (step * count + micro) * cfg.train.batch_size
        draws = range(first, first + cfg.train.batch_size)
        *inputs, some = batch(cfg, rows, cfg.train.seed, step, draws, bad)
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.train.precision == "bf16"):
            loss = model(inputs[0], ids_keep=inputs[1], ids_mask=inputs[2])[0]
        (loss / count).backward()
        losses.append(float(loss.detach()))
        paths += some
    grads = {name: p.grad.clone() for name, p in trained(model).items()}
    return sum(losses) / count, grads, paths


@torch.no_grad()
def held_out(cfg, rows, model):
    """The row that evaluation adds: 64 clips and more, whole batches of about 8, fixed draws."""
    videos = max(1, 8 // cfg.data.repeat_aug)
    batches = math.ceil(HELD_OUT_CLIPS / (videos * cfg.data.repeat_aug))
    loss = mean = 0.0
    for i in range(batches):
        draws = range(i * videos, (i + 1) * videos)
        video, keep, hidden, _ = batch(cfg, rows, HELD_OUT_SEED, 0, draws)
        loss += float(model(video, ids_keep=keep, ids_mask=hidden)[0]) / batches
        mean += _loss_of_the_mean(cfg.model, video, hidden) / batches
    clips = batches * videos * cfg.data.repeat_aug
    return {"val_loss": loss, "val_mean_patch_loss": mean, "val_clips": clips}


def _loss_of_the_mean(m, video, hidden):
    """What predicting each hidden patch's own mean scores; pred_t_dim frames, evenly spaced."""
    at = [int(i * (m.num_frames - 1) / max(m.pred_t_dim - 1, 1)) for i in range(m.pred_t_dim)]
    if m.variant == "slowfast":
        at = list(range(0, m.num_frames, m.t_patch_size))
    steps, p = m.num_frames // m.t_patch_size, m.patch_size
    x = video[:, :, at].unflatten(2, (steps, -1)).unflatten(4, (-1, p)).unflatten(6, (-1, p))
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(1, 3).flatten(2)  # [B, L, P]
    x = x.gather(1, hidden.long()[..., None].expand(-1, -1, x.shape[-1])).double()
    if m.norm_pix_loss:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
    return float((x - x.mean(-1, keepdim=True)).square().mean())


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder, step):
    """(state, tensors) of the checkpoint of a step."""
    path = Path(folder) / f"checkpoint-{step:08d}.safetensors"
    with safe_open(path, "pt") as f:
        state = json.loads(f.metadata()["mae_fast"])
    return state, load_file(path)


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def new_model(cfg):
    torch.manual_seed(cfg.train.seed)
    model = MaskedAutoencoder(cfg.model)
    if cfg.model.target == "tokens":
        model.tokenizer = Tokenizer(toy_tokenizer.make())
    return model


def trained(model):
    """Parameters by name, without those of the encoder's running average."""
    return {n: p for n, p in model.named_parameters() if not n.startswith("target_encoder.")}


def check(cfg, rows, *, world=1, val_rows=(), bad=(), steps=None):
    """Hold a run that saved every step against what is computed by hand, step by step."""
    folder, t = Path(cfg.output), cfg.train
    total = total_steps(cfg, len(rows), world)
    model = new_model(cfg)
    names = list(trained(model))
    moments = {kind: {n: torch.zeros_like(p) for n, p in trained(model).items()} for kind in "mv"}
    metrics = {row["step"]: row for row in rows_of(folder)}
    if val_rows:
        _near(metrics[0], held_out(cfg, val_rows, model), 1e-4)
    losses = []
    # A pixel that is resampled in another order may be rounded to its neighbour in bf16.
    slack = 10 if t.precision == "bf16" else 1
    for step in range(total):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss, grads, _ = gradients(cfg, rows, model, step, world, bad)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        shrink = min(1.0, t.clip_grad / (norm + 1e-6)) if t.clip_grad else 1.0
        lr, (b1, b2) = learning_rate(cfg, step, len(rows), world), t.betas
        state, after = checkpoint(folder, step + 1)
        assert state["step"] == step + 1 and state["nonfinite"] == 0
        got = {kind: part(after, f"optim.{key}.") for kind, key in KINDS.items()}
        new = part(after, "model.")
        assert set(weights) == set(new) and set(names) == set(got["m"]) == set(got["v"])
        for n in set(weights) - set(names):  # of the new weights, after the update
            e = t.ema_momentum
            wanted = e * weights[n] + (1 - e) * new[n.removeprefix("target_encoder.")]
            torch.testing.assert_close(new[n], wanted, rtol=1e-5, atol=1e-7, msg=f"{n}, {step}")
        for n in names:
            assert new[n].dtype == got["m"][n].dtype == torch.float32
            g = grads[n] * shrink
            _close(
                got["m"][n],
                b1 * moments["m"][n] + (1 - b1) * g,
                norm * shrink,
                f"{n} m {step}",
                slack,
            )
            v = b2 * moments["v"][n] + (1 - b2) * g * g
            _close(got["v"][n], v, (norm * shrink) ** 2, f"{n} v, step {step}", slack)
            assert float(after[f"optim.step.{n}"]) == step + 1
            decay = 0.0 if weights[n].ndim == 1 or n.endswith(".bias") else t.weight_decay
            wanted = weights[n] * (1 - lr * decay)
            bottom = (got["v"][n] / (1 - b2 ** (step + 1))).sqrt() + t.eps
            wanted = wanted - lr / (1 - b1 ** (step + 1)) * got["m"][n] / bottom
            torch.testing.assert_close(
                new[n], wanted, rtol=1e-5, atol=1e-3 * lr + 1e-8, msg=f"{n} after step {step}"
            )
        losses.append(loss)
        model.load_state_dict(new)
        moments = got
        row = metrics.get(step + 1)
        assert (row is not None) == (
            (step + 1) % t.log_every == 0 or (step + 1) % t.save_every == 0 or step + 1 == total
        )
        if row is None:
            continue
        epoch = (step + 1) * videos_a_step(cfg, world) / len(rows)
        window = sum(losses) / len(losses)
        _near(row, {"epoch": epoch, "lr": lr, "grad_norm": norm, "loss": window}, 1e-4)
        assert row["nonfinite"] == 0
        losses = []  # a window ends with its row
        clips = videos_a_step(cfg, world) * cfg.data.repeat_aug
        assert row["clips_per_s"] * row["step_seconds"] == _approx(clips)
        assert row["seconds_left"] == _approx((total - step - 1) * row["step_seconds"])
        assert 0 < row["data_wait"] < 1 and row["memory_mb"] > 1
        if val_rows and ((step + 1) % t.save_every == 0 or step + 1 == total):
            _near(row, held_out(cfg, val_rows, model), 1e-4)
    assert max(metrics) == total


KINDS = {"m": "exp_avg", "v": "exp_avg_sq"}


def _approx(x):
    import pytest

    return pytest.approx(x, rel=1e-6)


def _close(got, wanted, scale, what, slack=1):
    error, allowed = float((got - wanted).norm()), 1e-4 * float(wanted.norm()) + 1e-6 * scale
    assert error <= slack * allowed, f"{what}: off by {error:.3g}"


def _near(row, wanted, rel):
    for key, value in wanted.items():
        ok = abs(row[key] - value) <= rel * abs(value) + 1e-12
        assert ok, f"step {row['step']}: {key} {row[key]}, by hand {value}"
