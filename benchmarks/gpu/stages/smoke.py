"""Seconds that decide: the official code's figures, and equal bits of two runs.

python -m benchmarks.gpu.stages.smoke    the figures alone: what checks.py watches
"""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import ROOT
from benchmarks.gpu.engines import products_in
from benchmarks.gpu.records import Item
from benchmarks.gpu.setting import Setting
from mae_fast.config import ModelConfig
from mae_fast.model import MaskedAutoencoder

GOLDEN = ("mae_st_tiny", "mae_st_tiny_all_frames_raw_pixels")
DTYPES = {"F32": torch.float32, "U8": torch.uint8}


def items(setting: Setting) -> Iterator[Item]:
    for name in setting.some(GOLDEN):
        yield Item(f"golden {name}", partial(golden, setting, name))
    yield Item("two runs give the same bits", partial(equal_bits, setting))


def golden(setting: Setting, name: str) -> dict:
    """Loss and gradients of the official code, from its weights, in fp32."""
    values, tensors = read(name)
    ratio = values.pop("mask_ratio")
    for key in ("pixel_mean", "pixel_std", "norm_eps"):  # those of every model
        values.pop(key)
    model = MaskedAutoencoder(ModelConfig(**values))
    model.load_state_dict({k[6:]: t for k, t in tensors.items() if k.startswith("state.")})
    model.to(setting.device)
    video, noise = (tensors[k].to(setting.device) for k in ("video_u8", "noise"))
    with products_in(tf32=False):
        loss, _, mask = model(video, ratio, noise=noise)
        loss.backward()
    assert torch.equal(mask.cpu(), tensors["mask"]), "another mask"
    errors = {"loss": abs(float(loss.detach()) / float(tensors["loss"]) - 1)}
    for key, p in model.named_parameters():
        theirs = tensors[f"grad.{key}"]
        # A key's bias changes no softmax: its gradient is 0, and both hold roundings.
        scale = 1e-3 if key.endswith("attn.k.bias") else float(theirs.norm())
        errors[key] = float((p.grad.cpu() - theirs).norm()) / scale
    worst = max(errors, key=errors.get)
    assert errors["loss"] < 1e-5, f"the loss differs by {errors['loss']:.1e}"
    assert errors[worst] < 1e-4, f"the gradient of {worst} differs by {errors[worst]:.1e}"
    return {"errors": errors, "told": f"worst is {worst}, {errors[worst]:.1e}"}


def read(name: str) -> tuple[dict, dict[str, Tensor]]:
    """(the settings, tensors) of a golden file. There may be no safetensors here."""
    content = (ROOT / f"tests/golden/{name}.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    values = json.loads(header.pop("__metadata__")["config"])
    data = torch.frombuffer(bytearray(content[begin:]), dtype=torch.uint8)
    return values, {
        key: data[slice(*of["data_offsets"])].view(DTYPES[of["dtype"]]).reshape(of["shape"])
        for key, of in header.items()
    }


def equal_bits(setting: Setting) -> dict:
    """Loss and every gradient of two bf16 steps from the same weights."""
    cfg = setting.cfg("vit_tiny")
    with torch.device(setting.device):
        model = MaskedAutoencoder(cfg)
    batch = setting.batch(8)
    clips, noise = setting.inputs(cfg, batch)
    found = []
    for _ in range(2):
        with setting.autocast():
            loss = model(clips, 0.9, noise=noise)[0]
        loss.backward()
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
        model.zero_grad()
    differ = [name for name, t in found[0].items() if not torch.equal(t, found[1][name])]
    assert not differ, f"two runs differ in {', '.join(differ)}"
    return {"tensors": len(found[0]), "told": f"{len(found[0])} tensors are equal"}


if __name__ == "__main__":
    made = Setting.make("--rehearse" in sys.argv, math.inf)
    for name in made.some(GOLDEN):
        print(f"golden {name}: {golden(made, name)['told']}")
