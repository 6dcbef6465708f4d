"""What of a block runs as the model's own modules: dropout, hooks, more than linear layers.

Models of every family, with the same random numbers: the same results as their own code.
"""

import copy

import pytest
import stand_ins
import torch
import torch.nn.functional as F
from compare import check, check_curves, differences, results, scattered, summary
from foreign import clips, make
from torch import nn

import mae_fast
import mae_fast.forward as fused
from mae_fast import ModelConfig, adapters
from mae_fast.bench.baselines import official
from mae_fast.comparison import tensors_of
from mae_fast.ops.attention import attention

CFG = ModelConfig(
    img_size=16,
    patch_size=8,
    num_frames=8,
    pred_t_dim=4,
    embed_dim=16,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
)


class DropPath(nn.Module):
    """timm's stochastic depth."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.drop_prob or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class DroppingBlock(official.Block):
    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DroppingAttention(official.Attention):
    def forward(self, x):
        return self.proj_drop(super().forward(x))


class DroppingMlp(official.Mlp):
    """timm's, old (one dropout for both places) and new (two)."""

    def forward(self, x):
        first, last = (getattr(self, n, None) or self.drop for n in ("drop1", "drop2"))
        return last(self.fc2(first(self.act(self.fc1(x)))))


def mae_st():
    model = make(CFG)
    for i, block in enumerate([*model.blocks, *model.decoder_blocks]):
        block.__class__, block.attn.__class__ = DroppingBlock, DroppingAttention
        block.mlp.__class__ = DroppingMlp
        for name in ("drop",) if i % 2 else ("drop1", "drop2"):
            setattr(block.mlp, name, nn.Dropout(0.0))
        block.drop_path = DropPath(0.0)
    return model, model.blocks, model.decoder_blocks


def videomae():
    torch.manual_seed(0)
    model = scattered(stand_ins.VideoMAE())
    return model, model.encoder.blocks, model.decoder.blocks


def slowfast():
    torch.manual_seed(0)
    model = scattered(stand_ins.MaskMViT())
    return model, model.blocks, model.pred_head.transforms[0][:-1]


def transformers(**changes):
    videomae = pytest.importorskip("transformers").models.videomae
    torch.manual_seed(0)
    small = dict(image_size=32, patch_size=8, num_frames=8, tubelet_size=2, hidden_size=24)
    small |= dict(num_attention_heads=3, num_hidden_layers=2, intermediate_size=40)
    small |= dict(decoder_hidden_size=12, decoder_num_attention_heads=2)
    small |= dict(decoder_num_hidden_layers=2, decoder_intermediate_size=20) | changes
    model = scattered(videomae.VideoMAEForPreTraining(videomae.VideoMAEConfig(**small)))
    return model.train(), model.videomae.encoder.layer, model.decoder.decoder_layers


MODELS = {f.__name__: f for f in (mae_st, videomae, slowfast, transformers)}
MASK = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)).argsort(dim=1) >= 16


def run(model):
    """Outputs of one step, the loss first, on the family's own inputs."""
    family = adapters.find(model)[0].FAMILY
    dtype = next(model.parameters()).dtype
    if family == "mae_st":
        return list(model(clips(CFG, 3, dtype), 0.7)[:2])
    video = torch.randn(3, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    if family == "videomae":
        pred = model(video, MASK)
        return [pred.square().mean(), pred]
    if family == "slowfast":
        (pred,), ((label, _),) = model([video])
        return [F.mse_loss(pred, label), pred]
    out = model(video.transpose(1, 2), MASK)
    return [out.loss, out.logits]


def dropout(encoder, decoder, p=0.3):
    """Every place in which the model has some."""
    for block in (*encoder, *decoder):
        for module in block.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        if isinstance(getattr(block, "drop_path", None), nn.Module):
            block.drop_path = DropPath(p)


def assert_own(model, limit=1e-10):
    """Accelerated: outputs and every gradient of the model's own code, in fp64."""
    model = model.double()
    want = results(copy.deepcopy(model), run)
    found = differences(results(mae_fast.accelerate(model), run), want)
    assert max(found.values()) <= limit, summary(found)


@pytest.mark.parametrize("where", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("family", MODELS)
def test_dropout_has_the_models_own_random_numbers(family, where):
    model, encoder, decoder = MODELS[family]()
    plain = results(copy.deepcopy(model), run)
    dropout(encoder if where != "decoder" else [], decoder if where != "encoder" else [])
    assert max(differences(results(copy.deepcopy(model), run), plain).values()) > 0.1
    check(model, run)


@pytest.mark.parametrize("family", MODELS)
def test_dropout_is_over_in_eval(family):
    model, encoder, decoder = MODELS[family]()
    dropout(encoder, decoder)
    assert_own(model.eval())


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_dropout_of_attentions_probabilities(kind):
    if pytest.importorskip("transformers").__version__.startswith("4.") and kind == "eager":
        pytest.skip("its eager softmax is in fp32, whatever the dtype")
    model, *_ = transformers(
        attn_implementation=kind, attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.1
    )
    check(model, run)


@pytest.mark.parametrize("family", ["videomae", "transformers"])
def test_dropout_in_checkpointed_blocks(family):
    model, encoder, decoder = MODELS[family]()
    dropout(encoder, decoder)
    if family == "transformers":
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    else:
        model.encoder.use_checkpoint = model.decoder.use_checkpoint = True
        plain = copy.deepcopy(model).double()
        mae_fast.accelerate(model.double())
        want = results(plain, run)  # the stand-in keeps everything
        assert max(differences(results(model, run), want).values()) <= 1e-10
        return
    assert_own(model)


def test_dropout_that_came_after_the_call():
    model, encoder, decoder = mae_st()
    mae_fast.accelerate(model.double())
    results(model, run)
    dropout(encoder, decoder)
    plain = mae_fast.restore(copy.deepcopy(model))
    found = differences(results(model, run), results(plain, run))
    assert max(found.values()) <= 1e-10, summary(found)


def test_dropout_learns_as_before():
    model, encoder, decoder = transformers(norm_pix_loss=False)
    dropout(encoder, decoder, 0.1)
    check_curves(model, lambda model, step: run(model)[0])


@pytest.fixture
def attentions(monkeypatch):
    """How often the fused blocks' attention is called."""
    calls = []

    def watched(*qkv):
        calls.append(qkv)
        return attention(*qkv)

    monkeypatch.setattr(fused, "attention", watched)
    return calls


KINDS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda _, x, y: seen.append((*x, y))),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda _, x: seen.append(x)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda _, x, y: seen.append(y)),
    "pre_backward": lambda m, seen: m.register_full_backward_pre_hook(lambda _, y: seen.append(y)),
}


@pytest.mark.parametrize("where", ["block", "inside"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MODELS)
def test_a_block_with_a_hook_runs_itself(family, kind, where, attentions):
    model, encoder, decoder = MODELS[family]()
    pick = lambda b: b if where == "block" else b.norm1 if hasattr(b, "norm1") else b.output.dense  # noqa: E731
    seen = []
    for hooked in (encoder[1], decoder[0], decoder[1]):
        KINDS[kind](pick(hooked), seen)
    model = model.double()
    plain = copy.deepcopy(model)  # with the same hooks, on the same list
    want, theirs = results(plain, run), [t.detach() for t in tensors_of(seen)]
    mae_fast.accelerate(model, verify=False)
    seen.clear()
    attentions.clear()
    found = differences(results(model, run), want)
    assert max(found.values()) <= 1e-10, summary(found)
    ours = [t.detach() for t in tensors_of(seen)]
    assert len(theirs) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert len(attentions) == len(encoder) + len(decoder) - 3


def test_a_hook_may_change_what_a_block_gives():
    model, encoder, _ = mae_st()
    encoder[0].register_forward_hook(lambda _, x, y: 2 * y)
    encoder[1].attn.register_forward_hook(lambda _, x, y: y + 1)
    assert_own(model)


@pytest.mark.parametrize("family", MODELS)
def test_a_block_with_a_forward_of_its_own_runs_itself(family):
    model, encoder, decoder = MODELS[family]()
    model = model.double()
    for block in (encoder[0], decoder[1]):
        block.forward = lambda x, *thw, block=block: type(block).forward(block, 2 * x, *thw)
    want = results(model, run)
    found = differences(results(mae_fast.accelerate(model), run), want)
    assert max(found.values()) <= 1e-10, summary(found)


class LowRank(nn.Module):
    """An adapter around a layer, as peft has it."""

    def __init__(self, base, p=0.0):
        super().__init__()
        self.base_layer, self.drop = base.requires_grad_(False), nn.Dropout(p)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.drop(x) @ self.a.T @ self.b.T


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def low_rank(layer):
    return LowRank(layer)


def low_rank_dropped(layer):
    return LowRank(layer, 0.3)


def subclass(layer):
    layer.__class__ = Twice
    return layer


def weight_norm(layer):
    return nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize("change", [low_rank, low_rank_dropped, subclass, weight_norm])
@pytest.mark.parametrize("family", MODELS)
def test_a_layer_that_is_more_than_linear_is_called(family, change, attentions):
    model, encoder, decoder = MODELS[family]()
    for block in (*encoder, *decoder):
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:
                block.set_submodule(name, change(layer))
    for name in ("decoder_embed", "encoder_to_decoder"):
        if hasattr(model, name):
            setattr(model, name, change(getattr(model, name)))
    model.requires_grad_(True)
    assert_own_where_used(model)
    assert len(attentions) > 0


class Scaled(nn.Linear):
    """By all tokens of its input, as int8 with dynamic ranges."""

    def forward(self, x):
        return super().forward(x / x.square().mean())


@pytest.mark.parametrize("family", MODELS)
def test_a_layer_that_scales_by_all_tokens_sees_them_all(family):
    model, _, decoder = MODELS[family]()
    for layer in decoder[-1].modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Scaled
    assert_own_where_used(model)


def test_a_head_with_dropout_is_the_models_own(caplog):
    model, *_ = mae_st()
    model.decoder_pred = LowRank(model.decoder_pred, 0.3)
    assert_own_where_used(model.requires_grad_(True))
    assert "its own forward runs: decoder_pred draws" in caplog.text
    caplog.clear()
    model, *_ = mae_st()
    model.decoder_pred = LowRank(model.decoder_pred)
    assert_own_where_used(model.requires_grad_(True))
    assert not caplog.text


def assert_own_where_used(model):
    """Some families read weights of layers that they do not call: no gradient for an adapter."""
    model = model.double()

    def grads(model):
        torch.manual_seed(3)
        outputs = run(model)
        outputs[0].backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return found | {f"output {i}": t.detach() for i, t in enumerate(outputs)}

    want = grads(copy.deepcopy(model))
    found = differences(grads(mae_fast.accelerate(model)), want)
    assert max(found.values()) <= 1e-9  # a key's bias: rounding of 0, summary(found)


def test_explain_says_what_runs_itself(capsys):
    model, encoder, decoder = mae_st()
    encoder[0].attn.q = LowRank(encoder[0].attn.q)
    decoder[1].register_forward_hook(lambda *_: None)
    mae_fast.explain(model)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "runs itself   blocks.0.attn.q: is a LowRank, called as it is" in lines
    assert "runs itself   decoder_blocks.1: has hooks" in lines


def test_a_merged_adapter_is_fused_again(attentions):
    peft = pytest.importorskip("peft")
    model, *_ = transformers()
    config = peft.LoraConfig(target_modules=["query", "value", "dense"], lora_dropout=0.1)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    fast = peft.get_peft_model(mae_fast.accelerate(copy.deepcopy(model)), config)
    fast.load_state_dict(tuned.state_dict())
    curves = []
    for each in (tuned, fast):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], 1e-2)
        curves.append([])
        for step in range(20):
            torch.manual_seed(step)
            loss = run(each.base_model.model)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[1] == pytest.approx(curves[0], rel=1e-4) and curves[0][-1] < curves[0][0]
    merged = fast.merge_and_unload().eval()
    want = run(mae_fast.restore(copy.deepcopy(merged)))[1]
    torch.testing.assert_close(run(merged)[1], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(tuned.merge_and_unload().eval())[1], want, rtol=1e-3, atol=1e-3)
