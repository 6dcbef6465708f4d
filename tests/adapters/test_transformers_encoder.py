"""transformers' VideoMAEModel alone, with and without the one line: features, and training."""

import copy

import pytest
import torch
from compare import check
from test_transformers import IMAGENET, TINY, scattered, skip_rounded_softmax

import mae_fast
import mae_fast.forward as fused
from mae_fast.adapters import transformers_encoder
from mae_fast.ops.attention import attention


@pytest.fixture
def videomae():
    pytest.importorskip("transformers")
    from transformers.models import videomae

    return videomae


@pytest.fixture
def make(videomae):
    def build(**changes):
        torch.manual_seed(0)
        model = videomae.VideoMAEModel(videomae.VideoMAEConfig(**TINY | changes))
        return scattered(model).train()

    return build


CLIPS = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
MASK = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).argsort(dim=1) >= 2


def run_with(mask, **kwargs):
    def run(model):
        out = model(CLIPS.to(next(model.parameters()).dtype), bool_masked_pos=mask, **kwargs)
        assert list(out.keys()) == ["last_hidden_state", *(["hidden_states"] if kwargs else [])]
        states = out.hidden_states if kwargs else ()
        return [out.last_hidden_state.square().mean(), out.last_hidden_state, *states]

    return run


@pytest.mark.parametrize("states", [False, True], ids=["last", "hidden_states"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all_tokens", "visible_tokens"])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("norm", [False, True], ids=["no_norm", "norm"])
def test_features(make, kind, mask, states, norm):
    model = make(attn_implementation=kind, use_mean_pooling=not norm)
    skip_rounded_softmax(model)
    check(model, run_with(mask, **dict(output_hidden_states=True) if states else {}))


def test_dropout_and_checkpoints_and_eval(make):
    model = make(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    run = run_with(None, output_hidden_states=True)
    check(model, run)
    check(copy.deepcopy(model).eval(), run)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    check(model, run)


def test_a_sample_is_a_clip_of_the_model_s_size(make):
    model = make()
    assert model(*transformers_encoder.sample(model, torch.float32)).last_hidden_state.shape[1] == 8


def test_its_kernels_run_in_every_layer(make, monkeypatch):
    calls = []
    monkeypatch.setattr(fused, "attention", lambda *qkv: calls.append(1) or attention(*qkv))
    model = mae_fast.accelerate(make(), verify=False)
    for kwargs in ({}, dict(output_hidden_states=True)):
        calls.clear()
        model(CLIPS.float(), **kwargs)
        assert len(calls) == 2


def test_a_classifiers_trunk(videomae):
    torch.manual_seed(0)
    model = videomae.VideoMAEForVideoClassification(videomae.VideoMAEConfig(**TINY, num_labels=5))
    model = scattered(model).double()
    labels = torch.tensor([0, 3, 4])
    want = model(CLIPS, labels=labels, output_hidden_states=True)
    mae_fast.accelerate(model.videomae)
    out = model(CLIPS, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.hidden_states, want.hidden_states, rtol=1e-9, atol=1e-10)


def test_what_is_its_own_forwards(make, caplog):
    model = make(attn_implementation="eager")
    want = model(CLIPS.float(), output_attentions=True)
    out = mae_fast.accelerate(model)(CLIPS.float(), output_attentions=True)
    assert all(map(torch.equal, out.attentions, want.attentions))
    assert "its own forward runs: output_attentions is asked for" in caplog.text
    last, states = model(CLIPS.float(), output_hidden_states=True, return_dict=False)
    assert last.shape == (3, 8, 24) and len(states) == 3
    with pytest.raises(ValueError, match="Input image size"):
        model(CLIPS.float()[..., :8])


def test_arguments_that_the_fused_forward_does_not_know(make, caplog):
    own, model = make(), mae_fast.accelerate(make())
    heads = own.config.num_hidden_layers, own.config.num_attention_heads
    for given, why in (
        (dict(head_mask=torch.ones(heads)), "head_mask is given"),
        (dict(output_hidden_states=[0]), "output_hidden_states names layers"),
    ):
        try:
            want = own(CLIPS.float(), **given).last_hidden_state
        except (TypeError, ValueError) as e:
            with pytest.raises(type(e)):
                model(CLIPS.float(), **given)
        else:
            assert torch.equal(model(CLIPS.float(), **given).last_hidden_state, want)
        assert f"its own forward runs: {why}" in caplog.text


@pytest.mark.parametrize("asked", [{}, dict(return_dict=None), dict(return_dict=True)])
def test_a_configuration_without_dicts_is_asked(make, asked):
    """What None says differs between versions."""
    own, model = make(), mae_fast.accelerate(make())
    own.config.return_dict = model.config.return_dict = False
    assert type(model(CLIPS.float(), **asked)) is type(own(CLIPS.float(), **asked))


def test_uint8_clips(make):
    model = make()
    clips = torch.randint(0, 256, (3, 4, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in IMAGENET.values())
    want = model((clips / 255 - mean) / std).last_hidden_state
    got = mae_fast.accelerate(model, **IMAGENET)(clips).last_hidden_state
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
