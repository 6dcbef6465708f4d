"""Attention by libraries: reasons, adapters and the measured order, on machines without them.

A stand-in package computes the reference in the library's layout, behind the library's signature.
Where the library's own files are at hand (installed, or in a folder that MAE_FAST_LIBRARIES names,
separated by colons: unpacked wheels or source archives), what we pass is checked against them.
Nothing here shows that a library's kernels work: they need a GPU.
"""

import ast
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_checks import DEVICE, DTYPES, check_op
from torch._subclasses.fake_tensor import FakeTensorMode

import mae_fast
from mae_fast.errors import BackendError
from mae_fast.ops import attention as home
from mae_fast.ops import attention_libraries as libraries
from mae_fast.ops import dispatch
from mae_fast.ops.attention import OP, attention, attention_ref, measured_key
from mae_fast.ops.attention_libraries import LIBRARIES

# Each library's function as its source has it, first parameters in order, and what it returns.
SIGNATURES = {
    "flash_attn": (
        "flash_attn/flash_attn_interface.py",
        "flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False,"
        " window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,"
        " return_attn_probs=False)",
        "out",
    ),
    "flash_attn_3": (
        "flash_attn_interface.py",
        "flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None,"
        " k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,"
        " num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0)",
        "out",
    ),
    "flash_attn_4": (
        "flash_attn/cute/interface.py",
        "flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None,"
        " causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,"
        " pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,"
        " aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,"
        " block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False,"
        " gather_bwd_token_chunk=None)",
        "out, None",
    ),
    "xformers": (
        "xformers/ops/__init__.py",
        "memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None, *, op=None,"
        " output_dtype=None)",
        "out",
    ),
}
# Where a source archive or wheel keeps the file that defines the function.
SOURCES = {
    "flash_attn": ["flash_attn/flash_attn_interface.py"],
    "flash_attn_3": ["flash_attn_interface.py", "hopper/flash_attn_interface.py"],
    "flash_attn_4": ["flash_attn/cute/interface.py"],
    "xformers": ["xformers/ops/fmha/__init__.py"],
}
STAND_IN = """
import torch
calls = []
def {signature}:
    for t in (q, k, v):
        assert t.dim() == 4 and t.stride(-1) == 1 and t.dtype == q.dtype, t.shape
    assert k.shape == v.shape and q.shape[::2] == k.shape[::2] and q.shape[3] == k.shape[3]
    calls.append((q.stride(), k.stride(), v.stride(), locals().get("deterministic")))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype)
    return {returns}
"""


def _forget():
    for name in list(sys.modules):
        if name.split(".")[0] in ("flash_attn", "flash_attn_interface", "xformers"):
            del sys.modules[name]
    importlib.invalidate_caches()


def _write(root, name, body):
    """The package of a library under `root`, its module holding `body`."""
    path = root / SIGNATURES[name][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "xformers":
        (root / "xformers/__init__.py").touch()
    path.write_text(body)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(name) -> the stand-in's module; the backend then takes what it is given."""

    def install(name, returns=None):
        _, signature, out = SIGNATURES[name]
        _write(tmp_path, name, STAND_IN.format(signature=signature, returns=returns or out))
        monkeypatch.setitem(OP.backends, name, dispatch.anything)
        return importlib.import_module(LIBRARIES[name].module)

    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    yield install
    _forget()


def _qkv(dtype=torch.float32, shape=(2, 13, 29, 3, 24)):
    batch, queries, keys, heads, width = shape
    sizes = [(batch, n, heads, width) for n in (queries, keys, keys)]
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_adapter_gives_what_the_reference_gives(name, dtype, stand_in):
    module, args = stand_in(name), _qkv(DTYPES[dtype])
    with mae_fast.backends(attention=name):
        check_op(attention, attention_ref, args, [torch.randn(args[0].shape)])
    assert len(module.calls) == 1


@pytest.mark.parametrize("name", LIBRARIES)
def test_adapter_copies_nothing(name, stand_in):
    """Views of one projection [B, S, 3, H, d] arrive as they are."""
    module, qkv = stand_in(name), torch.randn(2, 41, 3, 2, 16)
    with mae_fast.backends(attention=name):
        attention(*qkv.unbind(2))
    strides = qkv[:, :, 0].stride()
    assert module.calls[0][:3] == (strides,) * 3


@pytest.mark.parametrize("name", [n for n in LIBRARIES if n.startswith("flash")])
def test_adapter_asks_for_equal_bits_where_torch_does(name, stand_in):
    module, args = stand_in(name), _qkv()
    with mae_fast.backends(attention=name):
        attention(*args)  # the tests of ops run under use_deterministic_algorithms
        torch.use_deterministic_algorithms(False)
        attention(*args)
    assert [call[3] for call in module.calls] == [True, False]


def test_early_flash_attn_3_gives_the_log_sum_exp_besides(stand_in):
    stand_in("flash_attn_3", "out, None")
    args = _qkv()
    with mae_fast.backends(attention="flash_attn_3"):
        check_op(attention, attention_ref, args, [torch.randn(args[0].shape)])


def _sources(name):
    """The files at hand that define the library's function."""
    roots = [Path(p) for p in os.environ.get("MAE_FAST_LIBRARIES", "").split(":") if p]
    roots += [Path(p) for p in sys.path if p]
    if name == "flash_attn_4":  # flash-attn 2.8 ships an early copy, which `loads` declines
        roots = [r for r in roots if not (r / SIGNATURES["flash_attn"][0]).is_file()]
    return [r / file for r in roots for file in SOURCES[name] if (r / file).is_file()]


def _parameters(text, function):
    """(parameters by position, all parameters) of a function in a source text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            return positional, [*positional, *(a.arg for a in node.args.kwonlyargs)]
    raise AssertionError(f"there is no {function}")


@pytest.mark.parametrize("name", LIBRARIES)
def test_stand_in_has_the_signature_of_the_library(name):
    signature = SIGNATURES[name][1]
    function = signature.split("(")[0]
    ours, ours_all = _parameters(f"def {signature}: pass", function)
    files = _sources(name)
    if not files:
        pytest.skip(f"no source of {name} is at hand: set MAE_FAST_LIBRARIES")
    for file in files:
        theirs, theirs_all = _parameters(file.read_text(), function)
        assert [p[0] for p in theirs[:3]] == ["q", "k", "v"], file
        assert set(ours_all) - set("qkv") <= set(theirs_all), file
        assert theirs[3:] == ours[3:] or name == "flash_attn_3", file  # newer ones have more


@pytest.mark.parametrize("name", LIBRARIES)
def test_absent_library_says_how_to_get_it(name, tmp_path, monkeypatch):
    if _installed(name):
        pytest.skip(f"{name} is installed")
    assert LIBRARIES[name].here() == f"not installed ({LIBRARIES[name].install})"
    with mae_fast.backends(attention=name), pytest.raises(BackendError, match="not installed"):
        attention(*_qkv())


def _installed(name):
    return LIBRARIES[name].here() is None or "installed" not in LIBRARIES[name].here()


@pytest.mark.skipif(DEVICE != "cpu", reason="this machine has a GPU")
def test_two_libraries_in_one_folder_are_told_apart(tmp_path, monkeypatch):
    """flash-attn and flash-attn-4 both install into flash_attn/."""
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    _write(tmp_path, "flash_attn_4", "")
    assert LIBRARIES["flash_attn"].here().startswith("not installed")
    assert LIBRARIES["flash_attn_4"].here() == "there is no CUDA device"
    _write(tmp_path, "flash_attn", "")
    _write(tmp_path, "flash_attn_3", "")
    _forget()
    assert LIBRARIES["flash_attn"].here() == "there is no CUDA device"
    assert LIBRARIES["flash_attn_3"].here() == "there is no CUDA device"
    assert not {"flash_attn", "flash_attn_interface"} & set(sys.modules)  # nothing was imported
    _forget()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "import: undefined symbol: _ZN3c10"),
        ("def flash_attn_func(q, k, v, softmax_scale=None): pass", "has no deterministic"),
        ("def flash_attn_func(q, k, v, deterministic=False): pass", None),
    ],
    ids=["broken", "early_copy", "works"],
)
def test_a_library_that_cannot_be_called_is_a_reason(body, reason, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    _write(tmp_path, "flash_attn_4", body)
    said = LIBRARIES["flash_attn_4"].loads()
    assert said is None if reason is None else said.endswith(reason)
    _forget()


# What xformers 0.0.35 keeps of the error with which its extension did not load.
XFORMERS_ERROR = """xFormers can't load C++/CUDA extensions. xFormers was built for:
    PyTorch 2.10.0+cu128 with CUDA 1208 (you have 2.11.0+cu130)
    Python  3.10.19 (you have 3.12.3)
  Please reinstall xformers"""


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            f"_cpp_library_load_exception = Exception({XFORMERS_ERROR!r})",
            "xFormers can't load C++/CUDA extensions. xFormers was built for: PyTorch 2.10.0+cu128"
            " with CUDA 1208 (you have 2.11.0+cu130) Python 3.10.19 (you have 3.12.3)",
        ),
        (
            "_cpp_library_load_exception, _built_with_cuda = None, False",
            "xformers is built without CUDA",
        ),
        ("_cpp_library_load_exception, _built_with_cuda = None, True", None),
    ],
    ids=["another_torch", "no_cuda", "works"],
)
def test_xformers_whose_kernels_do_not_load_is_declined(state, reason, tmp_path, monkeypatch):
    """It imports, and took every call: the op then failed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    _write(
        tmp_path,
        "xformers",
        "from xformers import _cpp_lib\ndef memory_efficient_attention(q, k, v): pass",
    )
    (tmp_path / "xformers/_cpp_lib.py").write_text(state)
    assert LIBRARIES["xformers"].loads() == reason
    _forget()


@pytest.mark.parametrize(
    ("capability", "takers"),
    [
        ((7, 5), []),
        ((8, 0), ["flash_attn_3", "flash_attn", "xformers"]),
        ((9, 0), ["flash_attn_4", "flash_attn_3", "flash_attn", "xformers"]),
        ((10, 0), ["flash_attn_4", "flash_attn", "xformers"]),
    ],
    ids=["sm_75", "sm_80", "sm_90", "sm_100"],
)
def test_each_library_has_its_architectures(capability, takers, monkeypatch):
    monkeypatch.setattr(libraries.Library, "_found", lambda self: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reasons = {name: library.here() for name, library in LIBRARIES.items()}
    assert [name for name, reason in reasons.items() if reason is None] == takers
    if capability == (10, 0):
        expected = "the device is sm_100, and its kernels are for sm_80 to sm_90"
        assert reasons["flash_attn_3"] == expected


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "size", "strides", "reason"),
    [
        (HALF, (2, 5, 3, 16), (720, 144, 16, 1), None),  # a view of one projection
        (torch.float32, (2, 5, 3, 16), (240, 48, 16, 1), "all must be float16 or all bfloat16"),
        (HALF, (2, 5, 3, 12), (320, 64, 16, 1), "head dim 12 is not a multiple of 8"),
        (HALF, (2, 5, 3, 512), (7680, 1536, 512, 1), "head dim 512 is not a multiple of 8 up to"),
        (HALF, (2, 0, 3, 16), (0, 48, 16, 1), "is empty"),
        (HALF, (2, 5, 3, 16), (240, 48, 1, 3), "multiples of 16 bytes"),
        (HALF, (2, 5, 3, 16), (300, 60, 20, 1), "multiples of 16 bytes"),
    ],
    ids=["fits", "fp32", "head_12", "head_512", "empty", "apart", "unaligned"],
)
@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_does_not_take(name, dtype, size, strides, reason):
    with FakeTensorMode():
        q, cpu = (
            torch.empty_strided(size, strides, dtype=dtype, device=d) for d in ("cuda", "cpu")
        )
    said = LIBRARIES[name].takes(q, q, q)
    assert said is None if reason is None else reason in said
    if reason is None:
        assert LIBRARIES[name].takes(q, q, cpu) == "v is on cpu, not on cuda"


@pytest.mark.skipif(DEVICE != "cpu", reason="cuDNN and the efficient kernel run on this machine")
@pytest.mark.parametrize("name", ["sdpa", *libraries.TORCH_KERNELS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_kernel_by_name(name, dtype):
    args = _qkv(DTYPES[dtype])
    dout = [torch.randn(args[0].shape)]
    with mae_fast.backends(attention=name):
        if name in ("sdpa_cudnn", "sdpa_efficient"):
            with pytest.raises(BackendError, match="there is no CUDA device"):
                attention(*args)
        else:
            check_op(attention, attention_ref, args, dout)


# batch, queries, keys, heads, width of a head: the encoder's, the decoder's and its last block's
MODEL_SHAPES = {
    "vit_b": (3, 157, 157, 12, 64),
    "vit_h": (2, 157, 157, 16, 80),
    "decoder": (2, 1569, 1569, 16, 32),
    "last_block": (2, 1412, 1569, 16, 32),
}


@pytest.mark.skipif(DEVICE == "cpu", reason="libraries' kernels need a GPU")
@pytest.mark.parametrize("name", libraries.BACKENDS)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_library_matches_fp64(name, shape, dtype):
    torch.use_deterministic_algorithms(False)  # not all of them have a backward for it
    args = _qkv(DTYPES[dtype], MODEL_SHAPES[shape])
    reason = OP.backends[name](*args)
    if reason:
        pytest.skip(reason)
    with mae_fast.backends(attention=name):
        check_op(attention, attention_ref, args, [torch.randn(args[0].shape)])


def test_torch_flash_kernel_declines_what_it_does_not_take():
    q, k, v = (t.detach() for t in _qkv())
    kernel = libraries.TORCH_KERNELS["sdpa_flash"]
    if DEVICE == "cpu":
        assert kernel.takes(q[:, :0], k, v) == "a tensor is empty"
        strided = q.transpose(1, 3).contiguous().transpose(1, 3)
        assert kernel.takes(strided, k, v) == "the values of a head do not lie together"
    else:
        assert "dtype" in kernel.takes(q, k, v).lower()  # fp32, in torch's own words


@pytest.mark.skipif(DEVICE != "cpu", reason="of a GPU's: test_torch_flash_kernel_declines ...")
def test_torch_says_why_it_declines():
    q, k, v = (t.detach() for t in _qkv())
    said = libraries.TORCH_KERNELS["sdpa_flash"].torch_says(q, k[..., :8], v)
    assert said.startswith("Flash attention requires q,k,v to have the same last dimension.")
    assert said.endswith("Value.size(-1): 24 instead.")


@pytest.fixture
def table(monkeypatch, tmp_path):
    """table(rows) is what `make gpu` has measured on the present device, an sm_90."""

    def install(rows):
        (tmp_path / "measured_backends.json").write_text(json.dumps({"90": rows}))
        monkeypatch.setattr(home.resources, "files", lambda package: tmp_path)
        found = home.orders(home.read_measured()["90"])
        monkeypatch.setattr(home, "measured", lambda: found)
        monkeypatch.setattr(home, "architecture", lambda: "90")
        monkeypatch.setattr(home, "_guessed", set())

    return install


def _order(gradients=True, keys=1569):
    with FakeTensorMode():
        q = torch.empty(2, 5, 3, 32, dtype=torch.bfloat16, device="cuda")
        k = q.new_empty(2, keys, 3, 32, requires_grad=gradients)
        return list(OP.order(q, k, k))


def test_the_measured_order_is_the_table(table):
    table({"d32-s2048-bfloat16-both": {"sdpa_cudnn": 0.9, "triton": 0.5, "gone": 0.1}})
    order = _order()
    assert order[:3] == ["triton", "sdpa_cudnn", "amx"]
    assert sorted(order) == sorted(OP.backends)
    assert _order(gradients=False) == _order(keys=2049) == list(OP.backends)


def test_an_order_that_is_a_guess_says_so_once(table, caplog):
    table({})
    with caplog.at_level(logging.INFO, "mae_fast"):
        for _ in range(2):
            assert _order() == list(OP.backends)
    (record,) = caplog.records
    assert record.getMessage() == (
        "attention: the order of backends is a guess, sm_90, d32-s2048-bfloat16-both was not "
        "measured"
    )


def test_rows_and_the_place_of_the_table(table, tmp_path):
    assert measured_key(64, 157, torch.float16, False) == "d64-s256-float16-forward"
    assert measured_key(32, 2048, torch.bfloat16, True) == "d32-s2048-bfloat16-both"
    assert measured_key(32, 1, torch.bfloat16, True) == "d32-s1-bfloat16-both"
    table({"row": {"triton": 0.3, "sdpa": 0.1}})
    assert home.read_measured() == {"90": {"row": {"triton": 0.3, "sdpa": 0.1}}}
    assert home.measured() == {"row": ("sdpa", "triton")}
    (tmp_path / "measured_backends.json").unlink()
    assert home.read_measured() == {}


def test_torch_compile_follows_the_table(monkeypatch):
    row = measured_key(32, 40, torch.float32, False)
    monkeypatch.setattr(home, "measured", dispatch.constant(lambda: {row: ("sdpa", "triton")}))

    def first(q):
        return q * len(OP.by_table(measured_key(q.shape[-1], q.shape[1], q.dtype, False))[0])

    q = torch.ones(1, 40, 2, 32)
    compiled = torch.compile(first, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q), q * len("sdpa"))


@pytest.mark.skipif(DEVICE != "cpu", reason="the Python it starts has CPU tensors only")
def test_nothing_is_imported_by_an_import():
    code = (
        "import sys, torch, mae_fast.ops; from mae_fast.ops.attention import attention;"
        "q = torch.randn(1, 3, 2, 8); attention(q, q, q);"
        "assert not {'flash_attn', 'flash_attn_interface', 'xformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
