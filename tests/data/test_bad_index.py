"""Hostile indexes: one line with the file, the row, the column and the value; exit code 65."""

import dataclasses
import json
import math

import pytest

from mae_fast import cli
from mae_fast.data.index import VideoRow, read_index, write_index
from mae_fast.errors import ConfigError, DataError

ROW = dict(path="a.mp4", frames=40, fps=25.0, total=40, duration=1.6)
# A column and what it must not hold; the value is said.
VALUES = {
    "path": ["", "a\0.mp4", None, 3, ["a.mp4"], {"a": 1}, True],
    "label": [3, ["x"], True, {}, "a\0"],
    "start": [-1, 1, 1.5, "0", None, True, [0], 2**63],
    "frames": [0, -1, 41, 2**31, 2**63, 10**400, 40.5, "40", None, True, [[40]]],
    "fps": [0, -25.0, math.nan, math.inf, -math.inf, 1e300, "25", None, True, [25.0], {}],
    "duration": [-1.0, math.nan, "1.6", None],
    "width": [-1, 2**40, 64.0, None],
    "rotation": [45, "90", None],
    "bytes": [-1, 2**63, None],
    "mtime": [math.nan, "now", None],
    "error": [3, [], False],
    "mirrored": [1, "yes", None],
    "total": [-1, 39, 2**31, None],
    "ordered": [0, None],
    "hidden": ["x", "3-1", "0-999999999", "1-2-3", "-1", "1,,2", 3, None],
    "gop": [-1, None],
    "damaged": [-2, 2**40, None],
    "at": [-2, 2**62, "0", None],
    "first": [-1, 2**40, None],
    "packets": [-1, 2**40, None],
    "crc": [-1, 2**40, None],
    "setup": ["!", "AWQ", 3, None],
    "weight": [0, -1.0, math.nan, math.inf, 2**40, "1", None, True],
    "source": [3, "/a\0b", None],
}
CASES = [(column, value) for column, values in VALUES.items() for value in values]


def refusal(path, capsys) -> str:
    """What `pretrain` says of an index, and with which code."""
    config = path.with_name("c.toml")
    config.write_text(f'output = "{path.parent}/run"\n[data]\nindex = "{path}"\n')
    assert cli.main(["pretrain", str(config)]) == 65
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ") and said.count("\n") == 1, said
    assert len(said) < 700 + len(str(path)) and not (path.parent / "run").exists()
    return said


@pytest.mark.parametrize("column", VALUES)
def test_a_hostile_value_names_row_column_and_value(column, tmp_path):
    path = tmp_path / "i.jsonl"
    for value in VALUES[column]:
        try:
            bad = json.dumps({**ROW, column: value})
        except ValueError:  # more digits than Python prints
            bad = json.dumps({**ROW, column: 1}).replace(
                f'"{column}": 1', f'"{column}": 1{"0" * 5000}'
            )
        path.write_text(f"{json.dumps(ROW)}\n\n{bad}\n")
        with pytest.raises(DataError) as e:
            read_index(path)
        said = str(e.value)
        assert said.startswith(f"{path}: ") and "row 3: " in said and "\n" not in said, said
        assert len(said) < 400 + len(str(path))
        if not isinstance(value, int) or abs(value) < 2**100:
            assert column in said, said
        if value not in (None, "") and not isinstance(value, list | dict):
            assert str(value).replace("\0", "\\x00")[:20] in said, (value, said)


def test_rows_made_in_python_are_held_to_the_same():
    for column, value in CASES:
        if (column, value) in [("frames", 0), ("fps", 0)]:  # of a broken video
            continue
        with pytest.raises(ConfigError, match=column if value != 39 else "total"):
            VideoRow(**{**ROW, column: value})


FILES = {
    "not_json": (b"not json\n", "not a readable index: row 1: "),
    "a_list": (b"[1]\n", "row 1 is not a row, but [1]"),
    "a_number": (b"3\n", "row 1 is not a row, but 3"),
    "deep": (b"[" * 10**5, "not a readable index: row 1: "),
    "cut": (json.dumps(ROW).encode()[:-9], "not a readable index: row 1: "),
    "latin_1": (b'{"path": "caf\xe9.mp4"}\n', "not a readable index: row 1: 'utf-8'"),
    "utf_16": (json.dumps(ROW).encode("utf-16"), "not a readable index: row 1: 'utf-8'"),
    "binary": (bytes(range(256)) * 9, "not a readable index: row 1: "),
    "column_twice": (
        b'{"path": "a.mp4", "path": "b.mp4"}\n',
        "row 1: two columns are called 'path'",
    ),
    "no_path": (b'{"frames": 3}\n', "row 1: not an index: columns frames (expected path, "),
    "no_frames": (b'{"path": "a.mp4"}\n', "row 1: frames must be positive, got 0"),
    "another_schema": (
        b'{"path": "a.mp4", "colour": 3}\n',
        "row 1: not an index: columns path, col",
    ),
    "empty": (b"", "no usable videos among 0 rows"),
    "blank": (b"\n\n", "no usable videos among 0 rows"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_one_line(name, tmp_path, capsys):
    content, said = FILES[name]
    (tmp_path / "i.jsonl").write_bytes(content)
    assert said in refusal(tmp_path / "i.jsonl", capsys)


def test_a_byte_order_mark_and_other_lines_ends_are_taken(tmp_path):
    line = json.dumps({**ROW, "label": "a\u2028b\x85"}, ensure_ascii=False).encode()
    (tmp_path / "i.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n")
    assert [r.label for r in read_index(tmp_path / "i.jsonl")] == ["a\u2028b\x85"]


def parquet_cases():
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: F401

    whole = {k: [v, v] for k, v in ROW.items()}
    twice = arrow.table([arrow.array(["a.mp4"])] * 2, names=["path", "path"])
    return {
        "words": ({**whole, "frames": ["40", "40"]}, "row 1: frames must be int, got '40'"),
        "null": ({**whole, "fps": [25.0, None]}, "row 2: fps must be float, got None"),
        "nan": ({**whole, "fps": [25.0, math.nan]}, "row 2: fps must be finite, got nan"),
        "nested": ({**whole, "frames": [[40], [40]]}, "row 1: frames must be int, got [40]"),
        "table": (
            {**whole, "label": [{"a": 1}, {"a": 2}]},
            "row 1: label must be str, got {'a': 1}",
        ),
        "unsigned": (
            {**whole, "frames": arrow.array([40, 2**63], arrow.uint64())},
            "row 2: frames must",
        ),
        "date": (
            {**whole, "mtime": arrow.array([0, 1], arrow.timestamp("s"))},
            "row 1: mtime must be",
        ),
        "null_in_path": ({**whole, "path": [b"a.mp4", b"\0"]}, "row 2: path must not hold a null"),
        "no_path": ({"frames": [3]}, "row 1: not an index: columns frames"),
        "schema": ({**whole, "colour": ["x", "y"]}, "row 1: not an index: columns path"),
        "no_rows": ({"path": arrow.array([], arrow.string())}, "no usable videos among 0 rows"),
        "twice": (twice, "two columns are called 'path'"),
    }


def test_hostile_parquet_is_one_line_with_row_column_and_value(tmp_path, capsys):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "i.parquet"
    for table, said in parquet_cases().values():
        table = arrow.table(table) if isinstance(table, dict) else table
        pyarrow.parquet.write_table(table, path)
        assert said in refusal(path, capsys)
    write_index([VideoRow(**ROW)] * 50, path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-20], whole[100:], b"PAR1" + whole[-9:]):
        path.write_bytes(content)
        assert "not a readable index: " in refusal(path, capsys)


def test_parquet_of_other_kinds_of_text_and_of_folders_named_like_columns(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = arrow.table({k: [v] for k, v in ROW.items()})
    table = table.set_column(
        0, "path", arrow.array(["a.mp4"], arrow.large_string()).dictionary_encode()
    )
    folder = tmp_path / "split=train"
    folder.mkdir()
    pyarrow.parquet.write_table(table, folder / "i.parquet")
    assert read_index(folder / "i.parquet")[0] == VideoRow(**{**ROW, "path": str(folder / "a.mp4")})


def test_an_index_is_written_and_read_alike_whatever_its_rows_hold(tmp_path):
    rows = [
        VideoRow(**{**ROW, "path": str(tmp_path / "a.mp4"), "label": "x", "hidden": "0-3,17"}),
        VideoRow(**{**ROW, "path": "/b/\udcff.mp4", "label": None, "bytes": 2**62, "fps": 23.976}),
        VideoRow(**{**ROW, "path": "/c/ü\n.mp4", "label": "", "mtime": -1.5, "mirrored": True}),
        VideoRow("/d.mp4", error="empty: 0 bytes"),
    ]
    for suffix in ("jsonl", "parquet"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        write_index(rows, tmp_path / f"i.{suffix}")
        assert read_index(tmp_path / f"i.{suffix}", broken=True) == rows
        assert read_index(tmp_path / f"i.{suffix}") == rows[:3]


def test_every_column_is_tried():
    assert set(VALUES) | {"height", "codec", "pix_fmt", "seekable"} == {
        f.name for f in dataclasses.fields(VideoRow)
    }
