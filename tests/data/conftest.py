import pytest

from mae_fast.data.index import build_index, read_index


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "i.jsonl"
    build_index([folder], out, workers=1, progress=False)
    return read_index(out)
