"""model.target tokens and features: losses and gradients against plain torch, the running average,
and where the state of either goes. wiring/ holds whole runs against a computation by hand.
"""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import toy_tokenizer
from torch import nn

from mae_fast import cli, metrics, train
from mae_fast.bench.flops import step_parts
from mae_fast.checkpoint import checkpoints
from mae_fast.config import Config, DataConfig, MaskConfig, TrainConfig
from mae_fast.data import build_index
from mae_fast.errors import ConfigError, Interrupted
from mae_fast.masking import draw_ids
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops import OPS
from mae_fast.ops.dispatch import backends
from mae_fast.ops.source import Source
from mae_fast.optim import make_optimizer
from mae_fast.step import WARMUP, Step
from mae_fast.targets import Tokenizer, follow
from mae_fast.weights import classifier, load_model, load_weights, to_mae_st, translate

TOKENS = dict(target="tokens", tokenizer="toy_tokenizer:make", vocabulary=16)
KINDS = {"tokens": TOKENS, "features": dict(target="features")}


@pytest.fixture
def made(tiny_cfg):
    """made(target, dtype, ...) -> a model whose average lags behind, clips and a mask of them."""

    def make(target, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        model = MaskedAutoencoder(dataclasses.replace(tiny_cfg, **KINDS[target], **changes))
        for p in model.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
        if target == "tokens":
            model.tokenizer = Tokenizer(toy_tokenizer.make())
        video = torch.randint(0, 256, (3, 3, 8, 16, 16), dtype=torch.uint8)
        ids = draw_ids("random", (4, 2, 2), 0.7, seed=0, step=0, samples=torch.arange(3))
        return model.to(dtype), video, ids

    return make


def _blocks(x, blocks, heads):
    for b in blocks:
        h = F.layer_norm(x, x.shape[-1:], b.norm1.weight, b.norm1.bias, 1e-6)
        q, k, v = (f(h).unflatten(-1, (heads, -1)).transpose(1, 2) for f in _qkv(b))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        x = x + b.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, x.shape[-1:], b.norm2.weight, b.norm2.bias, 1e-6)
        x = x + b.mlp.fc2(F.gelu(b.mlp.fc1(h)))
    return x


def _qkv(block):
    return block.attn.q, block.attn.k, block.attn.v


def _encoded(m, video, keep):
    """The encoder of a module that has its parts, in plain torch: tokens `keep` of clips."""
    pixels = (video.to(m.norm.weight.dtype) / 255 - 0.45) / 0.225
    x = m.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
    x = x + (m.pos_embed_temporal[:, :, None] + m.pos_embed_spatial[:, None]).flatten(1, 2)
    x = x.gather(1, keep.long()[..., None].expand(-1, -1, x.shape[-1]))
    cls = (m.cls_token + m.pos_embed_class).expand(len(x), -1, -1)
    x = _blocks(torch.cat([cls, x], 1), m.blocks, 2)
    return F.layer_norm(x, x.shape[-1:], m.norm.weight, m.norm.bias, 1e-6)


def _plain(m, video, keep, masked):
    """The loss in plain torch, in the official order: everything unshuffled, all predicted."""
    length, every = m.cfg.num_patches, torch.arange(m.cfg.num_patches).expand(len(video), -1)
    x = m.decoder_embed(_encoded(m, video, keep))
    whole = m.mask_token.expand(len(x), length, -1).clone()
    whole = whole.scatter(1, keep.long()[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
    temporal, spatial = m.decoder_pos_embed_temporal, m.decoder_pos_embed_spatial
    whole = whole + (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)
    cls = (m.decoder_cls_token + m.decoder_pos_embed_class).expand(len(x), -1, -1)
    x = _blocks(torch.cat([cls, whole], 1), m.decoder_blocks, 2)
    x = F.layer_norm(x, x.shape[-1:], m.decoder_norm.weight, m.decoder_norm.bias, 1e-6)
    pred, hidden = m.decoder_pred(x)[:, 1:], torch.zeros(len(x), length, dtype=torch.bool)
    hidden[torch.arange(len(x))[:, None], masked.long()] = True
    if m.cfg.target == "tokens":
        patches = video.float().div(255).mean(1).unflatten(1, (4, 2)).unflatten(3, (2, 8))
        patches = patches.unflatten(5, (2, 8)).mean((2, 4, 6))  # [B, t, h, w]
        target = (16 * patches).long().flatten(1)
        return F.cross_entropy(pred[hidden], target[hidden])
    target = _encoded(m.target_encoder, video, every)[:, 1:].detach()
    target = (target - target.mean(-1, keepdim=True)) / (
        target.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    return (pred - target)[hidden].abs().mean()


@pytest.mark.parametrize("target", KINDS)
def test_loss_and_gradients_are_plain_torch_s_in_fp64(target, made):
    model, video, (keep, masked) = made(target, torch.float64)
    loss, pred, _ = model(video, ids_keep=keep, ids_mask=masked)
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    expected = _plain(model, video, keep, masked)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        if name.startswith("target_encoder."):
            assert got[name] is None and not p.requires_grad
        else:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert pred.shape[-1] == {"tokens": 16, "features": 16}[target]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("target", KINDS)
def test_rounding_is_all_that_differs_in_training_s_precision(target, precision, made):
    """And every parameter gets a gradient, whatever autocast keeps of a forward without one."""
    model, video, (keep, masked) = made(target)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(video, ids_keep=keep, ids_mask=masked)[0]
    loss.backward()
    exact, *_ = made(target, torch.float64)
    _plain(exact, video, keep, masked).backward()
    wanted = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
    error = torch.cat([(model.get_parameter(n).grad - g).flatten() for n, g in wanted.items()])
    whole = torch.cat([g.flatten() for g in wanted.values()])
    assert error.norm() / whole.norm() < (1e-5 if precision == "fp32" else 0.05)


def test_features_are_of_all_tokens_in_their_order(made):
    model, video, _ = made("features", torch.float64)
    every = torch.arange(16).expand(3, -1)
    plain = _encoded(model.target_encoder, video, every)[:, 1:]
    torch.testing.assert_close(model.target(video), F.layer_norm(plain, (16,)))
    assert not model.target(video).requires_grad
    assert not torch.allclose(model.target(video), F.layer_norm(_encoded(model, video, every)[:, 1:], (16,)))  # fmt: skip  # noqa: E501


def test_an_average_begins_as_the_encoder(tiny_cfg):
    model = MaskedAutoencoder(dataclasses.replace(tiny_cfg, target="features"))
    own = dict(model.named_parameters())
    average = dict(model.target_encoder.named_parameters())
    encoder = {n for n in own if not n.startswith(("decoder_", "mask_token", "target_encoder."))}
    assert average.keys() == encoder
    for name, p in average.items():
        assert torch.equal(p, own[name]) and p.data_ptr() != own[name].data_ptr()


@pytest.mark.parametrize("norm", [1.0, float("nan"), float("inf")])
def test_an_average_follows_updates_that_were_done(norm, made):
    model, *_ = made("features")
    before = {n: p.clone() for n, p in model.target_encoder.named_parameters()}
    follow(model, 0.75, torch.tensor(norm))
    for name, p in model.target_encoder.named_parameters():
        moved = 0.75 * before[name] + 0.25 * model.get_parameter(name)
        torch.testing.assert_close(p.data, moved.data if norm == 1.0 else before[name].data)


def test_a_step_as_graphs_averages_the_same(made):
    """Bit for bit; the rehearsal refuses what a capture would."""
    found = []
    for graph in (False, True):
        model, video, ids = made("features")

        def loss(video, keep, masked, model=model):
            return model(video, ids_keep=keep, ids_mask=masked)[0]

        after = lambda norm, model=model: follow(model, 0.5, norm)  # noqa: E731
        optimizer = make_optimizer(model, TrainConfig())
        step = Step(model, optimizer, loss, graph=graph, after=after)
        for _ in range(WARMUP + 3):
            step.micro(video, *ids)
            step.update(1e-3)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


class _Told(nn.Module):
    """Gives what it was made with, whatever it is asked."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def forward(self, clips):
        self.seen = clips
        return self.ids


def test_a_tokenizer_s_classes_are_in_the_order_of_patches(made):
    """Time step, row, column; a clip that is normalised already is what it was in [0, 1]."""
    model, video, _ = made("tokens")
    model.tokenizer = Tokenizer(_Told(torch.arange(16).view(1, 4, 2, 2).expand(3, -1, -1, -1)))
    assert torch.equal(model.target(video), torch.arange(16).expand(3, -1))
    assert torch.equal(model.tokenizer.module.seen, video.float() / 255)
    model.target((video.float() / 255 - 0.45) / 0.225)
    torch.testing.assert_close(model.tokenizer.module.seen, video.float() / 255)
    assert not model.tokenizer.module.training
    assert not any("tokenizer" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(3, 16).long(), r"integers \[3, 4, 2, 2\], got torch.int64 \[3, 16\]"),
        (torch.zeros(3, 4, 2, 2), r"got torch.float32 \[3, 4, 2, 2\]"),
        (torch.full((3, 4, 2, 2), 16), "classes 16 to 16, model.vocabulary is 16"),
        (torch.full((3, 4, 2, 2), -1), "classes -1 to -1"),
    ],
    ids=["flat", "no_integers", "beyond", "below"],
)
def test_a_tokenizer_that_does_not_fit_is_refused(ids, words, made):
    model, video, _ = made("tokens")
    model.tokenizer = Tokenizer(_Told(ids))
    with pytest.raises(ValueError, match=words):
        model(video, 0.5)
    model.tokenizer = None
    with pytest.raises(ValueError, match="set the model's tokenizer"):
        model(video, 0.5)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("no_such_package:make", "ModuleNotFoundError"),
        ("toy_tokenizer:nothing", "AttributeError"),
        ("os:getcwd", "must give a module, got <class 'str'>"),
        ("toy_tokenizer", "package.module:callable, got 'toy_tokenizer'"),
    ],
)
def test_an_entry_point_that_gives_no_tokenizer_is_a_configuration_s_fault(entry, words, tiny_cfg):
    with pytest.raises(ConfigError, match=words):
        Tokenizer.find(dataclasses.replace(tiny_cfg, target="tokens", tokenizer=entry).tokenizer)


def test_units_tell_targets_apart(tiny_cfg):
    kinds = [dict(target=t) for t in ("pixels", "pixels_by_channel", "hog", "features")]
    kinds += [dict(norm_pix_loss=False), TOKENS, TOKENS | dict(vocabulary=17)]
    kinds += [TOKENS | dict(tokenizer="another:make")]
    units = [dataclasses.replace(tiny_cfg, **kind).loss_unit for kind in kinds]
    assert len({*units}) == len(units)


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "i.jsonl"
    build_index([folder], path, progress=False)
    return str(path)


def _cfg(index, output, model, target, **changes):
    return Config(
        output=str(output),
        model=dataclasses.replace(model, **KINDS[target]),
        mask=MaskConfig(ratio=0.5, per_clip=changes.pop("per_clip", 1)),
        data=DataConfig(index=index, repeat_aug=1, workers=0, sampling_rate=2),
        train=TrainConfig(
            batch_size=2, steps=4, warmup_steps=1, blr=0.5, log_every=1, save_every=9,
            device="cpu", ema_momentum=0.7, **changes,
        ),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


@pytest.mark.parametrize("target", KINDS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(target, index, tiny_cfg, tmp_path, monkeypatch):
    cfg = _cfg(index, tmp_path / "whole", tiny_cfg, target)
    held_out = dataclasses.replace(cfg.data, val_index=index)
    row = train.pretrain(dataclasses.replace(cfg, data=held_out))
    assert "val_loss" in row and "val_mean_patch_loss" not in row
    real = train.Pretraining._one_step

    def stopped(self, *args):
        if self.step == 2:
            raise Interrupted("told to stop")
        real(self, *args)

    parts = dataclasses.replace(cfg, output=str(tmp_path / "parts"))
    monkeypatch.setattr(train.Pretraining, "_one_step", stopped)
    with pytest.raises(Interrupted):
        train.pretrain(parts)
    monkeypatch.setattr(train.Pretraining, "_one_step", real)
    train.pretrain(parts)
    a, b = (load_weights(checkpoints(c.output)[-1])[1] for c in (cfg, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    if target == "features":
        own, average = (a[p + "blocks.0.mlp.fc1.weight"] for p in ("", "target_encoder."))
        assert not torch.equal(own, average)


def test_another_tokenizer_of_the_same_name_is_another_run(index, tiny_cfg, tmp_path, monkeypatch):
    cfg = _cfg(index, tmp_path / "run", tiny_cfg, "tokens")
    train.pretrain(cfg)
    real = toy_tokenizer.Brightness.__init__

    def other(self):
        real(self)
        self.steps.data += 1

    monkeypatch.setattr(toy_tokenizer.Brightness, "__init__", other)
    with pytest.raises(ConfigError, match=r"model.tokenizer toy_tokenizer:make has other weights"):
        train.pretrain(cfg)


def test_the_target_of_a_clip_with_several_masks_is_made_once(
    index, tiny_cfg, tmp_path, monkeypatch
):
    """And is that of its own clip: the loss is as if it were made for each."""
    seen, real = [], MaskedAutoencoder.target

    def watched(self, video):
        seen.append(len(video))
        return real(self, video)

    monkeypatch.setattr(MaskedAutoencoder, "target", watched)
    cfg = _cfg(index, tmp_path / "once", tiny_cfg, "features", per_clip=3)
    once = train.pretrain(cfg)
    assert seen == [2] * 4

    def loss(self, flat, table, keep, masked):
        video = Source(flat, table, tiny_cfg.img_size)
        return self.model(video, ids_keep=keep, ids_mask=masked)[0]

    monkeypatch.setattr(train.Pretraining, "_loss", loss)
    each = train.pretrain(dataclasses.replace(cfg, output=str(tmp_path / "each")))
    assert seen[4:] == [6] * 4 and once["loss"] == pytest.approx(each["loss"], rel=1e-6)


def test_weights_go_on_without_the_average(index, tiny_cfg, tmp_path, capsys):
    """A run's checkpoint is its model again, average included; other families and classifiers take
    the encoder itself."""
    from mae_fast.classifier import ClassifierConfig, VideoClassifier

    cfg = _cfg(index, tmp_path / "run", tiny_cfg, "features")
    train.pretrain(cfg)
    path = checkpoints(cfg.output)[-1]
    model = load_model(path)
    assert model.cfg == cfg.model and hasattr(model, "target_encoder")
    state, report = translate(model.state_dict(), "slowfast")
    assert not any("target_encoder" in name for name in state)
    assert any("the encoder's running average, " in line for line in report.lost)
    assert not any("target_encoder" in name for name in to_mae_st(model))
    net = VideoClassifier(ClassifierConfig(tiny_cfg, "mae_st", 2))
    said = classifier.load(net, path)
    assert any(line.startswith("the encoder's running average, ") for line in said)
    assert torch.equal(net.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    video = next(iter(open(index)))
    argv = ["reconstruct", "--checkpoint", str(path), "--video", json.loads(video)["path"]]
    assert cli.main([*argv, "-o", str(tmp_path / "o.png")]) == 2
    assert "there are no pixels to draw: model.target is, got 'features'" in capsys.readouterr().err


def test_the_forward_over_all_tokens_is_counted(made):
    """As torch counts it, without a backward; `plan` says what it takes."""
    from torch.utils.flop_counter import FlopCounterMode

    model, video, _ = made("features")
    with backends(**dict.fromkeys(OPS, "reference")), FlopCounterMode(display=False) as counter:
        model.target(video)
    parts = step_parts(model.cfg, 3, 0.7)
    found = [parts[f"target encoder {kind}"] for kind in ("products", "attention")]
    assert sum(part.forward for part in found) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert not any(part.backward for part in found)


@pytest.mark.parametrize("target", KINDS)
def test_plan_says_what_a_target_takes(target, tmp_path, capsys):
    kind = {k: v for k, v in KINDS[target].items() if k != "vocabulary"}  # 8192 by default
    rest = "".join(f"{k} = {v!r}\n" for k, v in kind.items())
    (tmp_path / "run.toml").write_text(f'[model]\npreset = "vit_base"\n{rest}')
    argv = ["plan", "--model", str(tmp_path / "run.toml"), "--results", str(tmp_path)]
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pixels = cli.main(["plan", "--model", "vit_base", "--results", str(tmp_path), "--json"])
    assert pixels == 0
    pixels = json.loads(capsys.readouterr().out)
    more = found["step"]["compute"] - pixels["step"]["compute"]
    assert found["target"]["seconds_more"] == pytest.approx(more) and more > 0
    memory = found["memory"]["peak_mb"] - pixels["memory"]["peak_mb"]
    assert found["target"]["memory_more_mb"] == pytest.approx(memory) and memory > 0
    assert cli.main(argv) == 0
    words = {"features": "a forward of the averaged encoder", "tokens": "forward is NOT counted"}
    assert words[target] in capsys.readouterr().out
