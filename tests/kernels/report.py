"""Write aot/ (this Triton's table), traffic.jsonl and docs/kernels.md, which shows all tables and
the planted defects.

python tests/kernels/report.py          all of it, many minutes; once under each Triton
python tests/kernels/report.py --page   the page alone, from the tables as they are
"""

import os
import subprocess
import sys
from pathlib import Path

import aot
import traffic
from mutations import MUTATIONS

PAGE = Path(__file__).parents[2] / "docs/kernels.md"
HEAD = """\
# The Triton and CUDA kernels, as far as they can be proved without a GPU

Written by `python tests/kernels/report.py`: do not edit. Nothing here was run on a GPU, and no time
is predicted. Tests compile the kernels again and count the bytes again, and fail where a kernel is
worse than these tables say, or is missing from them.

| tier | proves | runs |
|---|---|---|
| interpret | values and gradients against fp64 | `TRITON_INTERPRET=1 pytest tests/ops` |
| sanitizer | no race, no overrun, every output stored once, in any order of programs | \
`TRITON_INTERPRET=1 pytest tests/kernels` |
| bytes | what is loaded and stored, against what must be | the same |
| aot | machine code: registers, spills, occupancy, tensor cores, 16-byte accesses | \
`pytest tests/kernels` |
| emulate | the CUDA sources on a CPU, under ThreadSanitizer and AddressSanitizer | \
`pytest tests/emulate` |
| mutation | each planted defect is caught | `python tests/kernels/mutations.py` |
"""
BYTES = """
## Bytes

Memory-bound operators on an eighth of a clip of ViT-B (2 of 16 frames, 90% masked), forward and
backward. The least: every element of inputs and outputs once, of clips the wanted patches only.
Moved: what programs of a launch share, as a norm's weight, counts once; at most {at_most}x of the
least, partial sums and their second pass included. Requested: all lanes of all programs, which
caches serve; the share of what is loaded again falls as the batch grows. bf16 has fp32 parameters.
Where the loss's gradient is not known to be 1 on the host, as on a GPU, `masked_mse` takes a second
pass, its backward: the two rows together are what a step moves.

| operator | case | dtype | least | moved | requested |
|---|---|---|---|---|---|
{rows}

Forward and backward in fp32, against what the operators of the official code (or torch's), called
one by one, read and write.

| op | moved | official, eager | |
|---|---|---|---|
{eager}
"""
AOT = """
## Machine code

The sizes that `kernels/configs.py` chooses, at the shapes of ViT-B and ViT-L, batch 64, under each
version of Triton: {versions}. The tables `tests/kernels/aot/` have {total} kernels. A version's
cell is registers, resident warps of those that an SM could hold, tensor-core instructions (HMMA,
HGMMA, UTCMMA), and the share of the bytes of load and store instructions that accesses of 16 bytes
or more make, a static count. {spills}

Triton 3.6 is older than the kernels' tuning. Attention's dk and dv took 190 registers under it at
heads of 32 (2 programs an SM) and take 168 (3) since rows of statistics are whole multiples of 16;
`crop_resize_patchify_gather` took 127 registers, and takes the fewest without a spill that its
sizes give; `layer_norm`'s forward takes some registers more than under 3.8, and 64 at most: half of
an SM's warps, each thread with 16-byte loads in flight, so its sizes stay until they are timed.

| kernel | dtype | sizes | sm | {heads} |
|---|---|---|---|{rules}|
{rows}
"""
CLOCKS = """
## Attention by units

Clocks that an SM of sm_90 needs for 4,096 scores in a kernel's loop, by unit
(`tests/kernels/clocks.py`), at ViT-B's shapes: a bound, the largest of a row, and no speed. An H200
takes more: there kernels wait, larger tiles with fewer clocks were slower, and so was a backward of
one pass ([gpu.md](gpu.md)). With BY_FMA=1 one exponential of eight is a polynomial: candidates that
were 6 to 41% slower there.

| kernel | sizes | Triton | {units} | bound |
|---|---|---|{rules}|---|
{rows}
"""
UNITS = ("issue", "exponentials", "integers", "tensor", "shared")
MUTATION = """
## Planted defects

| defect | file | caught by |
|---|---|---|
{rows}
"""


def _table(rows) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3f} MB"


def page() -> str:
    """docs/kernels.md from the committed tables."""
    moved, eager = traffic.committed()
    bytes_ = BYTES.format(
        at_most=traffic.AT_MOST,
        rows=_table(
            (
                f"`{r.operator}`",
                r.case,
                r.dtype,
                _megabytes(r.least),
                f"{r.moved / r.least:.2f}x",
                f"{r.requested / r.least:.2f}x",
            )
            for r in moved
        ),
        eager=_table(
            (f"`{e.op}`", _megabytes(e.moved), _megabytes(e.eager), f"{e.eager / e.moved:.1f}x")
            for e in eager
        ),
    )
    return HEAD + bytes_ + _defects() + _clocks() + _machine_code()


def _machine_code() -> str:
    """The chosen kernels of the models, one row each, with the versions of Triton side by side."""
    found: dict[tuple, dict[str, aot.Row]] = {}
    tables = {version: aot.committed(version)[1] for version in aot.versions()}
    for version, table in tables.items():
        for r in table:
            cases = tuple(case for case in r.cases if case.split()[0] in aot.MODELS)
            if r.chosen and cases:
                found.setdefault((*r.key, *sorted(cases)), {}).setdefault(version, r)
    spilled = [
        f"`{r.kernel}` {r.dtype} sm_{r.arch} under {version}: {r.spilled} bytes a thread"
        for of in found.values()
        for version, r in of.items()
        if r.spilled
    ]
    rows = set()
    for of in found.values():
        r = next(iter(of.values()))
        cells = (_cell(of[v]) if v in of else "" for v in tables)
        rows.add((f"`{r.kernel}`", r.dtype, r.sizes, r.arch, *cells))
    return AOT.format(
        versions=", ".join(aot.committed(version)[0]["triton"] for version in tables),
        total=sum(map(len, tables.values())),
        spills=f"Spilled: {'; '.join(spilled)}." if spilled else "Nothing spills.",
        heads=" | ".join(f"Triton {version}" for version in tables),
        rules="|".join("---" for _ in tables),
        rows=_table(sorted(rows)),
    )


def _clocks() -> str:
    """Those of ViT-B's kernels, and of candidates with a polynomial, under each Triton."""
    rows = []
    for version in aot.versions():
        for r in aot.committed(version)[1]:
            if r.clocks and any(case.split()[0] == "vit_b" for case in r.cases):
                of = [r.clocks.get(unit, 0) for unit in UNITS]
                rows.append((f"`{r.kernel}`", r.sizes, version, *of, max(of)))
    return CLOCKS.format(
        units=" | ".join(UNITS), rules="|".join("---" for _ in UNITS), rows=_table(sorted(rows))
    )


def _cell(r: aot.Row) -> str:
    wide = f"{r.wide_loads:.0%}, {r.wide_stores:.0%}"
    return f"{r.registers}; {r.occupancy:.0%}; {r.tensor_core}; {wide}"


def _defects() -> str:
    return MUTATION.format(rows=_table((m.what, f"`{m.file}`", m.tier) for m in MUTATIONS))


def main(only_page: bool) -> None:
    """Write the tables, then the page."""
    if not only_page:
        folder = Path(__file__).parent
        subprocess.run([sys.executable, folder / "aot.py"], check=True)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, folder / "traffic.py"], check=True, env=environment)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())


if __name__ == "__main__":
    main("--page" in sys.argv[1:])
