"""Benchmarks of the ops, bench_<op>.py for each: forward and backward, checked, then timed."""
