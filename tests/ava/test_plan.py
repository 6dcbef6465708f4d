"""`mae-fast plan --task ava`: hours and bytes at AVA's size."""

import json

import pytest

from mae_fast import cli


def said(capsys, *args: str) -> dict:
    what = ["plan", "--task", "ava", "--model", "vit_large", "--json", *args]
    assert cli.main(what) == 0
    return json.loads(capsys.readouterr().out)


def test_hours_and_bytes_follow_from_ava_s_size(capsys):
    eight, one = (said(capsys, "--gpus", n) for n in ("8", "1"))
    train, test = eight["training"], eight["test"]
    # v2.2: 235 and 64 movies, a keyframe at each second from 902 to 1798 at most; 30 epochs.
    assert (train["keyframes"], test["keyframes"]) == (235 * 897, 64 * 897)
    assert train["epochs"] == 30 and eight["batch_clips"] == 16
    assert train["clips_per_second"] == pytest.approx(8 * 16 / train["step_seconds"])
    seconds = 30 * 235 * 897 / train["clips_per_second"]
    assert train["hours"] == pytest.approx(seconds / 3600)
    assert test["hours"] == pytest.approx(64 * 897 * test["clip_seconds"] / 8 / 3600)
    assert 7 < one["training"]["hours"] / train["hours"] <= 8
    assert one["test"]["hours"] == pytest.approx(8 * test["hours"])
    # A step is that of fine-tuning, whose head is as small; a wide frame has 29 / 14 of the width
    # in patches and 16 / 14 of the height, so more than 2.3 times the work of a clip forward.
    assert (
        cli.main("plan --task finetune --model vit_large --gpus 8 --batch 16 --json".split()) == 0
    )
    tuning = json.loads(capsys.readouterr().out)["step"]["seconds"]
    assert train["step_seconds"] == pytest.approx(tuning, rel=0.02)
    views = "plan --task test --model vit_large --batch 1 --json".split()
    assert cli.main(views) == 0
    view = json.loads(capsys.readouterr().out)["step"]["seconds"]
    assert 2.3 < test["clip_seconds"] / view < 3.5
    # 16 frames, 4 apart, of 256 x 455 pixels at 0.03 bytes; a cut movie lasts 901 s.
    frame = 0.03 * 256 * 455
    read = eight["bytes_a_clip"]
    assert (read["frames_between_first_and_last"], read["frames_decoded"]) == (61, 16)
    assert read["pack"] == pytest.approx(61 * frame)
    assert read["file_not_packed"] == pytest.approx(901 * 30 * frame)


def test_it_is_called_predicted_and_what_does_not_fit_is_refused(capsys):
    what = ["plan", "--task", "ava", "--model", "vit_large", "--gpus", "8"]
    assert cli.main(what) == 0
    words = capsys.readouterr().out
    assert "predicted, not measured; RoIAlign and the head are left out" in words.splitlines()[0]
    hours = said(capsys, "--gpus", "8")["training"]["hours"]
    assert f"210,795 keyframes: {hours:.1f} h" in words and "kB of a pack" in words
    assert cli.main([*what, "--batch", "9999"]) == 2
    assert "9999 clips do not fit on one h100" in capsys.readouterr().err
    assert cli.main([*what, "--ratio", "0.5"]) == 2
    assert "--task ava sees every token, got --ratio 0.5" in capsys.readouterr().err
