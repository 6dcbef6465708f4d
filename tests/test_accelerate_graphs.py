"""An accelerated model's CUDA graphs: whatever the loop around does, it sees what it sees without.

As a CPU rehearses them (mae_fast/graph.py); MAE_FAST_TEST_DEVICE=cuda captures them.
"""

import copy
import gc
import logging
import os
import pickle
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import families
import foreign
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mae_fast
from mae_fast import drop_in, graph, replays
from mae_fast.comparison import tensors_of

DEVICE = os.environ.get("MAE_FAST_TEST_DEVICE", "cpu")
CALLS = replays.WARMUP + 4  # the last three replay forward, and the last two backward as well


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(graph, "why_not", lambda device: None)


def clips(cfg, n: int = 2) -> Tensor:
    return foreign.clips(cfg, n).to(DEVICE)


def family_of(name: str, cfg) -> tuple[nn.Module, tuple]:
    model, args = families.FAMILIES[name](cfg)
    given = [[t.to(DEVICE) for t in a] if isinstance(a, list) else a.to(DEVICE) for a in args]
    return model.to(DEVICE), tuple(given)


@pytest.fixture
def pair(tiny_cfg):
    """(an accelerated model, the same without graphs)."""
    return both(foreign.make(tiny_cfg).to(DEVICE))


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    other = copy.deepcopy(model)
    return mae_fast.accelerate(model), mae_fast.accelerate(other, cuda_graph=False)


def known(model: nn.Module) -> list:
    return model.forward.replays.known


def loss_of(model: nn.Module, args: tuple, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    out = tensors_of(model(*args))
    return out[0] if out[0].dim() == 0 else out[0].square().mean()


def step(model: nn.Module, args: tuple, seed: int = 0) -> tuple[float, list[Tensor]]:
    """(loss, gradients that a step adds up in two calls)."""
    model.zero_grad(set_to_none=bool(seed % 2))
    total = 0.0
    for k in range(2):
        loss = loss_of(model, args, 2 * seed + k)
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def half(on: bool = True) -> torch.autocast:
    """Autocast's cache adds the gradients of a weight that is used twice in 16 bits; a graph has
    none."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=on, cache_enabled=False)


def same(a, b) -> None:
    """A GPU adds up some gradients of torch's in an order that changes."""
    how = dict(rtol=0, atol=0) if DEVICE == "cpu" else dict(rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a, b, **how)


def warm(model: nn.Module, video: Tensor, calls: int = CALLS) -> None:
    for _ in range(calls):
        loss_of(model, (video,)).backward()
    model.zero_grad()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_training_has_the_same_bits(family, cast, keep, tiny_cfg):
    """Clips that change, gradients that add up, an optimizer that writes into the weights."""
    model, args = family_of(family, tiny_cfg)
    found = []
    for each, how in ((copy.deepcopy(model), False), (model, True)):
        mae_fast.accelerate(each, cuda_graph=how, keep=keep)
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        rows = []
        for k in range(CALLS):
            torch.manual_seed(k)
            clip = args[0]
            new = [torch.randn_like(clip[0])] if isinstance(clip, list) else torch.randn_like(clip)
            with half(cast):
                rows += step(each, (new, *args[1:]), k)
            optimizer.step()
        found.append(rows)
    same(*found)
    made = known(model)
    assert made and all(r.forward and r.backward for r in made), "nothing was replayed"


def test_outputs_and_gradients_are_not_written_again(pair, tiny_cfg):
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    out = model(video)
    out[0].backward()
    held = [*out, *(p.grad for p in model.parameters())]
    before = [t.clone() for t in held]
    model.zero_grad()
    loss_of(model, (video + 1,), 5).backward()
    same([t.detach() for t in held], [t.detach() for t in before])


def test_clips_are_not_written(pair, tiny_cfg):
    """The first one's memory is the program's, not that of the graphs."""
    model, video = pair[0], clips(tiny_cfg)
    before = video.clone()
    warm(model, video)
    loss_of(model, (video + 1,)).backward()
    same(video, before)


@pytest.mark.parametrize("of", ["pred", "both", "none"])
def test_backward_is_of_any_outputs(of, pair, tiny_cfg):
    """After a graph of the loss alone."""
    video, found = clips(tiny_cfg), []
    for model in pair:
        warm(model, video)
        grads = []
        for seed in range(3):
            torch.manual_seed(seed)
            loss, pred, _ = model(video)
            if of != "none":
                (pred.square().mean() + (loss if of == "both" else 0)).backward()
            loss_of(model, (video,)).backward()
            grads += [p.grad.clone() for p in model.parameters()]
        found.append(grads)
    same(*found)


def test_backward_is_a_graph_too(pair, tiny_cfg, monkeypatch):
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    monkeypatch.setattr(known(model)[0], "_gradients", None)
    loss_of(model, (video,)).backward()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_is_frozen(part, tiny_cfg):
    """Of an encoder that is, the latent tokens have no gradient, though some parameter has."""
    model, args = family_of("videomae", tiny_cfg)
    model.get_submodule(part).requires_grad_(False)
    found = [[step(m, args, k) for k in range(CALLS)] for m in both(model)]
    same(*found)


def test_two_forwards_before_a_backward(pair, tiny_cfg):
    """The second may not write over what the first one's backward needs."""
    video, found = clips(tiny_cfg), []
    for model in pair:
        warm(model, video)
        (loss_of(model, (video,), 1) * loss_of(model, (2 * video,), 2)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)  # added up in another order
    assert pair[0].forward.replays.known[0].number


def test_a_forward_that_nobody_holds_is_no_hindrance(pair, tiny_cfg):
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    before = known(model)[0].number
    for _ in range(3):
        model(video)
    assert known(model)[0].number == before + 3


def test_a_second_backward(pair, tiny_cfg):
    """At once, it is right; after a later forward it is refused."""
    video, found = clips(tiny_cfg), []
    for model in pair:
        warm(model, video)
        loss = loss_of(model, (video,))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        found.append([p.grad.clone() for p in model.parameters()])
    same(*found)
    loss = loss_of(pair[0], (video,))
    loss.backward(retain_graph=True)
    loss_of(pair[0], (video,))
    with pytest.raises(RuntimeError, match="cuda_graph=False"):
        loss.backward()


@pytest.mark.parametrize("of", [0, 1])
def test_a_backward_that_is_broken_off_leaves_nothing(of, pair, tiny_cfg, monkeypatch):
    """By an interrupt, or out of memory, between two layers that read the same norm made again: the
    first one's gradient is there, and the next call's norm is another. `of`: which output."""
    video, found, grad = clips(tiny_cfg), [], torch.autograd.grad

    def broken_off(outputs, inputs, *args, **kwargs):
        weight = pair[0].blocks[-1].attn.k.weight
        inputs = [t for t in inputs if t.data_ptr() == weight.data_ptr()]
        grad(outputs, inputs, *args, **kwargs)
        raise KeyboardInterrupt

    warm(pair[0], video, replays.WARMUP if of == 0 else CALLS)
    out = pair[0](video)[of].sum()
    pool = known(pair[0])[0].side
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.autograd, "grad", broken_off)
        out.backward()
    del out
    for model in pair:
        rows = []
        for k, which in enumerate([of, of, of, 0]):
            torch.manual_seed(k)
            model.zero_grad()
            model(torch.randn_like(video))[which].sum().backward()
            rows.append([p.grad.clone() for p in model.parameters()])
        found.append(rows)
    same(*found)
    again = known(pair[0])[0]
    assert again.forward and again.side is not pool, "torch refuses one whose graphs are gone"


def test_a_forward_of_another_thread_during_a_backward(pair, tiny_cfg, monkeypatch):
    """It may not write over what the backward reads yet."""
    video = clips(tiny_cfg)
    for model in pair:
        warm(model, video)
    replay = known(pair[0])[0]
    gradients = replay.gradients

    def meanwhile(douts):
        with torch.enable_grad():  # as in any thread but that of the backward
            loss_of(pair[0], (2 * video,), 1)
        return gradients(douts)

    monkeypatch.setattr(replay, "gradients", meanwhile)
    same(*(step(model, (video,)) for model in pair))


def test_weights_that_change_before_backward_are_found(pair, tiny_cfg):
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    loss = loss_of(model, (video,))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ["data", "turned", "assign", "freeze", "thaw", "copy_", "double"])
def test_parameters_that_are_exchanged(how, pair, tiny_cfg):
    video, found = clips(tiny_cfg), []
    for model in pair:
        p = model.blocks[0].mlp.fc1.weight
        p.requires_grad_(how != "thaw")
        warm(model, video)
        if how == "data":
            p.data = p.data * 2
        elif how == "turned":
            model.blocks[0].attn.proj.weight.data = model.blocks[0].attn.proj.weight.data.t()
        elif how == "assign":
            state = {k: t.clone() * 2 for k, t in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        elif how == "freeze":
            p.requires_grad_(False)
        elif how == "thaw":
            p.requires_grad_(True)
        elif how == "double":
            model.double()
        else:
            p.data.copy_(p.data * 2)
        given = video.double() if how == "double" else video
        found.append([step(model, (given,), k) for k in range(CALLS)])
    same(*found)


def test_parameters_that_are_exchanged_before_a_backward(pair, tiny_cfg):
    """Two forwards of other weights each, as by functional_call: the first one's backward is to
    come, by the first one's weights."""
    video, found = clips(tiny_cfg), []
    for model in pair:
        warm(model, video)
        loss = loss_of(model, (video,))
        before = [p.data for p in model.parameters()]
        for p in model.parameters():
            p.data = 2 * p.data
        other = loss_of(model, (video,), 1).detach()
        for p, data in zip(model.parameters(), before, strict=True):
            p.data = data
        loss.backward()
        found.append([other, *(p.grad for p in model.parameters())])
    same(*found)


def test_two_kinds_before_a_backward(pair, tiny_cfg):
    """What the first one's backward needs is not where the second one's graphs write."""
    found = []
    for model in pair:
        rows = []
        for k in range(2 * CALLS):
            model.zero_grad()
            losses = [loss_of(model, (clips(tiny_cfg, n),), k) for n in (2, 3)]
            sum(losses if k % 2 else losses[::-1]).backward()
            rows.append([p.grad.clone() for p in model.parameters()])
        found.append(rows)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)  # added up in another order
    assert all(r.forward and r.backward for r in known(pair[0]))
    assert len({id(r.side) for r in known(pair[0])}) == 2


def test_each_dtype_has_its_own(pair, tiny_cfg):
    video, found = clips(tiny_cfg), []
    pixels = (50 * video + 128).clamp(0, 255).byte()
    for model, how in zip(pair, (True, False), strict=True):
        mae_fast.accelerate(model, mean=0.45, std=0.225, cuda_graph=how)
        found.append([step(model, (clip,), 1) for clip in [video] * CALLS + [pixels] * CALLS])
    same(*found)


def test_each_shape_has_its_own(pair, tiny_cfg):
    """The last batch of an epoch is smaller."""
    found = []
    for model in pair:
        sizes = [4] * CALLS + [2, 4, 4, 2] + [4] * 2
        found.append([step(model, (clips(tiny_cfg, n),), k) for k, n in enumerate(sizes)])
    same(*found)
    assert sorted(r.forward is not None for r in known(pair[0])) == [True, True]


def test_kinds_are_forgotten(pair, tiny_cfg):
    for k in range(replays.KINDS + 3):
        loss_of(pair[0], (clips(tiny_cfg), 0.3 + 0.05 * k)).backward()
    assert len(known(pair[0])) == replays.KINDS


def test_precision_and_backends_are_not_mixed_up(pair, tiny_cfg):
    video, found = clips(tiny_cfg), []
    blocks = [
        nullcontext,
        half,
        lambda: mae_fast.backends(layer_norm="reference", attention="reference"),
    ]
    for model in pair:
        rows = []
        for k in range(3 * CALLS):
            with blocks[k % 3]():
                rows.append(step(model, (video,), k))
        found.append(rows)
    same(*found)
    assert len(known(pair[0])) == 3


@pytest.mark.parametrize(
    "setting, values",
    [
        (torch.set_float32_matmul_precision, ("high", "highest")),
        (torch.use_deterministic_algorithms, (True, False)),
        (torch.set_default_dtype, (torch.float64, torch.float32)),
    ],
    ids=["tf32", "deterministic", "default_dtype"],
)
def test_a_setting_makes_another_kind(setting, values, pair, tiny_cfg):
    """A graph has the kernels of its capture."""
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    try:
        setting(values[0])
        loss_of(model, (video,))
    finally:
        setting(values[1])
    assert len(known(model)) == 2


def _inference(model, video):
    with torch.inference_mode():
        model(video)


def _saved_on_cpu(model, video):
    with torch.autograd.graph.save_on_cpu():
        loss_of(model, (video,)).backward()


def _checkpointed(model, video):
    def run(video):
        return model(video)[0]

    torch.utils.checkpoint.checkpoint(run, video, use_reentrant=False).backward()


def _anomaly(model, video):
    with torch.autograd.detect_anomaly(check_nan=False):
        loss_of(model, (video,)).backward()


def _hooked(model, video):
    handle = model.register_forward_hook(lambda *args: None)
    loss_of(model, (video,)).backward()
    handle.remove()


def _own_layer(model, video):
    class Lora(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.mean()

    layer = model.blocks[0].mlp.fc1
    model.blocks[0].mlp.fc1 = Lora(layer.in_features, layer.out_features, device=DEVICE)
    loss_of(model, (video,)).backward()
    model.blocks[0].mlp.fc1 = layer


def _counted(model, video):
    with FlopCounterMode(display=False):
        loss_of(model, (video,)).backward()


def _of_a_class(model, video):
    loss_of(model, (video.as_subclass(type("Video", (Tensor,), {})),)).backward()


def _of_inference(model, video):
    """torch cannot save it for a backward, which does not read it."""
    layer, before = model.decoder_pred, model.decoder_pred.bias
    with torch.inference_mode():
        layer.bias = nn.Parameter(before.clone(), requires_grad=False)
    loss_of(model, (video,)).backward()
    layer.bias = before


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("call", "why"),
    [
        (_inference, "inference mode"),
        (_saved_on_cpu, "goes through hooks"),
        (_checkpointed, "goes through hooks"),
        (_anomaly, "anomaly detection"),
        (_hooked, ""),  # the whole model is left alone
        (_own_layer, "runs itself"),
        (_counted, "a dispatch mode"),
        (_of_a_class, "not all are plain tensors"),
        (_of_inference, "inference mode"),
    ],
)
def test_what_does_not_fit_runs_without(call, why, pair, tiny_cfg, caplog):
    """And says why, once."""
    caplog.set_level(logging.INFO, "mae_fast")
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    before = known(model)[0].number
    for _ in range(CALLS):
        call(model, video)
    assert [r.number for r in known(model)] == [before]
    said = [r.message for r in caplog.records if "without CUDA graphs" in r.message]
    assert len(said) == bool(why) and all(why in line for line in said), said


def test_a_copy_has_graphs_of_its_own(pair, tiny_cfg):
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    expected = step(model, (video,))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not known(other)
        for _ in range(CALLS):
            same(step(other, (video,)), expected)
        assert known(other)[0].number
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    same(step(model, (video,)), expected)


def test_restore_lets_go_of_them(pair, tiny_cfg):
    """Also where a wrapper still holds the forward."""
    model = pair[0]
    warm(model, clips(tiny_cfg))
    found, held = weakref.ref(known(model)[0]), model.forward
    mae_fast.restore(model)
    gc.collect()
    assert found() is None and held is not None


def test_a_model_that_was_let_go_of_does_not_keep_its_graphs(tiny_cfg):
    """It is a cycle, with its forward; the next model's calls want the memory."""
    video = clips(tiny_cfg)
    model, other = (mae_fast.accelerate(foreign.make(tiny_cfg).to(DEVICE)) for _ in range(2))
    warm(model, video)
    found = weakref.ref(known(model)[0])
    gc.disable()
    try:
        del model
        warm(other, video)
        assert found() is None
    finally:
        gc.enable()


def test_a_capture_that_fails_is_said_once(pair, tiny_cfg, monkeypatch, caplog):
    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph.Side, "capture", fail)
    video = clips(tiny_cfg)
    found = [[step(model, (video,), k) for k in range(CALLS)] for model in pair]
    same(*found)
    said = [r.message for r in caplog.records if "without CUDA graphs" in r.message]
    assert said == ["forward and backward run without CUDA graphs: CUDA out of memory"]
    assert not known(pair[0]), "their memory is wanted"


def test_a_capture_that_waits_for_the_device_leaves_torch_as_it_was(pair, tiny_cfg, monkeypatch):
    """Its end fails too, on a GPU; masks are drawn there after it."""
    capture = replays._Replay._graph

    def waits(replay, work):
        return capture(replay, lambda: (work(), float(replay.leaves[0].detach().sum()))[0])

    monkeypatch.setattr(replays._Replay, "_graph", waits)
    video = clips(tiny_cfg)
    found = [[step(model, (video,), k) for k in range(CALLS)] for model in pair]
    same(*found)
    assert pair[0].forward.replays.failed


def test_a_call_within_another_threads_runs_without(pair, tiny_cfg):
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    before = known(model)[0].number
    with model.forward.replays.one_thread:
        same(step(model, (video,)), step(pair[1], (video,)))
    assert known(model)[0].number == before


@pytest.mark.parametrize("held", [20, 30])
def test_the_graphs_memory_must_fit_beside(held, monkeypatch):
    """Three times what a call holds, in 90% of the 90 MiB that are free or torch's to give; what
    has been in use before says nothing."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 20, 200 << 20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 << 20)
    replay = replays._Replay((), SimpleNamespace(device=torch.device("cuda")), [], [])
    replay.held = held << 20
    assert (replay.no_room([torch.zeros(1 << 18)]) is None) == (held == 20)


def test_streams_of_ones_own_run_without(monkeypatch):
    """A forward there may overlap the backward of the last call, in the same memory."""
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    for stream in ("default", "own"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        assert replays._in_order(torch.device("cuda")) == (stream == "default")


def test_a_comparison_is_no_call(pair, tiny_cfg, caplog):
    """Before the first one both forwards take a clip, with other parameters, under hooks."""
    caplog.set_level(logging.INFO, "mae_fast")
    warm(pair[0], clips(tiny_cfg, 1), 2)
    assert pair[0].forward.replays.calls == 2
    assert not any("without CUDA graphs" in r.message for r in caplog.records)


def test_without_graphs(pair, tiny_cfg):
    warm(pair[1], clips(tiny_cfg))
    assert pair[1].forward.replays is None


def test_evaluation_is_replayed_between_steps(pair, tiny_cfg):
    """Of the same clips' shape as training's, and its outputs want no gradient."""
    found = []
    for model in pair:
        rows = []
        for k in range(CALLS):
            rows.append(step(model, (clips(tiny_cfg) + k,), k))
            torch.manual_seed(k)
            with torch.no_grad():
                loss, pred, _ = model(clips(tiny_cfg) - k)
            assert not loss.requires_grad and not pred.requires_grad
            rows.append((float(loss), [pred]))
        found.append(rows)
    same(*found)
    made = known(pair[0])
    assert len(made) == 2 and all(r.forward for r in made)
    assert sorted(r.backward is not None for r in made) == [False, True]


def test_a_kind_that_comes_seldom_is_not_captured(pair, tiny_cfg, monkeypatch):
    """The last batch of every epoch."""
    monkeypatch.setattr(replays, "SPAN", 2 * replays.WARMUP)
    model, few, many = pair[0], clips(tiny_cfg, 1), clips(tiny_cfg, 2)
    for _ in range(replays.WARMUP + 3):
        for video in (many, many, few):
            loss_of(model, (video,)).backward()
    assert sorted(r.forward is not None for r in known(model)) == [False, True]
    monkeypatch.setattr(replays, "SPAN", 40)
    warm(model, few)
    assert all(r.forward for r in known(model))
    monkeypatch.setattr(replays, "SPAN", 0)  # what is captured stays
    before = [r.number for r in known(model)]
    loss_of(model, (many,)).backward()
    assert sum(r.number for r in known(model)) == sum(before) + 1


def test_what_is_read_beside_is_kept_until_then(monkeypatch):
    """The last warm-up's backward is on the stream of the captures: what it has saved of the
    stream before is not to be given to another while it reads."""
    kept, t, weight = [], torch.ones(2), torch.ones(2)
    monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: kept.append((t, stream)))
    side = SimpleNamespace(device=torch.device("cpu"), stream="side", beside=nullcontext)
    replay = replays._Replay((lambda a, b: a + b,), side, [t, weight], [False, True])
    for number in range(replays.WARMUP):
        assert not kept and not replay.is_due(number)
        same(replay.warm_up([t, weight], (t, weight), {}), t + weight)
    assert kept == [(t, "side")]


def test_calls_of_other_structure_are_of_another_kind():
    a, b = torch.ones(2), torch.zeros(2)
    calls = [((a, None), b), ((None, a), b), ((a, b), None), (([a], None), b), ((a, (None,)), b)]
    calls += [(((a,), None), b), ((a, None, b),)]
    tensors, others = zip(*map(replays._parted, calls), strict=True)
    assert all(others.count(o) == 1 for o in others) and {*map(len, tensors)} == {2}
    assert all(replays._why_not(t, o) is None for t, o in zip(tensors, others, strict=True))
    assert replays._why_not(*replays._parted((a, {"key": b}))) == "a block or layer runs itself"
    found, given = replays.Replays(nn.Linear(2, 2).to(DEVICE)), lambda **named: [*named.values()]
    for name in ("pixels", "target"):
        found(given, (), {name: a.to(DEVICE)})
    assert len(found.known) == 2


def test_graphs_of_other_kinds_make_room(pair, tiny_cfg, monkeypatch, caplog):
    model, video = pair[0], clips(tiny_cfg)
    warm(model, video)
    (first,) = known(model)
    no_room = lambda replay, tensors: "no" if first in known(model) else None  # noqa: E731
    monkeypatch.setattr(replays._Replay, "no_room", no_room)
    warm(model, clips(tiny_cfg, 3))
    assert len(known(model)) == 1 and known(model)[0].forward and not caplog.records


@pytest.mark.parametrize("views", [False, True])
def test_weights_that_are_views_are_not_captured(views, tiny_cfg, monkeypatch):
    """As of FSDP 1, which frees them between forward and backward."""
    monkeypatch.setattr(drop_in, "_has_views", lambda model: views)
    model = mae_fast.accelerate(foreign.make(tiny_cfg).to(DEVICE))
    warm(model, clips(tiny_cfg))
    assert bool(known(model)) == (not views)
