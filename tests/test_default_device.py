"""Every tensor that the engine makes names its device: a default one changes nothing."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import mae_fast
from mae_fast.config import ModelConfig
from mae_fast.data import VideoRow
from mae_fast.data.loader import make_loader
from mae_fast.masking import draw_ids
from mae_fast.ops.adamw import clipped_adamw

ROOT = Path(__file__).parent.parent
# What torch makes on the default device where none is named.
FACTORIES = {f.__name__ for f in _device_constructors()} | {"normal", "Tensor", "FloatTensor"}


def unplaced(source: str) -> list[str]:
    """What is made on the default device, or may be: calls of a factory without `device=`, and a
    factory that is named without being called there."""
    tree = ast.parse(source)
    modules, factories, placed, wrong = {"torch"}, {}, set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name for a in node.names if a.name == "torch"}
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            factories |= {a.asname or a.name: a.name for a in node.names if a.name in FACTORIES}

    def factory(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return node.value.id in modules and node.attr in FACTORIES
        return isinstance(node, ast.Name) and node.id in factories

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and factory(node.func):
            given = [k.value for k in node.keywords if k.arg == "device"]
            if given and not (isinstance(given[0], ast.Constant) and given[0].value is None):
                placed.add(id(node.func))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            of = node.args[0]
            if isinstance(of, ast.Name) and of.id in modules and len(node.args) < 3:
                name = node.args[1]
                if not isinstance(name, ast.Constant) or name.value in FACTORIES:
                    wrong.append(f"{node.lineno}: {ast.unparse(node)}")
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if factory(node) and id(node) not in placed:
            is_type = "Tensor" in getattr(node, "attr", factories.get(getattr(node, "id", "")))
            if not is_type or id(node) in called:
                wrong.append(f"{node.lineno}: {ast.unparse(node)}")
    return wrong


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.zeros(3)",
        "import torch\ntorch.zeros(3, device=None)",
        "import torch\ntorch.arange(3, **options)",
        "import torch as t\nt.tensor([1], pin_memory=True)",
        "from torch import empty as e\ne(3)",
        "import torch\nmake = torch.ones\nmake(3)",
        "import torch, functools\nfunctools.partial(torch.full, (2,))(1)",
        "from torch import Tensor\nTensor([1, 2])",
        "import torch\ngetattr(torch, 'rand')(3)",
        "import torch\ngetattr(torch, name)(3)",
        "import torch\ntorch.linspace(torch.zeros(3, device='cpu').sum(), 1, 5)",
    ],
)
def test_the_lint_sees(source):
    assert unplaced(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.zeros(3, device=x.device)",
        "import torch\ntorch.zeros_like(x), x.new_zeros(3), torch.from_numpy(a)",
        "import numpy as np\nnp.zeros(3)",
        "import torch\ndef f(x: torch.Tensor) -> torch.Tensor: return isinstance(x, torch.Tensor)",
    ],
)
def test_the_lint_lets_pass(source):
    assert not unplaced(source)


def test_every_tensor_names_its_device():
    files = [p for folder in ("kernels", "mae_fast") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60
    wrong = [f"{p.relative_to(ROOT)}:{line}" for p in files for line in unplaced(p.read_text())]
    assert not wrong, "\n".join(wrong)


TINY = ModelConfig(
    img_size=16,
    patch_size=8,
    num_frames=8,
    pred_t_dim=4,
    embed_dim=32,
    depth=1,
    num_heads=2,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=2,
)


def steps(cfg, folder) -> list[torch.Tensor]:
    """Losses and norms of two training steps on clips that the loader reads, and the weights."""
    rows = [VideoRow(str(p), frames=40, fps=25.0) for p in sorted(folder.glob("*.mp4"))]
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = mae_fast.MaskedAutoencoder(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    found = []
    options = dict(num_frames=cfg.num_frames, batch_size=2, steps=2)
    data = mae_fast.DataConfig(workers=0, repeat_aug=1)
    for batch in make_loader(rows, data, seed=0, **options):
        keep, masked = draw_ids("random", cfg.grid, 0.5, seed=0, step=0, samples=batch.samples)
        loss, *_ = model(batch.source(cfg.img_size), ids_keep=keep, ids_mask=masked)
        loss.backward()
        found += [loss.detach(), clipped_adamw(optimizer, 1.0)]
        optimizer.zero_grad()
    return [*found, *model.state_dict().values()]


@pytest.fixture
def meta():
    """A default device on which there are no values."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def expected(folder) -> list[torch.Tensor]:
    return steps(TINY, folder)


def test_a_default_device_changes_no_training_step(expected, folder, meta):
    """Loader, masks, ops, optimizer: whatever of a step lay on "meta" would raise, or show."""
    found = steps(TINY, folder)
    assert len(found) == len(expected) > 20
    for f, e in zip(found, expected, strict=True):
        assert f.device.type == "cpu" and torch.equal(f, e)


def test_a_model_is_made_on_the_default_device(meta):
    """As torch's layers are, and all of its parameters on one."""
    model = mae_fast.MaskedAutoencoder(TINY)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.device("cpu"):
        model = mae_fast.MaskedAutoencoder(TINY)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_tables_of_addresses_are_made_on_the_host(meta):
    """AdamW's, from pinned memory where there is a GPU."""
    adamw = pytest.importorskip("mae_fast.kernels.adamw")
    rows = torch.ones(4, device="cpu"), torch.ones(4, device="cpu")
    table = adamw.Table([[(rows[0], rows[1], rows[0], rows[1], rows[0], None)]])
    assert table.rows.tolist()[0][:2] == [t.data_ptr() for t in rows]
