"""docs/kernels.md shows the committed tables, and the chosen kernels keep the rules."""

import aot
from report import PAGE, page


def test_the_page_shows_the_tables():
    assert PAGE.read_text() == page(), "python tests/kernels/report.py --page writes it again"


def test_no_chosen_kernel_of_the_models_breaks_a_rule():
    """No spills, and tensor cores wherever there are dots of 16 bits: ViT-B and ViT-L."""
    wrong = [
        f"{row.kernel} {row.dtype} sm_{row.arch} {row.sizes}: {problem}"
        for row in aot.committed()[1]
        if row.chosen and any(case.split()[0] in aot.MODELS for case in row.cases)
        for problem in row.broken()
    ]
    assert not wrong, "\n".join(wrong)
