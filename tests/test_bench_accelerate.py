"""The benchmark of accelerate: it runs, and times nothing that computes something else."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_the_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))  # benchmarks is not installed
    from benchmarks import bench_accelerate as bench

    measure = bench.measure  # in a process of its own: once is enough here
    monkeypatch.setattr(bench, "measure", lambda f, e, a: e == bench.AFTER and measure(f, e, a))
    out = tmp_path / "accelerate.jsonl"
    bench.main(bench.Args(quick=True, out=str(out)))
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["family"] == "transformers" and record["model"] == "quick"
    assert list(record["engines"]) == ["eager", "sdpa", "accelerated"]
    for name, engine in record["engines"].items():
        step = record["seconds"][name]
        assert all(a < b for a, b in zip(engine["until_update"], step, strict=True))
        assert len(step) == 2
    assert record["engines"]["accelerated"]["peak_memory_mb"] > 50


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_nothing_is_timed_of_other_losses(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import bench_accelerate as bench

    args = bench.Args(quick=True)
    names = ("eager", bench.AFTER)
    built = {name: bench.build("transformers", name, args) for name in names}
    eager = built["eager"]
    wrong = eager._replace(step=lambda clips: 1.01 * eager.step(clips))
    with pytest.raises(SystemExit, match="nothing is timed"):
        clips = bench.make_clips("transformers", args)
        bench.check_losses({**built, "eager": wrong}, clips, args.precision)
