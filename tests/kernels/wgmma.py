"""A fault of compilers, seen in machine code of sm_90: a wgmma whose left operand lies in registers
reads them until a wait says that it has ended, and something writes them before.

On an H200 it showed as two runs that differ, of a kernel that was right in the interpreter and
clean under compute-sanitizer.
"""

import re
from collections.abc import Iterator

INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M
)
LABEL = re.compile(r"^(\.L\w+):", re.M)
# What has no register for its result.
NO_RESULT = ("ST", "RED", "BAR", "DEPBAR", "WARPGROUP", "LDGSTS", "LDGDEPBAR", "BRA", "HGMMA")
NO_RESULT += ("ISETP", "FSETP", "R2UR", "U", "PLOP3", "EXIT")


def overwritten(code: str) -> list[str]:
    """The instructions of loops, as nvdisasm writes them, that write into a register which a wgmma
    in flight may read."""
    labels = {m[1]: m.start() for m in LABEL.finditer(code)}
    found: dict[str, None] = {}
    for branch in re.finditer(r"BRA\s+`\((\.L\w+)\)", code):
        start = labels.get(branch[1], len(code))
        if start < branch.start():
            loop = INSTRUCTION.findall(code[start : branch.end() + 2])
            found |= dict.fromkeys(_written_in_flight(loop * 2))  # a round meets what one left
    return list(found)


def _written_in_flight(loop: list[tuple[str, str]]) -> Iterator[str]:
    flying: list[tuple[set[int], bool]] = []  # (registers read, whether it ends a group)
    for name, operands in loop:
        if name.startswith("HGMMA"):
            left = re.match(r"R\d+, R(\d+),", operands)
            read = set(range(int(left[1]), int(left[1]) + 4)) if left else set()
            flying.append((read, "gsb0" in operands))
        elif name.startswith("WARPGROUP.DEPBAR"):
            pending = int(re.search(r"gsb0, 0x(\w+)", operands)[1], 16)
            ends = [i for i, (_, group) in enumerate(flying) if group]
            done = ends[: max(len(ends) - pending, 0)]
            flying = flying[done[-1] + 1 :] if done else flying
        written = _written(name, operands)
        if any(written & read for read, _ in flying):
            yield f"{name} {operands}".strip()


def _written(name: str, operands: str) -> set[int]:
    first = re.match(r"R(\d+)\b", operands)
    if name.startswith(NO_RESULT) or not first:
        return set()
    wide = 4 if ".128" in name or "M88.4" in name else 2 if ".64" in name or "WIDE" in name else 1
    return set(range(int(first[1]), int(first[1]) + wide))
