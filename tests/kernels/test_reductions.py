"""Sums over lanes that lie apart, of what was put into another shape: Triton 3.6 adds up others
(its pull request 9219 mends it), which a GPU alone shows. Read from Triton's own code for a GPU."""

import re

import aot
import pytest
import torch
from cases import calls, launcher

from mae_fast.ops import dispatch

if dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled", allow_module_level=True)

LAYOUTS = {
    "channel_last": lambda v: v.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
    "mirrored": lambda v: v.transpose(3, 4).contiguous().transpose(3, 4),
    "frames_last": lambda v: v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
}
REDUCE = re.compile(
    r'"tt\.reduce"\(.*?<\{axis = (\d+) : i32\}>.*?\) : \(tensor<[\dx]+x\w+, (.*?)>\)'
)


def lanes(layout: str, aliases: dict[str, str]) -> list[list[int]]:
    """Where each of a warp's lane bits leads in a tensor of this layout; none for blocked ones,
    whose lanes of one axis are neighbours."""
    text = re.sub(r"#\w+$", lambda m: aliases[m[0]], layout)
    inner = re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", text)
    if inner:
        gone = int(inner[1])
        return [b[:gone] + b[gone + 1 :] for b in lanes(inner[2], aliases)]
    found = re.search(r"lane = \[(.*?)\], warp", text)
    bases = re.findall(r"\[([\d, ]*)\]", found[1]) if found else []
    return [[int(n) for n in base.split(",")] for base in bases]


def apart(code: str) -> list[str]:
    """The reductions of a kernel whose lanes are no neighbours."""
    aliases = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", code, re.M))
    wrong = []
    for axis, layout in REDUCE.findall(code.replace("\n", " ")):
        bits = [i for i, base in enumerate(lanes(layout, aliases)) if base[int(axis)]]
        if bits and bits[-1] - bits[0] >= len(bits):
            wrong.append(f"a sum over axis {axis} has lane bits {bits}")
    return wrong


@pytest.mark.parametrize("pixels", [torch.uint8, torch.bfloat16], ids=["uint8", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["masked_mse", "masked_hog_mse"])
def test_lanes_that_are_added_up_are_neighbours(op, layout, pixels):
    made, *_ = calls(op, "vit_b_cut_down", "f32", "meta").values()  # of masked_mse by channel
    args = list(made[0].args)
    args[1] = LAYOUTS[layout](args[1]).to(pixels)
    with aot.compiling(90) as compiled:
        launcher(made[0].operator)(*args)
    code = compiled[0][1].asm["ttgir"]
    assert REDUCE.search(code.replace("\n", " ")), "no sum is found in it"
    assert not apart(code)
