"""[ava]: the files of AVA, and what happens to its boxes."""

from dataclasses import dataclass
from typing import Literal

from mae_fast.fields import check_fields, require

FILES = ("train_csv", "val_csv", "labels", "excluded", "train_excluded", "train_detections")
FILES += ("val_detections", "frames")


@dataclass(frozen=True)
class AvaConfig:
    """Where AVA is, and what happens to its boxes. The movies are data.index's, by the names of
    their files."""

    train_csv: str = ""
    """ava_train_v2.2.csv: boxes and labels that training learns from"""
    val_csv: str = ""
    """ava_val_v2.2.csv: the truth of the test"""
    labels: str = ""
    """ava_action_list_v2.2_for_activitynet_2019.pbtxt: the classes that count"""
    excluded: str = ""
    """ava_val_excluded_timestamps_v2.2.csv"""
    train_excluded: str = ""
    """ava_train_excluded_timestamps_v2.2.csv"""
    train_detections: str = ""
    """detected persons, whose boxes on a true one (IoU 0.9 and more) train too, with its labels"""
    val_detections: str = ""
    """detected persons, which the test labels; without it the true boxes are taken, and it says so
    """
    score: float = 0.8
    """detections of a lower score are not read"""
    frames: str = ""
    """a folder of folders of pictures, MOVIE/MOVIE_000001.jpg ... at 30 a second, in place of
    data.index"""
    begins_at: float = 900.0
    """the second of the movie at which its file begins: 900 for movies cut to their 15th to 30th
    minute, 0 for whole ones"""
    num_classes: int = 80
    """outputs of the head; those that `labels` lacks are trained and not tested"""
    short_sides: tuple[float, float] = (256.0, 320.0)
    """training: the frame's short side is brought to a random number of pixels within these, and a
    square of model.img_size cut out"""
    box_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """training: each edge is moved by up to these shares of the box's side: in x outwards, in x
    inwards, in y outwards, in y inwards"""
    box_extend: tuple[float, float] = (0.0, 0.0)
    """test: boxes are made wider and higher by these shares for the head, not for the score"""
    times_detection: bool = False
    """test: an action's score is times that of the person's detection"""
    color: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """training: hue in degrees, saturation and value, shifted by up to these, by the clip"""
    pixels: Literal["family", "alphaction"] = "family"
    """mean and deviation of pixels: the family's, or those of AlphAction, which VideoMAE's recipe
    has"""
    val_every: int = 0
    """with every checkpoint the true seconds that are multiples of this are tested (4 is
    SlowFast's); 0: never while it trains"""

    def __post_init__(self) -> None:
        check_fields(self, "ava")
        require(0 <= self.score <= 1, "ava.score must be in [0, 1]", self.score)
        require(self.begins_at >= 0, "ava.begins_at must not be negative", self.begins_at)
        require(0 < self.num_classes <= 2**20, "ava.num_classes is out of range", self.num_classes)
        require(self.val_every >= 0, "ava.val_every must not be negative", self.val_every)
        low, high = self.short_sides
        require(0 < low <= high, "ava.short_sides must be two that do not fall", self.short_sides)
        for name in ("box_jitter", "box_extend", "color"):
            value = getattr(self, name)
            require(min(value) >= 0, f"ava.{name} must not be negative", value)
        require(max(self.box_jitter) < 0.5, "ava.box_jitter must be below 0.5", self.box_jitter)


# MCG-NJU/VideoMAE-Action-Detection, scripts/ava/videomae_vit_base_k400_pretrain+finetune/run.sh and
# the defaults of run_class_finetuning.py, modeling_finetune.py, data/transforms.py, datasets.py:
# 4 clips a GPU of 32; lr of 256 clips. It trains on true boxes alone.
VIDEOMAE_AVA = {
    "model": dict(preset="vit_base"),
    "classifier": dict(family="videomae", drop_path=0.2, dropout=0.0, head_scale=0.001),
    "augment": dict(randaugment="", erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0),
    "data": dict(
        sampling="seconds", sampling_rate=4, target_fps=30.0, repeat_aug=1, short_side=256, flip=0.5
    ),
    "train": dict(
        batch_size=4, epochs=30.0, warmup_epochs=5.0, blr=5e-4, min_lr=1e-6, warmup_lr=1e-6,
        count_repeats=False, scale_min_lr=True, weight_decay=0.05, betas=(0.9, 0.999),
        clip_grad=0.0, layer_decay=0.75,
    ),
    "test": dict(temporal=1, spatial=1, short_side=256),
    "ava": dict(
        score=0.8, short_sides=(256.0, 256.0), box_jitter=(0.2, 0.1, 0.1, 0.05),
        box_extend=(0.1, 0.05), times_detection=True, color=(20.0, 0.1, 0.1), pixels="alphaction",
    ),
}  # fmt: skip
