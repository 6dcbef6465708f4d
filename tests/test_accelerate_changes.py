"""A model that changes after its first call: computed as it then is, or refused; never ignored."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from foreign import Parallel, clips, make, run
from torch import nn

import mae_fast
from mae_fast.errors import AccelerateError
from mae_fast.guard import Guard, _guards_on


def _outputs(model, args):
    """Every output tensor, from one seed; an error's name where there is one."""
    torch.manual_seed(3)
    try:
        found = mae_fast.comparison.tensors_of(model(*args))
    except Exception as e:
        return e
    return [t.detach() for t in found]


def _agree(ours, theirs) -> bool:
    if isinstance(ours, Exception):
        return isinstance(theirs, Exception) or isinstance(ours, AccelerateError)
    if isinstance(theirs, Exception):
        return False
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4)
        for a, b in zip(ours, theirs, strict=True)
    )


def _read(model, args) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of all that the model's own forward reads of its instances."""
    read: dict = {}

    def probe(module, name):
        if name in object.__getattribute__(module, "__dict__"):
            read[module, name] = None
        return object.__getattribute__(module, name)

    nn.Module.__getattribute__ = probe
    try:
        model(*args)
    finally:
        del nn.Module.__getattribute__
    own = set(vars(nn.Module())) - {"training"}
    return [(m, n) for m, n in read if n not in own and n not in ("patch_info", "counter")]


def _others(value):
    """Other values of a number, a word, numbers; none of anything else."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value]
    if isinstance(value, float):
        return [value + 0.5]
    if isinstance(value, str):
        return ["tanh" if value == "none" else "eager" if value == "sdpa" else "none"]
    if isinstance(value, tuple | list) and value and all(isinstance(v, int) for v in value):
        return [type(value)([value[0] + 1, *value[1:]])]
    return []


def _settings(holder, seen):
    """Every object of settings inside one: a namespace, transformers' config."""
    if id(holder) not in seen:
        seen[id(holder)] = holder
        for value in vars(holder).values():
            if isinstance(value, SimpleNamespace):
                _settings(value, seen)
    return list(seen.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_own_forward_reads(tiny_cfg, family):
    """Every plain attribute, of a module of each class in the encoder and in the decoder, and of
    the settings: changed after the first call, then put back."""
    model, args = FAMILIES[family](tiny_cfg)
    own = copy.deepcopy(model)
    names = {m: n for n, m in own.named_modules()}
    # Some losses are modules made in the forward.
    read = [(m, n) for m, n in _read(own, args) if m in names]
    places = list({(type(m), n, "decoder" in names[m]): (m, n) for m, n in reversed(read)}.values())
    roots = [vars(own)[n] for n in ("cfg", "config") if n in vars(own)]
    places += [(s, n) for root in roots for s in _settings(root, {}) for n in vars(s)]
    copies: dict = {}
    fast = mae_fast.accelerate(copy.deepcopy(own, copies))
    assert _agree(_outputs(fast, args), _outputs(own, args))
    ignored, tried = [], 0
    for holder, name in places:
        before = vars(holder)[name]
        for value in _others(before):
            tried += 1
            twin = copies[id(holder)]
            vars(holder)[name] = vars(twin)[name] = value
            ours, theirs = _outputs(fast, args), _outputs(own, args)
            if not _agree(ours, theirs):
                ignored.append((names.get(holder, type(holder).__name__), name, value, ours))
            vars(holder)[name] = vars(twin)[name] = before
    assert not ignored, [i[:3] for i in ignored]
    assert tried > 20  # 28 in the smallest family
    assert _agree(_outputs(fast, args), _outputs(own, args))


def _block(model):
    return model.blocks[0]


def _dropout(model):
    _block(model).attn.proj_drop.p = 0.5


def _scale(model):
    _block(model).attn.scale *= 2


def _tanh(model):
    _block(model).mlp.act.approximate = "tanh"


def _relu(model):
    _block(model).mlp.act = nn.ReLU()


def _heads(model):
    for block in model.blocks:
        block.attn.num_heads = block.attn.heads = 1
        block.attn.scale = 16**-0.5


def _forward_of_a_block(model):
    _block(model).forward = lambda x: x


def _forward_inside(model):
    _block(model).mlp.forward = lambda x: 0 * x


def _class(model):
    class Half(type(_block(model).mlp)):
        def forward(self, x):
            return 0.5 * super().forward(x)

    _block(model).mlp.__class__ = Half


def _other_block(model):
    model.blocks[1] = Parallel(model.blocks[1])


def _hook(model):
    _block(model).mlp.register_forward_hook(lambda module, args, out: 2 * out)


def _pre_hook(model):
    model.norm.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _parametrized(model):
    nn.utils.parametrize.register_parametrization(model.decoder_pred, "weight", nn.Tanh())


def _eps(model):
    model.norm.eps = 0.1


def _low_rank(model):
    class Lora(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x

    q = _block(model).attn.q
    _block(model).attn.q = Lora(q.in_features, q.out_features)
    _block(model).attn.q.load_state_dict(q.state_dict())


def _no_bias(model):
    _block(model).mlp.fc1.bias = None


def _no_norm_bias(model):
    model.norm.bias = None


def _setting(model):
    model.norm_pix_loss = not model.norm_pix_loss


def _other_name(model):
    held = _block(model).mlp.fc1._parameters
    held["shift"] = held.pop("bias")


def _table(model):
    name = "pos_embed_temporal" if hasattr(model, "pos_embed_temporal") else "pos_embed"
    table = getattr(model, name)
    table.data = torch.cat([table.data, table.data], dim=1)


def _loss(model):
    own = type(model).forward

    class Half(type(model)):
        def forward(self, imgs, mask_ratio=0.75):
            loss, *rest = own(self, imgs, mask_ratio)
            return 0.5 * loss, *rest

    model.__class__ = Half


CHANGES = [
    *(_dropout, _scale, _tanh, _relu, _heads, _forward_of_a_block, _forward_inside, _class),
    *(_other_block, _hook, _pre_hook, _parametrized, _eps, _low_rank, _table, _loss),
    *(_no_bias, _no_norm_bias, _other_name, _setting),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_change_after_the_first_call(tiny_cfg, change):
    model, args = FAMILIES["mae_st"](tiny_cfg)
    own = copy.deepcopy(model)
    mae_fast.accelerate(model)
    before = _outputs(model, args)
    assert _agree(before, _outputs(own, args))
    for each in (model, own):
        change(each)
    ours, theirs = _outputs(model, args), _outputs(own, args)
    assert _agree(ours, theirs)
    assert isinstance(ours, Exception) or not _agree(before, ours)  # the change was one


def _gelu(x, approximate="none"):
    return 0.5 * x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_function_that_the_models_code_names(tiny_cfg, monkeypatch, compiled):
    """Replaced after the first call, in the module that the code names (F.gelu)."""
    model, args = FAMILIES["mae_st"](tiny_cfg)
    torch.compiler.reset()
    mae_fast.accelerate(model)
    run_it = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    run_it(*args)
    monkeypatch.setattr(nn.functional, "gelu", _gelu)
    with pytest.raises(Exception, match="computes something else"):
        run_it(*args)


def test_a_function_of_transformers(tiny_cfg, monkeypatch):
    """One that its module names, and one in its table of attentions."""
    model, args = FAMILIES["transformers"](tiny_cfg)
    module = importlib.import_module(type(model).__module__)
    name = "eager_attention_forward"
    if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this transformers has no table of attentions")
    mae_fast.accelerate(model)(*args)

    def nothing(module, query, key, value, *args, **kwargs):
        return 0 * value.transpose(1, 2), None

    table = module.ALL_ATTENTION_FUNCTIONS
    with monkeypatch.context() as patch:
        patch.setattr(module, name, nothing)
        model.config._attn_implementation = "eager"
        with pytest.raises(AccelerateError, match="computes something else"):
            model(*args)
        model.config._attn_implementation = "sdpa"
    model(*args)
    with monkeypatch.context() as patch:
        patch.setitem(table._global_mapping, "sdpa", nothing)
        with pytest.raises(AccelerateError, match="computes something else"):
            model(*args)
    model(*args)


def _hook_of_a_block(model):
    _block(model).register_forward_hook(lambda module, args, out: 2 * out)


# Those that the own forward reads at another time than the fused one, or never: a guard is needed.
COMPILED = [_dropout, _scale, _tanh, _forward_inside, _class, _other_block, _low_rank, _loss]
COMPILED += [_hook_of_a_block]


@pytest.mark.parametrize("change", [*CHANGES, _hook_of_a_block], ids=lambda f: f.__name__[1:])
def test_our_guard_tells_torch_compile(tiny_cfg, change):
    model, args = FAMILIES["mae_st"](tiny_cfg)
    guard = mae_fast.accelerate(model).forward.guard
    model(*args)
    assert _guards_on(guard) == _guards_on(guard) == [1]
    change(model)
    assert _guards_on(guard) == [-1]


def test_our_guard_sees_a_class_patched(tiny_cfg, monkeypatch):
    model, args = FAMILIES["mae_st"](tiny_cfg)
    guard = mae_fast.accelerate(model).forward.guard
    model(*args)
    monkeypatch.setattr(type(_block(model).mlp), "forward", lambda self, x: 0 * x)
    assert _guards_on(guard) == [-1]
    with pytest.raises(AccelerateError, match="computes something else"):
        model(*args)


def _only_ours(guards) -> list[bool]:
    """Of what torch.compile compares before it runs compiled code: mae_fast.guard's."""
    kept = [isinstance(g.value, Guard) and "OPAQUE" in g.guard_type for g in guards]
    assert any(kept)
    return kept


@pytest.mark.parametrize(
    ("change", "when"),
    [(c, "after") for c in COMPILED]
    + [(c, "before") for c in (_dropout, _low_rank, _loss, _hook_of_a_block)],
    ids=lambda x: x if isinstance(x, str) else x.__name__.strip("_"),
)
def test_a_change_under_torch_compile(tiny_cfg, change, when):
    """Before the first call, after `accelerate`; or between two calls, where torch.compile's other
    guards see most changes too: they are off."""
    model, args = FAMILIES["mae_st"](tiny_cfg)
    own = copy.deepcopy(model)
    torch.compiler.reset()
    options = dict(guard_filter_fn=_only_ours)
    compiled = torch.compile(
        mae_fast.accelerate(model), backend="eager", fullgraph=True, options=options
    )
    if when == "after":
        assert _agree(_outputs(compiled, args), _outputs(own, args))
    for each in (model, own):
        change(each)
    ours = _outputs(compiled, args)
    refused = isinstance(ours, Exception) and "AccelerateError" in f"{type(ours)} {ours}"
    assert refused or _agree(ours, _outputs(own, args)), ours


def test_our_guard_alone_sees_tube_masking(tiny_cfg):
    """PySlowFast's setting, of the masks that its forward draws."""
    model, args = FAMILIES["slowfast"](tiny_cfg)
    own = copy.deepcopy(model)
    torch.compiler.reset()
    options = dict(guard_filter_fn=_only_ours)
    compiled = torch.compile(mae_fast.accelerate(model), backend="eager", options=options)
    for tube in (False, True, False):
        model.cfg.AUG.MASK_TUBE = own.cfg.AUG.MASK_TUBE = tube
        assert _agree(_outputs(compiled, args), _outputs(own, args)), tube


@pytest.mark.parametrize("part", ["forward_loss", "random_masking"])
def test_another_part_of_the_official_forward_under_torch_compile(tiny_cfg, part):
    """Its methods are overridden, before accelerate sees the model: nothing but a comparison of
    outputs tells."""
    model = make(tiny_cfg)

    class Mine(type(model)):
        def forward(self, imgs, mask_ratio=0.75):
            if part == "forward_loss":
                loss, pred, mask = super().forward(imgs, mask_ratio)
                return 0.5 * loss, pred, mask
            return super().forward(imgs, 0.5)

    model.__class__ = Mine
    torch.compiler.reset()
    compiled = torch.compile(mae_fast.accelerate(model), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="computes something else"):
        compiled(clips(tiny_cfg))


def test_known_modes_are_compared_once(tiny_cfg, monkeypatch):
    model, args = FAMILIES["mae_st"](tiny_cfg)
    mae_fast.accelerate(model)
    compared = []
    compare = type(model.forward)._compare
    monkeypatch.setattr(
        type(model.forward), "_compare", lambda *a: compared.append(1) or compare(*a)
    )
    for mode in (True, False) * 3:
        model.train(mode)(*args)
    assert len(compared) == 2
    with torch.no_grad():
        model(*args)
    assert len(compared) == 2
    with torch.autocast("cpu", torch.bfloat16):
        model(*args)
    assert len(compared) == 3


def test_what_was_not_finite_is_compared_when_it_is(tiny_cfg):
    """A loss that is not a number says nothing of a forward that doubles it."""
    model, args = FAMILIES["mae_st"](tiny_cfg)

    class Mine(type(model)):
        def forward(self, imgs, mask_ratio=0.75):
            loss, pred, mask = super().forward(imgs, mask_ratio)
            return 2 * loss, pred, mask

    model.__class__ = Mine
    before = model.decoder_pred.bias.detach().clone()
    with torch.no_grad():
        model.decoder_pred.bias.fill_(torch.nan)
    mae_fast.accelerate(model)(*args)
    with torch.no_grad():
        model.decoder_pred.bias.copy_(before)
    with pytest.raises(AccelerateError, match="computes something else"):
        model(*args)


def test_a_model_that_changes_at_every_call_is_said_to(tiny_cfg, caplog):
    model, args = FAMILIES["mae_st"](tiny_cfg)
    mae_fast.accelerate(model)
    for model.calls in range(12):
        run(model, *args)
    assert "is examined anew at every call, for it changes: calls" in caplog.text
