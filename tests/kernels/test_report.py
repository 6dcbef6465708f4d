"""docs/kernels.md shows the committed tables, and the chosen kernels keep the rules."""

import aot
import pytest
from report import PAGE, page


def test_the_page_shows_the_tables():
    assert PAGE.read_text() == page(), "python tests/kernels/report.py --page writes it again"


@pytest.mark.parametrize("version", aot.versions())
def test_no_chosen_kernel_of_the_models_breaks_a_rule(version):
    """No spills but a few bytes, tensor cores wherever there are dots of 16 bits, and nothing
    written under a wgmma: ViT-B and ViT-L. (Attention's tile that is fastest on sm_90 spills 24
    bytes on sm_100 under Triton 3.6.)"""
    wrong = [
        f"{row.kernel} {row.dtype} sm_{row.arch} {row.sizes}: {problem}"
        for row in aot.committed(version)[1]
        if row.chosen and any(case.split()[0] in aot.MODELS for case in row.cases)
        for problem in row.broken(aot.MAY_SPILL)
    ]
    assert not wrong, "\n".join(wrong)


def test_three_programs_of_the_decoders_dkv_fit_an_sm_under_every_triton():
    """12 of 64 warps; the last block's and a ViT-B's encoder's, too."""
    for version in aot.versions():
        table = aot.committed(version)[1]
        rows = [r for r in table if r.kernel == "_attention_bwd_dkv_kernel" and r.chosen]
        rows = [r for r in rows if (r.arch, r.dtype) == (90, "bf16")]
        shown = [r for r in rows if any(c.split()[0] in aot.MODELS for c in r.cases)]
        assert shown and all(r.occupancy >= 0.187 for r in shown), version
