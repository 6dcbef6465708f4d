"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, no worse than this Triton's table in
aot/ says. What this very Triton compiled of these very sources is not compiled again."""

import ast
from pathlib import Path

import aot
import pytest
import torch
import triton
import triton.language as tl
from cases import CASES, DTYPES, ON_TRITON
from triton.runtime.jit import JITFunction

from mae_fast.kernels import configs
from mae_fast.ops import dispatch

if dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

KERNELS = Path(configs.__file__).parent
SAMPLE = "patchify_gather"  # compiled again in any case
AGAIN = "python tests/kernels/report.py writes it again"


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, SUM: tl.constexpr):
    """A product by tl.dot or, if SUM, another sum, without tensor cores."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)
    if SUM:
        out = tl.sum(tl.abs(a[:, :, None] - b[None, :, :]), axis=1)
    else:
        out = tl.dot(a, b)
    tl.store(out_ptr + i * N + j, out)


def _rows(arch, launch):
    with aot.compiling(arch) as compiled:
        launch()
    return [aot.read("toy", "bf16", arch, *found) for found in compiled]


def _meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("arch", aot.ARCHS, ids="sm_{}".format)
def test_what_is_read_from_machine_code(arch):
    """16-byte accesses where pointers and lengths are multiples of 16, and only there; the
    architecture's own tensor-core instruction; occupancy."""
    x, a = _meta(4096), _meta(64, 64)

    def launch():
        _copy_kernel[(1,)](x, x, 4096, BLOCK=1024, num_warps=4)
        _copy_kernel[(1,)](x[1:], x, 4095, BLOCK=1024, num_warps=4)
        _product_kernel[(1,)](a, a, a, N=64, SUM=False, num_warps=4)

    even, odd, product = _rows(arch, launch)
    assert even.sizes == "BLOCK=1024 num_warps=4 num_stages=3"
    assert (even.wide_loads, even.wide_stores, even.spilled, even.dots) == (1, 1, 0, 0)
    assert (even.tensor_core, even.occupancy, even.broken()) == (0, 1, [])
    assert odd.wide_loads == 0
    assert product.dots == 1 and product.tensor_core >= 1 and product.broken() == []


def test_occupancy():
    assert aot.occupancy(90, 32, 0, 4) == 1
    assert aot.occupancy(90, 33, 0, 4) == 0.75  # 40 registers are given: 12 blocks of 4 warps
    assert aot.occupancy(90, 255, 0, 8) == 0.125
    assert aot.occupancy(90, 32, 100 * 1024, 8) == 2 * 8 / 64
    assert aot.occupancy(80, 32, 100 * 1024, 8) == 8 / 64
    assert aot.occupancy(90, 32, 0, 1) == 0.5  # 32 blocks at most
    assert aot.occupancy(100, 32, 0, 8, columns=256) == 2 * 8 / 64


def test_a_worsening_is_seen():
    a = _meta(32, 32)

    def product(**options):
        (row,) = _rows(90, lambda: _product_kernel[(1,)](a, a, a, N=32, **options))
        return row

    good, bad = product(SUM=False), product(SUM=True)
    spilled = product(SUM=True, maxnreg=32)
    assert good.worse(good) == []
    occupancy, dots, tensor_core = bad.worse(good)
    assert dots == "0 dots of 16 bits, were 1"
    assert occupancy.startswith("occupancy") and "registers" in occupancy
    assert tensor_core.startswith("no tensor-core instruction, was")
    assert "bytes are spilled" in spilled.broken()[0]
    x = _meta(4096)
    (even,) = _rows(90, lambda: _copy_kernel[(1,)](x, x, 4096, BLOCK=1024))
    (odd,) = _rows(90, lambda: _copy_kernel[(1,)](x[1:], x, 4095, BLOCK=1024))
    assert odd.worse(even) == ["wide_loads 0%, was 100%", "wide_stores 0%, was 100%"]


def _defined() -> set[str]:
    """The kernels of kernels/*.py by name: what is launched, not what kernels call."""
    trees = [ast.parse(path.read_text()) for path in KERNELS.glob("*.py")]
    functions = (f for tree in trees for f in ast.walk(tree) if isinstance(f, ast.FunctionDef))
    return {f.name for f in functions if f.name.endswith("_kernel")}


def test_no_kernel_and_no_candidate_is_forgotten(monkeypatch):
    """Every kernel in kernels/ is launched at the models' shapes, every row of configs picked, and
    every op that has Triton kernels is in the committed table."""
    launched, picked, pick = set(), set(), configs.pick

    def count(self, *args, **kwargs):
        launched.add(self.__name__)

    def note(kernel, shape="any"):
        picked.add((kernel, shape))
        return pick(kernel, shape)

    with aot.compiling(90):
        monkeypatch.setattr(JITFunction, "run", count)
        monkeypatch.setattr(configs, "pick", note)
        models = aot.MODELS + aot.MORE_MODELS
        pairs = [(op, dtype) for op in ON_TRITON for dtype in DTYPES]
        operators = {name for pair in pairs for name, _ in aot.launch(*pair, models)}
    assert set(ON_TRITON) <= CASES.keys()
    assert launched == _defined()
    assert picked == {(k, shape) for k, shapes in configs.candidates().items() for shape in shapes}
    for version in aot.versions():
        assert {row.operator for row in aot.committed(version)[1]} == operators, (version, AGAIN)


def test_this_triton_has_a_table():
    if configs.TRITON not in aot.versions():
        pytest.skip(
            f"Triton {configs.TRITON} has no table (there are {', '.join(aot.versions())}): its "
            "kernels are held to what must hold anywhere"
        )
    assert aot.committed()[1]


def test_what_is_proved(monkeypatch):
    """A digest follows what machine code follows from: other kernels that are imported, sizes."""
    names = {path.name for path in aot.sources("crop_resize_patchify_gather")}
    assert {"patchify_gather.py", "configs.py", "aot.py"} <= names
    assert "_rows.py" in {path.name for path in aot.sources("add_layer_norm")}
    pick = configs.pick
    before = aot.launched("bias_gelu")
    monkeypatch.setattr(configs, "pick", lambda *of: pick(*of) | {"num_warps": 16})
    assert aot.launched("bias_gelu") != before


@pytest.mark.parametrize("arch", aot.ARCHS, ids="sm_{}".format)
@pytest.mark.parametrize("op", ON_TRITON)
def test_kernels_are_no_worse_than_the_table(op, arch):
    _, table = aot.committed()
    known = [row for row in table if (row.arch, row.op) == (arch, op)]
    if aot.proved(op) and op != SAMPLE:
        assert known
        return
    wrong = []
    for row in aot.rows(op, arch):
        name = f"{row.kernel} {row.dtype} sm_{arch} {row.sizes} ({', '.join(row.cases)})"
        before = [k for k in known if k.key == row.key and set(k.cases) & set(row.cases)]
        if not table:
            problems = row.broken(aot.MAY_SPILL)
        elif not before:
            problems = [f"is not in the table: {AGAIN}"]
        else:
            problems = min((row.worse(k) for k in before), key=len)
        wrong += [f"{name}: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)
