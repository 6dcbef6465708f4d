"""Planted defects are caught: a few here, all by `python tests/kernels/mutations.py`."""

import aot
import pytest
from mutations import MUTATIONS, ROOT, TIERS, caught

from mae_fast.kernels import configs
from mae_fast.ops import dispatch

if dispatch.interpreting():
    pytest.skip("it starts the interpreter itself", allow_module_level=True)

FEW = (
    "masked_mse: eps outside the root",
    "bias_gelu backward: every program writes the same partial sums",
    "patchify_gather: the compiler is not told that pixels follow each other",
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_mutation_still_fits_its_file(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1


def test_every_tier_and_enough_defects():
    assert len(MUTATIONS) >= 12 and {m.tier for m in MUTATIONS} == TIERS.keys()


@pytest.mark.parametrize("what", FEW)
def test_mutation_is_caught(what):
    (mutation,) = (m for m in MUTATIONS if m.what == what)
    if mutation.tier == "aot" and configs.TRITON not in aot.versions():
        pytest.skip(f"Triton {configs.TRITON} has no table of machine code")
    assert caught(mutation)
