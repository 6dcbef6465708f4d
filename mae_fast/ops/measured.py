"""Ops whose backends stand in the order that a GPU has measured, by shape class."""

import json
import logging
from collections.abc import Iterable
from importlib import resources

import torch

from mae_fast.ops import dispatch

log = logging.getLogger("mae_fast")


def read_measured() -> dict[str, dict[str, dict[str, float]]]:
    """The table that `make gpu` writes, kernels/measured_backends.json, or {}.

    {architecture: {row: {backend: milliseconds}}}, architectures as "90" for sm_90, the times of a
    row taken side by side at the same shapes.
    """
    file = resources.files("mae_fast.kernels") / "measured_backends.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def orders(rows: dict[str, dict[str, float]]) -> dict[str, tuple[str, ...]]:
    """{row: backends, the fastest first}: as flat as torch.compile wants it."""
    return {row: tuple(sorted(times, key=times.get)) for row, times in rows.items()}


architecture = dispatch.constant(lambda: "{}{}".format(*torch.cuda.get_device_capability()))
measured = dispatch.constant(lambda: orders(read_measured().get(architecture(), {})))
_guessed: set[str] = set()


class Measured(dispatch.Op):
    """`order` of such an op asks `by_table`."""

    def by_table(self, row: str) -> Iterable[str]:
        """The fastest first where the row was measured, then what it does not have."""
        fastest = measured().get(row)
        if fastest:
            found = [name for name in fastest if name in self.backends]
            return [*found, *(name for name in self.backends if name not in found)]
        if not torch.compiler.is_compiling() and row not in _guessed:
            _guessed.add(row)
            where = f"sm_{architecture()}, {row}"
            log.info("%s: the order of backends is a guess, %s was not measured", self.name, where)
        return self.backends


def row(shape: str, dtype: torch.dtype, gradients: bool) -> str:
    """ "<shape>-bfloat16-both": forward and backward, without gradients "forward"."""
    return f"{shape}-{str(dtype).removeprefix('torch.')}-{'both' if gradients else 'forward'}"
