"""A pytest plugin: `--shard 2/12` keeps every twelfth test, so that processes share the tests where
pytest-xdist is not installed. Importing it maps mae_fast.kernels, as benchmarks.gpu does."""


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", help="i/n: the tests i, i + n, i + 2n, ...")


def pytest_collection_modifyitems(config, items):
    i, n = map(int, config.getoption("--shard").split("/"))
    items[:] = items[i::n]
