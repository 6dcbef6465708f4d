"""Bad configurations by the hundred: one line that names key and value, exit code 2, no traceback.

The cases walk the dataclasses, so a new field is tried as soon as it is there.
"""

import dataclasses
import sys
import types
from typing import get_origin

import numpy as np
import pytest

from mae_fast import cli, masking
from mae_fast.config import (
    Config,
    DataConfig,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    preset,
)
from mae_fast.config_file import SECTIONS
from mae_fast.errors import ConfigError
from mae_fast.fields import shown

FIELDS = [(s, f) for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
FIELDS += [("", f) for f in dataclasses.fields(Config) if f.name not in SECTIONS]
# Fields of numbers that may be zero; every other is refused at 0.
ZERO = set(
    "ratio decoder_ratio span_seconds short_side flip workers max_bad_share steps warmup_steps "
    "warmup_epochs min_lr weight_decay clip_grad seed max_nonfinite probe ema_momentum".split()
)
# As TOML has them; what each kind of field refuses is all but what is named after it.
VALUES = {
    "word": '"bfloat16"',
    "unicode": '"Größe ∞"',
    "empty": '""',
    "null": '"a\\u0000b"',
    "yes": "true",
    "negative": "-1",
    "negative_fraction": "-0.5",
    "zero": "0",
    "fraction": "2.5",
    "nan": "nan",
    "inf": "inf",
    "minus_inf": "-inf",
    "huge": "1e300",
    "huge_whole": "9" * 400,
    "over_64_bits": str(2**64),
    "list": "[]",
    "list_of_words": '["a", "b"]',
    "list_of_nan": "[nan, nan]",
    "list_falling": "[2, 1]",
    "three": "[0.5, 0.6, 0.7]",
    "nested": "[[1, 2], [3, 4]]",
    "table": '{ a = "b", c = 3 }',
    "tables": "[{ a = 1 }]",
    "date": "1979-05-27",
    "time": "07:32:00",
}


SHARES = ("ratio", "decoder_ratio", "flip", "max_bad_share", "ema_momentum")  # at most 1


def fits(field, value: str) -> bool:
    """Whether a value of VALUES may stand in this field."""
    kind, name = field.type, field.name
    if kind is str:
        return value in ("word", "unicode") or (value == "empty" and name != "output")
    if kind is bool:
        return value == "yes"
    if kind in (int, float) and value == "zero":
        return name in ZERO
    return kind is float and value == "fraction" and name not in SHARES


@pytest.fixture
def trained(monkeypatch) -> list[Config]:
    """The configurations with which pretrain was called."""
    calls: list[Config] = []
    monkeypatch.setitem(sys.modules, "mae_fast.train", types.SimpleNamespace(pretrain=calls.append))
    return calls


def refusal(path, capsys) -> str:
    """What the command says of a configuration file that it refuses."""
    assert cli.main(["pretrain", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("section", "field"), FIELDS, ids=[f"{s}.{f.name}".strip(".") for s, f in FIELDS]
)
def test_bad_value_is_one_line_with_key_and_value(section, field, tmp_path, trained, capsys):
    """Of 1,390 cases when it was written."""
    path, key = tmp_path / "run.toml", f"{section}.{field.name}".strip(".")
    head = {"": "", "model": '[model]\npreset = "vit_tiny"\n'}.get(section, f"[{section}]\n")
    shows = {"nan": "nan", "inf": "inf", "word": "'bfloat16'", "negative": "-1", "date": "1979"}
    for value in [v for v in VALUES if not fits(field, v)]:
        path.write_text(f"{head}{field.name} = {VALUES[value]}\n", encoding="utf-8")
        said = refusal(path, capsys)
        assert key in said, (value, said)
        assert shows.get(value, "") in said, (value, said)
    assert not trained


WRONG = [None, "x", "", -1, True, float("nan"), float("inf"), [], (1,), {}, object(), 2**70, b"x"]
WRONG += [np.zeros(3), 1j, (None, None), {"a": 1}, set(), "a\0b"]


@pytest.mark.parametrize("how", ["made", "replaced"])
@pytest.mark.parametrize("section", [*SECTIONS, ""])
def test_python_is_held_to_the_same_as_toml(section, how):
    cls = SECTIONS.get(section, Config)
    for field in dataclasses.fields(cls):
        for value in WRONG:
            accepted = (
                (field.type is bool and value is True)
                or (field.type is str and isinstance(value, str) and "\0" not in value)
                or (get_origin(field.type) is dict and isinstance(value, dict) and not value)
            )
            if accepted and not (field.name == "output" and value == ""):
                continue
            with pytest.raises(ConfigError, match=f"{field.name}|a model is") as e:
                if how == "made":
                    cls(**{field.name: value})
                else:
                    dataclasses.replace(cls(), **{field.name: value})
            assert "\n" not in str(e.value) and len(str(e.value)) < 300


def _parted(**changes) -> Config:
    return Config(train=TrainConfig(shard="full"), **changes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TrainConfig(precision="bfloat16"), "precision must be fp32 or bf16, got 'bfloat"),
        (lambda: TrainConfig(device="cuda:0"), "device must be auto, cpu or cuda, got 'cuda:0'"),
        (lambda: ModelConfig(variant="slow_fast"), "variant must be mae_st or slowfast, got"),
        (lambda: TrainConfig(batch_size=2.5), "train.batch_size must be int, got 2.5"),
        (lambda: TrainConfig(betas=(0.9, 1.0)), r"train.betas must be in \[0, 1\), got \(0.9, 1"),
        (lambda: TrainConfig(blr=float("inf")), "train.blr must be finite, got inf"),
        (lambda: preset("vit_tiny", t_patch_size=0), "model.t_patch_size must be positive, got 0"),
        (lambda: preset("vit_tiny", num_frames="x"), "model.num_frames must be int, got 'x'"),
        (lambda: preset(["vit_tiny"]), r"unknown model \['vit_tiny'\]"),
        (lambda: Config(mask=MaskConfig(ratio=0.9999)), "mask ratio 0.9999 leaves none of 8x14x14"),
        (lambda: Config(mask=MaskConfig("tube", 1e-9)), "ratio 1e-09 leaves nothing to predict"),
        (lambda: _parted(eval=EvalConfig(5, "a", "b")), "none with eval.probe.*got 'full'"),
        (lambda: _parted(model=preset("vit_tiny", target="features")), "none .*a target that a"),
        (lambda: Config(model=ModelConfig(in_chans=1)), "to train on video, got 1"),
        (
            lambda: ModelConfig(img_size=2**17, patch_size=2),
            "make 34359738368 patches, more than 2147",
        ),
        (lambda: Config(model="vit_bse"), "did you mean 'vit_base'"),
        (lambda: Config(train={"batch_size": 2}), "train must be TrainConfig, got {'batch_size'"),
    ],
)
def test_one_slip_names_key_and_value(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_what_python_has_of_numbers_and_paths_is_taken(tmp_path):
    data = DataConfig(index=tmp_path / "a.jsonl", workers=np.int64(3), crop_area=[0.5, 1])
    assert data == DataConfig(index=str(tmp_path / "a.jsonl"), workers=3, crop_area=(0.5, 1.0))
    assert all(type(x) is float for x in data.crop_area) and type(data.workers) is int
    train = TrainConfig(epochs=7, blr=np.float32(0.5), seed=2**63 - 1)
    assert type(train.epochs) is float and train.blr == 0.5
    assert Config(output=tmp_path, model="vit_tiny").model == preset("vit_tiny")


def test_a_table_given_is_not_shared():
    backends = {"attention": "sdpa"}
    train = TrainConfig(backends=backends)
    backends["attention"] = 3
    assert train.backends == {"attention": "sdpa"}


FILES = {
    "not_toml": (b"[train\n", "run.toml: "),
    "latin_1": ("[data]\nindex = 'Übung'\n".encode("latin-1"), "not UTF-8, byte 0xdc at 16"),
    "utf_16": ("[data]\n".encode("utf-16"), "not UTF-8"),
    "binary": (bytes(range(256)), "run.toml: "),
    "null": (b"output = 'a\x00'\n", "run.toml: "),
    "deep": (b"a = " + b"[" * 20000, "run.toml: "),
    "twice": (b"[train]\n[train]\n", "run.toml: "),
    "train_is_a_number": (b"train = 3\n", "[train] must be a table, got 3"),
    "model_is_a_name": (b"model = 'vit_base'\n", 'as in [model] preset = "vit_base"'),
    "data_is_a_list": (b"[[data]]\nworkers = 1\n", "[data] must be a table, got [{'workers'"),
    "recipe_is_a_list": (b"recipe = []\n", "unknown recipe []"),
    "recipe_is_unknown": (b"recipe = 'mae'\n", "did you mean 'mae_st'"),
    "preset_is_a_number": (b"[model]\npreset = 3\n", "unknown model 3"),
    "unknown_table": (b"[trian]\n", "did you mean 'train'"),
    "unknown_key_of_two_lines": (b'"a\\nb" = 3\n', r"unknown key 'a\nb'"),
    "preset_in_train": (b"[train]\npreset = 'vit_base'\n", "unknown key 'train.preset'"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file_is_one_line(name, tmp_path, trained, capsys):
    content, said = FILES[name]
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert said in refusal(path, capsys)
    assert not trained


def test_a_folder_or_nothing_is_no_file(tmp_path, capsys):
    assert "Is a directory" in refusal(tmp_path, capsys)
    assert "No such file" in refusal(tmp_path / "none.toml", capsys)
    assert "null" in refusal("a\0b", capsys)


def test_a_byte_order_mark_is_no_text(tmp_path, trained):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + "output = 'Läufe'\n".encode())
    assert cli.main(["pretrain", str(path)]) == 0
    assert trained[0].output == "Läufe"


def test_an_empty_file_is_the_recipe(tmp_path, trained):
    (tmp_path / "run.toml").touch()
    assert cli.main(["pretrain", str(tmp_path / "run.toml")]) == 0
    assert trained == [Config()]


def test_a_value_of_any_length_is_shown_in_one_short_line():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert shown("x" * 999).endswith("...") and len(shown("x" * 999)) == 80
    assert shown(Broken()) == "a Broken" and "\n" not in shown(np.zeros((9, 9)))
    assert shown(10**5000) == "a int"


@pytest.mark.parametrize("strategy", masking.STRATEGIES)
def test_a_ratio_that_a_run_takes_hides_some_and_leaves_some(strategy):
    model = ModelConfig(img_size=32, num_frames=4, pred_t_dim=2)
    taken = 0
    for ratio in np.linspace(0, 0.999, 100):
        try:
            cfg = Config(model=model, mask=MaskConfig(strategy, ratio))
        except ConfigError:
            continue
        taken += 1
        keep = masking.num_keep(strategy, model.grid, cfg.mask.ratio)
        assert 0 < keep < model.num_patches
    assert taken


def test_pretrain_takes_the_path_of_a_file(tmp_path):
    from mae_fast import pretrain

    path = tmp_path / "run.toml"
    path.write_text('[model]\npreset = "vit_tiny"\n')
    for said in (path, str(path)):
        with pytest.raises(ConfigError, match=r"data\.index is empty"):  # the file's, read
            pretrain(said)
    with pytest.raises(ConfigError, match=r"the path of a TOML file, got {'model': 3}"):
        pretrain({"model": 3})
