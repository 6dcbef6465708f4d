"""The defects that `python tests/wiring/mutate.py` plants: drawn by their seed, one in a file."""

import ast

import pytest
from mutate import FILES, ROOT, changes, drawn, statements


def test_defects_are_drawn_by_the_seed_from_statements_of_every_file():
    chosen = drawn(1, 40)
    assert len(chosen) == 40 and chosen == drawn(1, 40)
    assert len({d.file for d in chosen}) >= 5
    for defect in chosen:
        was = (ROOT / defect.file).read_text()
        assert ast.dump(ast.parse(defect.text)) != ast.dump(ast.parse(was))


@pytest.mark.parametrize("file", [f for f in FILES if (ROOT / f).exists()])
def test_a_file_is_tested(file):
    assert len(statements(file)) > 10
    assert any((ROOT / test).exists() for test in FILES[file])


def test_a_line_s_defects():
    tree = ast.parse("def f(a, b):\n    return min(a, b) if not a < 2 else -a\n")
    found = changes(tree.body[0].body[0], True)
    whats = {" -> ".join(map(ast.unparse, pair)) for pair in found}
    assert {
        "min -> max",
        "min(a, b) -> min(b, a)",
        "a < 2 -> a <= 2",
        "not a < 2 -> a < 2",
        "2 -> 3",
        "2 -> 1",
        "-a -> a",
    } <= whats
