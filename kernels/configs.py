"""The sizes of every kernel, by architecture and shape class.

A launcher asks `pick("<kernel>", "<shape class>")` and passes the answer on: `kernel[grid](...,
**picked)`. Of the candidates of a shape class the first is taken, a guess (for what ViT-B and L ask
for at 64 clips: the fastest on an H200 under Triton 3.6), until `make gpu` has timed them on an
architecture and written the fastest to measured.json, by version of Triton. Nothing is tuned while
training.
"""

import functools
import json
from pathlib import Path

import triton

# kernel -> shape class -> candidates: constexprs in CAPITALS, num_warps, num_stages.
CANDIDATES: dict[str, dict[str, list[dict[str, int]]]] = {
    # Rows' shape classes: their width as a power of two. PROGRAMS: how many share the rows.
    "layer_norm_fwd": {
        "512": [
            {"ROWS": 4, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 4224, "num_warps": 2},
            {"ROWS": 1, "PROGRAMS": 8448, "num_warps": 1},
            {"ROWS": 8, "PROGRAMS": 1056, "num_warps": 8},
        ],
        "1024": [
            {"ROWS": 2, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 1, "PROGRAMS": 4224, "num_warps": 2},
            {"ROWS": 4, "PROGRAMS": 1056, "num_warps": 8},
        ],
        "2048": [
            {"ROWS": 1, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 1056, "num_warps": 8},
        ],
    },
    "layer_norm_bwd": {
        "512": [
            {"ROWS": 4, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 4, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 8, "PROGRAMS": 264, "num_warps": 8},
        ],
        "1024": [
            {"ROWS": 2, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 4, "PROGRAMS": 264, "num_warps": 8},
        ],
        "2048": [
            {"ROWS": 2, "PROGRAMS": 264, "num_warps": 8},
            {"ROWS": 1, "PROGRAMS": 528, "num_warps": 4},
        ],
    },
    "add_layer_norm_fwd": {
        "512": [
            {"ROWS": 4, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 4224, "num_warps": 2},
            {"ROWS": 8, "PROGRAMS": 1056, "num_warps": 8},
        ],
        "1024": [
            {"ROWS": 1, "PROGRAMS": 4224, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 2112, "num_warps": 8},
            {"ROWS": 4, "PROGRAMS": 1056, "num_warps": 8},
        ],
        "2048": [
            {"ROWS": 1, "PROGRAMS": 2112, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 1056, "num_warps": 8},
        ],
    },
    "add_layer_norm_bwd": {
        "512": [
            {"ROWS": 4, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 4, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 8, "PROGRAMS": 264, "num_warps": 8},
        ],
        "1024": [
            {"ROWS": 2, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 2, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 4, "PROGRAMS": 264, "num_warps": 8},
        ],
        "2048": [
            {"ROWS": 2, "PROGRAMS": 264, "num_warps": 8},
            {"ROWS": 1, "PROGRAMS": 528, "num_warps": 4},
        ],
    },
    "sum_parts": {
        "any": [
            {"ROWS": 128, "COLUMNS": 16, "num_warps": 4},
            {"ROWS": 64, "COLUMNS": 32, "num_warps": 4},
            {"ROWS": 32, "COLUMNS": 64, "num_warps": 4},
        ]
    },
    "linear_sums": {
        "any": [
            {"ROWS": 16, "COLUMNS": 256, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 16, "COLUMNS": 256, "PROGRAMS": 264, "num_warps": 4},
            {"ROWS": 16, "COLUMNS": 256, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 32, "COLUMNS": 256, "PROGRAMS": 528, "num_warps": 8},
        ]
    },
    "bias_gelu_fwd": {
        "any": [
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 2, "COLUMNS": 1024, "PROGRAMS": 1056, "num_warps": 4},
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 4224, "num_warps": 4},
        ]
    },
    "bias_gelu_bwd": {
        "any": [
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 528, "num_warps": 4},
            {"ROWS": 4, "COLUMNS": 256, "PROGRAMS": 132, "num_warps": 4},
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 132, "num_warps": 4},
            {"ROWS": 4, "COLUMNS": 512, "PROGRAMS": 264, "num_warps": 4},
        ]
    },
    "decoder_tokens_fwd": {
        "any": [
            {"ROWS": 4, "num_warps": 4},  # of 512 values in ViT-B and L
            {"ROWS": 8, "num_warps": 4},
            {"ROWS": 8, "num_warps": 8},
        ]
    },
    "decoder_tokens_bwd": {
        "any": [
            {"ROWS": 16, "COLUMNS": 128, "PROGRAMS": 264, "num_warps": 4},  # rows of some clips
            {"ROWS": 32, "COLUMNS": 128, "PROGRAMS": 264, "num_warps": 4},
        ]
    },
    "crop_resize_patchify_gather_fwd": {
        # With 32 lines to 2 warps Triton 3.6 takes 127 registers where 3.8 takes 80, and at a limit
        # of 80 it spills; with 4 warps it spills on sm_100.
        "channel_first": [
            {"LINES": 16, "num_warps": 2},
            {"LINES": 32, "num_warps": 4},
            {"LINES": 32, "num_warps": 2},
        ],
        "channel_last": [{"LINES": 32, "num_warps": 8}, {"LINES": 16, "num_warps": 8}],
    },
    "masked_mse_fwd": {
        "any": [  # values at a time; one warp alone would exchange bytes by shuffles, 32 for each
            {"CHUNK": 256, "num_warps": 2},
            {"CHUNK": 1024, "num_warps": 4},
            {"CHUNK": 1024, "num_warps": 2},
            {"CHUNK": 512, "num_warps": 2},
        ]
    },
    "masked_mse_bwd": {
        "any": [{"BLOCK": 4096, "num_warps": 4}, {"BLOCK": 1024, "num_warps": 4}],
    },
    "adamw_norm": {
        "any": [
            {"BLOCK": 1024, "PROGRAMS": 2112, "num_warps": 4},
            {"BLOCK": 2048, "PROGRAMS": 1056, "num_warps": 4},
            {"BLOCK": 4096, "PROGRAMS": 528, "num_warps": 8},
        ]
    },
    "adamw_step": {
        "any": [
            {"BLOCK": 1024, "num_warps": 4},
            {"BLOCK": 512, "num_warps": 4},
            {"BLOCK": 2048, "num_warps": 8},
        ]
    },
    "patch_embed_add": {
        "any": [
            {"ROWS": 4, "num_warps": 4},
            {"ROWS": 2, "num_warps": 4},
            {"ROWS": 8, "num_warps": 8},
        ]
    },
    "patch_embed_dpos": {
        "any": [{"BLOCK": 256, "num_warps": 1}, {"BLOCK": 1024, "num_warps": 4}],
    },
    "patchify_gather_fwd": {
        "any": [
            {"LINES": 32, "num_warps": 1},  # of the 96 lines of a token of ViT-B
            {"LINES": 128, "num_warps": 4},
            {"LINES": 32, "num_warps": 2, "maxnreg": 80},
            {"LINES": 16, "num_warps": 1},
        ]
    },
    # Attention's shape classes: head dims up to that number, "short" up to 512 keys; fp32 has no
    # tensor cores. By warps an SM from registers and shared memory, then instructions a score.
    "attention_fwd": {
        "d32": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        ],
        "d64_short": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
        ],
        "d64_long": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        ],
        "d80": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        ],
        "d128": [
            {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
        ],
        "f32_d32": [
            {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
        ],
        "f32_d64": [
            {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
        ],
        "f32": [
            {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
        ],
    },
    "attention_bwd_dq": {
        "d32": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
        ],
        "d64_short": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        ],
        "d64_long": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
        ],
        "d80": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
        ],
        "d128": [
            {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
        ],
        "f32_d32": [
            {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
        ],
        "f32_d64": [
            {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
        ],
        "f32": [
            {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
        ],
    },
    "attention_bwd_dkv": {
        "d32": [
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
        ],
        "d64_short": [
            {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
        ],
        "d64_long": [
            {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
            {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
        ],
        "d80": [
            {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
        ],
        "d128": [
            {"BLOCK_Q": 16, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
            {"BLOCK_Q": 16, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
        ],
        "f32_d32": [
            {"BLOCK_Q": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
        ],
        "f32_d64": [
            {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
        ],
        "f32": [
            {"BLOCK_Q": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
        ],
    },
}

MEASURED = Path(__file__).with_name("measured.json")
TRITON = ".".join(triton.__version__.split(".")[:2])


def pick(kernel: str, shape: str = "any") -> dict[str, int]:
    """The sizes of a kernel for a shape class on the present device's architecture."""
    return _pick(kernel, shape, architecture())


@functools.cache
def _pick(kernel: str, shape: str, arch: int) -> dict[str, int]:
    found = measured().get(str(arch), {}).get(kernel, {}).get(shape)
    return found or CANDIDATES[kernel][shape][0]


@functools.cache
def measured() -> dict:
    """{architecture: {kernel: {shape class: sizes}}}, as `make gpu` wrote it under this Triton."""
    return read_measured().setdefault(TRITON, {})


def read_measured() -> dict:
    """{version of Triton: what was measured under it}: each has a compiler of its own."""
    return json.loads(MEASURED.read_text()) if MEASURED.exists() else {}


@functools.cache
def interpreted() -> bool:
    """Whether kernels run on a CPU, by Triton's interpreter."""
    return triton.knobs.runtime.interpret


def architecture() -> int:
    """80 for sm_80 and so on; the interpreter stands for sm_90."""
    if interpreted():
        return 90
    return triton.runtime.driver.active.get_current_target().arch
