"""Benchmarks of mae_fast and its baselines, run from the checkout. On an idle machine:

python -m benchmarks.ladder --batch 1 4 --out benchmarks/results/ladder.jsonl
python -m benchmarks.ladder --engines ... --official MAE_ST --out benchmarks/results/ladder.jsonl
python -m benchmarks.ladder --engines mae_fast_encode_all --out benchmarks/results/ladder.jsonl
python -m benchmarks.ops --out benchmarks/results/ops.jsonl
python -m benchmarks.curves --out benchmarks/results/curves.jsonl
make tables
"""
