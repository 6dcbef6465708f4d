"""What accelerate refuses, by name and with the reason; what explain prints."""

import logging

import pytest
import torch
from foreign import Parallel, assert_close, clips, make, run
from torch import nn

import mae_fast
from mae_fast import MaskedAutoencoder
from mae_fast.errors import AccelerateError


@pytest.fixture
def model(tiny_cfg):
    return make(tiny_cfg)


@pytest.fixture
def video(tiny_cfg):
    return clips(tiny_cfg)


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_modules_outside_of_blocks_are_refused(model, video, hook, caplog):
    fired = []

    def watch():
        return getattr(model.norm, hook)(lambda *_: fired.append(hook))

    handle = watch()
    with pytest.raises(AccelerateError, match="norm: has hooks"):
        mae_fast.accelerate(model)
    handle.remove()
    mae_fast.accelerate(model)
    before = run(model, video)
    handle = watch()
    with pytest.raises(AccelerateError, match=r"norm: has hooks .*: see strict=False"):
        model(video)
    assert not fired
    mae_fast.accelerate(mae_fast.restore(model), strict=False)
    with caplog.at_level(logging.WARNING, "mae_fast"):
        for _ in range(2):
            assert_close(run(model, video), before)
    assert len(fired) == 2 and len(caplog.records) == 1  # said once
    handle.remove()
    run(model, video)
    assert len(fired) == 2


def test_hooks_of_every_module_are_refused(model, video):
    mae_fast.accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(AccelerateError, match="hooks of every module: see strict=False"):
            model(video)
    finally:
        handle.remove()
    model(video)


class _Scaled(nn.Module):
    """Layer scale: a child more."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x * self.gamma


def _layer_scale(model):
    model.blocks[1].ls1 = _Scaled()


def _tanh(model):
    model.blocks[0].mlp.act = nn.GELU(approximate="tanh")


def _relative_position(model):
    model.blocks[0].attn.table = nn.Parameter(torch.zeros(3))


def _drop_path(model):
    model.blocks[0].drop_path = nn.Dropout1d(0.2)


class DropTokens(nn.Module):
    """Stochastic depth by its name; of tokens by what it does."""

    drop_prob = 0.5

    def forward(self, x):
        return x * torch.rand(*x.shape[:2], 1).round()


def _drop_tokens(model):
    model.blocks[0].drop_path = DropTokens()


def _scale(model):
    model.blocks[1].attn.scale = 1.0


def _patched(model):
    model.norm.forward = lambda x: x


def _not_linear(model):
    model.blocks[0].attn.q = nn.Sequential(model.blocks[0].attn.q)


def _wide(model):
    model.blocks[0].mlp.fc2 = type("LoRA", (nn.Linear,), {})(16, 16)


def _of_the_same_name(model):
    model.patch_embed.proj.__class__ = type("Conv3d", (nn.Conv3d,), {"__module__": "peft"})


def _stride(model):
    model.patch_embed.proj.stride = (2, 4, 4)


def _mask_token(model):
    model.mask_token = nn.Parameter(torch.zeros(1, 1, 8))


def _head(model):
    model.head = nn.Linear(16, 10)


CHANGED = {
    _layer_scale: r"blocks\.1\.ls1: is a _Scaled",
    _tanh: r"blocks\.0\.mlp\.act: approximate is tanh",
    _relative_position: r"blocks\.0\.attn\.table: is no parameter",
    _drop_path: r"blocks\.0\.drop_path: is a Dropout1d",
    _drop_tokens: r"blocks\.0\.drop_path: is a DropTokens that does not drop whole samples",
    _scale: r"blocks\.1\.attn\.scale: is 1\.0, not 0\.35",
    _patched: r"norm: has a forward of its own",
    _not_linear: r"blocks\.0\.attn\.q: is a Sequential, no linear layer with in_features",
    _wide: r"blocks\.0\.mlp\.fc2: in_features is 16, not 64",
    _of_the_same_name: r"patch_embed\.proj: is a peft\.Conv3d, not a Conv3d",
    _stride: r"patch_embed\.proj: stride is \(2, 4, 4\)",
    _mask_token: r"mask_token: is \[1, 1, 8\], not \[1, 1, 16\]",
    _head: r"head: is a Linear",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_part_is_refused_by_name(model, change, capsys):
    change(model)
    with pytest.raises(AccelerateError, match=CHANGED[change]) as e:
        mae_fast.accelerate(model)
    assert "forward" not in vars(model)
    mae_fast.explain(model)
    printed = capsys.readouterr().out.splitlines()
    assert all(printed.count(line) == 1 for line in str(e.value).splitlines())


def test_modules_exchanged_after_the_call_are_compared_again(model, video):
    mae_fast.accelerate(model)
    model(video)
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(AccelerateError, match=r"the model has changed(.|\n)*blocks\.0\.mlp\.act"):
        model(video)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["blocks", "decoder_blocks"])
def test_other_arithmetic_under_the_same_names_is_caught(model, video, where, precision):
    blocks = getattr(model, where)
    mae_fast.accelerate(model)
    blocks[1] = Parallel(blocks[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with pytest.raises(AccelerateError, match=r"computes something else(.|\n)*differs? by"):
            model(video)
        with pytest.raises(AccelerateError, match="computes something else"):
            model(video)  # it goes on being refused
    mae_fast.accelerate(model, verify=False)
    assert model(video)[0].isfinite()


def _attribute(module, out):
    module.map = out.detach()


def _entry(module, out):
    module.maps.append(out.detach())


def _buffer(module, out):
    module.mean.mul_(0.9).add_(out.mean().detach())


@pytest.mark.parametrize("write", [_attribute, _entry, _buffer])
def test_what_the_own_forward_writes_beside_its_outputs(model, video, write):
    """A map of attention for a picture, say: the fused forward would leave an old one there."""
    attn = model.blocks[1].attn

    class Watched(type(attn)):
        def forward(self, x):
            out = super().forward(x)
            write(self, out)
            return out

    attn.__class__, attn.maps = Watched, []
    attn.register_buffer("mean", torch.zeros(()))
    mae_fast.accelerate(model)
    with pytest.raises(AccelerateError, match=r"own forward writes blocks\.1\.attn\.(map|mean)"):
        model(video)
    assert attn.mean == 0


def test_the_comparison_is_not_counted_by_what_runs_itself(model, video):
    block = model.blocks[0]
    block.calls = 0

    def forward(x):
        block.calls += 1
        return type(block).forward(block, x)

    block.forward = forward
    mae_fast.accelerate(model)
    model(video)
    assert block.calls == 1


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapper_is_refused(model, wrap):
    with pytest.raises(AccelerateError, match="accelerate the model inside"):
        mae_fast.accelerate(wrap(model))


def test_unknown_models_are_refused_with_reasons(tiny_cfg, capsys):
    with pytest.raises(AccelerateError, match="of no known family") as e:
        mae_fast.accelerate(nn.Transformer(8, 2, 1, 1, 8))
    assert all(f in str(e.value) for f in mae_fast.drop_in.adapters.FAMILIES)
    with pytest.raises(AccelerateError, match="forward: takes"):
        mae_fast.accelerate(MaskedAutoencoder(tiny_cfg))  # ours: it has nothing to gain
    with pytest.raises(TypeError, match=r"takes an nn\.Module, not a dict"):
        mae_fast.accelerate({})


def test_explain_prints_every_part(model, capsys):
    mae_fast.explain(model)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert ["fits", "blocks.0", "to", "1"] in lines and ["fits", "decoder_pred"] in lines
    assert all(line[0] == "fits" for line in lines)
