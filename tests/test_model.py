"""The native model: names, loading, shapes and refusals."""

import subprocess
import sys

import pytest
import torch

import mae_fast
from mae_fast import MaskedAutoencoder, ModelConfig, preset
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.weights import load_model, load_weights, to_mae_st


def test_the_public_names_are_there_without_another_import():
    code = "import mae_fast; print([getattr(mae_fast, n) for n in mae_fast.__all__][0] is not None)"
    code += "; mae_fast.data.make_loader; mae_fast.masking.draw_ids"
    code += "; import mae_fast.weights, mae_fast.train, mae_fast.reconstruction"
    code += (
        "; assert all(map(callable, (mae_fast.convert, mae_fast.reconstruct, mae_fast.pretrain)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "True\n", run.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mae_fast.nothing  # noqa: B018


def _video(cfg, batch=2):
    shape = (batch, 3, cfg.num_frames, cfg.img_size, cfg.img_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_vit_large_has_the_official_names_and_size():
    with torch.device("meta"):
        model = MaskedAutoencoder(preset("vit_large"))
    state = model.state_dict()
    assert len(state) == 467
    assert sum(p.numel() for p in model.parameters()) == 317_731_584
    expected = {
        "cls_token": (1, 1, 1024),
        "decoder_cls_token": (1, 1, 512),
        "pos_embed_spatial": (1, 196, 1024),
        "pos_embed_temporal": (1, 8, 1024),
        "pos_embed_class": (1, 1, 1024),
        "mask_token": (1, 1, 512),
        "decoder_pos_embed_spatial": (1, 196, 512),
        "decoder_pos_embed_temporal": (1, 8, 512),
        "decoder_pos_embed_class": (1, 1, 512),
        "patch_embed.proj.weight": (1024, 3, 2, 16, 16),
        "blocks.23.attn.q.weight": (1024, 1024),
        "blocks.23.mlp.fc1.bias": (4096,),
        "decoder_blocks.3.attn.proj.bias": (512,),
        "decoder_blocks.3.mlp.fc2.weight": (512, 2048),
        "decoder_pred.weight": (768, 512),
    }
    assert {k: tuple(state[k].shape) for k in expected} == expected


@pytest.mark.parametrize(("name", "count"), [("vit_base", 99_898_880), ("vit_huge", 645_232_460)])
def test_parameter_counts_are_the_official_ones(name, count):
    with torch.device("meta"):
        model = MaskedAutoencoder(preset(name))
    assert sum(p.numel() for p in model.parameters()) == count


def test_to_mae_st_gives_parameters_and_gradients(tiny_cfg):
    model = MaskedAutoencoder(tiny_cfg)
    assert list(to_mae_st(model)) == [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="cls_token has no gradient"):
        to_mae_st(model, "grad")
    model(_video(tiny_cfg), 0.75)[0].backward()
    grads = to_mae_st(model, what="grad")
    assert torch.equal(grads["norm.weight"], model.norm.weight.grad)
    with pytest.raises(ValueError, match="'gradient'"):
        to_mae_st(model, "gradient")


def test_loading_names_what_does_not_fit(tiny_cfg, tmp_path):
    model = MaskedAutoencoder(tiny_cfg)
    state = model.state_dict()
    del state["norm.weight"]
    state["head.weight"] = torch.zeros(3)
    state["mask_token"] = torch.zeros(1, 1, 99)
    path = tmp_path / "weights.pth"
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError) as e:
        load_model(path, tiny_cfg)
    for words in ("norm.weight", "head.weight", "mask_token", "[1, 1, 99]", "[1, 1, 16]"):
        assert words in str(e.value), words


def test_official_pth_with_namespace_loads_without_unpickling_code(tiny_cfg, tmp_path):
    import argparse

    model = MaskedAutoencoder(tiny_cfg)
    path = tmp_path / "checkpoint-00099.pth"
    args = argparse.Namespace(lr=1e-3, model="mae_vit_large_patch16")
    torch.save({"model": model.state_dict(), "args": args, "epoch": 99}, path)
    assert load_weights(path)[0] is None
    again = load_model(path, tiny_cfg)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    with pytest.raises(ConfigError, match="vit_large"):
        load_model(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        load_weights(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04cut"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_broken_file_is_refused_with_its_name(tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="broken"):
        load_weights(path)


def test_default_pred_is_of_masked_patches_only(tiny_cfg):
    model = MaskedAutoencoder(tiny_cfg)
    loss, pred, mask = model(_video(tiny_cfg), 0.75)
    assert loss.shape == () and pred.shape == (2, 12, 192) and mask.shape == (2, 16)
    assert model(_video(tiny_cfg), 0.75, full_pred=True)[1].shape == (2, 16, 192)


def test_generator_noise_and_ids_give_the_same_mask(tiny_cfg):
    model, video = MaskedAutoencoder(tiny_cfg), _video(tiny_cfg)
    a = model(video, 0.75, generator=torch.Generator().manual_seed(5))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(5))
    b = model(video, 0.75, noise=noise)
    c = model(video, ids_keep=noise.argsort(1)[:, :4])
    assert torch.equal(a[2], b[2]) and torch.equal(a[2], c[2])
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[0], c[0])


def test_uint8_and_float_clips_agree(tiny_cfg):
    model, video, noise = MaskedAutoencoder(tiny_cfg), _video(tiny_cfg), torch.rand(2, 16)
    a = model(video, 0.75, noise=noise)[0]
    b = model((video.float() / 255 - 0.45) / 0.225, 0.75, noise=noise)[0]
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["mae_st", "slowfast"])
@pytest.mark.parametrize("cls_embed", [True, False], ids=["cls", "no_cls"])
@pytest.mark.parametrize("sep", [True, False], ids=["separable", "joint"])
def test_gradients_against_finite_differences(variant, cls_embed, sep, tiny_cfg):
    changes = dict(variant=variant, cls_embed=cls_embed, sep_pos_embed=sep, depth=1)
    model = MaskedAutoencoder(ModelConfig(**{**tiny_cfg.__dict__, **changes})).double()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    video, noise = _video(tiny_cfg, 1), torch.rand(1, 16)
    model(video, 0.75, noise=noise)[0].backward()
    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        ahead, behind = [], []
        for sign, out in ((1, ahead), (-1, behind)):
            p.data.add_(sign * 1e-6 * direction)
            with torch.no_grad():
                out.append(model(video, 0.75, noise=noise)[0].item())
            p.data.sub_(sign * 1e-6 * direction)
        slope = (ahead[0] - behind[0]) / 2e-6
        assert slope == pytest.approx((p.grad * direction).sum().item(), rel=1e-5, abs=1e-7), name


def test_unpatchify_keeps_no_state(tiny_cfg):
    a = MaskedAutoencoder(tiny_cfg)
    b = MaskedAutoencoder(ModelConfig(**{**tiny_cfg.__dict__, "img_size": 32}))
    b.unpatchify(torch.rand(1, 64, 192))
    video = a.unpatchify(torch.rand(2, 16, 192))
    assert video.shape == (2, 3, 4, 16, 16)
    with pytest.raises(ValueError, match=r"\[2, 15, 192\]"):
        a.unpatchify(torch.rand(2, 15, 192))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"video": torch.zeros(2, 3, 8, 16, 17)}, "[2, 3, 8, 16, 17]"),
        ({"video": torch.zeros(3, 8, 16, 16)}, "[3, 8, 16, 16]"),
        ({"noise": torch.rand(2, 15)}, "[2, 15]"),
        ({"ids_keep": torch.tensor([[0, 1]])}, "1 rows for 2"),
        ({"mask_ratio": 1.0}, "1.0"),
    ],
    ids=["size", "dims", "noise", "ids", "ratio"],
)
def test_bad_arguments_name_the_value(tiny_cfg, arguments, words):
    model = MaskedAutoencoder(tiny_cfg)
    arguments = {"video": _video(tiny_cfg), "mask_ratio": 0.75, **arguments}
    with pytest.raises(ValueError) as e:
        model(**arguments)
    assert words in str(e.value)


def test_bf16_autocast_keeps_an_fp32_loss(tiny_cfg):
    model, video, noise = MaskedAutoencoder(tiny_cfg), _video(tiny_cfg), torch.rand(2, 16)
    exact = model(video, 0.75, noise=noise)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(video, 0.75, noise=noise)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and model.norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_a_preset_s_name_stands_for_its_configuration():
    with torch.device("meta"):
        assert MaskedAutoencoder("vit_tiny").cfg == preset("vit_tiny")
    with pytest.raises(ValueError, match="unknown model 'vit_tny'; did you mean 'vit_tiny'"):
        MaskedAutoencoder("vit_tny")
    with pytest.raises(ValueError, match="a model is a ModelConfig or a preset's name, got 3"):
        MaskedAutoencoder(3)


@pytest.mark.parametrize("which", ["noise", "ids_keep", "ids_mask"])
def test_ids_on_another_device_are_refused_with_both_devices(tiny_cfg, which):
    """They gave numbers that nobody wrote. The meta device stands in for another."""
    model, video = MaskedAutoencoder(tiny_cfg), torch.zeros(1, 3, 8, 16, 16)
    ids = torch.arange(tiny_cfg.num_patches, dtype=torch.int32)[None]
    given = {"ids_keep": ids[:, :4], "ids_mask": ids[:, 4:]}
    if which == "noise":
        given = {"noise": torch.rand(1, tiny_cfg.num_patches)}
    given[which] = given[which].to("meta")
    with pytest.raises(ValueError, match=f"on one device, got video on cpu.*{which} on meta"):
        model(video, **given)


def test_natural_mistakes_of_a_call_are_named(tiny_cfg):
    model, video = MaskedAutoencoder(tiny_cfg), torch.zeros(2, 3, 8, 16, 16)
    length = tiny_cfg.num_patches
    with pytest.raises(ValueError, match="mask_ratio 0 leaves nothing to predict"):
        model(video, mask_ratio=0)
    with pytest.raises(ValueError, match=r"video must be uint8, or float.*got torch.int64"):
        model(video.long())
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[:, 4:] = True
    with pytest.raises(ValueError, match=r"got torch.bool .*\(~mask\).nonzero\(\)"):
        model(video, ids_keep=mask)
    B = len(mask)
    ids = (~mask).nonzero()[:, 1].view(B, -1)  # as the message has it
    assert torch.equal(model(video, ids_keep=ids)[2], mask.float())
    with pytest.raises(ValueError, match="ids_mask is given without ids_keep"):
        model(video, ids_mask=ids)


def test_load_model_takes_a_preset_s_name(tmp_path):
    small = dict(depth=1, decoder_depth=1, img_size=32)
    with pytest.raises(ConfigError, match="unknown model 'vit_tny'; did you mean 'vit_tiny'"):
        load_model(tmp_path / "none.pth", "vit_tny")
    path = tmp_path / "weights.pth"
    torch.save({"model": MaskedAutoencoder(preset("vit_tiny", **small)).state_dict()}, path)
    with pytest.raises(CheckpointError, match="does not fit the model"):  # it is vit_tiny, whole
        load_model(path, "vit_tiny")
