"""A small labelled set, made once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_fast import motion


@pytest.fixture(scope="session")
def motions(tmp_path_factory):
    """Indexes of 16 training and 8 other clips of four classes, over pictures of noise."""
    folder = tmp_path_factory.mktemp("motion")
    found = {}
    for seed, (name, count) in enumerate({"train": 16, "val": 8}.items()):
        rng = np.random.default_rng(seed)
        noise = [rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for _ in range(3)]
        found[name] = motion.make(folder, name, count, noise, seed, labelled=True)
    return SimpleNamespace(folder=folder, **found)


class Largest(TorchDispatchMode):
    """`numbers`: of the largest tensor that is made while it lasts."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return found


@pytest.fixture
def largest():
    return Largest()
