"""A disk that is full or read-only, or a name that cannot be: one line and exit code 73."""

import errno
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_fast import MaskedAutoencoder, checkpoint, cli, figures, files, preset
from mae_fast.config import Config
from mae_fast.config_file import to_dict
from mae_fast.data.index import VideoRow, write_index
from mae_fast.errors import ConfigError, WriteError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{what is written: the command that writes it to a path}."""
    folder = tmp_path_factory.mktemp("commands")
    cfg = preset("vit_tiny", img_size=32, depth=1, decoder_depth=1)
    model = MaskedAutoencoder(cfg)
    state = {"config": to_dict(Config(model=cfg))}
    saved = checkpoint.save(folder, 1, model, torch.optim.SGD(model.parameters()), state, keep=1)
    import av

    with av.open(str(folder / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        for i in range(20):
            frame = np.full((64, 64, 3), 10 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    record = (ROOT / "benchmarks/results/steps.jsonl").read_text().splitlines()[0]
    (folder / "records.jsonl").write_text(record + "\n")
    video, drawn = str(folder / "v.mp4"), ["reconstruct", "--checkpoint", str(saved)]
    return {
        "index.jsonl": ["index", video, "--workers", "1", "-o"],
        "index.parquet": ["index", video, "--workers", "1", "-o"],
        **{f"{x}.{x}": [*drawn, "--video", video, "-o"] for x in ("png", "gif", "mp4")},
        "out.safetensors": ["convert", str(saved), "--to", "slowfast", "-o"],
        "page.html": ["report", str(folder / "records.jsonl"), "-o"],
    }


WRITTEN = ["index.jsonl", "index.parquet", "png.png", "gif.gif", "mp4.mp4"]
WRITTEN += ["out.safetensors", "page.html"]


def refusal(command, path, capsys) -> str:
    assert cli.main([*command, str(path)]) == 73
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert said.startswith("error: cannot write ") and str(path) in said, said
    return said


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(name, commands, tmp_path, capsys):
    """The kernel refuses files longer than 200 bytes, as a full disk does."""
    if name == "index.parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        said = refusal(commands[name], path, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in said
    assert path.read_bytes() == b"before"
    assert sorted(set(os.listdir(tmp_path)) - {name + ".partial"}) == [name]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_read_only_disk_is_one_line(name, commands, tmp_path, capsys, monkeypatch):
    """Root may write everywhere, so the system's answer is given by hand."""
    if name == "index.parquet":
        pytest.importorskip("pyarrow")
    import builtins

    opened = builtins.open

    def read_only(path, mode="r", *args, **kwargs):
        if str(path).startswith(str(tmp_path)) and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", read_only)
    if name == "out.safetensors":
        monkeypatch.setattr(checkpoint, "save_file", lambda t, path, m: read_only(path, "wb"))
    said = refusal(commands[name], tmp_path / name, capsys)
    assert "Read-only file system" in said and os.listdir(tmp_path) == []


INPUTS = {
    "index": ["index", "a.jsonl", "-o", "a.jsonl"],
    "features of a checkpoint": ["features", "a.jsonl", "b", "-o", "a.jsonl"],
    "features of an index": ["features", "b", "a.jsonl", "-o", "./a.jsonl"],
    "probe": ["probe", "b", "a.jsonl", "-o", "a.jsonl"],
    "reconstruct": ["reconstruct", "--checkpoint", "b", "--video", "v.mp4", "-o", "v.mp4"],
    "convert": ["convert", "w.safetensors", "--to", "mae_st", "-o", "link.safetensors"],
    "report": ["report", "a.jsonl", "-o", "a.jsonl"],
    "bench data": ["bench", "data", "a.jsonl", "-o", "a.jsonl"],
    "pack": ["pack", "a.jsonl", "-o", "."],
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_is_read_is_not_written_over(name, commands, tmp_path, capsys, monkeypatch):
    """A video, a checkpoint or an index by the name of the output; `pack` writes index.jsonl."""
    monkeypatch.chdir(tmp_path)
    rows = [VideoRow(commands["png.png"][4], frames=20, fps=25.0, width=64, height=64)]
    write_index(rows, Path("index.jsonl"))
    for path in ("a.jsonl", "b", "v.mp4", "w.safetensors"):
        Path(path).write_bytes(Path("index.jsonl").read_bytes())
    Path("link.safetensors").symlink_to("w.safetensors")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert cli.main(INPUTS[name]) == ConfigError.exit_code
    assert "choose another --output" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize("verb", ["ops --quick", "step --steps 2", "finetune --model quick"])
def test_a_file_of_something_else_gets_no_record(verb, tmp_path, capsys):
    path = tmp_path / "config.toml"
    path.write_text("recipe = 'mae_st'\n")
    assert cli.main(["bench", *verb.split(), "--out", str(path)]) == ConfigError.exit_code
    assert f"{path}:1: not JSON" in capsys.readouterr().err
    assert path.read_text() == "recipe = 'mae_st'\n"


@pytest.mark.parametrize(
    "words", ["features a b -o", "probe a b -o", "bench data a -o", "bench ops --out",
              "bench step --out", "bench finetune --out", "bench ratio --quick --out"],
)  # fmt: skip
def test_what_cannot_be_written_is_told_before_the_work(words, tmp_path, capsys):
    """None of a and b is there: nothing was read."""
    (tmp_path / "file").touch()
    refusal(words.split(), tmp_path / "file" / "out", capsys)


def test_a_device_is_written_where_its_folder_is_not(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    files.check_output(os.devnull)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_or_a_file_in_the_way_is_one_line(name, commands, tmp_path, capsys):
    if name == "index.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "file").touch()
    (tmp_path / name).mkdir()
    refusal(commands[name], tmp_path / name, capsys)
    refusal(commands[name], tmp_path / "file" / name, capsys)


def test_a_device_is_written_to_not_replaced(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "link.jsonl").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"link\.jsonl: No space left on device"):
        write_index([VideoRow("a.mp4", frames=3, fps=1.0)], tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink() and os.path.exists("/dev/full")


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    files.write(tmp_path / "link", "text \udcff")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_bytes() == b"text \xff"


def test_a_disk_fault_of_any_command_is_one_line(monkeypatch, capsys):
    from mae_fast import info

    def fail(json: bool = False) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/x.json")

    monkeypatch.setattr(info, "info", fail)
    assert cli.main(["info"]) == 73
    assert capsys.readouterr().err == "error: cannot write /runs/x.json: No space left on device\n"


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path):

    with pytest.raises(ConfigError, match=r"a\.xyz"):
        figures.write_figure(tmp_path / "a.xyz", figures.figure(1, 1)[0], dpi=50)
