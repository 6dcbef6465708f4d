"""Benchmarks of mae_fast and its baselines, run from the checkout."""
