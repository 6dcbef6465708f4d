"""A setting of fine-tuning changes in a run what it should, and nothing else. Those that every kind
of run takes are in tests/wiring/test_fields.py; rates, labels, masks and views beside this file."""

import dataclasses
import sys
import types

import pytest
import torch
from base_run import STEP, observed
from tuned import config

from mae_fast.tasks import score
from mae_fast.tasks.classify import FinetuneRun
from mae_fast.tasks.finetune import finetune

FIELDS = {  # what is set, and what of `observed` is then another
    "classifier.pool": ("first", STEP),
    "classifier.drop_path": (0.7, STEP),
    "classifier.dropout": (0.6, STEP),
    "augment.randaugment": ("", STEP),
    "augment.erasing": (1.0, STEP),
    "augment.smoothing": (0.3, STEP),
    "data.sampling_rate": (1, STEP),
    "data.target_fps": (60.0, STEP),
    "train.weight_decay": (0.5, {"end"}),
    "train.betas": ((0.8, 0.9), {"m", "v", "end"}),
    "train.eps": (1e-2, {"end"}),
    "train.layer_decay": (0.4, {"end"}),
}
MIXING = dict(mixup=0.3, cutmix=0.4, mix_prob=0.5, switch_prob=0.6, smoothing=0.7)


def run(motions, output, **changes):
    how = dict(data__sampling_rate=2, train__steps=3, train__save_every=1, train__clip_grad=0.5)
    cfg = config(motions, output, **how | changes)
    finetune(cfg)
    return observed(cfg.output)


@pytest.fixture(scope="module")
def base(motions, tmp_path_factory):
    return run(motions, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("field", FIELDS)
def test_a_setting_changes_what_it_should_and_nothing_else(field, base, motions, tmp_path):
    value, wanted = FIELDS[field]
    got = run(motions, tmp_path, **{field.replace(".", "__"): value})
    assert {key for key in got if got[key] != base[key]} == wanted


def test_a_new_head_is_scaled(motions, tmp_path):
    """Of the families whose head is not made anew after loading."""
    first, second = (
        run(motions, tmp_path / str(s), classifier={"family": "videomae", "head_scale": s})["start"]
        for s in (1.0, 0.5)
    )
    for (name, one), (_, half) in zip(first, second, strict=True):
        scale = 0.5 if name.startswith("head.") else 1
        torch.testing.assert_close(torch.tensor(half), scale * torch.tensor(one), msg=name)


def test_mixing_is_as_it_is_set(motions, tmp_path, monkeypatch):
    given = []

    def mixup(**how):
        given.append(how)
        return lambda clips, labels: (clips, torch.full((len(clips), 4), 0.25))

    monkeypatch.setitem(sys.modules, "timm.data.mixup", types.SimpleNamespace(Mixup=mixup))
    run(motions, tmp_path, augment=MIXING)
    names = dict(mixup_alpha=0.3, cutmix_alpha=0.4, prob=0.5, switch_prob=0.6, label_smoothing=0.7)
    assert given == [names | {"num_classes": 4}] * 3


def test_what_a_step_draws_is_of_the_seed(motions, tmp_path, monkeypatch):
    """Of the same clips: erased boxes, masks, and the numbers of dropout and drop path."""
    drawn, inputs = {}, FinetuneRun._inputs

    def of_seeds(self, batch):
        for seed in (1, 2):
            train = dataclasses.replace(self.cfg.train, seed=seed)
            self.cfg, self.micro = dataclasses.replace(self.cfg, train=train), 0
            video, target, keep = inputs(self, batch)
            drawn[seed] = video, keep, torch.get_rng_state()
        return video, target, keep

    monkeypatch.setattr(FinetuneRun, "_inputs", of_seeds)
    run(motions, tmp_path, train__steps=1, train__mask_ratio=0.5, augment__erasing=1.0)
    assert not any(map(torch.equal, *drawn.values()))


def test_held_out_videos_are_judged_in_the_precision_of_the_run(motions, tmp_path, monkeypatch):
    seen, judged = [], score.logits_of

    def watched(model, views, numbers, precision, *how):
        seen.append(precision)
        return judged(model, views, numbers, precision, *how)

    monkeypatch.setattr(score, "logits_of", watched)
    how = dict(train__steps=1, train__precision="bf16", data__val_index=str(motions.val))
    run(motions, tmp_path, **how)
    assert seen == ["bf16"] * 2
