"""Every Triton kernel compiled for GPUs that are not there, and what the machine code says.

A stand-in for Triton's driver names the architecture; the launchers run on meta tensors, and each
launch is compiled in place of being run. Registers, spills, shared memory, the width of global
accesses and tensor-core instructions are read from the machine code by Triton's own tools.
"""

import ast
import contextlib
import functools
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from cases import DTYPES, ON_TRITON, calls, launcher, op_of
from clocks import clocks
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from wgmma import overwritten

from mae_fast.kernels import configs


class Limits(NamedTuple):
    """Of one streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    shared: int = 228 * 1024
    tensor_columns: int = 512  # of sm_100's tensor memory


ARCHS = {80: Limits(shared=164 * 1024), 90: Limits(), 100: Limits()}
TABLES = Path(__file__).with_name("aot")  # a file for each version of Triton: 3.8.jsonl
# Bytes a thread that a Triton without a table may spill: a few are its assembler's choice.
MAY_SPILL = 32
MODELS = ("vit_b", "vit_l")  # whose kernels every run of the tests compiles
MORE_MODELS = ("vit_h", "vit_b_two_clips", "vit_l_slowfast", "heads_of_128")
# Instructions of tensor cores: mma of sm_80, wgmma of sm_90, tcgen05 of sm_100.
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC[A-Z]*MMA")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass
class Row:
    """One compiled kernel. wide_*: the share of bytes that accesses of 16 bytes and more make;
    bulk: copies by the tensor memory accelerator, which have no width of their own."""

    operator: str
    kernel: str
    dtype: str
    arch: int
    sizes: str
    chosen: bool  # by configs.pick, and not only a candidate
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes
    occupancy: float  # resident warps, of those that an SM could hold
    tensor_core: int
    dots: int  # tl.dot's of operands of 16 bits
    bulk: int
    wide_loads: float
    wide_stores: float
    waits: int = 0  # for all wgmma begun
    overwritten: int = 0  # instructions that write what a wgmma in flight reads
    clocks: dict[str, int] = field(default_factory=dict)  # of attention on sm_90, by unit
    cases: list[str] = field(default_factory=list)

    @property
    def op(self) -> str:
        return op_of(self.operator)

    @property
    def key(self) -> tuple:
        return self.operator, self.kernel, self.dtype, self.arch, self.sizes

    def broken(self, may_spill: int = 0) -> list[str]:
        """The rules that hold on any version of Triton and that this kernel breaks."""
        wrong = [f"{self.spilled} bytes are spilled"] if self.spilled > may_spill else []
        if self.dots and not self.tensor_core:
            wrong.append(f"{self.dots} dots, and no tensor-core instruction")
        if self.waits >= max(self.tensor_core, 1):
            wrong.append(f"{self.tensor_core} wgmma one after the other, {self.waits} waits")
        if self.overwritten:
            wrong.append(f"{self.overwritten} instructions write what a wgmma in flight reads")
        return wrong

    def worse(self, before: "Row") -> list[str]:
        """In what this kernel, just compiled, is worse than its row in the committed table."""
        wrong = self.broken()
        if self.occupancy < before.occupancy:
            why = f"{self.registers} registers and {self.shared} bytes of shared memory"
            was = f"was {before.occupancy:.0%}: {before.registers} and {before.shared}"
            wrong.append(f"occupancy {self.occupancy:.0%} with {why} ({was})")
        if self.dots < before.dots:
            wrong.append(f"{self.dots} dots of 16 bits, were {before.dots}")
        if before.tensor_core and not self.tensor_core:
            wrong.append(f"no tensor-core instruction, was {before.tensor_core}")
        if max(self.clocks.values(), default=0) > max(before.clocks.values(), default=0):
            wrong.append(f"clocks for 4,096 scores {self.clocks}, were {before.clocks}")
        if self.bulk >= before.bulk:
            for name in ("wide_loads", "wide_stores"):
                now, was = getattr(self, name), getattr(before, name)
                if now < was - 0.01:
                    wrong.append(f"{name} {now:.0%}, was {was:.0%}")
        return wrong


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def candidate(number: int) -> Callable:
    """A `configs.pick` that takes every kernel's candidate of this number."""

    def pick(kernel: str, shape: str = "any") -> dict[str, int]:
        of = configs.candidates()[kernel][shape]
        return of[number % len(of)]

    return pick


def polynomial(kernel: str, shape: str = "any") -> dict[str, int]:
    """A `configs.pick` that takes attention's first candidate with exponentials by polynomial."""
    for sizes in configs.candidates()[kernel][shape]:
        if "BY_FMA" in sizes:
            return sizes
    return configs._pick(kernel, shape, configs.architecture())


@contextlib.contextmanager
def compiling(arch: int, take: Callable | None = None) -> Iterator[list]:
    """Launches are compiled for `arch`, and collected, in place of being run; nothing is kept on
    the disk. `take`: stands in place of configs.pick."""
    compiled: list[tuple[JITFunction, Any]] = []
    run, pick, active = JITFunction.run, configs.pick, driver._active
    cache, fusion = triton.knobs.cache.dir, triton.knobs.language.default_fp_fusion

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))
        return compiled[-1][1]

    with tempfile.TemporaryDirectory() as folder:
        try:
            driver.set_active(_Driver(arch))
            JITFunction.run = compile_only
            triton.knobs.cache.dir, triton.knobs.language.default_fp_fusion = folder, True
            configs.pick = take or pick
            yield compiled
        finally:
            JITFunction.run, configs.pick, driver._active = run, pick, active
            triton.knobs.cache.dir, triton.knobs.language.default_fp_fusion = cache, fusion


def _sizes(function: JITFunction, kernel: Any) -> str:
    """The constexprs, warps and stages that a kernel was compiled with."""
    given = {k[0] if isinstance(k, tuple) else k: v for k, v in kernel.src.constants.items()}
    shown = [
        f"{p.name}={getattr(given[i], 'value', given[i])}"
        for i, p in enumerate(function.params)
        if p.is_constexpr and i in given
    ]
    meta = kernel.metadata
    return " ".join([*shown, f"num_warps={meta.num_warps}", f"num_stages={meta.num_stages}"])


def _tool(name: str, *args: str) -> str:
    command = [getattr(triton.knobs.nvidia, name).path, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _wide(accesses: list[str]) -> float:
    """The share of bytes that accesses of 16 bytes and more move; 1 where there are none."""
    widths = [max([WIDTHS.get(part, 0) for part in a.split(".")[1:]]) or 4 for a in accesses]
    return round(sum(w for w in widths if w >= 16) / sum(widths), 3) if widths else 1.0


def occupancy(arch: int, registers: int, shared: int, warps: int, columns: int = 0) -> float:
    """Resident warps of an SM, of those that it could hold."""
    limits = ARCHS[arch]
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256 a warp
    fits = [limits.blocks, limits.warps // warps, limits.registers // (per_warp * warps)]
    fits.append(limits.shared // (-(-shared // 128) * 128 + 1024))  # 1 KiB of each is the system's
    if columns:
        fits.append(limits.tensor_columns // columns)
    return round(min(fits) * warps / limits.warps, 3)


def read(operator: str, dtype: str, arch: int, function: JITFunction, kernel: Any) -> Row:
    """The table's row of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    instructions = re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.M
    )
    meta = kernel.metadata
    warps = meta.num_warps  # and those that Triton adds for a warp-specialised kernel
    threads = re.search(r"\.maxntid (\d+)", kernel.asm["ptx"]) or re.search(
        r"\.reqntid (\d+)", kernel.asm["ptx"]
    )
    warps = max(warps, int(threads[1]) // 32) if threads else warps
    columns = getattr(meta, "tmem_size", 0) or 0
    sizes = _sizes(function, kernel)
    tile = re.search(r"BLOCK_Q=(\d+) BLOCK_K=(\d+)", sizes) if arch == 90 else None
    dots = re.findall(r"tt\.dot .*: tensor<\w+x(?:bf16|f16)[ ,>]", kernel.asm["ttir"])
    return Row(
        operator=operator,
        kernel=function.__name__,
        dtype=dtype,
        arch=arch,
        sizes=sizes,
        chosen=False,
        registers=used["REG"],
        spilled=used["STACK"],
        shared=meta.shared,
        occupancy=occupancy(arch, used["REG"], meta.shared, warps, columns),
        tensor_core=sum(bool(TENSOR_CORE.match(i)) for i in instructions),
        dots=len(dots),
        bulk=sum(i.startswith(("UTMALDG", "UTMASTG", "UBLKCP")) for i in instructions),
        wide_loads=_wide([i for i in instructions if i.startswith(("LDG.", "LDGSTS."))]),
        wide_stores=_wide([i for i in instructions if i.startswith("STG.")]),
        waits=len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", code)),
        overwritten=len(overwritten(code)),
        clocks=clocks(code, meta.num_warps, int(tile[1]) * int(tile[2])) if tile else {},
    )


def launch(op: str, dtype: str, models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Run the launchers of one op at the models' shapes; (operator, case) after each."""
    for model in models:
        for case, made in calls(op, model, dtype, "meta").items():
            for operator, args in made:
                launcher(operator)(*args)
                yield operator, f"{model} {case}".strip()


def rows(op: str, arch: int, everything: bool = False) -> list[Row]:
    """One op's kernels, compiled for one architecture: for MODELS as configs.pick chooses, and with
    exponentials by polynomial; or every candidate for all models."""
    found: dict[int, tuple[Any, Row]] = {}  # by the compiled kernel, which Triton gives again
    most = max(len(c) for shapes in configs.candidates().values() for c in shapes.values())
    takes = [None, *map(candidate, range(most))] if everything else [None, polynomial]
    models = MODELS + MORE_MODELS if everything else MODELS
    for dtype in DTYPES:
        for take in takes:
            with compiling(arch, take) as compiled:
                for operator, case in launch(op, dtype, models):
                    for function, kernel in compiled:
                        if id(kernel) not in found:
                            found[id(kernel)] = (
                                kernel,
                                read(operator, dtype, arch, function, kernel),
                            )
                        row = found[id(kernel)][1]
                        row.chosen |= take is None
                        if case not in row.cases:
                            row.cases.append(case)
                    del compiled[:]
    return [row for _, row in found.values()]


@functools.cache
def _meaning(path: Path) -> str:
    """A source without its comments, docstrings and layout."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                del body[0]
    return ast.dump(tree)


def sources(op: str) -> list[Path]:
    """The files that an op's machine code and its rows follow from, beside what is launched."""
    folder, found, todo = Path(configs.__file__).parent, set(), [op, "configs"]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            text = (folder / f"{name}.py").read_text()
            todo += re.findall(r"^from mae_fast\.kernels\.(\w+) import", text, re.M)
    return [*sorted(folder / f"{name}.py" for name in found), Path(__file__)]


def launched(op: str) -> list[str]:
    """What an op's launchers ask for at the shapes of MODELS: kernels, dtypes, numbers, sizes."""
    asked = []

    def note(self, *args, grid, warmup, **sizes):
        shown = [f"{a.dtype}+{a.storage_offset()}" if torch.is_tensor(a) else a for a in args]
        asked.append(f"{self.__name__} {shown} {sizes}")

    with compiling(90):
        JITFunction.run = note
        for dtype in DTYPES:
            for _ in launch(op, dtype, MODELS):
                pass
    return asked


@functools.cache
def digest(op: str) -> str:
    """Of sources and launches: where it is the table's, this Triton compiles the same again."""
    parts = [*map(_meaning, sources(op)), *launched(op)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def versions() -> list[str]:
    """The versions of Triton that have a committed table, oldest first."""
    found = [path.stem for path in TABLES.glob("*.jsonl")]
    return sorted(found, key=lambda version: [*map(int, version.split("."))])


def committed(version: str = configs.TRITON) -> tuple[dict, list[Row]]:
    """A version's table: what it is of ({"triton": "3.8.0", "sources": {op: digest}}) and its rows;
    nothing where the version has none."""
    table = TABLES / f"{version}.jsonl"
    lines = map(json.loads, table.read_text().splitlines() if table.exists() else [])
    of = next(lines, {"triton": None, "sources": {}})
    return of, [Row(**line) for line in lines]


def proved(op: str) -> bool:
    """Whether this very Triton compiled these very sources for the table."""
    of, _ = committed()
    return of["triton"] == triton.__version__ and of["sources"].get(op) == digest(op)


def main(ops: Sequence[str], candidates: bool) -> None:
    """Write this Triton's table, or its rows of some ops: what configs.pick chooses for MODELS, or
    every candidate for all models, on every architecture."""
    ops = ops or ON_TRITON
    of, before = committed()
    assert of["triton"] in (None, triton.__version__) or set(ops) == set(ON_TRITON)
    jobs = [(op, arch) for op in ops for arch in ARCHS]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(rows, *zip(*jobs, strict=True), [candidates] * len(jobs))
        made = [row for part in found for row in part]
    made += [row for row in before if row.op in ON_TRITON and row.op not in ops]
    made.sort(key=lambda row: (row.key, row.cases))
    compiled = of["sources"] | {op: digest(op) for op in ops}
    of = {"triton": triton.__version__, "sources": {op: compiled[op] for op in sorted(compiled)}}
    TABLES.mkdir(exist_ok=True)
    lines = [json.dumps(of), *(json.dumps(asdict(row)) for row in made)]
    (TABLES / f"{configs.TRITON}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    words = sys.argv[1:]
    main([word for word in words if word != "--candidates"], "--candidates" in words)
