"""The scripts of examples/: each runs, and its one line changes no loss."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mae_fast.data import build_index

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
STEPS = 20
# PyTorch sums in another order once a forward is fused; 20 steps of AdamW pass that on.
TOLERANCE = 1e-4

# The official repository's model, where there is no checkout of it: the same from its description.
STAND_IN = """
import sys
sys.path.append({adapters!r})
import foreign
from mae_fast.config import ModelConfig

class MaskedAutoencoderViT(foreign.MaskedAutoencoderViT):
    def __init__(self, norm_layer, **settings):
        super().__init__(ModelConfig(pred_t_dim=8, **settings))
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory, video) -> Path:
    """Four small videos whose patches all vary: the target of a flat patch is rounding noise."""
    folder, random = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)

    def noisy(k, height, width):
        noise = random.integers(0, 128, (height, width, 3))
        return (video.image(k, height, width) // 2 + noise).astype(np.uint8)

    for i in range(4):
        video.write(folder / f"v{i}.mp4", 40 + 5 * i, make=noisy)
    build_index([folder], folder / "index.jsonl", progress=False)
    return folder / "index.jsonl"


@pytest.fixture
def repository(tmp_path) -> Path:
    """The checkout that MAE_ST_REPOSITORY names, or a stand-in."""
    if "MAE_ST_REPOSITORY" in os.environ:
        return Path(os.environ["MAE_ST_REPOSITORY"])
    folder = tmp_path / "mae_st"
    folder.mkdir()
    text = STAND_IN.format(adapters=str(ROOT / "tests/adapters"))
    (folder / "models_mae.py").write_text(text)
    return folder


def losses(script: str, *arguments, cwd: Path, launcher: tuple[str, ...] = ()) -> list[float]:
    """The losses that a script prints, step by step."""
    command = [sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = re.findall(r"^step (\d+) loss ([\d.]+)$", run.stdout, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(STEPS)), run.stdout
    return [float(loss) for _, loss in found]


def check(
    script: str, *arguments, cwd: Path, launcher: tuple[str, ...] = (), rtol: float = TOLERANCE
) -> None:
    arguments = (*arguments, "--size", "tiny", "--steps", STEPS)
    fast, slow = (
        losses(script, *arguments, line, cwd=cwd, launcher=launcher)
        for line in ("--accelerate", "--no-accelerate")
    )
    np.testing.assert_allclose(fast, slow, rtol=rtol)
    assert fast != slow, "the one line did nothing"
    assert slow[-1] < 0.98 * slow[0], "nothing was learned"


def test_the_official_engine(index, repository, tmp_path):
    check("official_engine.py", repository, index, cwd=tmp_path)


def test_transformers_trainer(index, tmp_path):
    _needs("transformers", "accelerate")
    check("transformers_trainer.py", index, cwd=tmp_path, rtol=1e-2)  # it trains in bf16


def test_lightning(index, tmp_path):
    _needs("transformers", "lightning")
    check("lightning_module.py", index, cwd=tmp_path)


def test_two_processes(index, tmp_path):
    _needs("transformers")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    check("ddp.py", index, cwd=tmp_path, launcher=launcher)


def test_our_model_with_a_strangers_loader(index, tmp_path):
    found = losses("native_model.py", *index.parent.glob("*.mp4"), cwd=tmp_path)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_an_example_is_under_60_lines(path):
    assert len(path.read_text().splitlines()) < 60


def _needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
