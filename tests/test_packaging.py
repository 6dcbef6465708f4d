"""What is installed, under which names, and what an import of it costs."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mae_fast

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "csrc",
    "docs",
    "examples",
    "kernels",
    "mae_fast",
    "pyproject.toml",
    "setup.py",
    "tests",
}
MAPPED = {"mae_fast.kernels": "kernels", "mae_fast.bench.baselines": "benchmarks/baselines"}
EXTRAS = {"ava", "torchcodec", "flash-attn", "flash-attn-4", "xformers", "tensorboard", "timm"}
EXTRAS |= {"remote", "shots", "slurm", "wandb"}


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run code in a new interpreter that sees neither this process's path nor the checkout."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**clean, **env}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of what it is made of, without a network and a C++ compiler."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *MAPPED.values(), "csrc"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "mae_fast", source / "mae_fast", ignore=lambda *_: ["__pycache__"])
    for built in source.glob("mae_fast/*.so"):
        built.unlink()
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    run = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(out), str(source)],
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (path,) = out.iterdir()
    return path


def test_sdist_holds_what_a_build_needs(tmp_path):
    """Made where neither torch nor CUDA can be imported, as in pip's isolated build."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode != 0 or not git.stdout:
        pytest.skip("not a git checkout")
    names = git.stdout.splitlines()
    for name in names:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/torch.py").write_text("raise ImportError('no torch in an isolated build')")
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=tmp_path / "source",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    held = {name.partition("/")[2] for name in tarfile.open(path).getnames()}
    built_of = ("csrc/", "kernels/", "benchmarks/baselines/", "mae_fast/", "setup.py", "pyproject")
    assert {name for name in names if name.startswith(built_of)} <= held


def test_wheel_holds_the_package_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"mae_fast"}
    assert "mae_fast/cli.py" in names
    assert "mae_fast/kernels/__init__.py" in names
    assert "mae_fast/py.typed" in names
    assert "mae_fast/bench/baselines/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize("module", MAPPED)
def test_wheel_imports_mapped_folders_by_one_name(wheel, tmp_path, module):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"import {module} as m; print(m.__file__)"
    run = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "site" / module.replace(".", "/") / "__init__.py")


@pytest.mark.parametrize("module", MAPPED)
def test_installed_package_imports_from_another_directory(tmp_path, module):
    run = python(f"import {module} as m; print(m.__name__)", tmp_path)
    if "No module named 'mae_fast'" in run.stderr:
        pytest.skip("mae-fast is not installed here: pip install -e .")
    assert run.stdout.strip() == module, run.stderr


def test_mapped_folders_refuse_another_name():
    run = python("import benchmarks.baselines", ROOT)
    said = "ImportError: import mae_fast.bench.baselines, not benchmarks.baselines"
    assert run.stderr.strip().endswith(said)
    # transformers imports the other package of this name and reads its version.
    run = python("import kernels; assert not hasattr(kernels, '__version__')", ROOT)
    assert run.returncode == 0, run.stderr
    run = python("import kernels.attention", ROOT)
    assert "No module named 'kernels.attention'" in run.stderr


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        (name,) = [n for n in z.namelist() if n.endswith(".dist-info/METADATA")]
        found = metadata.PathDistribution(zipfile.Path(z, name.rpartition("/")[0] + "/"))
        meta, scripts = found.metadata, found.entry_points
        assert meta["Name"] == "mae-fast"
        assert meta["Version"] == mae_fast.__version__
        assert meta["Requires-Python"] == ">=3.10"
        assert set(meta.get_all("Provides-Extra")) == EXTRAS | {"parquet", "dev"}
        assert [(e.name, e.value) for e in scripts] == [("mae-fast", "mae_fast.cli:main")]


def test_editors_see_the_names_that_are_loaded_on_use():
    text = (ROOT / "mae_fast/__init__.py").read_text()
    seen = re.findall(r"^    from (mae_fast\S*) import (\w+) as (\w+)$", text, re.MULTILINE)
    assert all(name == again for _, name, again in seen)
    homes = {name: f"mae_fast.{home}" for name, home in mae_fast._HOME.items()}
    want = {**homes, **dict.fromkeys(mae_fast._MODULES, "mae_fast")}
    assert {name: home for home, name, _ in seen} == want
    assert mae_fast.__all__ == sorted([*want, "__version__"])


def test_constraints_pin_every_dependency():
    """Every dependency and development tool is pinned, but torch and triton."""
    pins = re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    hard = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    dev = re.search(r"^dev = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    needed = set(re.findall(r"[\"']([a-z0-9-]+)>=", hard + dev))
    assert len(needed) > 10
    assert needed - set(pins) == {"torch", "triton"}


def test_top_level_of_the_repository():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode != 0 or not git.stdout:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in git.stdout.splitlines()} == TOP_LEVEL


def test_import_touches_nothing(tmp_path):
    """No environment variable read or written, no device, no library loaded by mae_fast."""
    code = f"""
import os, sys
import torch
libraries, ours, touched = set(torch.ops.loaded_libraries), {str(ROOT)!r}, []
def spy(call):
    def spied(self, key, *value):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<frozen") or "os.py" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame.f_code.co_filename.startswith((ours + "/mae_fast", ours + "/kernels")):
            touched.append((frame.f_code.co_filename, key))
        return call(self, key, *value)
    return spied
for name in ("__getitem__", "__setitem__", "__delitem__"):
    setattr(type(os.environ), name, spy(getattr(type(os.environ), name)))
sys.path.insert(0, ours)
import mae_fast
assert mae_fast.__file__.startswith(ours), mae_fast.__file__
assert not touched, touched
assert not torch.cuda.is_initialized()
assert set(torch.ops.loaded_libraries) == libraries
"""
    run = python(code, tmp_path)
    assert run.returncode == 0, run.stderr


def test_import_costs_little_more_than_torch(tmp_path):
    """Under 0.3 s after `import torch`: best of five, because the machine has other work too."""
    code = f"""
import sys, time
import torch
sys.path.insert(0, {str(ROOT)!r})
start = time.perf_counter()
import mae_fast
print(time.perf_counter() - start)
"""
    seconds = []
    for _ in range(5):
        run = python(code, tmp_path)
        assert run.returncode == 0, run.stderr
        seconds.append(float(run.stdout))
        if seconds[-1] < 0.3:
            return
    raise AssertionError(f"import mae_fast took {min(seconds):.2f} s more than import torch")
