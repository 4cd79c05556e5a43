"""Prints the house in figures: rooms, floors, circles, parameter lists, and what one call runs through.

    python tools/house.py [--call NAME]

Rooms are the folders and files at the package's root; a room's floor is the longest chain of imports below it; a circle
is a set of files that import one another. Static imports only, those inside functions included, those for type checkers
left out. ``--call linear_dpo_loss`` lists the files that one call executes, forward and backward, in their order.
"""

import argparse
import ast
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "python" / "prefkern"
MANY = 8


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without ``prefkern.``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if name.removeprefix("prefkern.") in known else node.module for name in full)
    return {name.removeprefix("prefkern.") for name in names if name.startswith("prefkern.")} & known


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach one another."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for following in graph[left.pop()] - seen:
                seen.add(following)
                left.append(following)
        return seen

    reach = {name: reached(name) for name in graph}
    found: list[set[str]] = []
    for name in graph:
        if name in reach[name] and not any(name in circle for circle in found):
            found.append({other for other in reach[name] if name in reach[other]})
    return found


def floors(rooms: dict[str, set[str]]) -> int:
    """The number of rooms on the longest chain of imports."""

    @cache
    def height(room: str) -> int:
        return 1 + max((height(below) for below in rooms[room]), default=0)

    return max(map(height, rooms))


class Lists(ast.NodeVisitor):
    """Counts functions with long parameter lists, and the lines that parameters and arguments handed on take."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.long = path, set[int](), list[tuple[str, int, bool]]()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if len(arguments) > MANY:
            private = node.name.startswith("_") or "engine" in self.path.parts or "kernels" in self.path.parts
            self.long.append((f"{self.path.relative_to(PACKAGE)}:{node.name}", len(arguments), not private))
        self.lines.update(argument.lineno for argument in arguments if argument.lineno != node.lineno)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for word in node.keywords:
            if isinstance(word.value, ast.Name) and word.value.id == word.arg and word.value.lineno != node.lineno:
                self.lines.add(word.value.lineno)
        for value in node.args:
            if isinstance(value, ast.Name) and value.lineno != node.lineno:
                self.lines.add(value.lineno)
        self.generic_visit(node)


def structure() -> None:
    """Prints rooms, floors, circles, long lists and the lines that they take."""
    found = modules()
    graph = {name: imports(path, set(found)) - {name} for name, path in found.items()}
    rooms: dict[str, set[str]] = {}
    for name, below in graph.items():
        room = name.split(".")[0] or "__init__"
        rooms.setdefault(room, set()).update({other.split(".")[0] or "__init__" for other in below} - {room})
    total = listed = 0
    long: list[tuple[str, int, bool]] = []
    for path in found.values():
        text = path.read_text()
        counter = Lists(path)
        counter.visit(ast.parse(text))
        total += sum(bool(line.strip()) for line in text.splitlines())
        listed += len(counter.lines)
        long += counter.long
    print(f"files {len(found)}, lines {total}, rooms {len(rooms)}, floors {floors(rooms)}", end=", ")
    print(f"circles {len(circles(graph))}{''.join(f' {sorted(circle)}' for circle in circles(graph))}")
    print(
        f"functions with more than {MANY} parameters: {len(long)}, {sum(public for *_, public in long)} of them public"
    )
    for name, count, public in sorted(long, key=lambda item: -item[1]):
        print(f"  {count:3} {name}{'' if public else '  (internal)'}")
    print(f"lines of parameter lists and of arguments handed on: {listed} of {total} = {listed / total:.0%}")


def traced(work: Callable[[], Any]) -> tuple[list[tuple[str, int]], Any]:
    """The package's functions that ``work`` enters, as file and depth, and what it returns."""
    events: list[tuple[str, int]] = []
    stack: list[Any] = []

    def see(frame: Any, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if not name.startswith(str(PACKAGE)):
            return
        if event == "call":
            stack.append(frame.f_code)
            events.append((os.path.relpath(name, PACKAGE), len(stack)))
        elif event == "return" and stack and stack[-1] is frame.f_code:
            stack.pop()

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        return events, work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def call(wanted: str | None) -> None:
    """Prints how many files one forward and backward of each call executes, and how deep its stack is."""
    import torch

    import prefkern as pk

    B, T, H, V = 2, 6, 16, 64
    torch.manual_seed(0)
    hidden, weight = torch.randn(2 * B, T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets, tokens = torch.randint(V, (2 * B, T)), torch.zeros(2 * B, T)
    head = hidden, weight, targets
    rows = [torch.randn(3, requires_grad=True) for _ in range(4)]
    calls: dict[str, Callable[[], Any]] = {
        "linear_token_logprobs": lambda: pk.linear_token_logprobs(*head).logps.sum(),
        "linear_dpo_loss": lambda: pk.linear_dpo_loss(*head, ref_logps=tokens[:, 0]).loss,
        "linear_ppo_loss": lambda: pk.linear_ppo_loss(*head, tokens, tokens[:, 0] + 1).loss,
        "linear_cross_entropy": lambda: pk.linear_cross_entropy(*head).loss,
        "linear_kl_divergence": lambda: pk.linear_kl_divergence(*head[:2], *(x.detach() for x in head)).sum(),
        "dpo_loss": lambda: pk.dpo_loss(*rows).loss,
    }
    for name, forward in calls.items():
        if wanted not in (None, name):
            continue
        forward().backward()  # everything is loaded
        events, loss = traced(forward)
        more, _ = traced(loss.backward)
        files = list(dict.fromkeys(file for file, _ in events + more))
        lines = sum(len((PACKAGE / file).read_text().splitlines()) for file in files)
        depth = max(depth for _, depth in events + more)
        print(f"{name}: {len(files)} files, {lines} lines, deepest stack {depth}")
        if wanted:
            print("  " + "\n  ".join(files))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", help="list the files that this call executes")
    given = parser.parse_args()
    if not given.call:
        structure()
    call(given.call)
