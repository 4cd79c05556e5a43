"""Reads compiled kernels: registers, spills, shared memory, widths of loads and stores, instructions of the loops."""

import collections
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);")
_LABEL = re.compile(r"^\s*(\.L_x_\w+):")


class Code(NamedTuple):
    """What one compiled kernel costs. Widths are the widest, in bits; a loop is (instructions on its shortest
    path, bytes that a thread reads)."""

    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    loops: list[tuple[int, int]]
    opcodes: dict[str, int]  # of the longest loop, most frequent first


def _tool(name: str, cubin: bytes, *args: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, name).path, *args, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _bits(opcode: str) -> int:
    """Width of a global access: ``LDG.E.128`` is 128, ``LDG.E`` 32, ``LDG.E.U16`` 16."""
    for width in (256, 128, 64):
        if f".{width}" in opcode:
            return width
    return 16 if re.search(r"\.[US]16", opcode) else 8 if re.search(r"\.[US]8", opcode) else 32


def _target(instruction: tuple[str, str, str], labels: dict[str, int]) -> int | None:
    """Where a branch goes."""
    found = re.search(r"(\.L_x_\w+)", instruction[2]) if instruction[1].startswith("BRA") else None
    return labels.get(found[1]) if found else None


def _shortest_path(code: list[tuple[str, str, str]], labels: dict[str, int], start: int, end: int) -> list[int]:
    """The instructions of a loop that always run: forward branches are taken (what they skip concerns one tile)."""
    path, i = [], start
    while i <= end:
        path.append(i)
        target = _target(code[i], labels)
        i = target if target is not None and i < target <= end else i + 1
    return path


def nvidia(compiled: Any) -> Code:
    usage = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+)", usage)
    sass = _tool("nvdisasm", compiled.asm["cubin"], "-c")
    code: list[tuple[str, str, str]] = []  # predicate, opcode, operands
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append((instruction[1] or "", instruction[2], instruction[3]))
    opcodes = [opcode for _, opcode, _ in code]
    reads = [opcode for opcode in opcodes if opcode.startswith("LDG")]  # and LDGSTS, which copies to shared memory
    loops, bodies = [], []
    for i in range(len(code)):
        start = _target(code[i], labels)
        if start is None or start >= i:
            continue
        body = [opcodes[j] for j in _shortest_path(code, labels, start, i)]
        read = sum(_bits(opcode) // 8 for opcode in body if opcode.startswith("LDG"))
        if read:
            loops.append((len(body), read))
            bodies.append(body)
    longest = max(bodies, key=len, default=[])
    return Code(
        registers=int(found[1]) if found else 0,
        spills=sum(bool(re.match(r"LDL|STL", opcode)) for opcode in opcodes),
        shared=compiled.metadata.shared,
        load_bits=max(map(_bits, reads), default=0),
        store_bits=max((_bits(op) for op in opcodes if op.startswith("STG")), default=0),
        loops=loops,
        opcodes=dict(collections.Counter(op.split(".")[0] for op in longest).most_common()),
    )


def amd(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern + r":?\s+(\d+)", text)
        return int(found[1]) if found else 0

    def widest(kind: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{kind}_(dwordx4|dwordx3|dwordx2|dword|[us]?(?:short|byte))", text)
        return max(
            (int(name[-1]) * 32 if name[-1].isdigit() else 32 if name == "dword" else 16 for name in found), default=0
        )

    return Code(
        registers=number(r"\.vgpr_count"),
        spills=number(r"\.vgpr_spill_count"),
        shared=compiled.metadata.shared,
        load_bits=widest("load"),
        store_bits=widest("store"),
        loops=[],
        opcodes={},
    )
