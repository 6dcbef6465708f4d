"""What AVA will take at its official size, predicted: training, a test, and the bytes of a clip."""

from dataclasses import replace
from typing import Any

from mae_fast import cost
from mae_fast.data.pack import _BYTES_A_PIXEL as BYTES_A_PIXEL
from mae_fast.tasks.ava.config import VIDEOMAE_AVA
from mae_fast.tasks.ava.files import FIRST, LAST

MOVIES, TEST_MOVIES = 235, 64  # v2.2; every second from FIRST to LAST of each may be a keyframe
SHORT, LONG = 256, 455  # of a 16:9 frame at the recipe's short side
SQUARE = 352  # a square of as many tokens as 256 x 464 has, or a few more: 484 for 464 at a time
CUT_SECONDS, FPS = 901, 30


def plan(step: cost.Step, epochs: float) -> dict[str, Any]:
    """Hours of `epochs` of such a step over the training keyframes and of one test, of the encoder
    and the head's encoder alone: RoIAlign and the head are left out. Bytes are of a pack."""
    cfg, seconds, rate = step.cfg, LAST - FIRST + 1, VIDEOMAE_AVA["data"]["sampling_rate"]
    wide = replace(cfg, img_size=SQUARE // 16 * cfg.patch_size)
    test = cost.Step(wide, 1, 0.0, step.device, "forward").seconds
    span = (cfg.num_frames - 1) * rate + 1
    frame = BYTES_A_PIXEL * SHORT * LONG
    return {
        "device": step.device.name,
        "gpus": step.gpus,
        "batch_clips": step.clips,
        "training": {
            "keyframes": MOVIES * seconds,
            "epochs": epochs,
            "step_seconds": step.seconds,
            "clips_per_second": step.clips_per_second,
            "hours": epochs * MOVIES * seconds / step.clips_per_second / 3600,
            "memory_mb": step.held().peak / 2**20,
        },
        "test": {
            "keyframes": TEST_MOVIES * seconds,
            "clip_seconds": test,
            "hours": TEST_MOVIES * seconds * test / step.gpus / 3600,
        },
        "bytes_a_clip": {
            "pack": span * frame,
            "frames_between_first_and_last": span,
            "frames_decoded": cfg.num_frames,
            "file_not_packed": CUT_SECONDS * FPS * frame,
        },
    }


def tell(model: str, found: dict[str, Any]) -> str:
    """The prediction in words."""
    train, test, read = found["training"], found["test"], found["bytes_a_clip"]
    a_second = train["clips_per_second"] * read["pack"]
    said = [
        f"ava of {model}, {found['gpus']} x {found['device']}, {found['batch_clips']} clips each: "
        "predicted, not measured; RoIAlign and the head are left out",
        f"  a step            {1e3 * train['step_seconds']:.1f} ms, "
        f"{train['memory_mb'] / 1024:.1f} GiB, {train['clips_per_second']:.0f} clips/s",
        f"  training          {train['epochs']:g} epochs of at most {train['keyframes']:,} "
        f"keyframes: {train['hours']:.1f} h",
        f"  a test            at most {test['keyframes']:,} keyframes of {SHORT} x {LONG} pixels, "
        f"one at a time: {1e3 * test['clip_seconds']:.1f} ms each, {test['hours']:.2f} h",
        f"  read a clip       {read['pack'] / 1e3:.0f} kB of a pack (all-intra, short side "
        f"{SHORT}, {BYTES_A_PIXEL} bytes a pixel): {read['frames_between_first_and_last']} frames "
        f"in one read, {read['frames_decoded']} decoded; {a_second / 1e6:.0f} MB/s in all",
        "                    of a movie that is not packed: all its packets, about "
        f"{read['file_not_packed'] / 1e6:.0f} MB at that rate",
    ]
    return "\n".join(said)
