"""The mae-fast command: help, exit codes, and what it says when something is wrong."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mae_fast import cli, errors, info
from mae_fast.config import Config, preset

COMMAND = [sys.executable, "-m", "mae_fast"]
NO_RICH = ModuleNotFoundError("No module named 'rich'", name="rich")


def exit_code(argv: list[str]) -> int:
    """main's exit code, also where it leaves by SystemExit as argparse does."""
    try:
        return cli.main(argv)
    except SystemExit as e:
        return e.code


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[model]\npreset = "vit_tiny"\n[train]\nbatch_size = 4\n')
    return str(path)


@pytest.fixture
def trained(monkeypatch) -> list[Config]:
    """The configurations with which mae_fast.train.pretrain was called."""
    calls: list[Config] = []
    monkeypatch.setitem(sys.modules, "mae_fast.train", types.SimpleNamespace(pretrain=calls.append))
    return calls


def test_every_option_of_pretrain_says_what_it_is(capsys):
    """tyro prints an attribute's docstring between the option and its default."""
    assert exit_code(["pretrain", "--help"]) == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    options = [i for i, line in enumerate(lines) if re.match("--[a-z]", line)]
    assert len(options) > 50
    silent = [lines[i] for i in options if lines[i + 1].startswith(("(default", "--"))]
    assert silent == []


@pytest.mark.parametrize("words", [["--model.preset", "vit_small"], ["--model.preset=vit_small"]])
def test_the_preset_is_an_option(config, trained, words):
    """It takes the place of the file's; other options change it."""
    assert exit_code(["pretrain", config, *words, "--model.depth", "3"]) == 0
    assert trained[0].model == preset("vit_small", depth=3)
    assert trained[0].train.batch_size == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.preset", "vit_smal"], "unknown model 'vit_smal'; did you mean 'vit_small'"),
        (["--model.preset"], "--model.preset: expected one argument"),
    ],
)
def test_a_preset_that_is_none_is_refused(config, trained, words, said, capsys):
    assert exit_code(["pretrain", config, *words]) == 2
    assert said in capsys.readouterr().err and not trained


def test_help_names_every_verb_without_torch():
    code = (
        "import sys; from mae_fast.cli import main; main(['--help']);"
        "assert not {'torch', 'triton', 'numpy', 'av'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for verb in cli.VERBS:
        assert verb in run.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verb_help(verb, capsys):
    assert exit_code([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: mae-fast {verb}" in out
    assert "default" in out


@pytest.mark.parametrize(
    ("argv", "near"),
    [(["inf"], "info"), (["pretrian"], "pretrain"), (["bench", "stp"], "bench step")],
    ids=["inf", "pretrian", "bench-stp"],
)
def test_unknown_verb_names_the_nearest(argv, near, capsys):
    assert exit_code(argv) == 2
    err = capsys.readouterr().err
    assert f"did you mean {near!r}" in err
    assert err.count("\n") == 1


def test_bench_alone_lists_its_verbs(capsys):
    assert exit_code(["bench"]) == 2
    assert "bench step" in capsys.readouterr().out


@pytest.mark.parametrize("spelling", ["--train.batch_size", "--train.batch-size"])
def test_pretrain_overrides_the_file(spelling, config, trained):
    assert exit_code(["pretrain", config, spelling, "8", "--mask.ratio", "0.75"]) == 0
    (cfg,) = trained
    assert (cfg.train.batch_size, cfg.mask.ratio, cfg.model.embed_dim) == (8, 0.75, 192)


def test_pretrain_takes_the_file_as_it_is(config, trained):
    assert exit_code(["pretrain", config]) == 0
    assert trained[0].train.batch_size == 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--train.batch_siz", "8"], "--train.batch-size"),
        (["--train.batch-size", "many"], "'many'"),
        (["--model.patch-size", "15"], "not divisible"),
    ],
    ids=["unknown-key", "not-a-number", "impossible"],
)
def test_pretrain_refuses(args, said, config, trained, capsys):
    assert exit_code(["pretrain", config, *args]) == 2
    assert said in capsys.readouterr().err
    assert not trained


@pytest.mark.parametrize(
    ("text", "said"),
    [("[train]\nbatch_siz = 8\n", "did you mean 'train.batch_size'"), ("[train\n", "run.toml")],
    ids=["unknown-key", "not-toml"],
)
def test_pretrain_refuses_a_file(text, said, tmp_path, trained, capsys):
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert exit_code(["pretrain", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert not trained


def test_pretrain_wants_the_file_first(capsys):
    assert exit_code(["pretrain", "--train.steps", "3"]) == 2
    assert "first argument is the TOML file" in capsys.readouterr().err


def test_index_wants_a_source(capsys):
    assert exit_code(["index"]) == 2
    assert "at least one folder" in capsys.readouterr().err


def test_index_passes_its_arguments(monkeypatch):
    calls = []
    data = types.SimpleNamespace(
        build_index=lambda *args, **options: calls.append((*args, *options.values()))
    )
    monkeypatch.setitem(sys.modules, "mae_fast.data", data)
    assert exit_code(["index", "a", "b.csv", "-o", "c.jsonl"]) == 0
    assert exit_code(["index", "a", "--workers", "3", "--weights", "1", "0.5"]) == 0
    assert exit_code(["index", "a", "--verify", "--root", "d"]) == 0
    assert calls == [
        (["a", "b.csv"], "c.jsonl", None, False, None, ()),
        (["a"], "index.jsonl", 3, False, None, (1.0, 0.5)),
        (["a"], "index.jsonl", None, True, "d", ()),
    ]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.DataError("no videos"), 65, "error: no videos\n"),
        (errors.CheckpointError("cut"), 73, "error: cut\n"),
        (NO_RICH, 2, "error: No module named 'rich' (pip install rich)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["data", "checkpoint", "no_package", "ctrl-c"],
)
def test_errors_are_one_line_and_an_exit_code(error, code, said, monkeypatch, capsys):
    def fail(json: bool = False) -> None:
        raise error

    monkeypatch.setattr(info, "info", fail)
    assert exit_code(["info"]) == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(info, "info", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])
    monkeypatch.setitem(sys.modules, "mae_fast.info", None)
    with pytest.raises(ModuleNotFoundError, match=r"mae_fast\.info"):
        cli.main(["info"])


def test_closed_pipe_is_quiet():
    run = subprocess.Popen(
        [*COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait() == 141


def test_info_json_is_one_document(capsys):
    assert exit_code(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sections = ["versions", "devices", "decoders", "ops", "backends", "optional libraries"]
    assert list(found) == sections
    assert set(found["optional libraries"]) == set(info.OPTIONAL)
    assert all(isinstance(v, str) and v for rows in found.values() for v in rows.values())


def test_info_gives_each_backend_a_reason():
    """Every backend that some op has and some machine has not, the attention libraries included."""
    from mae_fast.ops import OPS

    found = info.collect()
    backends = {b for op in OPS.values() for b in op.backends} - {"reference", "sdpa", "torch"}
    assert backends | {"cpp", "triton", "flash_attn_3", "sdpa_cudnn"} <= set(found["backends"])
    if found["devices"].get("cuda", "").startswith("none"):
        assert "no CUDA device" in found["backends"]["triton"]
        assert found["backends"]["sdpa_cudnn"] == "there is no CUDA device"
        assert found["backends"]["sdpa_math"] == "runs here"


def test_info_table_shows_brackets_as_they_are(monkeypatch, capsys):
    monkeypatch.setattr(info, "collect", lambda: {"devices": {"cuda": "none: [Errno 2] x"}})
    assert exit_code(["info"]) == 0
    assert "none: [Errno 2] x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("import os; os.abort()", "exit code -6"),
        ("print('noise')", None),
    ],
    ids=["import-error", "abort", "works"],
)
def test_info_survives_a_broken_library(body, reason, tmp_path, monkeypatch):
    (tmp_path / "frail.py").write_text(body)
    (tmp_path / "frail-1.2.dist-info").mkdir()
    (tmp_path / "frail-1.2.dist-info" / "METADATA").write_text("Name: frail\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(info, "OPTIONAL", {"frail": "frail", "absent-library": "absent"})
    found = info.collect()["optional libraries"]
    assert found["absent-library"] == "not installed"
    if reason is None:
        assert found["frail"] == "1.2"
    else:
        assert found["frail"].startswith("not used: 1.2 does not import: ")
        assert reason in found["frail"]


@pytest.mark.parametrize("stderr", ["pipe", "/dev/full", "closed"])
@pytest.mark.parametrize("words", ["pretrain nowhere.toml", "pretend"])
def test_an_error_that_nobody_can_read_leaves_with_its_code(words, stderr):
    """A terminal that was closed sends SIGHUP: the run saves, and must leave with 75."""
    command = [sys.executable, "-m", "mae_fast", *words.split()]
    if stderr == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    with open("/dev/full", "w") as full:
        where = full if stderr == "/dev/full" else subprocess.PIPE
        process = subprocess.Popen(command, stderr=where, stdout=subprocess.PIPE)
        if stderr == "pipe":
            process.stderr.close()
        assert process.stdout.read() == b"" and process.wait() == 2


REFUSED = {
    "unknown_option": (["index", "v", "--no-such", "3"], ["index: ", "--no-such", "3"]),
    "near_option": (["index", "v", "--worker", "3"], ["--worker", "did you mean --workers?"]),
    "wrong_kind": (["index", "v", "--workers", "many"], ["--workers", "'many'"]),
    "no_value": (["index", "v", "--workers"], ["Missing value for argument '--workers'"]),
    "no_option": (["reconstruct", "--checkpoint", "a"], ["reconstruct: Missing", "--video STR"]),
    "choice": (
        ["reconstruct", "--checkpoint", "a", "--video", "b", "--strategy", "x"],
        ["'x' for argument '--strategy'. Expected one of ('random', 'tube'"],
    ),
    "number": (
        ["convert", "a", "--to", "mae_st", "-o", "b", "--img-size", "x"],
        ["--img-size", "x"],
    ),
    "verb": (["train", "--no-such"], ["unknown verb 'train'; did you mean 'pretrain'"]),
    "long": (["index", "v", "--" + "x" * 9999], ["--xxx", "..."]),
    "of_a_config": (["pretrain", "CONFIG", "--train.steps", "x"], ["--train.steps", "'x'"]),
    "impossible": (["pretrain", "CONFIG", "--train.steps", "-3"], ["train.steps", "-3"]),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_arguments_are_refused_in_one_line(name, encoding, config, trained, monkeypatch, capsys):
    """tyro draws another box where the terminal has no lines to draw it with."""
    argv, words = REFUSED[name]
    monkeypatch.setattr(
        sys,
        "stdout",
        types.SimpleNamespace(
            encoding=encoding, write=sys.stdout.write, flush=sys.stdout.flush, isatty=lambda: False
        ),
    )
    assert exit_code([config if a == "CONFIG" else a for a in argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == "", err
    assert len(err) < 500 and not set("│╭─") & set(err), err
    assert all(word in err for word in words), err
    assert not trained


IMPOSSIBLE = {
    "probe a b --epochs 0": "--epochs must be positive, got 0",
    "probe a b --seed 99999999999999999999": "seed must be in [0, 2^63), got 99999999999999999999",
    "masks --seed -1": "seed must be in [0, 2^63), got -1",
    "index . --workers -1": "--workers must be positive, got -1",
    "features a b -o c --device cuda": "device is cuda, but torch sees no CUDA device",
    "plan --batch -1": "--batch must be positive, got -1",
    "plan --price nan": "--price must be positive, got nan",
    "plan --epochs inf": "--epochs must be positive, got inf",
    "plan --data-rate nan": "--data-rate must be positive, got nan",
    "plan --gpus 1000000000000000000000": "--gpus must be at most 1000000",
    "sweep a --price -1": "--price must be positive, got -1",
    "bench ops --batch -1": "--batch must be positive, got -1",
    "bench ops --device cuda": "device is cuda, but torch sees no CUDA device",
    "bench step --steps 1": "--steps must be 2 or more, got 1",
    "bench step --warmup -1 --index a": "--warmup must not be negative, got -1",
    "bench finetune --batch 0": "--batch must be positive, got 0",
    "bench finetune --classes -3": "--classes must be positive, got -3",
    "bench ratio --batch -1": "--batch must be positive, got -1",
    "bench ratio --seed -1": "seed must be in [0, 2^63), got -1",
    "bench ratio --device cuda": "device is cuda, but torch sees no CUDA device",
    "bench ratio --ratios": "--ratios must name at least one, got ()",
    "bench history": "bench history: name at least one file of records",
    "profile --batch 0": "--batch must be positive, got 0",
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_a_value_that_cannot_be_is_refused_before_any_work(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert exit_code(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {IMPOSSIBLE[words]}")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_leaves_the_environment_and_help_the_width_of_the_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert exit_code(["index", "--no-such"]) == 2
    assert os.environ["COLUMNS"] == "60"
    monkeypatch.delenv("COLUMNS")
    assert exit_code(["index", "--no-such"]) == 2 and "COLUMNS" not in os.environ
    assert exit_code(["index", "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 1000


def test_documented_exit_codes_are_the_codes():
    """In the docstring of errors.py, and in the README where it names one."""
    said = dict(re.findall(r"^(\d+) +(.*)$", errors.__doc__, re.M))
    kinds = [e for e in vars(errors).values() if isinstance(e, type)]
    for kind in kinds:
        if kind is not errors.MaeFastError:
            assert str(kind.exit_code) in said, kind
    for code, words in said.items():
        for name in re.findall(r"\w+Error|Interrupted", words):
            assert str(getattr(errors, name).exit_code) == code
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    codes = re.search(r"Exit codes:([^.]*)\.", readme)[1]
    assert set(re.findall(r"\d+", codes)) <= set(said)


def test_a_full_stdout_is_one_line():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        run = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (
        73,
        "error: cannot write to stdout: No space left on device\n",
    )
