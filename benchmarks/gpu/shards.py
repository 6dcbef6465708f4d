"""A pytest plugin: `--shard 2/12` keeps every twelfth test, so that processes share the tests where
pytest-xdist is not installed, and `--outcomes FILE` has each test's as it ends, a line of JSON: the
process may be ended before it sums up. Importing it maps mae_fast.kernels, as benchmarks.gpu does.
"""

import json
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="i/n: the tests i, i + n, i + 2n, ...")
    parser.addoption("--outcomes", type=Path, help="where each test's outcome is added")


def pytest_configure(config):
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


def pytest_collection_modifyitems(config, items):
    """What holds an op to its reference comes first."""
    items.sort(key=lambda item: "_matches_" not in item.name)
    i, n = map(int, config.getoption("--shard").split("/"))
    items[:] = items[i::n]


class Outcomes:
    def __init__(self, path: Path | None) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report):
        if self.path and (report.when == "call" or report.outcome != "passed"):
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            row |= {"error": error(report)} if report.failed else {}
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")


def error(report) -> str:
    """What was raised, on one line; of what has no such place, as a missing fixture, its lines."""
    crash, text = getattr(report.longrepr, "reprcrash", None), str(report.longrepr)
    lines = [line[1:] for line in text.splitlines() if line.startswith("E ")]
    return " ".join((crash.message if crash else " ".join(lines) or text).split())[:300]
