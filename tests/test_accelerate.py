"""What accelerate leaves as it was, and what it takes; what it refuses: test_accelerate_refuses."""

import copy
import functools
import inspect
import io
import logging
import operator
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from foreign import Parallel, assert_close, clips, make, process, relative, run, worst
from torch import nn

import mae_fast
from mae_fast import ModelConfig, comparison
from mae_fast.adapters import mae_st
from mae_fast.adapters.parts import Unfused
from mae_fast.errors import AccelerateError, ConfigError


@pytest.fixture
def model(tiny_cfg):
    return make(tiny_cfg)


@pytest.fixture
def video(tiny_cfg):
    return clips(tiny_cfg)


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
    assert_close(run(model, video, 0.7), before)
    assert_close(run(model, imgs=video, mask_ratio=0.7), before)


def test_the_default_masking_ratio_is_the_models(model, video):
    before = run(model, video)
    assert_close(run(mae_fast.accelerate(model), video), before)
    assert before[0][2].mean() == 0.75


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_kept_is_not_made_again(keep, model, video, monkeypatch):
    """Activations, counted in backward; gradients have the same bits either way."""
    expected = run(mae_fast.accelerate(model, verify=False), video)
    made, gelu = [], mae_fast.forward.bias_gelu
    monkeypatch.setattr(
        mae_fast.forward, "bias_gelu", lambda *args: made.append(len(made)) or gelu(*args)
    )
    mae_fast.accelerate(model, verify=False, keep=keep)
    got = run(copy.deepcopy(model) if keep else model, video)
    blocks = len(model.blocks) + len(model.decoder_blocks)
    assert len(made) == (1 if keep else 2) * blocks
    assert all(map(torch.equal, got[0], expected[0]))
    assert all(torch.equal(got[1][name], grad) for name, grad in expected[1].items())


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
    model.forward = lambda imgs: imgs
    with pytest.raises(AccelerateError, match="did not set"):
        mae_fast.restore(model)
    with pytest.raises(AccelerateError, match="forward: was replaced on this instance"):
        mae_fast.accelerate(model)


def test_twice_is_once(model, video):
    before = run(model, video)
    mae_fast.accelerate(mae_fast.accelerate(model, mean=0.45, std=0.225))
    assert_close(run(model, video), before)
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
    assert_close(run(other, video), before)
    for p in other.parameters():
        p.data.zero_()
    assert other(video)[0] != before[0][0]
    assert_close(run(model, video), before)


def test_a_state_dict_is_all_that_a_checkpoint_needs(model, video, tiny_cfg):
    before = run(mae_fast.accelerate(model), video)
    plain = make(tiny_cfg)
    for p in plain.parameters():
        p.data.zero_()
    plain.load_state_dict(model.state_dict())
    assert_close(before, run(plain, video))


def test_compiled(model, video):
    before = run(model, video, 0.7)
    compiled = torch.compile(mae_fast.accelerate(model), backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    model.zero_grad()
    loss, pred, mask = compiled(video, 0.7)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert_close(((loss.detach(), pred.detach(), mask), grads), before)
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")


def test_eval_and_train(model, video):
    mae_fast.accelerate(model)
    trained = model.train()(video)
    with torch.no_grad():
        assert model.eval()(video)[0].isfinite() and not model.training
    with torch.inference_mode():
        assert model(video)[0].isfinite()
    assert trained[0].requires_grad


def test_ddp_and_fsdp(tiny_cfg, tmp_path):
    # Before and after the model is wrapped, and with blocks that are sharded by themselves; FSDP 1.
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
    assert_close(after, before, 1e-10 if dtype == torch.float64 else 0.05)


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


def test_parameters_exchanged_after_the_call(model, video, tiny_cfg):
    mae_fast.accelerate(model)
    run(model, video)
    other = make(tiny_cfg)
    for p in other.parameters():
        p.data.mul_(1.5)
    old = model.blocks[0].attn.q.weight
    model.load_state_dict(other.state_dict(), assign=True)
    assert model.blocks[0].attn.q.weight is not old
    assert_close(run(model, video), run(other, video))
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
    assert_close(run(mae_fast.accelerate(model, **given), video), before, limit)
    assert_close(run(model, floats), before, limit)  # as before
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
    torch.compiler.reset()  # it remembers that another test's model broke the graph in this frame
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(3)
    assert relative(compiled(video, 0.5)[0], before[0][0]) < 2e-5
    model.blocks[1] = Parallel(model.blocks[1])  # the first fused call is compared, still
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


def _spectral(model):
    nn.utils.parametrizations.spectral_norm(model.blocks[0].attn.q)


def _old_spectral(model):
    nn.utils.spectral_norm(model.blocks[0].attn.q)


def _observed(model):
    """An observer gives its buffers another shape at the first call."""
    fc1 = model.blocks[1].mlp.fc1
    fc1.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model.blocks[1].mlp.fc1 = torch.ao.nn.qat.Linear.from_float(fc1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("change", [_spectral, _old_spectral, _observed])
def test_the_comparison_writes_no_buffer(model, video, change):
    """Layers whose forward writes what the next one reads: both forwards begin at the same."""
    torch.manual_seed(0)
    change(model)
    plain = copy.deepcopy(model)
    mae_fast.accelerate(model)
    for _ in range(3):
        assert_close(run(model, video), run(plain, video), 1e-4)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("what", ["parameter", "module"])
def test_the_comparison_leaves_no_gradient_in_tied_parts(model, video, what):
    if what == "module":
        model.blocks[1] = model.blocks[0]
    else:
        model.blocks[1].attn.q.weight = model.blocks[0].attn.q.weight
    before, kept = run(model, video), dict(model.named_parameters())
    mae_fast.accelerate(model).zero_grad()
    loss = model(video)[0]
    assert all(p.grad is None for p in model.parameters())
    assert all(p is kept[n] for n, p in model.named_parameters())
    loss.backward()
    assert_close(run(model, video), before)


def test_threads_that_call_first_leave_the_parameters(model, video):
    """One compared while another did: stand-ins stayed in the parameters' places."""
    parameters = list(mae_fast.accelerate(model).parameters())
    together = threading.Barrier(4)

    def step(_):
        together.wait()
        model(video)[0].backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(step, range(4)))
    assert all(map(operator.is_, model.parameters(), parameters))
    assert all(p.grad is not None for p in parameters)


def test_outputs_that_are_not_finite_are_compared_later(model, video):
    bias = model.norm.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[0] = float("nan")
    assert mae_fast.accelerate(model)(video)[0].isnan()
    with torch.no_grad():
        bias.copy_(kept)
    model.blocks[1] = Parallel(model.blocks[1])
    with pytest.raises(AccelerateError, match="computes something else"):
        model(video)


def test_a_clip_of_another_size_is_refused(model, video):
    mae_fast.accelerate(model)
    with pytest.raises(ValueError, match=r"imgs must be \[N, 3, 8, 16, 16\]"):
        model(video[..., :8])


def test_gradients_of_fp32_that_differ_are_compared_in_double(model, video, monkeypatch):
    """Rounding may keep a sum over many tokens apart, a model of another kind stays refused."""
    compare, seen = comparison._gradients_differ, []

    def rounded(ours, theirs, limit):
        dtype = next(g.dtype for g in theirs.values() if g is not None)
        seen.append(dtype)
        return "mask_token" if dtype == torch.float32 else compare(ours, theirs, limit)

    monkeypatch.setattr(comparison, "_gradients_differ", rounded)
    run(mae_fast.accelerate(copy.deepcopy(model)), video)
    assert seen == [torch.float32, torch.float64]

    class Other(type(model)):
        double = True

        def forward(self, imgs, mask_ratio=0.75):
            if imgs.dtype == torch.float64 and not self.double:
                raise RuntimeError("this forward has no fp64")
            loss, *others = super().forward(imgs, mask_ratio)
            return loss + 1e-3 * (self.norm.bias - self.norm.bias.detach()).sum(), *others

    model.__class__ = Other
    for Other.double in (True, False):
        with pytest.raises(AccelerateError, match=r"gradient of"):
            run(mae_fast.accelerate(model), video)
        mae_fast.restore(model)
