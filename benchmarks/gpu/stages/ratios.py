"""Training steps at masking ratios from 0 to 95%, each beside mae_fast at 90%: see steps.py."""

from benchmarks.gpu.stages.steps import items_by_ratio as items

assert items
