"""`mae-fast reconstruct`: draw what a checkpoint makes of a video it sees a tenth of."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from mae_fast.config import MaskStrategy, Variant, preset
from mae_fast.data import BadVideo, VideoReader, clip_indices
from mae_fast.errors import ConfigError, DataError
from mae_fast.fields import check_seed, require
from mae_fast.figures import figure as new_figure
from mae_fast.figures import write_figure
from mae_fast.files import check_output, write
from mae_fast.forward import targets
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.masked_mse import norm_target
from mae_fast.ops.source import Source
from mae_fast.weights import load_model

ROWS = ("original", "masked", "reconstruction", "reconstruction + visible patches")
FPS = 30.0  # the rate at which sampling_rate counts, as in the official configuration


def reconstruct(
    checkpoint: str,
    video: str,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "reconstruction.png",
    ratio: tuple[float, ...] = (0.9,),
    strategy: MaskStrategy = "random",
    at: float = 0.5,
    sampling_rate: int = 4,
    seed: int = 0,
    model: str = "",
    variant: Variant = "mae_st",
) -> None:
    """Draw original, masked, reconstruction, and reconstruction with visible patches put back.

    Args:
        checkpoint: a run's checkpoint, or weights under the official names (.pth, .safetensors).
        video: the video file.
        output: .png shows the predicted frames side by side, .gif and .mp4 play them.
        ratio: masked shares in [0, 1), drawn one below the other, such as 0.75 0.9 0.95.
        strategy: how patches are masked.
        at: where in the video the clip starts, 0 at the beginning to 1 at the end.
        sampling_rate: frames from one frame of the clip to the next, at 30 frames a second.
        seed: which mask is drawn.
        model: preset of weights that do not say which model they are, such as vit_large.
        variant: the official variant of that preset.
    """
    suffix = Path(output).suffix
    if suffix not in (".png", ".gif", ".mp4"):
        raise ConfigError(f"output must end in .png, .gif or .mp4, got {output!r}")
    check_output(output, checkpoint, video)
    require(len(ratio) > 0, "ratio must name at least one", ratio)
    for r in ratio:
        require(0 <= r < 1, "ratio must be in [0, 1)", r)
    require(0 <= at <= 1, "at must be in [0, 1]", at)
    require(0 < sampling_rate < 2**31, "sampling_rate must be positive", sampling_rate)
    check_seed(seed)
    net = load_model(checkpoint, preset(model, variant) if model else None)
    target = net.cfg.target
    require(target.startswith("pixels"), "there are no pixels to draw: model.target is", target)
    clip = load_clip(video, net, at, sampling_rate)
    panels = [draw_panel(net, clip, r, strategy, seed) for r in ratio]
    if suffix == ".png":
        save_png(panels, output, net, Path(video).name)
    else:
        save_movie(panels, output, net, Path(video).name)
    print(f"wrote {output}")


def load_clip(video: str, model: MaskedAutoencoder, at: float, sampling_rate: int) -> Source:
    """A clip [1, 3, T, S, S]: the centre square of official frames from `at` on."""
    cfg = model.cfg
    try:
        with VideoReader(video) as reader:
            span = sampling_rate * cfg.num_frames / FPS * reader.fps
            start = at * max(reader.num_frames - span, 0)
            rng = np.random.default_rng(0)  # draws nothing: the clip fills its window
            index = clip_indices(
                rng,
                reader.num_frames,
                reader.fps,
                cfg.num_frames,
                sampling_rate,
                FPS,
                lo=start,
                hi=start + span,
            )
            wanted, where = index.unique(return_inverse=True)
            found = reader.pictures(wanted.tolist())
    except BadVideo as e:
        raise DataError(str(e)) from e
    side = min(found.height, found.width)
    box = (found.height - side) // 2, (found.width - side) // 2, side, side
    return found.source([(where.tolist(), box, False)], cfg.img_size)


@dataclass
class Panel:
    """The four rows of one masking ratio: uint8 [4, frames, S, S, 3]."""

    ratio: float
    loss: float
    rows: np.ndarray


@torch.no_grad()
def draw_panel(
    model: MaskedAutoencoder, clip: Source, ratio: float, strategy: str, seed: int
) -> Panel:
    """Run the model on one clip; normalised patches are denormalised with the target's own
    mean and deviation, which a model without the original could not know."""
    cfg, spec = model.cfg, model.spec
    samples = torch.zeros(1, dtype=torch.int64, device="cpu")
    keep, masked = draw_ids(strategy, cfg.grid, ratio, seed=seed, step=0, samples=samples)
    loss, pred, mask = model(clip, ids_keep=keep, ids_mask=masked, full_pred=True)
    everything = torch.arange(cfg.num_patches, device="cpu")[None]
    target = targets(spec, clip, everything, torch.float32)
    _, mean, std = norm_target(target, spec.norm_pix, cfg.in_chans)
    pred = pred * std + mean
    hidden = mask[..., None]
    grey = torch.full_like(target, (0.5 - spec.mean) / spec.std)
    rows = [
        target,
        torch.where(hidden > 0, grey, target),
        pred,
        torch.where(hidden > 0, pred, target),
    ]
    pixels = torch.stack([model.unpatchify(r)[0] for r in rows])  # [4, 3, frames, S, S]
    pixels = ((pixels * spec.std + spec.mean) * 255).round().clamp(0, 255).byte()
    return Panel(ratio, float(loss), pixels.permute(0, 2, 3, 4, 1).numpy())


def _caption(model: MaskedAutoencoder, name: str) -> str:
    text = f"{name}: {model.cfg.num_frames} frames of {model.cfg.img_size} x {model.cfg.img_size}"
    if model.spec.norm_pix != "none":
        text += "; predicted patches are given the original's own mean and contrast"
    return text


def save_png(panels: list[Panel], output: str, model: MaskedAutoencoder, name: str) -> None:
    """One row of frames for each of the four pictures, one group a ratio."""
    frames = panels[0].rows.shape[1]
    lines = len(panels) * len(ROWS)
    figure, _ = new_figure(1.25 * frames + 0.3, 1.42 * lines + 0.5, lines)
    figure.suptitle(_caption(model, name), fontsize=9, parse_math=False)
    for i, axis in enumerate(figure.axes):
        panel = panels[i // len(ROWS)]
        strip = panel.rows[i % len(ROWS)]  # [frames, S, S, 3]
        strip = np.pad(strip, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        axis.imshow(np.concatenate(list(strip), axis=1))
        title = ROWS[i % len(ROWS)]
        if i % len(ROWS) == 0:
            title += f"   ({panel.ratio:.0%} masked, loss {panel.loss:.3f})"
        axis.set_title(title, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    write_figure(output, figure, dpi=120)


def save_movie(panels: list[Panel], output: str, model: MaskedAutoencoder, name: str) -> None:
    """The four pictures side by side, one line a ratio, as a .gif or .mp4 of 6 frames a second."""
    drawn = []
    for t in range(panels[0].rows.shape[1]):
        figure, axes = new_figure(9.6, 2.6 * len(panels) + 0.4, len(panels), len(ROWS))
        figure.suptitle(_caption(model, name), fontsize=8, parse_math=False)
        for line, panel in zip(axes, panels, strict=True):
            for axis, title, row in zip(line, ROWS, panel.rows, strict=True):
                axis.imshow(row[t])
                axis.set_title(title, fontsize=8)
                axis.axis("off")
        figure.canvas.draw()
        image = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        drawn.append(np.ascontiguousarray(image[: image.shape[0] // 2 * 2]))
    content = io.BytesIO()
    if output.endswith(".gif"):
        from PIL import Image

        first, *rest = [Image.fromarray(d) for d in drawn]
        first.save(content, "gif", save_all=True, append_images=rest, duration=170, loop=0)
        return write(output, content.getvalue())
    import av

    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=6)
        stream.height, stream.width = drawn[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for image in drawn:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    write(output, content.getvalue())
