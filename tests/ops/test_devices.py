"""Tensors of several devices are refused by every op, in one line: kernels would read, or leave
unwritten, what is not there."""

import contextlib
import importlib
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mae_fast.ops import OPS
from mae_fast.ops.source import Source

PATCHES = {"t_patch": 2, "patch": 4, "mean": 0.45, "std": 0.225}


def clip():
    return {"video": torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8), "ids": ids()}


def source():
    return Source(torch.zeros(99, dtype=torch.uint8), torch.zeros(2, 18, dtype=torch.int64), 8)


def ids():
    return torch.zeros(2, 3, dtype=torch.int64)


def ones(*shape):
    return torch.ones(shape)


def step():
    p = torch.nn.Parameter(ones(8))
    p.grad = ones(8)
    copies = {p: ones(8).bfloat16()}
    return {"optimizer": torch.optim.AdamW([p]), "copies": copies}


def norm():
    return {"x": ones(2, 8), "weight": ones(8), "bias": ones(8), "eps": 1e-6}


ARGUMENTS = {  # of every public function of an op
    "adamw": lambda: step() | {"scale": ones(), "skip": ones()},
    "clipped_adamw": lambda: step() | {"clip": 1.0},
    "add_layer_norm": lambda: norm() | {"y": ones(2, 8)},
    "attention": lambda: {name: ones(2, 3, 1, 16) for name in "qkv"},
    "bias_gelu": lambda: {"x": ones(2, 8), "bias": ones(8)},
    "crop_resize_patchify_gather": lambda: {
        "source": source(), "ids": ids(), "dtype": torch.float32, **PATCHES
    },
    "decoder_tokens": lambda: {
        "visible": ones(2, 3, 8),
        "cls": ones(2, 8),
        "mask_token": ones(8),
        "pos": ones(8, 8),
        "ids_keep": ids(),
        "ids_mask": ids(),
    },
    "layer_norm": norm,
    "linear": lambda: {"x": ones(2, 8), "weight": ones(4, 8), "bias": ones(4)},
    "masked_hog_mse": lambda: {
        "pred": ones(2, 3, 27), "video": torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8),
        "ids": torch.zeros(2, 3, dtype=torch.int32), "frames": (0, 2), "patch": 8, "std": 0.2
    },
    "masked_mse": lambda: {
        "pred": ones(2, 3, 96), "frames": (0, 1, 2, 3), "norm_pix": "patch", **clip(), **PATCHES
    },
    "patch_embed": lambda: {
        "weight": ones(8, 96), "bias": ones(8), "pos": ones(8, 8), **clip(), **PATCHES
    },
    "patchify_gather": lambda: {"dtype": torch.float32, **clip(), **PATCHES},
}  # fmt: skip


def moved(arguments, device):
    """(the name as an error says it, the arguments) with each tensor in turn on the device."""
    for name, value in arguments.items():
        if torch.is_tensor(value):
            yield name, arguments | {name: value.to(device)}
        elif isinstance(value, Source):
            yield "flat", arguments | {name: replace(value, flat=value.flat.to(device))}
            yield "table", arguments | {name: replace(value, table=value.table.to(device))}
        elif isinstance(value, dict):
            yield "copy", arguments | {name: {p: t.to(device) for p, t in value.items()}}


def test_no_op_is_without_a_case():
    assert ARGUMENTS.keys() == OPS.keys() | {"clipped_adamw"}


@pytest.mark.parametrize("device", ["meta", "cuda:1"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_tensors_on_two_devices_are_refused(name, device):
    if device == "cuda:1" and torch.cuda.device_count() == 1:
        pytest.skip("this machine has one GPU, and torch makes no tensor that would be on another")
    function = getattr(
        importlib.import_module("mae_fast.ops." + name.removeprefix("clipped_")), name
    )
    with FakeTensorMode() if device != "meta" else contextlib.nullcontext():
        cases = [*moved(ARGUMENTS[name](), device)]
        assert cases
        for argument, arguments in cases:
            with pytest.raises(
                ValueError, match="its tensors must be on one device, got "
            ) as error:
                function(**arguments)
            assert f"{argument} on {device}" in str(error.value) and "\n" not in str(error.value)
