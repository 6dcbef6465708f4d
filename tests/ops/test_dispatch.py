"""Which backend is taken, what is said about it, and what happens where there is no compiler."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mae_fast
from mae_fast.errors import BackendError, ConfigError
from mae_fast.ops import OPS, dispatch
from mae_fast.ops.layer_norm import OP

ARGS = (torch.randn(2, 8), torch.randn(8), torch.randn(8), torch.float32)


def test_a_forced_backend_is_taken_and_let_go(cpp):
    assert OP.choose(*ARGS) == "cpp"
    with mae_fast.backends(layer_norm="reference"):
        assert OP.choose(*ARGS) == "reference"
        with mae_fast.backends(layer_norm="cpp", linear="reference"):
            assert OP.choose(*ARGS) == "cpp"
        assert OP.choose(*ARGS) == "reference"
    assert OP.choose(*ARGS) == "cpp"


def test_an_error_inside_lets_go():
    with pytest.raises(ZeroDivisionError), mae_fast.backends(layer_norm="reference"):
        1 / 0  # noqa: B018
    assert not dispatch._forced


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layer_nrm": "cpp"}, "unknown op 'layer_nrm'"),
        ({"layer_norm": "sdpa"}, r"no backend 'sdpa' \(it has: cpp, triton, reference\)"),
    ],
)
def test_unknown_names_are_refused(choice, message):
    with pytest.raises(ConfigError, match=message), mae_fast.backends(**choice):
        pass
    assert not dispatch._forced


@pytest.mark.parametrize("op", OPS)
def test_a_backend_asked_for_that_cannot_run_raises(op, monkeypatch):
    """With its reason; it never falls back."""
    first = next(iter(OPS[op].backends))
    monkeypatch.setitem(OPS[op].backends, first, lambda *args: "today is Monday")
    with mae_fast.backends(**{op: first}), pytest.raises(BackendError, match="today is Monday"):
        OPS[op].choose(None)


def test_int_tensors_go_to_the_reference_and_say_why(caplog, cpp):
    x = torch.ones(2, 8, dtype=torch.complex64)
    with caplog.at_level(logging.INFO, "mae_fast"):
        for _ in range(3):
            assert OP.choose(x, *ARGS[1:]) == "reference"
    (record,) = (r for r in caplog.records if "complex" in r.message)
    assert record.message.startswith("layer_norm: reference (cpp: dtype torch.complex64 is none of")


def test_of_two_backends_on_one_device_the_forced_or_the_first_runs():
    """As Triton's and the CUDA kernels, whichever was loaded first."""
    library, key = dispatch.LIBRARY, "Meta"  # a key that nothing else has here
    given = {"cuda": lambda saved, dloss: saved + 2, "triton": lambda saved, dloss: saved + 1}
    registered = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_implementations", {})
        patch.setattr(library, "impl", lambda name, f, key, **_: registered.append(f))
        for backend, function in given.items():
            dispatch._implement("mae_fast::masked_mse_bwd", backend, function, key)
    assert registered[0](0, None) == 2
    both = registered[1]
    assert both(0, None) == 1
    patch = pytest.MonkeyPatch()
    for backend, answer in {"triton": 1, "cuda": 2, "reference": 1}.items():
        patch.setitem(dispatch._forced, "masked_mse", backend)
        assert both(0, None) == answer
    patch.undo()


WITHOUT = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", level=logging.INFO)
import mae_fast, torch
from pathlib import Path
Path.glob = lambda self, pattern: iter(())  # as if nothing had been built
from mae_fast.ops import dispatch
assert "mae_fast._cpu" not in str(torch.ops.loaded_libraries)
from mae_fast.environment import environment
print("asked", environment()["cpu kernels"])
model = mae_fast.MaskedAutoencoder(mae_fast.preset("vit_tiny", img_size=32, depth=1))
for _ in range(2):
    model(torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8))[0].backward()
with mae_fast.backends(masked_mse="cpp"):
    try:
        model(torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8))
    except mae_fast.errors.BackendError as e:
        print("refused:", e)
from mae_fast.info import collect
print(collect()["ops"]["layer_norm"])
"""


def test_without_the_kernels_the_reference_runs_and_one_line_says_so():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    warnings = [line for line in run.stdout.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1 and "were not built" in warnings[0]
    # Who asks computes nothing: on a GPU they do not matter.
    assert run.stdout.startswith("asked plain torch: the C++ kernels were not built")
    assert "refused: masked_mse: cpp was asked for, but the C++ kernels were not" in run.stdout
    assert "reference; not cpp: the C++ kernels were not built" in run.stdout


def test_what_is_not_built_says_whether_there_is_a_compiler(tmp_path, monkeypatch):
    (tmp_path / "compiler").write_text("")
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "mae_fast/ops/dispatch.py"))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setenv("CXX", f"{tmp_path}/compiler -v")
    assert dispatch._load_cpp().startswith(
        f"the C++ kernels were not built, though {tmp_path}/compiler is here: install mae_fast"
    )
    monkeypatch.setenv("CXX", "clang++-0")
    said = "the C++ kernels were not built: there is no compiler (clang++-0)"
    assert dispatch._load_cpp() == said


def test_a_library_that_does_not_load_says_so_in_the_loaders_words(tmp_path, monkeypatch):
    """As one built for another torch, whose symbols are not there."""
    (tmp_path / "mae_fast").mkdir()
    for capability in ("avx512", "avx2", "default"):
        (tmp_path / f"mae_fast/_cpu_{capability}.so").write_text("no library\n" * 9)
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "mae_fast/ops/dispatch.py"))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    reason = dispatch._load_cpp()
    assert re.fullmatch(r"the C\+\+ kernels do not load: .*_cpu_\w+\.so: \w.* header", reason)


def test_nothing_is_loaded_by_an_import():
    code = "import torch, mae_fast.ops; assert not torch.ops.loaded_libraries, 1"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_kernels_of_other_sources_are_not_used(cpp, monkeypatch):
    monkeypatch.setattr(dispatch.LIBRARY, "_op_defs", {"aten::sym_size.int"})  # has no CPU kernel
    assert "other sources: aten::sym_size.int" in dispatch._load_cpp()


OTHER_SCHEMA = """
import torch
define = torch.library.Library.define
def changed(self, schema, *args, **kwargs):
    return define(self, schema.replace("masked_mse_bwd(", "masked_mse_bwd(Tensor more, "), *args)
torch.library.Library.define = changed
from mae_fast.ops import dispatch
print(dispatch.load_cpp())
"""


def test_kernels_of_an_older_schema_are_not_used(cpp):
    """Their library was built before an update of the sources: the process must not end."""
    run = subprocess.run([sys.executable, "-c", OTHER_SCHEMA], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    assert run.stdout.startswith("the C++ kernels are built from other sources: mae_fast::masked_")


def test_the_kernels_for_lesser_cpus_compute_the_same(cpp):
    """The ops' tests against fp64, with AVX2 by torch's own switch."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no better kernels than the ones tested anyway")
    options = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "matches_fp64 and cpp"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(Path(__file__).parent)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 50
