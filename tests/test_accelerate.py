"""What accelerate leaves as it was, what it takes, and what it refuses, by name."""

import copy
import functools
import inspect
import io
import json
import logging
import pickle
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from foreign import clips, make, process, relative, run, worst
from torch import nn

import mae_fast
from mae_fast import MaskedAutoencoder, ModelConfig
from mae_fast.adapters import mae_st
from mae_fast.adapters.parts import Unfused
from mae_fast.errors import AccelerateError, ConfigError


@pytest.fixture
def model(tiny_cfg):
    return make(tiny_cfg)


@pytest.fixture
def video(tiny_cfg):
    return clips(tiny_cfg)


def _close(ours, theirs, limit=2e-5):
    differences = worst(ours, theirs)
    assert max(differences.values()) < limit, differences


def _is_fused(model):
    return "forward" in vars(model)


def test_nothing_changes_but_the_forward(model, video):
    before = run(model, video, 0.7)
    kind, keys, parameters = type(model), list(model.state_dict()), dict(model.named_parameters())
    assert mae_fast.accelerate(model) is model and _is_fused(model)
    assert type(model) is kind and list(model.state_dict()) == keys
    now = dict(model.named_parameters())
    assert list(now) == list(parameters) and all(now[n] is p for n, p in parameters.items())
    assert inspect.signature(model.forward) == inspect.signature(kind(model.cfg).forward)
    _close(run(model, video, 0.7), before)
    _close(run(model, imgs=video, mask_ratio=0.7), before)


def test_the_default_masking_ratio_is_the_models(model, video):
    before = run(model, video)
    _close(run(mae_fast.accelerate(model), video), before)
    assert before[0][2].mean() == 0.75


def test_random_numbers_go_on_as_before(model, video):
    run(model, video)
    expected = torch.rand(5)
    mae_fast.accelerate(model)  # its first call compares the two forwards
    for _ in range(2):
        run(model, video)
        assert torch.equal(torch.rand(5), expected)


def test_restore(model, video):
    before = run(model, video)
    attributes = set(vars(model))
    mae_fast.restore(mae_fast.accelerate(model))
    assert set(vars(model)) == attributes and mae_fast.restore(model) is model
    after = run(model, video)
    assert all(map(torch.equal, after[0], before[0]))
    model.forward = model.forward
    with pytest.raises(AccelerateError, match="did not set"):
        mae_fast.restore(model)
    with pytest.raises(AccelerateError, match="forward: was replaced on this instance"):
        mae_fast.accelerate(model)


def test_twice_is_once(model, video):
    before = run(model, video)
    mae_fast.accelerate(mae_fast.accelerate(model, mean=0.45, std=0.225))
    _close(run(model, video), before)
    with pytest.raises(AccelerateError, match="uint8"):  # of the second call
        model(video.byte())
    mae_fast.restore(model)
    assert not _is_fused(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch_save"])
def test_a_copy_is_accelerated_and_its_own(model, video, how):
    mae_fast.accelerate(model, backends={"attention": "reference"})
    before = run(model, video)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert _is_fused(other) and other.forward.model is other
    assert other.forward.backends == {"attention": "reference"}
    _close(run(other, video), before)
    for p in other.parameters():
        p.data.zero_()
    assert other(video)[0] != before[0][0]
    _close(run(model, video), before)


def test_a_state_dict_is_all_that_a_checkpoint_needs(model, video, tiny_cfg):
    before = run(mae_fast.accelerate(model), video)
    plain = make(tiny_cfg)
    for p in plain.parameters():
        p.data.zero_()
    plain.load_state_dict(model.state_dict())
    _close(before, run(plain, video))


def test_compiled(model, video):
    before = run(model, video, 0.7)
    compiled = torch.compile(mae_fast.accelerate(model), backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    model.zero_grad()
    loss, pred, mask = compiled(video, 0.7)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    _close(((loss.detach(), pred.detach(), mask), grads), before)
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")


def test_eval_and_train(model, video):
    mae_fast.accelerate(model)
    trained = model.train()(video)
    with torch.no_grad():
        assert model.eval()(video)[0].isfinite() and not model.training
    with torch.inference_mode():
        assert model(video)[0].isfinite()
    assert trained[0].requires_grad


def test_ddp_and_fsdp2(tiny_cfg, tmp_path):
    # Before and after the model is wrapped; blocks that are sharded by themselves are refused.
    context, store = get_context("spawn"), str(tmp_path / "store")
    workers = [context.Process(target=process, args=(r, tiny_cfg, store)) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_autocast(model, video):
    exact = run(copy.deepcopy(model).double(), video.double())

    def errors(model):
        with torch.autocast("cpu", torch.bfloat16):
            out, grads = run(model, video)
        assert out[1].dtype == torch.bfloat16 and out[0].dtype == torch.float32
        assert all(g.dtype == torch.float32 for g in grads.values())
        return worst((out, grads), exact)

    theirs = errors(model)
    ours = errors(mae_fast.accelerate(model))
    assert all(ours[k] <= 2 * theirs[k] + 1e-3 for k in theirs), (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_parameters_of_another_dtype(tiny_cfg, dtype):
    model, video = make(tiny_cfg, dtype), clips(tiny_cfg, dtype=dtype)
    before = run(model, video)
    after = run(mae_fast.accelerate(model), video)
    assert [t.dtype for t in after[0]][1:] == [t.dtype for t in before[0]][1:]
    _close(after, before, 1e-10 if dtype == torch.float64 else 0.05)


def test_frozen_parameters(model, video):
    frozen = [n for n, _ in model.named_parameters() if n.startswith(("patch_embed", "blocks.0"))]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    (_, before), (_, after) = (run(model, video), run(mae_fast.accelerate(model), video))
    assert [n for n, g in after.items() if g is None] == frozen
    assert [n for n, g in before.items() if g is None] == frozen
    for name in set(before) - set(frozen):
        if not name.endswith("attn.k.bias"):
            assert relative(after[name], before[name]) < 2e-5


def test_a_clip_that_wants_a_gradient(model, video):
    def gradient(model):
        clip = video.clone().requires_grad_()
        torch.manual_seed(3)
        model(clip)[0].backward()
        return clip.grad

    before = gradient(model)
    assert relative(gradient(mae_fast.accelerate(model)), before) < 2e-5


def test_hooks_of_the_model_itself_fire(model, video):
    fired = []
    mae_fast.accelerate(model)
    model.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.register_forward_hook(lambda *_: fired.append("forward"))
    model.register_full_backward_hook(lambda *_: fired.append("backward"))
    model.mask_token.register_hook(lambda _: fired.append("gradient"))
    run(model, video)
    assert sorted(fired) == ["backward", "forward", "gradient", "pre"]


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_modules_inside_are_refused(model, video, hook, caplog):
    fired = []

    def watch():
        return getattr(model.blocks[1].attn, hook)(lambda *_: fired.append(hook))

    handle = watch()
    with pytest.raises(AccelerateError, match=r"blocks\.1\.attn: has hooks"):
        mae_fast.accelerate(model)
    handle.remove()
    mae_fast.accelerate(model)
    before = run(model, video)
    handle = watch()
    with pytest.raises(AccelerateError, match=r"blocks\.1\.attn: has hooks"):
        model(video)
    assert not fired
    mae_fast.accelerate(mae_fast.restore(model), strict=False)
    with caplog.at_level(logging.WARNING, "mae_fast"):
        for _ in range(2):
            _close(run(model, video), before)
    assert len(fired) == 2 and len(caplog.records) == 1  # said once
    handle.remove()
    run(model, video)
    assert len(fired) == 2


def test_hooks_of_every_module_are_refused(model, video):
    mae_fast.accelerate(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(AccelerateError, match="hooks of every module"):
            model(video)
    finally:
        handle.remove()
    model(video)


def test_parameters_exchanged_after_the_call(model, video, tiny_cfg):
    mae_fast.accelerate(model)
    run(model, video)
    other = make(tiny_cfg)
    for p in other.parameters():
        p.data.mul_(1.5)
    old = model.blocks[0].attn.q.weight
    model.load_state_dict(other.state_dict(), assign=True)
    assert model.blocks[0].attn.q.weight is not old
    _close(run(model, video), run(other, video))
    swapped = {n: p * 0.5 for n, p in other.named_parameters()}
    torch.manual_seed(3)
    ours = torch.func.functional_call(model, swapped, (video,))
    torch.manual_seed(3)
    theirs = torch.func.functional_call(other, swapped, (video,))
    assert relative(ours[0], theirs[0]) < 2e-5 and relative(ours[1], theirs[1]) < 2e-5


COLOURS = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw"])
@pytest.mark.parametrize("given", [dict(mean=0.45, std=0.225), COLOURS], ids=["one", "a_channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_uint8_clips(tiny_cfg, given, norm_pix, dtype):
    model = make(ModelConfig(**{**tiny_cfg.__dict__, "norm_pix_loss": norm_pix}), dtype)
    video = torch.randint(0, 256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=dtype).view(-1, 1, 1, 1) for v in given.values())
    floats = (video.to(dtype) / 255 - mean) / std
    before = run(model, floats)
    limit = 2e-5 if dtype == torch.float32 else 1e-10
    _close(run(mae_fast.accelerate(model, **given), video), before, limit)
    _close(run(model, floats), before, limit)  # as before
    mae_fast.accelerate(model)
    with pytest.raises(AccelerateError, match="uint8 clips need"):
        model(video)
    with pytest.raises(AccelerateError, match="go together"):
        mae_fast.accelerate(model, mean=0.45)


def test_backends_are_forced(model, video):
    mae_fast.accelerate(model, backends={"masked_mse": "no_such"})
    with pytest.raises(ConfigError, match="no_such"):
        model(video)


@pytest.fixture
def unfused(monkeypatch):
    """A family whose adapter leaves calls at a masking ratio of 0.5 to the model."""
    fused = mae_st.forward

    @functools.wraps(fused)
    def forward(model, pixels, imgs, mask_ratio=0.75):
        if mask_ratio == 0.5:
            raise Unfused("a ratio of 0.5 is asked for")
        return fused(model, pixels, imgs, mask_ratio)

    monkeypatch.setattr(mae_st, "forward", forward)


def test_a_call_that_is_left_to_the_model(model, unfused, caplog):
    video = torch.randint(0, 256, (2, 3, 8, 16, 16), dtype=torch.uint8)
    before = run(model, (video / 255 - 0.45) / 0.225, 0.5)
    mae_fast.accelerate(model, mean=0.45, std=0.225)
    with caplog.at_level(logging.WARNING, "mae_fast"):
        for _ in range(2):
            after = run(model, video, 0.5)
            assert all(map(torch.equal, after[0], before[0]))
    assert [r.message for r in caplog.records] == [
        "MaskedAutoencoderViT: its own forward runs: a ratio of 0.5 is asked for"
    ]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(3)
    assert relative(compiled(video, 0.5)[0], before[0][0]) < 2e-5
    model.blocks[1] = _Parallel(model.blocks[1])  # the first fused call is compared, still
    with pytest.raises(AccelerateError, match="computes something else"):
        model(video)


def test_one_clip_is_compared_once(model, video, monkeypatch):
    sizes, own = [], type(model).forward

    def watched(self, imgs, mask_ratio=0.75):
        sizes.append(len(imgs))
        return own(self, imgs, mask_ratio)

    monkeypatch.setattr(type(model), "forward", watched)
    mae_fast.accelerate(model)
    for _ in range(2):
        run(model, video)
    assert sizes == [1]
    model.blocks[0].mlp.act = nn.GELU()
    run(model, video)
    assert sizes == [1, 1]
    mae_fast.accelerate(model, verify=False)
    run(model, video)
    assert sizes == [1, 1]


def test_a_clip_of_another_size_is_refused(model, video):
    mae_fast.accelerate(model)
    with pytest.raises(ValueError, match=r"imgs must be \[N, 3, 8, 16, 16\]"):
        model(video[..., :8])


class _Scaled(nn.Module):
    """Layer scale: a child more."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x * self.gamma


def _layer_scale(model):
    model.blocks[1].ls1 = _Scaled()


def _dropout(model):
    model.decoder_blocks[0].attn.proj_drop.p = 0.1


def _tanh(model):
    model.blocks[0].mlp.act = nn.GELU(approximate="tanh")


def _relative_position(model):
    model.blocks[0].attn.table = nn.Parameter(torch.zeros(3))


def _drop_path(model):
    model.blocks[0].drop_path = nn.Dropout1d(0.2)


def _scale(model):
    model.blocks[1].attn.scale = 1.0


def _patched(model):
    model.blocks[0].forward = lambda x: x


def _low_rank(model):
    model.blocks[0].attn.q = type("LoRA", (nn.Linear,), {})(16, 16)


def _weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.decoder_pred)


def _stride(model):
    model.patch_embed.proj.stride = (2, 4, 4)


def _mask_token(model):
    model.mask_token = nn.Parameter(torch.zeros(1, 1, 8))


def _head(model):
    model.head = nn.Linear(16, 10)


CHANGED = {
    _layer_scale: r"blocks\.1\.ls1: is a _Scaled",
    _dropout: r"decoder_blocks\.0\.attn\.proj_drop: is a Dropout of 0\.1",
    _tanh: r"blocks\.0\.mlp\.act: approximate is tanh",
    _relative_position: r"blocks\.0\.attn\.table: is no parameter",
    _drop_path: r"blocks\.0\.drop_path: is a Dropout1d",
    _scale: r"blocks\.1\.attn\.scale: is 1\.0, not 0\.35",
    _patched: r"blocks\.0: has a forward of its own",
    _low_rank: r"blocks\.0\.attn\.q: is a LoRA, not a Linear",
    _weight_norm: r"decoder_pred: is a ParametrizedLinear",
    _stride: r"patch_embed\.proj: stride is \(2, 4, 4\)",
    _mask_token: r"mask_token: is \[1, 1, 8\], not \[1, 1, 16\]",
    _head: r"head: is a Linear",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_part_is_refused_by_name(model, change, capsys):
    change(model)
    with pytest.raises(AccelerateError, match=CHANGED[change]) as e:
        mae_fast.accelerate(model)
    assert not _is_fused(model)
    mae_fast.explain(model)
    printed = capsys.readouterr().out
    for line in str(e.value).splitlines():
        assert line in printed.splitlines()


def test_modules_exchanged_after_the_call_are_compared_again(model, video):
    mae_fast.accelerate(model)
    model(video)
    model.blocks[0].mlp.act = nn.ReLU()
    with pytest.raises(AccelerateError, match=r"the model has changed(.|\n)*blocks\.0\.mlp\.act"):
        model(video)


class _Parallel(nn.Module):
    """The parts of a block, put together otherwise."""

    def __init__(self, block):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["blocks", "decoder_blocks"])
def test_other_arithmetic_under_the_same_names_is_caught(model, video, where, precision):
    blocks = getattr(model, where)
    mae_fast.accelerate(model)
    blocks[1] = _Parallel(blocks[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with pytest.raises(AccelerateError, match=r"computes something else(.|\n)*differ by"):
            model(video)
        with pytest.raises(AccelerateError, match="computes something else"):
            model(video)  # it goes on being refused
    mae_fast.accelerate(model, verify=False)
    assert model(video)[0].isfinite()


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


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_the_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))  # benchmarks is not installed
    from benchmarks import bench_accelerate as bench

    measure = bench.measure_memory  # in a process of its own: once is enough here
    monkeypatch.setattr(
        bench, "measure_memory", lambda f, e, a: e == bench.AFTER and measure(f, e, a)
    )
    out = tmp_path / "accelerate.jsonl"
    bench.main(bench.Args(quick=True, out=str(out)))
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["family"] == "transformers" and record["model"] == "quick"
    assert list(record["engines"]) == ["eager", "sdpa", "accelerated"]
    for engine in record["engines"].values():
        assert all(a < b for a, b in zip(engine["forward_backward"], engine["step"], strict=True))
        assert len(engine["step"]) == 2
    assert record["engines"]["accelerated"]["peak_memory_mb"] > 50


@pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")
def test_nothing_is_timed_of_other_losses(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import bench_accelerate as bench

    args = bench.Args(quick=True)
    names = ("eager", bench.AFTER)
    built = {name: bench.build("transformers", name, args) for name in names}
    eager = built["eager"]
    wrong = eager._replace(step=lambda clips: 1.01 * eager.step(clips))
    with pytest.raises(SystemExit, match="nothing is timed"):
        clips = bench.make_clips("transformers", args)
        bench.check_losses({**built, "eager": wrong}, clips, args.precision)
