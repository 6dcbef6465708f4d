"""Pictures: the right pixels in the right rows, and every kind of file."""

import sys

import numpy as np
import pytest
import torch

from mae_fast import MaskedAutoencoder, checkpoint, preset
from mae_fast.config import Config
from mae_fast.config_file import to_dict
from mae_fast.errors import ConfigError, DataError
from mae_fast.ops.masked_mse import NORM_PIX
from mae_fast.reconstruction import draw_panel, load_clip, reconstruct


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with a checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    cfg = preset("vit_tiny", img_size=32, depth=1, decoder_depth=1)
    model = MaskedAutoencoder(cfg)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(folder, 1, model, optimizer, {"config": to_dict(Config(model=cfg))}, keep=1)
    return str(folder / "checkpoint-00000001.safetensors"), model


@pytest.mark.parametrize("norm_pix", NORM_PIX)
def test_rows_hold_what_their_names_say(norm_pix):
    cfg = preset("vit_tiny", img_size=32, depth=1, decoder_depth=1)
    model = MaskedAutoencoder(cfg)
    model.spec = model.spec._replace(norm_pix=norm_pix)
    pixels = torch.randint(0, 256, (1, 3, 16, 32, 32))
    clip = (pixels / 255 - 0.45) / 0.225
    panel = draw_panel(model, clip, 0.75, "random", seed=0)
    original, masked, predicted, together = panel.rows.astype(int)
    frames = pixels[0, :, list(cfg.target_frames)].permute(1, 2, 3, 0).numpy()
    assert np.array_equal(original, frames)
    hidden = (masked != original).any(-1)
    assert hidden.mean() == pytest.approx(0.75, abs=0.02)
    assert (masked[hidden] == 128).all()
    assert np.array_equal(together[hidden], predicted[hidden])
    assert np.array_equal(together[~hidden], original[~hidden])
    if norm_pix != "none":  # of zeros it is the mean, of the patch or of each channel
        axis = (0, 1) if norm_pix == "channel" else None
        with torch.no_grad():
            model.decoder_pred.weight.zero_()
            model.decoder_pred.bias.zero_()
        flat = draw_panel(model, clip, 0.75, "random", seed=0).rows[2].astype(float)
        assert flat[0, :16, :16].std(axis).max() < 1
        means = [x[0, :16, :16].mean(axis) for x in (flat, original)]
        assert means[0] == pytest.approx(means[1], abs=1)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".mp4"])
def test_files_are_pictures_of_the_right_length(trained, folder, tmp_path, suffix):
    import av

    out = tmp_path / f"picture{suffix}"
    path = str(folder / "v0.mp4")
    reconstruct(trained[0], path, str(out), ratio=(0.75, 0.9), sampling_rate=1)
    with av.open(str(out)) as container:
        images = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(images) == (1 if suffix == ".png" else 8)
    assert all(image.std() > 20 for image in images)


def test_clip_is_the_centre_of_official_frames(trained, video, tmp_path):
    path = video.write(tmp_path / "v.mp4", 64, rate=30)
    clip = load_clip(str(path), trained[1], at=0.0, sampling_rate=4)
    assert clip.shape == (1, 3, 16, 32, 32)


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_without_matplotlib_it_is_asked_for(trained, folder, tmp_path, monkeypatch, suffix):
    for name in [n for n in sys.modules if n.startswith("matplotlib")] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        reconstruct(trained[0], str(folder / "v0.mp4"), str(tmp_path / f"picture{suffix}"))


def test_what_cannot_be_drawn_is_said(trained, folder, tmp_path):
    video = str(folder / "v0.mp4")
    with pytest.raises(ConfigError, match=r"picture\.jpeg"):
        reconstruct(trained[0], video, str(tmp_path / "picture.jpeg"))
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.mp4"):
        reconstruct(trained[0], str(tmp_path / "empty.mp4"), str(tmp_path / "out.png"))


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_name_is_no_mathematics(trained, folder, tmp_path, suffix):
    """matplotlib reads what stands between two $ as TeX."""
    video = tmp_path / "$x_{$.mp4"
    video.symlink_to(folder / "v0.mp4")
    reconstruct(trained[0], str(video), str(tmp_path / f"$x_{{$ out{suffix}"), sampling_rate=1)
    assert (tmp_path / f"$x_{{$ out{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(ratio=(0.9, 1.0)), r"ratio must be in \[0, 1\), got 1.0"),
        (dict(ratio=(-0.1,)), "got -0.1"),
        (dict(ratio=(float("nan"),)), "got nan"),
        (dict(ratio=()), "ratio must name at least one"),
        (dict(at=float("nan")), r"at must be in \[0, 1\], got nan"),
        (dict(at=1.5), "got 1.5"),
        (dict(sampling_rate=0), "sampling_rate must be positive, got 0"),
        (dict(sampling_rate=-1), "got -1"),
        (dict(seed=-1), "seed must be in .*, got -1"),
        (dict(seed=2**64), "seed must be in"),
        (dict(model="vit_tny"), "did you mean 'vit_tiny'"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_refused(trained, folder, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        reconstruct(trained[0], str(folder / "v0.mp4"), str(tmp_path / "out.png"), **options)
    assert not (tmp_path / "out.png").exists()
