"""Others wrap the forward of an accelerated model, or did so before it was: libraries among them.

What a wrapper does around the forward it goes on doing, and the forward inside is ours.
"""

import contextlib
import copy
import functools
import importlib.util
from types import MethodType

import pytest
import torch
from families import FAMILIES
from foreign import assert_close, clips, make, run
from torch.utils.checkpoint import checkpoint

import mae_fast
from mae_fast import adapters
from mae_fast.adapters import mae_st
from mae_fast.errors import AccelerateError


def _by_wraps(model, calls):
    forward = model.forward

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        calls.append("wrapper")
        return forward(*args, **kwargs)

    model.forward = wrapper


def _by_closure(model, calls):
    forward = model.forward

    def wrapper(imgs, mask_ratio=0.75):
        calls.append("wrapper")
        return forward(imgs, mask_ratio)

    model.forward = wrapper


def _by_method(model, calls):
    forward = getattr(model.forward, "__func__", model.forward)

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        calls.append("wrapper")
        return forward(*args, **kwargs)

    bound = hasattr(model.forward, "__func__")
    model.forward = MethodType(wrapper, model) if bound else wrapper


class _Callable:
    def __init__(self, forward, calls):
        self.inner, self.calls = forward, calls

    def __call__(self, *args, **kwargs):
        self.calls.append("wrapper")
        return self.inner(*args, **kwargs)


def _by_object(model, calls):
    model.forward = _Callable(model.forward, calls)


def _by_autocast(model, calls):
    _by_wraps(model, calls)
    model.forward = torch.autocast("cpu", enabled=False)(model.forward)


WRAPPERS = [_by_wraps, _by_closure, _by_method, _by_object, _by_autocast]


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of mae_st's fused forward."""
    calls, forward = [], mae_st.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        calls.append("fused")
        return forward(*args, **kwargs)

    monkeypatch.setattr(mae_st, "forward", counted)
    return calls


@pytest.mark.parametrize("order", ["wrapped_first", "accelerated_first"])
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda f: f.__name__.strip("_"))
def test_a_wrapper_calls_ours(tiny_cfg, wrap, order, fused):
    model, video, calls = make(tiny_cfg), clips(tiny_cfg), []
    before = run(model, video)
    if order == "wrapped_first":
        wrap(model, calls)
        mae_fast.accelerate(model)
    else:
        wrap(mae_fast.accelerate(model), calls)
    assert_close(run(model, video), before)  # compared once, too
    fused.clear(), calls.clear()
    assert_close(run(model, video), before)
    assert (fused, calls) == (["fused"], ["wrapper"])
    mae_fast.accelerate(model)  # twice is once, inside
    run(model, video)
    fused.clear(), calls.clear()
    run(model, video)
    assert (fused, calls) == (["fused"], ["wrapper"])
    mae_fast.restore(model)
    assert_close(run(model, video), before)
    assert (fused, calls) == (["fused"], ["wrapper", "wrapper"])
    mae_fast.accelerate(model)
    run(model, video)
    assert len(fused) > 1


def test_a_forward_that_calls_another_is_refused(tiny_cfg):
    model = make(tiny_cfg)
    model.forward = lambda imgs, mask_ratio=0.75: imgs.sum()
    with pytest.raises(AccelerateError, match="forward: was replaced on this instance"):
        mae_fast.accelerate(model)


def test_a_wrapper_that_only_names_what_it_wraps_is_refused(tiny_cfg):
    """Its own is found nowhere else, and what it does around that would be lost."""
    model = make(tiny_cfg)
    name = type(model)

    def twice(imgs, mask_ratio=0.75):
        loss, *rest = name.forward(model, imgs, mask_ratio)
        return 2 * loss, *rest

    model.forward = functools.wraps(model.forward)(twice)
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args: inner(*args))
    with pytest.raises(AccelerateError, match="forward: was replaced on this instance"):
        mae_fast.accelerate(model)


def test_a_replica_of_data_parallel_runs_its_own_weights(tiny_cfg, fused):
    model, video = make(tiny_cfg), clips(tiny_cfg)
    mae_fast.accelerate(model)
    replicas = torch.nn.parallel.replicate  # it copies to GPUs; here as it does, by hand
    assert replicas
    modules = list(model.modules())
    made = {m: m._replicate_for_data_parallel() for m in modules}
    for module, replica in made.items():
        for name, child in module._modules.items():
            setattr(replica, name, made[child])
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else 0.5 * p)
    half = make(tiny_cfg)
    for p in half.parameters():
        p.data.mul_(0.5)
    fused.clear()
    torch.manual_seed(3)
    loss, pred, _ = made[model](video)
    torch.manual_seed(3)
    want = half(video)
    assert fused == ["fused"]
    torch.testing.assert_close((loss, pred), want[:2], rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.blocks[0].attn.proj_drop.p, model.blocks[0].attn.scale = 0.5, 1.0
    with pytest.raises(AccelerateError, match=r"scale: is 1\.0"):
        model._replicate_for_data_parallel()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_for_the_comparison_is_of_the_model_s_size(family, tiny_cfg):
    model, _ = FAMILIES[family](tiny_cfg)
    model(*adapters.FAMILIES[family].sample(model, torch.float32))


def test_a_replica_of_a_wrapped_model_is_refused(tiny_cfg):
    """The wrapper would call the original, with its weights."""
    model = mae_fast.accelerate(make(tiny_cfg))
    _by_wraps(model, [])
    with pytest.raises(AccelerateError, match="DataParallel after another has wrapped"):
        model._replicate_for_data_parallel()


def _checkpointed(block):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(block)


def _compiled(block):
    return torch.compile(block, backend="eager")


def _wrap_inside(block):
    block.mlp = _compiled(block.mlp)
    return block


@pytest.mark.parametrize("order", ["wrapped_first", "accelerated_first", "called_first"])
@pytest.mark.parametrize("wrap", [_checkpointed, _compiled, _wrap_inside])
def test_blocks_that_others_wrapped(tiny_cfg, wrap, order, fused, capsys):
    """torchtitan's torch.compile of each block, and torch's activation checkpointing: the block
    runs as it is, by name no part of a known family."""
    model, video = make(tiny_cfg), clips(tiny_cfg)
    before = run(model, video)
    if order != "wrapped_first":
        mae_fast.accelerate(model)
        if order == "called_first":
            run(model, video)
    model.blocks[0] = wrap(model.blocks[0])
    model.decoder_blocks[0] = wrap(model.decoder_blocks[0])
    if order == "wrapped_first":
        mae_fast.accelerate(model)
    for _ in range(2):
        after, grads = run(model, video)
        names = {
            n.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "") for n in grads
        }
        assert names == set(before[1])
        assert_close((after, dict(zip(before[1], grads.values(), strict=True))), before)
    assert fused
    mae_fast.explain(model)
    assert "runs itself   blocks.0: is a" in capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False], ids=["first_call", "later_call"])
def test_a_checkpoint_around_the_model(tiny_cfg, first):
    """What the comparison of the first call saves is nothing that backward makes again."""
    model, video = make(tiny_cfg), clips(tiny_cfg)
    before = run(model, video)
    mae_fast.accelerate(model)
    if not first:
        run(model, video)
    model.zero_grad()
    torch.manual_seed(3)
    out = checkpoint(model, video, use_reentrant=False)
    out[0].backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert_close((tuple(t.detach() for t in out), grads), before)


@contextlib.contextmanager
def _accelerator(precision: str):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision=precision, cpu=True)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("first", ["accelerate", "prepare"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerators_mixed_precision(tiny_cfg, tmp_path, precision, first, monkeypatch):
    """`prepare` before and after the one line; then a copy, unwrap_model, save_pretrained."""
    from mae_fast.adapters import transformers as adapter

    own, args = FAMILIES["transformers"](tiny_cfg)
    exact = copy.deepcopy(own).double()(args[0].double(), args[1]).loss
    calls, forward = [], adapter.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        calls.append("fused")
        return forward(*args, **kwargs)

    monkeypatch.setattr(adapter, "forward", counted)
    with _accelerator(precision) as accelerator:
        if first == "prepare":
            model = mae_fast.accelerate(accelerator.prepare(copy.deepcopy(own)))
        else:
            model = accelerator.prepare(mae_fast.accelerate(copy.deepcopy(own)))
        theirs = accelerator.prepare(copy.deepcopy(own))
        for _ in range(2):
            ours, want = model(*args), theirs(*args)
        assert len(calls) == 3 and ours.logits.dtype == want.logits.dtype == torch.float32
        assert abs(ours.loss - exact) <= 2 * abs(want.loss - exact) + 1e-3 * exact
        accelerator.backward(ours.loss)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        plain = copy.deepcopy(own)(*args).loss
        assert unwrapped is model and abs(unwrapped(*args).loss / plain - 1) < 1e-5
        assert len(calls) > 3
        unwrapped.save_pretrained(tmp_path)
        loaded = type(own).from_pretrained(tmp_path)
        assert torch.equal(loaded(*args).loss, plain)
        count = len(calls)
        assert torch.equal(mae_fast.restore(unwrapped)(*args).loss, plain)
        assert len(calls) == count and "forward" not in vars(unwrapped)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is missing")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fabric(tiny_cfg, precision):
    from lightning import Fabric

    own, args = FAMILIES["transformers"](tiny_cfg)
    fabric, losses = Fabric(accelerator="cpu", devices=1, precision=precision), []
    for line in (False, True):
        model = copy.deepcopy(own)
        model = fabric.setup(mae_fast.accelerate(model) if line else model)
        losses.append(model(*args).loss)
        fabric.backward(losses[-1])
    assert losses[0].dtype == losses[1].dtype
    torch.testing.assert_close(losses[1], losses[0], rtol=3e-2, atol=0)
