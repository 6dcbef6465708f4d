"""Triton kernels and their launchers. They know nothing of autograd; `mae_fast.ops` calls them.

kernels/<op>.py gives operators of mae_fast/ops/<op>.py under their names and schemas. The folder
is `mae_fast.kernels`: the bare name belongs to another package, and gives nothing.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

if __name__ != "mae_fast.kernels":
    # From the root of the checkout transformers imports that other package, to see its version.
    __path__ = []  # there is no module here under that name


def launchers(operators: Iterable[str]) -> dict[str, Callable]:
    """{"mae_fast::<op>_fwd": its launcher} for each of the operators that a kernel file gives."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = import_module(f"mae_fast.kernels.{file.stem}")
        for operator in operators:
            launch = getattr(module, operator.split("::")[1], None)
            if launch is not None:
                found[operator] = launch
    return found
