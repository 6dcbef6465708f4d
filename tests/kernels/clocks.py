"""Clocks that one multiprocessor of sm_90 needs for 4,096 scores of attention, by unit, counted in
the machine code of a kernel's innermost loop of products: a bound, and no speed. What waits, what
a cache does not have and what is outside the loop is not in it.

Rates a clock: 4 warps' instructions issued; 16 lanes of exponentials (MUFU); 64 of integers and
conversions; 2,048 multiply-adds of 16 bits; 128 bytes of shared memory, of which a wgmma m64nNk16
reads 32 N for its right operand and 2,048 for a left one that lies there.
"""

import re
from collections import Counter

from wgmma import INSTRUCTION, LABEL

SCORES = 4096
INTEGER = set("FMNMX IADD3 LOP3 LEA ISETP SEL PRMT F2FP SHF VIADD MOV FSETP FSEL VIMNMX".split())


def inner_loop(code: str) -> list[tuple[str, str]]:
    """(instruction, operands) of the innermost loop with the most products; [] without any."""
    labels, loops = {m[1]: m.start() for m in LABEL.finditer(code)}, []
    for branch in re.finditer(r"BRA\s+`\((\.L\w+)\)", code):
        start = labels.get(branch[1], len(code))
        if start < branch.start():
            loops.append((start, branch.end() + 2))
    leaves = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = [INSTRUCTION.findall(code[a:b]) for a, b in leaves]
    products = [sum(name.startswith("HGMMA") for name, _ in loop) for loop in found]
    return found[products.index(max(products))] if any(products) else []


def clocks(code: str, warps: int, scores: int) -> dict[str, int]:
    """{unit: clocks}; `scores`: those of one round of the loop of one program."""
    loop, found = inner_loop(code), Counter()
    for name, operands in loop:
        base, lanes = name.split(".")[0], 32 * warps
        found["issue"] += warps / 4
        if base == "MUFU":
            found["exponentials"] += lanes / 16
        elif base in INTEGER:
            found["integers"] += lanes / 64
        elif base == "HGMMA":
            n, groups = int(re.match(r"HGMMA\.64x(\d+)x16", name)[1]), warps / 4
            found["tensor"] += groups * 64 * n * 16 / 2048
            from_registers = re.match(r"R\d+, R\d+,", operands)
            found["shared"] += groups * (32 * n + (0 if from_registers else 2048)) / 128
        elif base in ("LDS", "STS", "LDSM", "STSM", "LDGSTS"):
            found["shared"] += _bytes(name) * lanes / 128
    return {unit: round(each * SCORES / scores) for unit, each in found.items()}


def _bytes(name: str) -> int:
    """Of shared memory, by a lane."""
    if name.startswith(("LDSM", "STSM")):
        many = re.search(r"\.([24])\b", name)
        return 4 * int(many[1]) if many else 4
    return 16 if ".128" in name else 8 if ".64" in name else 4
