"""Weights as other scripts save them, and hostile files: no code is run, and one line is said."""

import argparse
import zipfile

import numpy as np
import pytest
import torch
from convertible import SIZE, make
from safetensors.torch import load_file, save_file

from mae_fast import cli
from mae_fast.errors import CheckpointError, ConfigError
from mae_fast.weights import Size, load_model, load_weights, translate
from mae_fast.weights.families import FAMILIES, _apart, identify


def test_videomaes_own_file_loads_with_numpys_numbers_and_runs_none_of_numpys_code(
    tmp_path, monkeypatch
):
    """As its save_model writes it: args, and an optimizer whose rates are numpy's."""
    model = make("videomae")
    optimizer = torch.optim.AdamW(model.parameters())
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = np.float64(1e-3), np.linspace(0, 1, 3)[1]
    args = argparse.Namespace(lr=np.float32(1), seed=np.int64(3), device="cuda", betas=[0.9, 0.95])
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "args": args}
    kept |= {"epoch": np.int64(7), "scaler": {"scale": 65536.0}, "draws": np.arange(3)}
    kept |= {"kind": np.dtype("float16"), "flag": np.bool_(True)}
    torch.save(kept, tmp_path / "checkpoint-7.pth")
    old = (tmp_path / "checkpoint-7.pth").read_bytes()
    # numpy 1 calls its module core, numpy 2 _core.
    _, weights = load_weights(tmp_path / "checkpoint-7.pth")
    assert "patch_embed.proj.weight" in weights
    out = tmp_path / "out.safetensors"
    command = ["convert", str(tmp_path / "checkpoint-7.pth"), "--to", "videomae", "-o", str(out)]
    assert cli.main(command) == 0
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in load_file(out).items())
    assert old == (tmp_path / "checkpoint-7.pth").read_bytes()


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpys_numbers_are_inert_under_both_of_its_names(core, tmp_path):
    torch.save({"model": make("mae_st").state_dict(), "x": np.float64(2.5)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as a, zipfile.ZipFile(tmp_path / "b.pth", "w") as b:
        for name in a.namelist():
            data = a.read(name)
            if name.endswith("data.pkl"):
                for was in (b"cnumpy._core.", b"cnumpy.core."):
                    data = data.replace(was, b"cnumpy." + core.encode() + b".")
                assert b"multiarray\nscalar" in data
            b.writestr(name, data)
    assert "blocks.0.norm1.weight" in load_weights(tmp_path / "b.pth")[1]


def test_separate_qkv_of_slowfast_stays_separate():
    fused = make("slowfast").state_dict()
    apart = _apart(fused)
    assert not any("qkv" in n for n in apart) and identify(apart) == "slowfast"
    again, report = translate(apart, "slowfast")
    assert report.lost == report.made == [] and again.keys() == apart.keys()
    assert all(torch.equal(again[n], t) for n, t in apart.items())
    again, _ = translate(fused, "slowfast")
    assert again.keys() == fused.keys()
    there, _ = translate(apart, "mae_st", size=SIZE)
    assert all(
        torch.equal(there[n], t) for n, t in translate(fused, "mae_st", size=SIZE)[0].items()
    )


@pytest.mark.parametrize("option", ["--img-size", "--num-frames", "--source-num-frames"])
@pytest.mark.parametrize("value", ["0", "-8", "33", "x", "1e9", str(2**40)])
def test_sizes_out_of_range_are_refused_with_their_value(option, value, tmp_path, capsys):
    if option == "--source-num-frames" and value == "33":
        pytest.skip("a count that is not asked for where nothing is interpolated")
    torch.save(make("mae_st").state_dict(), tmp_path / "mae.pth")
    for to in FAMILIES:
        if option == "--num-frames" and value == "33" and to == "timm-vit":
            continue
        out = tmp_path / "out.safetensors"
        command = ["convert", str(tmp_path / "mae.pth"), "--to", to, "-o", str(out), option, value]
        assert cli.main(command) == 2, (to, option, value)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and option[2:].replace("-", "_") in said.replace("-", "_")
        assert value in said and not out.exists()


def test_a_patch_of_no_frames_is_refused():
    with pytest.raises(ConfigError, match="t_patch_size must be positive, got 0"):
        translate(make("timm-vit").state_dict(), "mae_st", size=Size(t_patch_size=0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patch_embed.proj.weight", torch.ones(24, 3)),
        ("patch_embed.proj.weight", torch.ones(24, 3, 2, 8, 4)),
        ("patch_embed.proj.bias", torch.ones(())),
        ("blocks.0.attn.q.weight", torch.ones(24, 23)),
        ("blocks.0.attn.k.bias", torch.ones(7)),
        ("blocks.1.norm1.bias", torch.ones(1, 24)),
        ("blocks.1.mlp.fc1.weight", torch.ones(0, 24)),
        ("blocks.1.mlp.fc1.weight", torch.ones(96, 24, dtype=torch.int64)),
        ("cls_token", torch.ones(24)),
        ("pos_embed_spatial", torch.ones(1, 16, 25)),
        ("mask_token", torch.ones(1, 1, 24)),
        ("decoder_blocks.0.norm1.weight", torch.ones(13)),
    ],
)
def test_weights_of_odd_shapes_are_refused_by_name(name, value):
    state = make("mae_st").state_dict()
    state[name] = value
    for to in FAMILIES:
        with pytest.raises(CheckpointError, match=name):
            translate(state, to, size=SIZE)


@pytest.mark.parametrize(
    "text",
    ['{"path": "a.mp4"}', 'recipe = "mae_st"', "", "\0" * 99],
    ids=["index", "toml", "empty", "zeros"],
)
def test_a_file_of_something_else_is_named_as_that(text, tmp_path, capsys):
    """torch asks for weights_only=False there, which nobody can give, nor should."""
    (tmp_path / "index.jsonl").write_text(text)
    command = ["convert", str(tmp_path / "index.jsonl"), "--to", "mae_st", "-o", "out.safetensors"]
    assert cli.main(command) == 73
    said = capsys.readouterr().err
    assert "index.jsonl: not a whole file of torch.save: " in said
    assert said.count("\n") == 1 and "weights_only" not in said


def test_tables_that_are_no_weights_are_refused(tmp_path):
    state = make("mae_st").state_dict()
    for tree in ({}, {"model": {}}, {**state, 3: torch.ones(1)}, {**state, "x": 3}, [state], 3):
        torch.save(tree, tmp_path / "odd.pth")
        with pytest.raises(CheckpointError, match=r"odd\.pth holds no table of weights"):
            load_model(tmp_path / "odd.pth", "vit_tiny")
    sparse = torch.ones(2, 2).to_sparse()
    torch.save({**state, "x": sparse}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth"):
        load_model(tmp_path / "odd.pth", "vit_tiny")


def test_what_does_not_fit_is_one_line(tmp_path):
    torch.save(make("mae_st").state_dict(), tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*size mismatch") as e:
        load_model(tmp_path / "mae.pth", "vit_tiny")
    assert "\n" not in str(e.value)


HEADERS = {
    "state_is_a_list": dict(mae_fast="[]"),
    "state_is_cut": dict(mae_fast='{"step": 1'),
    "state_is_deep": dict(mae_fast="[" * 10**5),
    "no_step": dict(mae_fast='{"config": {}}'),
    "no_config": dict(mae_fast='{"step": 1}'),
    "config_is_a_word": dict(mae_fast='{"step": 1, "config": "x"}'),
    "model_is_a_list": dict(mae_fast='{"step": 1, "config": {"model": []}}'),
    "unknown_field": dict(mae_fast='{"step": 1, "config": {"model": {"x": 1}}}'),
    "wrong_kind": dict(mae_fast='{"step": 1, "config": {"model": {"depth": "12"}}}'),
    "impossible": dict(mae_fast='{"step": 1, "config": {"model": {"img_size": 0}}}'),
    "crc": dict(mae_fast='{"step": 1, "config": {"model": {}}}', crc32="x"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_odd_states_in_a_safetensors_file_are_one_line(name, tmp_path, capsys):
    path = tmp_path / "odd.safetensors"
    save_file({"model.x": torch.ones(2)}, path, HEADERS[name])
    command = ["convert", str(path), "--to", "mae_st", "-o", str(tmp_path / "out.safetensors")]
    assert cli.main(command) == 73
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "odd.safetensors" in said


def _file(header: bytes, data: bytes = b"\0" * 8, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


ONE = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
FILES = {
    "empty": b"",
    "zeros": b"\0" * 64,
    "huge_header": _file(b"{}", size=2**62),
    "header_beyond_the_file": _file(ONE + b"}", size=500),
    "not_json": _file(b"not json"),
    "latin_1": _file(b'{"\xe9":1}'),
    "deep": _file(b"[" * 10**5),
    "metadata_is_a_list": _file(ONE + b',"__metadata__":[1]}'),
    "metadata_of_numbers": _file(ONE + b',"__metadata__":{"a":1}}'),
    "cut": _file(ONE + b"}", b"\0" * 5),
    "longer": _file(ONE + b"}", b"\0" * 16),
    "overlap": _file(ONE + b',"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', b"\0" * 12),
    "backwards": _file(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}'),
    "shape": _file(b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'),
    "dtype": _file(b'{"x":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}'),
    "too_many": _file(
        b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}'
    ),
    "no_family": _file(ONE + b"}"),
    "bits": _file(b'{"x":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}'),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_safetensors_files_are_one_line(name, tmp_path, capsys):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(FILES[name])
    for command in (
        ["convert", str(path), "--to", "mae_st", "-o", str(tmp_path / "out.safetensors")],
        ["reconstruct", "--checkpoint", str(path), "--video", "v.mp4", "--model", "vit_tiny"],
    ):
        assert cli.main(command) == 73
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
