"""Defects planted in the kernels, one at a time, and the tier of proof that catches each.

python tests/kernels/mutations.py [words of a name]    all of them, or some; exit 1 if one lives
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PARTS = ("mae_fast", "kernels", "csrc", "tests", "benchmarks", "pyproject.toml", "README.md")
FAILED = 1  # pytest's exit code where a test failed, and nothing else went wrong
TIERS = {  # its environment, its tests
    "interpret": ({"TRITON_INTERPRET": "1"}, "tests/ops"),
    "sanitizer": ({"TRITON_INTERPRET": "1"}, "tests/kernels/test_operators.py"),
    "bytes": ({"TRITON_INTERPRET": "1"}, "tests/kernels/test_traffic.py"),
    "aot": ({}, "tests/kernels/test_aot.py"),
    "emulate": ({}, "tests/emulate/test_emulate.py"),
}


class Mutation(NamedTuple):
    """`old` of a file becomes `new`; `only` (pytest -k) names the tests of the tier that see it."""

    what: str
    file: str
    old: str
    new: str
    tier: str
    only: str


MUTATIONS = [
    # What a test of values sees.
    Mutation(
        "layer_norm: the variance is unbiased",
        "kernels/layer_norm.py",
        "distance * distance, 1) / D + eps)",
        "distance * distance, 1) / (D - 1) + eps)",
        "interpret",
        "test_layer_norm_matches_fp64",
    ),
    Mutation(
        "layer_norm backward: only the last tile's bias gradient is kept",
        "kernels/layer_norm.py",
        "        dbias += d\n",
        "        dbias = d\n",
        "interpret",
        "test_layer_norm_matches_fp64",
    ),
    Mutation(
        "masked_mse: the variance is biased",
        "kernels/masked_mse.py",
        "total / (VALUES - 1)",
        "total / VALUES",
        "interpret",
        "test_masked_mse_matches_fp64",
    ),
    Mutation(
        "masked_mse: eps outside the root",
        "kernels/masked_mse.py",
        "tl.rsqrt(variance + 1e-6 * unit * unit)",
        "1 / (tl.sqrt(variance) + 1e-6 * unit)",
        "interpret",
        "test_masked_mse_of_an_almost_flat_patch",
    ),
    Mutation(
        "masked_mse by channel: the mean is the patch's",
        "kernels/masked_mse.py",
        "_deviation(pixels, mean_of, of_channel)",
        "_deviation(pixels, tl.sum(mean_of) // CHANNELS, of_channel)",
        "interpret",
        "test_masked_mse_matches_fp64",
    ),
    Mutation(
        "masked_mse by channel: eps under the root",
        "kernels/masked_mse.py",
        "1 / (tl.sqrt(variance) + 1e-6 * unit)",
        "tl.rsqrt(variance + 1e-6 * unit * unit)",
        "interpret",
        "test_masked_mse_of_an_almost_flat_patch",
    ),
    Mutation(
        "masked_mse: the gradient is not divided by the number of values",
        "kernels/masked_mse.py",
        "gradient = (difference * factor)",
        "gradient = difference",
        "interpret",
        "test_masked_mse_matches_fp64",
    ),
    Mutation(
        "masked_hog_mse: the arguments of the angle are the textbook's",
        "kernels/masked_hog_mse.py",
        "gx * _COS[edge] >= gy * _SIN[edge]",
        "gy * _COS[edge] >= gx * _SIN[edge]",
        "interpret",
        "test_masked_hog_mse_matches_fp64",
    ),
    Mutation(
        "masked_hog_mse: the border is repeated, not reflected",
        "kernels/masked_hog_mse.py",
        "tl.where(i < 0, -i, i)",
        "tl.where(i < 0, 0, i)",
        "interpret",
        "test_masked_hog_mse_matches_fp64",
    ),
    Mutation(
        "masked_hog_mse: bins are signed",
        "kernels/masked_hog_mse.py",
        "(gx < 0) | ((gx == 0) & (gy < 0))",
        "(gx < 0) & (gy < 0)",
        "interpret",
        "test_masked_hog_mse_matches_fp64",
    ),
    Mutation(
        "masked_hog_mse: cells are not normalised",
        "kernels/masked_hog_mse.py",
        "tl.div_rn(sums, tl.maximum(norm, least))",
        "sums",
        "interpret",
        "test_masked_hog_mse_matches_fp64",
    ),
    Mutation(
        "masked_hog_mse: empty bins are stored too",
        "kernels/masked_hog_mse.py",
        "(k < 9) & (i < cells)",
        "(i < cells)",
        "sanitizer",
        "masked_hog_mse",
    ),
    Mutation(
        "bias_gelu: the derivative lacks a factor h",
        "kernels/bias_gelu.py",
        "cdf + h * (0.39",
        "cdf + (0.39",
        "interpret",
        "test_bias_gelu_matches_fp64",
    ),
    Mutation(
        "sums over programs: the first partial sums are left out",
        "kernels/_rows.py",
        "for start in range(0, count, ROWS):",
        "for start in range(1, count, ROWS):",
        "interpret",
        "test_bias_gelu_matches_fp64",
    ),
    Mutation(
        "decoder_tokens: strides of clips and tokens swapped",
        "kernels/decoder_tokens.py",
        "clip * visible_clip + token * visible_token",
        "clip * visible_token + token * visible_clip",
        "interpret",
        "test_decoder_tokens_matches_fp64",
    ),
    Mutation(
        "decoder_tokens backward: the first mask token's gradient is left out",
        "kernels/decoder_tokens.py",
        "tl.where((token >= kept)[:, None], d, 0.0)",
        "tl.where((token > kept)[:, None], d, 0.0)",
        "interpret",
        "test_decoder_tokens_matches_fp64",
    ),
    Mutation(
        "patchify_gather: strides of rows and columns swapped",
        "kernels/patchify_gather.py",
        "r.to(tl.int64) * PATCH * sh + c.to(tl.int64) * PATCH * sw",
        "r.to(tl.int64) * PATCH * sw + c.to(tl.int64) * PATCH * sh",
        "interpret",
        "test_patchify_gather_is_exact",
    ),
    Mutation(
        "attention: the last block of keys has no mask",
        "kernels/attention.py",
        's = tl.where((tl.arange(0, BLOCK) < Sk - first)[None, :], s, float("-inf"))',
        "s += 0.0",
        "interpret",
        "test_attention_matches_fp64",
    ),
    Mutation(
        "attention: the log-sum-exp is to base 2",
        "kernels/attention.py",
        "(m + tl.log2(total)) / LOG2E",
        "m + tl.log2(total)",
        "interpret",
        "test_attention_matches_fp64",
    ),
    Mutation(
        "attention backward: delta is left out of dq",
        "kernels/attention.py",
        "ds = p * (_dot_t(do, do2, v, v2, REST) - delta[:, None])",
        "ds = p * _dot_t(do, do2, v, v2, REST)",
        "interpret",
        "test_attention_matches_fp64",
    ),
    Mutation(
        "attention: the polynomial's nearest integer is one too small",
        "kernels/attention.py",
        "shifted.to(tl.int32, bitcast=True) << 23",
        "(shifted.to(tl.int32, bitcast=True) - 1) << 23",
        "interpret",
        "exponentials_by_polynomial",
    ),
    Mutation(
        "attention: the polynomial takes what is not a number for the least",
        "kernels/attention.py",
        ", propagate_nan=tl.PropagateNan.ALL)",
        ")",
        "interpret",
        "exponentials_by_polynomial",
    ),
    Mutation(
        "attention: a thread takes both ways for each exponential",
        "kernels/attention.py",
        "// 8 % 8 < BY_FMA",
        "% 8 < BY_FMA",
        "aot",
        "no_worse and attention-sm_90",
    ),
    Mutation(
        "add_layer_norm backward: the sum goes on from one token too early",
        "kernels/layer_norm.py",
        "token = row % tokens - first\n",
        "token = row % tokens - first + 1\n",
        "interpret",
        "of_which_some_tokens_go_on",
    ),
    Mutation(
        "add_layer_norm backward: only the last tile's gradient is summed",
        "kernels/layer_norm.py",
        "            total += gradient\n",
        "            total = gradient\n",
        "interpret",
        "the_sums_of_a_gradient",
    ),
    # What leaves the values right.
    Mutation(
        "layer_norm backward: rows past the end are read",
        "kernels/layer_norm.py",
        "tl.load(dout + at, mask=mask, other=0.0)",
        "tl.load(dout + at, mask=inside[None, :], other=0.0)",
        "sanitizer",
        "clean and layer_norm-odd-f32",
    ),
    Mutation(
        "add_layer_norm backward: of a sum that goes on later, what lies before it is read",
        "kernels/layer_norm.py",
        "there_too = mask & (token >= 0)[:, None]",
        "there_too = mask",
        "sanitizer",
        "clean and add_layer_norm-odd-f32",
    ),
    Mutation(
        "sums over programs: partial sums past the end are read",
        "kernels/_rows.py",
        "mask=(row < count) & (column < D)[None, :]",
        "mask=(row <= count) & (column < D)[None, :]",
        "sanitizer",
        "clean and bias_gelu-odd-f32",
    ),
    Mutation(
        "bias_gelu backward: every program writes the same partial sums",
        "kernels/bias_gelu.py",
        "to = parts + tl.program_id(0).to(tl.int64) * F + column",
        "to = parts + column",
        "sanitizer",
        "clean and bias_gelu-odd-f32",
    ),
    Mutation(
        "patchify_gather: masked pixels are undefined",
        "kernels/patchify_gather.py",
        "tl.load(at, mask=mask, other=0)",
        "tl.load(at, mask=mask)",
        "sanitizer",
        "clean and patchify_gather-odd-f32 and not crop",
    ),
    Mutation(
        "attention: rows past the end are stored",
        "kernels/attention.py",
        "x.to(ptr.dtype.element_ty), mask=keep)",
        "x.to(ptr.dtype.element_ty))",
        "sanitizer",
        "clean and attention-vit_b_cut_down-bf16",
    ),
    Mutation(
        "decoder_tokens backward: a partial sum for every position",
        "kernels/decoder_tokens.py",
        "LEAST_POSITIONS = 16",
        "LEAST_POSITIONS = 1",
        "bytes",
        "decoder_tokens-bf16",
    ),
    Mutation(
        "norms' backward: a partial sum for every four rows",
        "kernels/_rows.py",
        "LEAST_ROWS = 24",
        "LEAST_ROWS = 4",
        "bytes",
        "layer_norm-bf16 and not add",
    ),
    Mutation(
        "patchify_gather: the compiler is not told that pixels follow each other",
        "kernels/patchify_gather.py",
        "@triton.jit\ndef _patchify_gather_fwd_kernel(",
        '@triton.jit(do_not_specialize=["sw"])\ndef _patchify_gather_fwd_kernel(',
        "aot",
        "no_worse and patchify_gather-sm_90 and not crop",
    ),
    Mutation(
        "attention: the loop over queries may be empty, so that wgmma wait for one another",
        "kernels/attention.py",
        "tl.assume(whole > 0)  # else the wgmma of a loop that may be empty are serialised\n"
        "        for query",
        "for query",
        "aot",
        "no_worse and attention-sm_90",
    ),
    Mutation(
        "patch_embed: positions are those of the rows, not of the tokens",
        "kernels/patch_embed.py",
        "at = token.to(tl.int64)[:, None] * WIDTH + n",
        "at = row[:, None] * WIDTH + n",
        "interpret",
        "test_patch_embed_matches_fp64",
    ),
    # CUDA C++.
    Mutation(
        "CUDA masked_mse: the variance is biased",
        "csrc/cuda/masked_mse.cuh",
        "float(size) * float(size - 1)",
        "float(size) * float(size)",
        "emulate",
        "masked_mse_matches_fp64 and plain",
    ),
    Mutation(
        "CUDA masked_mse: no barrier before the warps' sums are added",
        "csrc/cuda/masked_mse.cuh",
        "of_warp[warp] = error;\n  __syncthreads();",
        "of_warp[warp] = error;",
        "emulate",
        "masked_mse_matches_fp64 and thread",
    ),
    Mutation(
        "CUDA patchify_gather: warps past the last patch write too",
        "csrc/cuda/patchify_gather.cuh",
        "if (row >= rows) return;",
        "if (row > rows) return;",
        "emulate",
        "patchify_gather_is_exact and address",
    ),
]


def copy_tree(folder: Path, libraries: bool = False) -> None:
    """The tree as it stands, importable from there: an installed mae_fast lies elsewhere. The C++
    kernels are left behind, unless with `libraries`."""
    unwanted = shutil.ignore_patterns("__pycache__", "results", *([] if libraries else ["*.so"]))
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=unwanted)
        else:
            shutil.copy(source, folder)
    (folder / "mae_fast/kernels").symlink_to("../kernels")


def _pytest(folder: Path, tier: str, only: str) -> tuple[int, str]:
    """(exit code, output) of a tier's tests in a copy of the tree, up to the first failure."""
    environment, tests = TIERS[tier]
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", tests, "-k", only]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    environment = {**inherited, **environment, "PYTHONPATH": str(folder)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@functools.cache
def _passes(tier: str, only: str) -> None:
    """Raises AssertionError unless the tests pass, and some run, on the tree as it stands."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        code, output = _pytest(Path(folder), tier, only)
        assert code == 0, f"{tier}, {only}: exit {code} without any defect\n{output}"
        assert " passed" in output, f"{tier}, {only}: nothing ran\n{output}"


def caught(mutation: Mutation) -> str:
    """How the tier catches a mutation, in a copy of the tree: the first error's words. Raises
    AssertionError if it does not, or if its text is not there, once."""
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.old) == 1, f"{mutation.what}: {mutation.old!r} is not there once"
    _passes(mutation.tier, mutation.only)
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        changed = Path(folder) / mutation.file
        changed.write_text(source.replace(mutation.old, mutation.new))
        code, output = _pytest(Path(folder), mutation.tier, mutation.only)
    assert code == FAILED, f"{mutation.what}: lives (exit {code})\n{output}"
    # What no compiler takes says nothing of the tier.
    assert not re.search(r"\d: error: ", output), f"{mutation.what}: does not compile\n{output}"
    error = re.search(r"^E +(.*)$", output, re.M)
    return error[1] if error else output.splitlines()[-1]


def main(words: str) -> int:
    """Run the mutations whose names have these words; the number of those that live."""
    alive = 0
    chosen = [m for m in MUTATIONS if words in m.what]

    def attempt(mutation: Mutation) -> str:
        try:
            return caught(mutation)
        except AssertionError as e:
            return f"ALIVE {e}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutation, how in zip(chosen, pool.map(attempt, chosen), strict=True):
            alive += how.startswith("ALIVE")
            print(f"{mutation.what}\n    {mutation.tier}: {how[:4000]}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} defects are caught")
    return alive


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])) > 0)
