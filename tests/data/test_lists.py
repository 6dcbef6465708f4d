"""Lists of videos as other repositories write them; what could be two things is refused."""

import os

import pytest

from mae_fast.data.index import build_index, read_index
from mae_fast.data.sources import find_videos
from mae_fast.errors import DataError


def read(tmp_path, content: str | bytes, name: str = "list.txt", **options):
    """(path below the list's folder, label, segment) of each entry."""
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    videos = find_videos([tmp_path / name], **options)
    return [(os.path.relpath(v.path, tmp_path), v.label, v.segment) for v in videos]


GOOD = {
    # What it is, and its lines: every one gives the entries that follow.
    "path": ("a.mp4\nb.mp4\n", [("a.mp4", None, None), ("b.mp4", None, None)]),
    "slowfast": ("x/a.mp4 3\nx/b.mp4 0\n", [("x/a.mp4", "3", None), ("x/b.mp4", "0", None)]),
    "videomae_comma": ("a.mp4,3\nb.mp4,10\n", [("a.mp4", "3", None), ("b.mp4", "10", None)]),
    "videomae_frames": (
        "a.mp4 250 3\nb.mp4 5 300\n",
        [("a.mp4", "3", None), ("b.mp4", "300", None)],
    ),
    "videomae_v2": ("a.mp4 0 -1\nb.mp4 0 -1\n", [("a.mp4", None, None), ("b.mp4", None, None)]),
    "unlabelled_frames": ("a.mp4 250 -1\n", [("a.mp4", "-1", None)]),
    "frames_words": ("a.mp4 250 playing cards\n", [("a.mp4", "playing cards", None)]),
    "seconds": (
        "a.mp4 0.5 2.5\nb.mp4 3 4\n",
        [("a.mp4", None, (0.5, 2.5)), ("b.mp4", None, (3, 4))],
    ),
    "from_zero": (
        "a.mp4 0 10\nb.mp4 10 20\n",
        [("a.mp4", None, (0, 10)), ("b.mp4", None, (10, 20))],
    ),
    "seconds_label": (
        "a.mp4 1.5 2 jump\nb.mp4 0 1 run\n",
        [("a.mp4", "jump", (1.5, 2)), ("b.mp4", "run", (0, 1))],
    ),
    "label_seconds": (
        "a.mp4,tap dance,1,2\nb.mp4,run,0,1\n",
        [("a.mp4", "tap dance", (1, 2)), ("b.mp4", "run", (0, 1))],
    ),
    "another_line_decides": (
        "a.mp4 3 10 20\nb.mp4 9 1 2\n",
        [("a.mp4", "3", (10, 20)), ("b.mp4", "9", (1, 2))],
    ),
    "tabs": (
        "a b.mp4\ttap dance\nc.mp4\tjump\n",
        [("a b.mp4", "tap dance", None), ("c.mp4", "jump", None)],
    ),
    "semicolons": ("a.mp4;1\nb.mp4;2\n", [("a.mp4", "1", None), ("b.mp4", "2", None)]),
    "blank_comma_quote": (
        '"a, ""b"".mp4","hold, drop"\nit\'s.mp4,x\n',
        [('a, "b".mp4', "hold, drop", None), ("it's.mp4", "x", None)],
    ),
    "bare_comma_in_label": ("a.mp4,hold, then drop\n", [("a.mp4", "hold, then drop", None)]),
    "number_in_label": (
        "a.mp4 Boeing 747\nb.mp4 walking\n",
        [("a.mp4", "Boeing 747", None), ("b.mp4", "walking", None)],
    ),
    "some_without": ("a.mp4 250 3\nb.mp4\n", [("a.mp4", "3", None), ("b.mp4", None, None)]),
    "bom_crlf_comments": (
        "\ufeff# made by hand\r\n\r\n  a.mp4 1 \r\n\t\r\nb.mp4 2",
        [("a.mp4", "1", None), ("b.mp4", "2", None)],
    ),
    "old_mac": ("a.mp4 1\rb.mp4 2\r", [("a.mp4", "1", None), ("b.mp4", "2", None)]),
    "joined_files": ("a.mp4 1\n\ufeffb.mp4 2\n", [("a.mp4", "1", None), ("b.mp4", "2", None)]),
    "odd_line_ends_in_names": ("a\u2028\x85\x0c.mp4 1\n", [("a\u2028\x85\x0c.mp4", "1", None)]),
    "suffix_twice": ("a.mp4.mkv 1\n", [("a.mp4.mkv", "1", None)]),
    "header": ("path,label\na.mp4,3\n", [("a.mp4", "3", None)]),
    "header_quoted": ('"path","label"\n"a, b.mp4","x, y"\n', [("a, b.mp4", "x, y", None)]),
    "header_blanks": ("path label\nmy a.mp4 tap dance\n", [("my a.mp4", "tap dance", None)]),
    "header_frames": ("path frames label\na.mp4 10 20\n", [("a.mp4", "20", None)]),
    "header_seconds": ("path start end\na.mp4 10 20\n", [("a.mp4", None, (10, 20))]),
    "header_order": (
        "split,Label,end,start,Video_Path\ntrain,x,2,1,a.mp4\n",
        [("a.mp4", "x", (1, 2))],
    ),
    "header_no_suffix": ("filename\tclass\nfilm\t3\n", [("film", "3", None)]),
    "header_whole": (
        "path,start,end\na.mp4,,\nb.mp4,0,-1\n",
        [("a.mp4", None, None), ("b.mp4", None, None)],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_list_is_read_as_its_columns_say(name, tmp_path):
    content, entries = GOOD[name]
    for suffix in ("txt", "csv"):
        assert read(tmp_path, content, f"list.{suffix}") == entries


BAD = {
    "frames_or_start": (
        "x.mp4 10 20\ny.mp4 1 2\n",
        "line 1: '10 20' may be `frames label` or `start end`: add a first line",
    ),
    "two_ways_of_three": (
        "x.mp4 3 10 20\n",
        "line 1: '3 10 20' may be `label start end` or `start end label`",
    ),
    "changes": (
        "x.mp4 250 3\ny.mp4 7\n",
        "line 2: after the path, '7' is not as the lines before it: `path frames label`",
    ),
    "back_and_forth": ("x.mp4 250 3\ny.mp4 0 10\n", "line 2: after the path, '0 10' is not as"),
    "words_then_numbers": ("x.mp4 run\ny.mp4 250 3\n", "line 2: after the path, '250 3' is not as"),
    "reversed": (
        "x.mp4 2.5 0.5\n",
        "line 1: after the path, '2.5 0.5' is none of `label`, `frames label`",
    ),
    "empty_column": ("x.mp4,,3\n", "line 1: after the path, ',3' is none of"),
    "no_video": ("# frames\nvideo_0001 250 3\n", "line 2 names no video: 'video_0001 250 3'"),
    "two_names": (
        "x.mp4 y.mp4 3\n",
        "line 1: 'x.mp4 y.mp4 3' may name 'x.mp4' or 'x.mp4 y.mp4': quote",
    ),
    "open_quote": ('"x.mp4,3\n', "a quote is not closed"),
    "open_quote_label": ('x.mp4,"3\n', "line 1: '\"3': unexpected end of data"),
    "utf_16": ("x.mp4 3\n".encode("utf-16"), "holds null bytes .save UTF-16 as UTF-8"),
    "header_twice": ("path,label,label\nx.mp4,1,2\n", "line 1: two columns are called 'label'"),
    "header_in_frames": (
        "path,start_frame,end_frame\nx.mp4,1,2\n",
        "a column 'start_frame': give `start` and `end` in sec",
    ),
    "header_no_end": (
        "path,start\nx.mp4,1\n",
        "one of the columns start and end without the other",
    ),
    "header_falling": (
        "path,start,end\nx.mp4,5,1\n",
        "line 2: a segment in seconds must rise from 0 or above, got '5' to '1'",
    ),
    "header_nan": ("path,start,end\nx.mp4,0,nan\n", "got '0' to 'nan'"),
    "header_huge": ("path,start,end\nx.mp4,0,1e999\n", "got '0' to '1e999'"),
    "header_clock": ("path,start,end\nx.mp4,0:00,0:10\n", "got '0:00' to '0:10'"),
    "header_more": ("path,label\nx.mp4,a,b\n", "line 2: 'x.mp4,a,b' has 3 columns, not 2"),
    "header_no_path": ("path,label\n,3\n", "line 2: ',3' has no path"),
    "kinetics_times": (
        "youtube_id,time_start,time_end\nx,10,1\n",
        "line 2: a segment in seconds must rise .* got '10' to '1'",
    ),
    "kinetics_no_id": ("label,youtube_id\ncards,\n", "line 2: 'cards,' has no youtube_id"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_list_does_not_say_is_refused_with_file_line_and_value(name, tmp_path):
    content, said = BAD[name]
    with pytest.raises(DataError, match=said) as e:
        read(tmp_path, content)
    assert str(e.value).startswith(str(tmp_path / "list.txt")) and "\n" not in str(e.value)


def test_what_is_there_decides_between_two_names(tmp_path):
    (tmp_path / "x.mp4 y.mp4").touch()
    assert read(tmp_path, "x.mp4 y.mp4 3\n") == [("x.mp4 y.mp4", "3", None)]
    assert read(tmp_path, '"x.mp4" y.mp4\n') == [("x.mp4", "y.mp4", None)]


def test_relative_paths_begin_at_the_root(tmp_path, video):
    (tmp_path / "lists").mkdir()
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    video.write(tmp_path / "videos" / "a b.mp4", 10)
    video.write(tmp_path / "videos" / "deep" / "id_000001_000002.mp4", 10)
    (tmp_path / "lists" / "a.csv").write_text("a b.mp4 3\n/nowhere/c.mp4 4\n")
    (tmp_path / "lists" / "k.csv").write_text("youtube_id,time_start,time_end\nid,1,2\n")
    (tmp_path / "lists" / "s.json").write_text('[{"id": "a b", "label": "x"}]')
    sources = [tmp_path / "lists" / name for name in ("a.csv", "k.csv", "s.json")]
    out, options = tmp_path / "i.jsonl", dict(workers=1, progress=False)
    found = build_index(sources, out, root=tmp_path / "videos", **options)
    assert (found.videos, found.broken) == (2, {"missing": 1})
    assert {os.path.basename(r.path): r.label for r in read_index(out)} == {
        "a b.mp4": "3",
        "id_000001_000002.mp4": None,
    }
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        find_videos(sources, root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '[{"id": 1.5}]',
        "[3]",
        '[{"id": "a", "label": 3}]',
        "[" * 10**5,
        '[{"id": "a\\u0000"}]',
    ],
    ids=["table", "fraction", "number", "label", "deep", "null"],
)
def test_a_json_that_is_no_list_of_videos_is_one_line(content, tmp_path):
    with pytest.raises(DataError, match=r"list.json: not a ") as e:
        read(tmp_path, content, "list.json")
    assert "\n" not in str(e.value) and len(str(e.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_names_that_are_not_utf8_go_through_lists_and_indexes(tmp_path, video, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    video.write(tmp_path / "a.mp4", 10)
    os.rename(tmp_path / "a.mp4", folder + b"/\xff a.mp4")
    (tmp_path / "l.txt").write_bytes(b"caf\xe9/\xff a.mp4 na\xefve\n")
    out = tmp_path / f"i.{suffix}"
    for source in (tmp_path / "l.txt", tmp_path):
        assert build_index([source], out, workers=1, progress=False).videos == 1
        (row,) = read_index(out)
        assert os.fsencode(row.path) == folder + b"/\xff a.mp4" and row.frames == 10
        label = b"na\xefve" if source == tmp_path / "l.txt" else b"caf\xe9"
        assert os.fsencode(row.label) == label
