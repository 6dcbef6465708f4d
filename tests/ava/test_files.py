"""AVA's files, and what is wrong with some of them."""

import numpy as np
import pytest
from PIL import Image

from mae_fast.data import VideoRow
from mae_fast.errors import ConfigError, DataError
from mae_fast.tasks.ava import files
from mae_fast.tasks.ava.clips import keyframes
from mae_fast.tasks.ava.evaluate import Labelled
from mae_fast.tasks.ava.files import LeftOut, Person

BAD = {
    "a,0902,0.1,0.1,0.5": "5 columns, not 7 or 8",
    "a,902.5,0.1,0.1,0.5,0.5,3,0": "not a movie and a second: 'a,902.5'",
    ",0902,0.1,0.1,0.5,0.5,3,0": "not a movie and a second",
    "a,0901,0.1,0.1,0.5,0.5,3,0": "second 901 is outside 902 to 1798",
    "a,0902,0.1,nan,0.5,0.5,3,0": "not four numbers",
    "a,0902,0.5,0.1,0.5,0.5,3,0": "a box without an area",
    "a,0902,0.6,0.1,0.5,0.5,3,0": "a box without an area",
    "a,0902,1.1,0.1,1.5,0.5,3,0": "nothing of the box is in the frame",
    "a,0902,0.1,0.1,0.5,0.5,81,0": "class '81' is none of 1 to 80",
    "a,0902,0.1,0.1,0.5,0.5,walk,0": "class 'walk' is none of 1 to 80",
    "a,0902,0.1,0.1,0.5,0.5,3,sure": "score 'sure' is no number",
}


def test_bad_rows_are_counted_listed_and_left_out(tmp_path):
    good = ["a,0902,0.1,0.1,0.5,0.5,3,0", "b,1798,-0.1,0.1,1.2,0.5,80,1", "a,0903", ""]
    (tmp_path / "x.csv").write_text("\ufeff" + "\r\n".join([*good, *BAD]))
    left = LeftOut()
    rows = files.read_boxes(tmp_path / "x.csv", left)
    assert rows == [
        Labelled("a", 902.0, (0.1, 0.1, 0.5, 0.5), 3, 0.0),
        Labelled("b", 1798.0, (-0.1, 0.1, 1.2, 0.5), 80, 1.0),
        Labelled("a", 903.0, (0.0,) * 4, None),
    ]
    assert left.counts == {
        "boxes partly outside the frame, cut at its edge": 1,
        "bad rows": len(BAD),
    }
    for number, reason in enumerate(BAD.values(), 5):
        assert any(
            line.startswith(f"x.csv: line {number}: bad rows: {reason}") for line in left.lines
        )
    said = left.say()
    assert len(said) == 2 and said[1].startswith("11 bad rows: x.csv: line 5: ")
    assert all("\n" not in line for line in said)
    (tmp_path / "y.csv").write_text("\n".join(BAD))
    with pytest.raises(DataError, match=r"no row can be used .*5 columns"):
        files.read_boxes(tmp_path / "y.csv", LeftOut())
    with pytest.raises(DataError, match="cannot be read"):
        files.read_boxes(tmp_path / "none.csv", LeftOut())


def test_the_label_list_is_read_as_the_official_ones_are_written(tmp_path):
    path = tmp_path / "l.pbtxt"
    path.write_text(
        'item {\n  name: "bend/bow (at the waist)"\n  id: 1\n}\n'
        'label {\n  name: "stand"\n  label_id: 12\n  label_type: PERSON_MOVEMENT\n}\n'
    )
    assert files.read_classes(path) == {1: "bend/bow (at the waist)", 12: "stand"}
    for text in (
        "",
        "item {\n  id: 1\n}",
        'name: "a"\nid: 1\nname: "b"\nid: 1',
        'name: "a"\nid: x',
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=r"no classes|not a class of its own"):
            files.read_classes(path)


def test_excluded_timestamps(tmp_path):
    (tmp_path / "e.csv").write_text("a,0903\nb,1000\nc\n")
    left = LeftOut()
    found = files.read_excluded(tmp_path / "e.csv", left)
    assert found == {("a", "903.000000"), ("b", "1000.000000")} and left.counts == {"bad rows": 1}


BOX, NEAR, FAR = (0.1, 0.1, 0.5, 0.5), (0.1, 0.1, 0.5, 0.51), (0.1, 0.1, 0.5, 0.6)


def test_rows_of_one_box_are_one_person_and_low_scores_are_none():
    rows = [Labelled("a", 902.0, BOX, c, 0.9) for c in (3, 5, -1)]
    rows += [Labelled("a", 902.0, FAR, -1, 0.7), Labelled("a", 903.0, BOX, None)]
    found = files.people(rows, 0.7)
    assert found == {("a", 902): [Person(BOX, frozenset({3, 5}), 0.9), Person(FAR, score=0.7)]}
    assert files.people(rows, 0.8) == {("a", 902): [Person(BOX, frozenset({3, 5}), 0.9)]}


def test_detections_on_a_true_box_take_its_classes():
    truth = {
        ("a", 902): [Person(BOX, frozenset({3})), Person((0.6, 0.6, 0.9, 0.9), frozenset({5}))]
    }
    seen = {("a", 902): [Person(NEAR, score=0.9), Person(FAR, score=0.9), Person(BOX)],
            ("a", 903): [Person(NEAR, score=0.9)]}  # fmt: skip
    found = files.with_detections(truth, seen)
    # IoU 0.4 / 0.41 and 0.4 / 0.5; the true box itself is not twice.
    assert found == {("a", 902): [*truth["a", 902], Person(NEAR, frozenset({3}), 0.9)]}


def movie(**how):
    return VideoRow("/m/a.mp4", **dict(frames=900, fps=25.0, duration=36.0, total=900) | how)


def test_missing_movies_are_counted_by_keyframe_and_listed():
    frames = {(m, s): [Person(BOX)] for m in ("a", "b", "c") for s in (902, 903)}
    rows, left = {"a": movie(), "b": movie(error="truncated: 3 of 9 frames")}, LeftOut()
    found = files.movies_of(frames, rows, left, {("a", "903.000000")})
    assert [(r.path, s) for r, s, _ in found] == [("/m/a.mp4", 902)]
    assert left.counts == {"keyframes of missing movies": 4}
    assert left.lines == [
        "b: keyframes of missing movies: 2 of them, truncated: 3 of 9 frames",
        "c: keyframes of missing movies: 2 of them, not in the index",
    ]
    with pytest.raises(DataError, match="no keyframe has its movie"):
        files.movies_of(frames, {}, LeftOut())


def test_seconds_that_none_are_left_of_are_no_missing_movies():
    with pytest.raises(DataError, match=r"no keyframe is left by .* ava\.val_every"):
        files.movies_of({}, {"a": movie()}, LeftOut())


def test_a_clip_lies_around_its_second():
    thirty = movie(frames=30 * 901, fps=30.0, duration=901.0, total=0)
    # SlowFast: range(centre - 32, centre + 32, 4), centre (902 - 900) * 30.
    found = files.around(thirty, 902, 900, 16, 4, 30.0)
    assert found.tolist() == list(range(60 - 32, 60 + 32, 4))
    assert files.around(thirty, 900, 900, 16, 4, 30.0).tolist()[:10] == [0] * 9 + [4]
    assert files.around(thirty, 1801, 900, 16, 4, 30.0)[-1] == 30 * 901 - 1
    # At another rate the same moments: 0.8 s before it is frame 30, at 25 a second.
    found = files.around(movie(), 902, 900, 16, 4, 30.0)
    assert (found[8], found[0]) == (50, round(50 - 25 * 32 / 30))
    with pytest.raises(ConfigError, match=r"second 1000 is not in its 36 s.*ava.begins_at 900"):
        files.around(movie(), 1000, 900, 16, 4, 30.0)


def test_a_movie_that_is_a_part_of_its_file_begins_where_the_part_does():
    frames = {("a", 902): [Person(BOX)]}
    rule = (16, 4, 30.0)
    found = keyframes(frames, {"a": movie(start=100, total=2000)}, rule, 900.0, LeftOut())
    wanted = files.around(movie(), 902, 900.0, *rule) + 100
    assert found.indices[0].tolist() == wanted.tolist() and found.seconds == [902]
    row = found.rows[0]
    assert (row.start, row.start + row.frames - 1) == (wanted[0], wanted[-1])


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17])
def test_folders_of_pictures_are_counted_without_being_listed(tmp_path, count):
    (tmp_path / "a").mkdir()
    for i in range(count):
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "a" / f"a_{i + 1:06d}.jpg")
    (tmp_path / "b").mkdir()
    found = files.frame_folders(tmp_path, {"a", "b", "c"})
    assert set(found) == {"a"} and (found["a"].frames, found["a"].fps) == (count, 30.0)
