"""Parses PTX text: the parameters, registers, shared arrays, labels and instructions of its first kernel."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ptx.faults import UnknownInstruction


class Instruction(NamedTuple):
    """One instruction: ``@guard opcode operands``; ``source`` is the line of Python that it was compiled from."""

    opcode: str
    guard: str | None
    negated: bool
    operands: tuple[str, ...]
    text: str
    source: str

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" ({self.source})" if self.source else "")


@dataclass
class Program:
    """A parsed kernel. ``registers`` maps names to types, ``symbols`` shared arrays to their first byte, ``labels`` to
    positions in ``code``."""

    name: str = ""
    threads: int = 0
    parameters: dict[str, str] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)

    def block_of(self, position: int) -> int:
        """Returns where the block of an instruction begins: the instructions between two branches or their targets."""
        targets = {self.labels.get(i.operands[0], 0) for i in self.code if i.opcode.startswith("bra") and i.operands}
        for at in range(position, 0, -1):
            if at in targets or self.code[at - 1].opcode.startswith(("bra", "ret", "exit")):
                return at
        return 0


_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_SHARED = re.compile(r"(?:\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+([\w$]+)\[(\d*)\]")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s.*?([\w$]+)\s*$", re.S)
_LOCATION = re.compile(r"\s*\.loc\s")


def parse(ptx: str) -> Program:
    """Returns the first kernel of a PTX module. A directive or a statement that it does not know is an error."""
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.S)
    if entry is None:
        raise UnknownInstruction("the text has no `.entry`: it is not the PTX of a kernel")
    program = Program(name=entry[1])
    for parameter in filter(str.strip, entry[2].split(",")):
        found = _PARAMETER.match(parameter.strip())
        if found is None:
            raise UnknownInstruction(f"parameter `{parameter.strip()}`")
        program.parameters[found[2]] = found[1]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    program.threads = int(threads[1]) if threads else 32
    for line in ptx[: entry.start()].splitlines():
        if (shared := _SHARED.match(line.strip())) is not None:
            _declare_shared(program, shared)
    _Body(program).read(ptx[entry.end() :])
    return program


def _declare_shared(program: Program, declared: re.Match[str]) -> None:
    """Places a shared array after those before it; one of unknown length (the launch gives it) begins there too."""
    align = int(declared[1] or 1)
    program.shared_bytes += -program.shared_bytes % align
    program.symbols[declared[2]] = program.shared_bytes
    program.shared_bytes += int(declared[3] or 0)


class _Body:
    """Reads the statements between a kernel's braces. Registers declared in inner braces live there only."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[dict[str, str]] = [{}]  # name in the text: name in the program
        self.source = ""
        self.number = 0

    def read(self, text: str) -> None:
        pending = ""
        for line in text.splitlines():
            code, _, comment = line.partition("//")
            if _LOCATION.match(code):
                self.source = ":".join(comment.strip().split(":")[:2])
                continue
            pending = self._statements(f"{pending} {code}")
            if not self.scopes:
                break
        self.program.code.append(Instruction("ret", None, False, (), "the end of the kernel", self.source))

    def _statements(self, text: str) -> str:
        """Takes the complete statements off the front and returns the rest."""
        while self.scopes:
            text = text.lstrip()
            if text[:1] == "{":
                self.scopes.append({})
                text = text[1:]
            elif text[:1] == "}":
                self.scopes.pop()
                text = text[1:]
            elif label := re.match(r"([\w$]+):(?!:)", text):
                self.program.labels[label[1]] = len(self.program.code)
                text = text[label.end() :]
            elif ";" in text:
                statement, _, text = text.partition(";")
                self._statement(statement.strip())
            else:
                return text
        return ""

    def _statement(self, text: str) -> None:
        if not text or text.startswith(".pragma"):
            return
        if registers := _REGISTERS.match(text):
            for name in registers[2].split(","):
                self._declare(name.strip(), registers[1])
        elif shared := _SHARED.match(text):
            _declare_shared(self.program, shared)
        elif (found := _INSTRUCTION.fullmatch(text)) is not None:
            negated, guard, opcode, operands = found.groups()
            resolved = tuple(self._resolve(operand) for operand in _split(operands))
            guard = None if guard is None else self._resolve(guard)
            shown = " ".join(text.split())
            self.program.code.append(Instruction(opcode, guard, negated == "!", resolved, shown, self.source))
        else:
            raise UnknownInstruction(f"`{text}`")

    def _declare(self, name: str, kind: str) -> None:
        """Declares ``%r<8>``: registers %r0 to %r7, or one register."""
        many = re.fullmatch(r"(.*)<(\d+)>", name)
        for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            unique = each
            if len(self.scopes) > 1:
                self.number += 1
                unique = f"{each}.{self.number}"
            self.scopes[-1][each] = unique
            self.program.registers[unique] = kind

    def _resolve(self, operand: str) -> str:
        """Replaces the registers of an operand by their names in the program."""
        return re.sub(r"[%A-Za-z_$][\w$.]*", self._unique, operand)

    def _unique(self, name: re.Match[str]) -> str:
        for scope in reversed(self.scopes):
            if name[0] in scope:
                return scope[name[0]]
        return name[0]


def _split(operands: str) -> list[str]:
    """Splits at the commas that are outside braces and brackets."""
    out, depth, current = [], 0, ""
    for character in operands:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += character
    return [*out, current.strip()] if current.strip() else out
