"""Breaks each kernel in one line at a time and asks whether the kernel tests notice.

    python tools/mutants.py [--only TEXT] [--workers N] [--markdown FILE]

Each break of `mutant_table.py` is made in a copy of the tree, never in the working tree, and the tests that should see
it soonest run against it in the interpreter; what survives them meets all kernel tests. Exit code 1 when fewer than
95 % are caught, or a survivor is not explained in the table. Processes are forked from one that has already imported
torch and Triton, so that a break costs only its tests.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from mutant_table import MUTANTS, Mutant, quick_tests

ROOT = Path(__file__).resolve().parent.parent
KERNELS = Path("python/prefkern/kernels/triton")
TESTS = [
    f"tests/kernels/test_{name}.py" for name in ("math", "logprobs", "logprobs_backward", "scale", "divergence_kernels")
]
SECONDS = 240  # a break that makes a loop endless is caught by the clock
REQUIRED = 0.95


def mutate(source: str, mutant: Mutant) -> str:
    """The source with the break; the old text must stand exactly once in the function."""
    start = re.search(rf"^def {mutant.function}\(", source, re.MULTILINE)
    if start is None:
        raise SystemExit(f"mutants: {mutant.file} has no function {mutant.function}")
    end = re.compile(r"^(?:@|def |class |[A-Z_]+ = )", re.MULTILINE).search(source, start.end())
    stop = end.start() if end else len(source)
    body = source[start.start() : stop]
    if body.count(mutant.old) != 1:
        count = body.count(mutant.old)
        raise SystemExit(
            f"mutants: {mutant.file} {mutant.function}: {mutant.old!r} stands {count} times, expected once"
        )
    broken = source[: start.start()] + body.replace(mutant.old, mutant.new) + source[stop:]
    compile(broken, mutant.file, "exec")  # a syntax error would be no break
    return broken


def copy_tree(target: Path) -> Path:
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "demo")
    shutil.copytree(ROOT / "python" / "prefkern", target / "python" / "prefkern", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "kernels", target / "tests" / "kernels", ignore=ignore)
    shutil.copy(ROOT / "tests" / "conftest.py", target / "tests")
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def start_tests(tree: Path, selection: str, seconds: int = SECONDS) -> int:
    """Forks a process that runs the selected tests of a tree; its exit code is pytest's."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        signal.alarm(seconds)
        os.chdir(tree)
        log = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, str(tree / "python"))
        import pytest

        code = int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-k", selection, *TESTS]))
    finally:
        os._exit(code)


def caught_by(tree: Path, status: int) -> str | None:
    """The test that failed, None if all passed."""
    if os.WIFSIGNALED(status):
        return "no end" if os.WTERMSIG(status) == signal.SIGALRM else f"signal {os.WTERMSIG(status)}"
    log = (tree / "log").read_text()
    code = os.WEXITSTATUS(status)
    if code not in (0, 1):
        raise SystemExit(f"mutants: pytest ended with exit code {code}\n{log[-3000:]}")
    failed = re.search(r"^FAILED \S+::(\w+)", log, re.MULTILINE)
    return None if code == 0 else failed[1] if failed else "?"


def run(mutants: list[Mutant], folder: Path, workers: int) -> dict[Mutant, str | None]:
    """Which test caught each break. Quick tests first, all for a survivor; the unbroken kernels run beside them."""
    results: dict[Mutant, str | None] = {}
    waiting = [(mutant, quick_tests(mutant)) for mutant in reversed(mutants)]
    free = [copy_tree(folder / f"tree{i}") for i in range(workers)]
    running: dict[int, tuple[Mutant | None, str, Path]] = {}
    unbroken = copy_tree(folder / "unbroken")
    running[start_tests(unbroken, "interpreter", 8 * SECONDS)] = (None, "interpreter", unbroken)
    begin = time.monotonic()
    while waiting or running:
        while waiting and free:
            (mutant, tests), tree = waiting.pop(), free.pop()
            source = (unbroken / KERNELS / mutant.file).read_text()
            (tree / KERNELS / mutant.file).write_text(mutate(source, mutant))
            running[start_tests(tree, f"interpreter and ({tests})")] = (mutant, tests, tree)
        pid, status = os.wait()
        done, tests, tree = running.pop(pid)
        test = caught_by(tree, status)
        if done is None:
            if test:
                raise SystemExit(f"mutants: {test} fails without a break\n{(tree / 'log').read_text()[-3000:]}")
            continue
        shutil.copy(unbroken / KERNELS / done.file, tree / KERNELS)
        free.append(tree)
        if test is None and tests != "interpreter":
            waiting.append((done, "interpreter"))
            continue
        results[done] = test
        if test is None:
            print(f"\rsurvived: {done.file} {done.function}: {done.old!r} -> {done.new!r}")
        survived = sum(value is None for value in results.values())
        line = f"[{len(results)}/{len(mutants)}] {time.monotonic() - begin:4.0f} s, {survived} survived"
        print(f"\r{line}  {done.file} {done.function}"[:100].ljust(100), end="", flush=True)
    print()
    return results


def markdown(results: dict[Mutant, str | None], before: str = "") -> str:
    """The table. Files of which nothing was run keep the rows that they have in the table ``before``."""
    counts = {
        file: (int(breaks), int(caught))
        for file, breaks, caught in re.findall(r"^\| `(\S+\.py)` \| (\d+) \| (\d+) \|$", before, re.MULTILINE)
    }
    survivors = dict(re.findall(r"^(\| `(?:\S+\.py)`, .*)$()", before, re.MULTILINE))
    for file in dict.fromkeys(m.file for m in results):
        own = {m: test for m, test in results.items() if m.file == file}
        counts[file] = (len(own), sum(test is not None for test in own.values()))
        survivors = {line: "" for line in survivors if not line.startswith(f"| `{file}`,")}
        for m in (m for m, test in own.items() if test is None):
            change = " to ".join(f"`{' '.join(text.split())}`" for text in (m.old, m.new))
            survivors[f"| `{m.file}`, `{m.function}`: {change} | {m.survives or 'unexplained'} |"] = ""
    lines = ["| kernel file | breaks | caught |", "| --- | ---: | ---: |"]
    lines += [f"| `{file}` | {breaks} | {caught} |" for file, (breaks, caught) in counts.items()]
    totals = (sum(column) for column in zip(*counts.values(), strict=True))
    lines.append("| **all** | " + " | ".join(map(str, totals)) + " |")
    if survivors:
        lines += ["", "| survivor | why |", "| --- | --- |", *survivors]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only breaks whose file, function or text contains this")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--markdown", type=Path, help="write the table to this file; with --only, its rows")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in f"{m.file} {m.function} {m.old} {m.new}"]
    if not chosen:
        parser.error(f"no break contains {options.only!r}")
    for mutant in chosen:
        mutate((ROOT / KERNELS / mutant.file).read_text(), mutant)
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    import pytest  # noqa: F401 - what every fork needs
    import torch  # noqa: F401
    import triton.language  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="prefkern-mutants-") as folder:
        results = run(chosen, Path(folder), options.workers)
    for mutant in chosen:
        outcome = results[mutant] or f"SURVIVED{': ' + mutant.survives if mutant.survives else ''}"
        change = f"{mutant.old!r} -> {mutant.new!r}"
        print(f"{mutant.file:15s} {mutant.function:22s} {change[:90]:90s} {outcome}")
    caught = sum(test is not None for test in results.values())
    unexplained = sum(test is None and not mutant.survives for mutant, test in results.items())
    print(
        f"{caught} of {len(results)} breaks caught ({caught / len(results):.1%}), {unexplained} survivors unexplained"
    )
    files = {mutant.file for mutant in chosen}
    complete = all(mutant in results for mutant in MUTANTS if mutant.file in files)
    if options.markdown and not complete:
        print("mutants: the table is not written, since only some breaks of a file were run")
    elif options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        before = options.markdown.read_text() if options.only and options.markdown.exists() else ""
        options.markdown.write_text(markdown({mutant: results[mutant] for mutant in chosen}, before))
    return 0 if caught / len(results) >= REQUIRED and not unexplained else 1


if __name__ == "__main__":
    raise SystemExit(main())
