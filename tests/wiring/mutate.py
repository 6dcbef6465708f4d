"""Defects drawn at random from what lies between the configuration and the step, and what catches
each.

python tests/wiring/mutate.py [--seed 0] [--count 60] [--jobs 2] [--only FILE] [--list]

A statement is drawn first, from all of FILES, then one of the changes that OPERATORS make of it.
Each defect is planted in a copy of the package, and the tests of its file run up to the first
failure. Python and torch are imported once: a defect's tests run in a fork.
"""

import argparse
import ast
import copy
import functools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from mutations import ROOT, copy_tree

WIRING = tuple(f"tests/wiring/test_{name}.py" for name in ("runs", "two_ranks", "fields"))
RUNS = ("tests/test_resume.py", "tests/test_stops.py")
CONFIG = ("tests/test_config.py", "tests/test_bad_config.py", *WIRING, "tests/test_cli.py")
FILES = {  # file: its tests, those that see most first
    "mae_fast/run.py": (*WIRING, "tests/test_train.py", *RUNS),
    "mae_fast/train.py": (*WIRING, "tests/test_train.py", *RUNS),
    "mae_fast/folder.py": (*WIRING, *RUNS),
    "mae_fast/window.py": (*WIRING, "tests/test_train.py", *RUNS),
    "mae_fast/step.py": ("tests/test_step.py", *WIRING, "tests/test_train.py"),
    "mae_fast/optim.py": ("tests/test_optim.py", *WIRING),
    "mae_fast/distributed.py": ("tests/test_distributed.py", *WIRING, *RUNS),
    "mae_fast/resume.py": (*WIRING, "tests/test_resume.py", "tests/test_scale.py"),
    "mae_fast/data/loader.py": (*WIRING, "tests/data/test_loader.py", "tests/test_train.py"),
    "mae_fast/data/workers.py": (*WIRING, "tests/data/test_workers.py"),
    "mae_fast/data/sampling.py": ("tests/data/test_sampling.py", *WIRING),
    "mae_fast/evaluate.py": (*WIRING,),
    "mae_fast/config.py": CONFIG,
    "mae_fast/config_file.py": CONFIG,
    "mae_fast/checkpoint.py": ("tests/test_checkpoint.py", *WIRING, "tests/test_train.py", *RUNS),
}
SECONDS = 600  # until a defect's tests count as hung
_COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_BINARY = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Defect(NamedTuple):
    """A file's text with one statement changed."""

    file: str
    line: int
    what: str  # `old` -> `new`, the statement's first line
    text: str


def _of_statement(node: ast.stmt) -> Iterator[ast.AST]:
    """The expressions that belong to a statement itself, not to the statements inside it."""
    todo = [node]
    while todo:
        inner = todo.pop()
        if not isinstance(inner, ast.JoinedStr):  # the words of a message
            if inner is not node:
                yield inner
            todo += [c for c in ast.iter_child_nodes(inner) if not isinstance(c, ast.stmt)]


def _fields_like(name: str) -> list[str]:
    """Other fields of the configuration of the same type as the field `name`."""
    from mae_fast import config

    for cls in (config.ModelConfig, config.MaskConfig, config.DataConfig, config.TrainConfig):
        kinds = {f: str(kind) for f, kind in cls.__annotations__.items()}
        if name in kinds:
            return [f for f, kind in kinds.items() if kind == kinds[name] and f != name]
    return []


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """Every replacement of one expression: OPERATORS, all of them but those of whole statements."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        yield ast.Compare(
            node.left, [_COMPARE[type(node.ops[0])](), *node.ops[1:]], node.comparators
        )
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield ast.BinOp(node.left, _BINARY[type(node.op)](), node.right)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        yield ast.Name(_NAMES[node.id], node.ctx)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        for name in _fields_like(node.attr)[:2]:
            yield ast.Attribute(node.value, name, node.ctx)
    if isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    if isinstance(node, ast.Call):
        for i in range(len(node.args) - 1):
            args = list(node.args)
            args[i], args[i + 1] = args[i + 1], args[i]
            if not any(isinstance(a, ast.Starred) for a in args[i : i + 2]):
                yield ast.Call(node.func, args, node.keywords)
        for i in range(len(node.keywords)):
            yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])


def _of_whole(node: ast.stmt, in_function: bool) -> Iterator[ast.stmt]:
    """Every replacement of a whole statement."""
    if isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.Raise | ast.Continue):
        yield ast.Pass()  # dropped
    if isinstance(node, ast.If | ast.While):
        negated = copy.copy(node)
        negated.test = ast.UnaryOp(ast.Not(), node.test)
        yield negated
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    if in_function and isinstance(node, ast.Expr | ast.For | ast.If | ast.With):
        yield ast.Return(None)  # leaves early


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _is_said(node: ast.stmt) -> bool:
    """Docstrings say, imports and definitions name: what they hold is drawn by itself."""
    said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return said or isinstance(node, ast.Import | ast.ImportFrom | ast.Pass)


def statements(file: str) -> list[tuple[str, ast.Module, ast.stmt, bool]]:
    """(file, its tree, a statement, whether it lies in a function) for each of a file."""
    tree = ast.parse((ROOT / file).read_text())
    inside = {
        id(s)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for s in ast.walk(f)
        if s is not f
    }
    found = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and not _is_said(n)]
    return [(file, tree, n, id(n) in inside) for n in found]


def changes(node: ast.stmt, in_function: bool) -> list[tuple[ast.AST, ast.AST]]:
    """(old, new) for each change of one statement."""
    found = [(node, new) for new in _of_whole(node, in_function)]
    for inner in _of_statement(node):
        found += [(inner, new) for new in _changed(inner)]
    return [(old, new) for old, new in found if ast.dump(old) != ast.dump(new)]


def planted(file: str, tree: ast.Module, node: ast.stmt, old: ast.AST, new: ast.AST) -> Defect:
    """The file with `old`, which lies in the statement `node`, changed to `new`."""
    changed = _Swap(old, new).visit(copy.deepcopy(tree, {id(old): old}))
    text = ast.unparse(ast.fix_missing_locations(changed))
    words = [ast.unparse(x).splitlines()[0][:80] for x in (old, new)]
    where = ast.unparse(node).splitlines()[0][:80]
    return Defect(file, node.lineno, f"{words[0]} -> {words[1]}   in: {where}", text)


def drawn(seed: int, count: int, only: str = "") -> list[Defect]:
    """`count` defects: of statements drawn without repetition, one of each."""
    rng = random.Random(seed)
    files = [f for f in FILES if (ROOT / f).exists() and only in f]
    everything = [s for f in files for s in statements(f)]
    rng.shuffle(everything)
    chosen: list[Defect] = []
    for file, tree, node, in_function in everything:
        if len(chosen) < count and (possible := changes(node, in_function)):
            chosen.append(planted(file, tree, node, *rng.choice(possible)))
    return chosen


def _tests(folder: str, tests: list[str], report: int) -> None:
    """Run tests in this process, which ends: 0 if all passed, with the words of the first error."""
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, folder)
    os.dup2(report, 1)
    os.dup2(report, 2)
    import pytest

    code = pytest.main(["-xq", "-p", "no:cacheprovider", "--no-header", "--tb=short", *tests])
    sys.stdout.flush()
    os._exit(code)


def _run(defect: Defect | None, tests: Iterable[str]) -> tuple[int | None, str]:
    """(exit code, output) of tests in a copy of the tree with a defect; None: they did not end."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as report:
        copy_tree(Path(folder), libraries=True)
        if defect:
            (Path(folder) / defect.file).write_text(defect.text)
        child = os.fork()
        if child == 0:
            try:
                _tests(folder, list(tests), report.fileno())
            finally:
                os._exit(4)
        done = 0
        while not done:
            time.sleep(0.2)
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.time() - began > SECONDS:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None, ""
        report.seek(0)
        return os.waitstatus_to_exitcode(status), report.read()


@functools.cache
def _passes(test: str) -> bool:
    """Whether a test passes, alone, where nothing is planted."""
    return _run(None, [test])[0] == 0


def attempt(defect: Defect) -> tuple[str, float]:
    """(what caught a defect, or an empty string; seconds). Only a test that passes without the
    defect catches it; tests that did not end are no catch either, but are said."""
    began = time.time()
    code, text = _run(defect, (t for t in FILES[defect.file] if (ROOT / t).exists()))
    seconds = time.time() - began
    if code is None:
        print(f"nothing ended within {SECONDS} s: {defect.what}", flush=True)
    if not code:
        return "", seconds
    who = re.search(r"^(?:FAILED|ERROR) (\S+?)(?: - .*)?$", text, re.M)
    if who and "::" in who[1] and not _passes(who[1]):
        print(f"fails without any defect: {who[1]}", flush=True)
        return "", seconds
    return (who[1] if who else text.strip().splitlines()[-1])[:150], seconds


def _preload() -> None:
    """What every fork needs, without mae_fast."""
    import av  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import rich.progress  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torch.distributed
    import torch.nn.parallel
    import torch.utils.data
    import tyro  # noqa: F401

    torch.set_num_threads(1)
    for name in [m for m in sys.modules if m == "mae_fast" or m.startswith("mae_fast.")]:
        del sys.modules[name]


def main() -> int:
    """The number of defects that live."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = drawn(args.seed, args.count, args.only)
    print(f"seed {args.seed}: {len(chosen)} defects", flush=True)
    if args.list:
        print("\n".join(f"{d.file}:{d.line}  {d.what}" for d in chosen))
        return 0
    _preload()
    alive = 0

    def told(defect: Defect) -> bool:
        caught, seconds = attempt(defect)
        how = f"caught by {caught}" if caught else "SURVIVED"
        print(
            f"{defect.file}:{defect.line}  {defect.what}\n    {how}  ({seconds:.0f} s)", flush=True
        )
        return not caught

    with ThreadPoolExecutor(args.jobs) as pool:
        alive = sum(pool.map(told, chosen))
    print(f"seed {args.seed}: {len(chosen) - alive} of {len(chosen)} defects are caught")
    return alive


if __name__ == "__main__":
    sys.exit(main() > 0)
