"""Records: what they must have, and that files of them are only appended to; compare."""

import copy
import json
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from benchmarks.gpu import records as gpu
from mae_fast import cli
from mae_fast.bench import compare, records

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks/results").rglob("*.jsonl"))
RECORD = {
    "kind": "steps",
    "what": "training step",
    "model": "vit_base",
    "batch_clips": 2,
    "ratio": 0.9,
    "precision": "fp32",
    "device": "cpu",
    "engines": {"mae_fast": {}, "official_eager": {}},
    "baseline": "official_eager",
    "seconds": {"mae_fast": [1.0, 1.1], "official_eager": [3.0, 3.1]},
    "environment": dict.fromkeys(records.ENVIRONMENT, "x"),
}


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_records_are_valid(path):
    found = records.read(path)
    assert found
    for record in found:
        timed = record.get("seconds") or record.get("seconds_a_clip")
        assert timed or record["kind"] in ("losses", "check")


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_files_were_only_appended_to(path):
    git = ["git", "-C", str(ROOT)]
    name = str(path.relative_to(ROOT))
    run = subprocess.run([*git, "log", "--format=%h", "--", name], capture_output=True, text=True)
    if run.returncode:
        pytest.skip("no git history")
    after = path.read_bytes()
    for commit in run.stdout.split():
        shown = subprocess.run([*git, "show", f"{commit}:{name}"], capture_output=True)
        if b'"kind"' not in shown.stdout.split(b"\n", 1)[0]:
            break  # written before records had one format, and converted once
        assert after.startswith(shown.stdout), commit
        after = shown.stdout


def test_what_a_killed_stage_leaves_is_a_record(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    records.append(path, RECORD)
    gpu.Records(path, "sources").add("tune", "the stage", gpu.NOT_REACHED, reason="killed")
    assert len(records.read(path)) == 2
    assert cli.main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 0
    assert "1 records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": None}, "precision must be str, got None"),
        ({"seconds": {"mae_fast": []}}, "samples of mae_fast must be seconds above 0, got []"),
        ({"seconds": {"mae_fast": [1, -1.0]}}, "samples of mae_fast must be seconds above 0"),
        ({"seconds": {"mae_fast": [float("nan")]}}, "samples of mae_fast"),
        ({"baseline": "theirs"}, "baseline theirs is none of mae_fast, official_eager"),
        ({"environment": {"torch": "2"}}, "environment lacks mae_fast, python, cpu, commit"),
        ({"environment": "here"}, "environment must be dict, got 'here'"),
    ],
)
def test_what_is_no_record(change, said, tmp_path):
    record = RECORD | change
    assert any(said in p for p in records.problems(record))
    with pytest.raises(ValueError, match="not a record"):
        records.append(tmp_path / "r.jsonl", record)
    assert not (tmp_path / "r.jsonl").exists()


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    records.append(path, RECORD)
    path.open("a").write("{\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:2: not JSON"):
        records.read(path)


def draw(generator: np.random.Generator, count: int, times: float = 1.0) -> list[float]:
    """Seconds with 3% of noise, and now and then a slow one."""
    seconds = times * np.exp(generator.normal(0, 0.03, count))
    slow = (generator.random(count) < 0.05) * generator.exponential(0.3, count)
    return list(seconds * (1 + slow))


@pytest.mark.parametrize("count", [7, 15])
def test_equal_distributions_show_no_difference(count):
    """False positives of a 95% interval, over 200 seeds: at most 5%, and the noise of counting."""
    wrong = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        _, low, high = compare.interval(draw(generator, count), draw(generator, count), generator)
        wrong += not low <= 1 <= high
    assert wrong <= 18


def test_a_planted_slow_down_is_found():
    found = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        ratio, low, high = compare.interval(
            draw(generator, 11), draw(generator, 11, 1.1), generator
        )
        found += low > 1
        assert low <= ratio <= high
    assert found >= 90


def two_files(tmp_path, times: float, machine: float = 1.0, limits: bool = True) -> list[str]:
    generator, paths = np.random.default_rng(1), []
    for name, slower, speed in (("a", 1.0, 1.0), ("b", times, machine)):
        record = copy.deepcopy(RECORD)
        for engine, seconds in (("mae_fast", slower), ("official_eager", 3.0)):
            record["seconds"][engine] = draw(generator, 15, seconds * speed)
        if limits:
            record["limits"] = {"engine_product": {"flop": 1, "seconds": [0.1 * speed] * 15}}
        records.append(tmp_path / f"{name}.jsonl", record)
        paths.append(str(tmp_path / f"{name}.jsonl"))
    return paths


def verdicts(paths, capsys) -> dict[str, str]:
    assert cli.main(["bench", "compare", *paths, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    return {row["name"]: row["verdict"] for row in told["changes"]}


def test_compare_finds_what_was_planted(tmp_path, capsys):
    found = verdicts(two_files(tmp_path, times=1.1), capsys)
    assert found["mae_fast"].startswith("B takes 1.") and found["mae_fast"].endswith("x as long")
    assert found["official_eager"] == compare.NO_DIFFERENCE


def test_a_slower_machine_is_no_difference(tmp_path, capsys):
    """Its own products, timed in the same rounds, are slower too."""
    paths = two_files(tmp_path, times=1.0, machine=1.3)
    assert set(verdicts(paths, capsys).values()) == {compare.NO_DIFFERENCE}
    assert cli.main(["bench", "compare", *paths]) == 0
    assert "the machine's own products took 1.30x" in capsys.readouterr().out


def test_without_limits_times_are_compared(tmp_path, capsys):
    found = verdicts(two_files(tmp_path, times=1.0, machine=1.3, limits=False), capsys)
    assert all(v.endswith("x as long") for v in found.values())


def test_an_interval_leaves_as_much_below_as_above():
    """Of two samples a quarter of the draws' medians is the less, and a quarter the greater."""
    for level, low, high in ((0.7, 1.0, 3.0), (0.3, 2.0, 2.0)):
        generator = np.random.default_rng(0)
        assert compare.interval([1.0], [1.0, 3.0], generator, level) == (2.0, low, high)


def test_all_lines_together_hold_with_the_confidence(tmp_path):
    """Of many lines each has a wider interval than it would have alone, of the same draws."""
    both = [records.newest(records.read(path)) for path in two_files(tmp_path, times=1.1)]
    many = compare.compare_records(*both)
    alone = [
        {subject: record | {"seconds": {many[0]["name"]: record["seconds"][many[0]["name"]]}}}
        for each in both
        for subject, record in each.items()
    ]
    (one,) = compare.compare_records(*alone)
    assert len(many) > 1 and one["ratio"] == many[0]["ratio"]
    assert many[0]["low"] < one["low"] < one["high"] < many[0]["high"]


def test_lines_of_one_file(tmp_path, capsys):
    path = str(tmp_path / "r.jsonl")
    for times in (1.0, 2.0):
        seconds = {name: [times * s for s in x] for name, x in RECORD["seconds"].items()}
        records.append(path, RECORD | {"seconds": seconds})
    slower, faster = "B takes 2.00x as long", "B is 2.00x as fast"
    for a, b, said in ((1, -1, slower), (1, 2, slower), (2, 1, faster), (-2, 2, slower)):
        assert set(verdicts([f"{path}:{a}", f"{path}:{b}"], capsys).values()) == {said}
    assert set(verdicts([f"{path}:2", path], capsys).values()) == {compare.NO_DIFFERENCE}
    assert cli.main(["bench", "compare", f"{path}:3", path]) == 2
    assert "has lines 1 to 2, not 3" in capsys.readouterr().err


OTHER = {"model": "vit_large", "batch_clips": 3, "ratio": 0.5, "strategy": "tube"}
OTHER |= {"precision": "bf16", "device": "cuda", "variant": "slowfast", "family": "videomae"}


@pytest.mark.parametrize("field", OTHER)
def test_other_things_are_not_compared(field, tmp_path, capsys):
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    records.append(a, RECORD)
    records.append(b, RECORD | {field: OTHER[field]})
    assert cli.main(["bench", "compare", a, b]) == 2
    assert "no two records of the same thing" in capsys.readouterr().err


def test_history_is_drawn(tmp_path, capsys):
    out = tmp_path / "history.png"
    results = str(ROOT / "benchmarks/results/ladder.jsonl")
    assert cli.main(["bench", "history", results, "-o", str(out)]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["bench", "history", results, "--names", "nobody"]) == 2


def test_a_step_has_the_clips_that_fitted():
    engines = {"mae_fast": {"clips": 1}, "official_eager": {"clips": 2}}
    assert records.ours(RECORD | {"engines": engines}) == (1, [1.0, 1.1])
    assert records.ours(RECORD) == (2, [1.0, 1.1])


def test_a_bar_of_history_is_its_interval():
    """Of 1, 2 and 9 a quarter of the draws' medians is 1, and a quarter 9."""
    axis, record = mock.Mock(), RECORD | {"seconds": {"mae_fast": [1.0, 2.0, 9.0]}}
    compare._draw_history(axis, [record], "mae_fast", np.random.default_rng(0))
    at, medians, (below, above) = axis.errorbar.call_args.args
    assert (at, medians, below, above) == ((0,), (2.0,), (1.0,), (7.0,))
