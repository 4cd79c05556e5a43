"""Compiles every kernel for every target without a GPU and asserts what the machine code must be.

    python tools/compile_report.py [--both | --oldest] [--target sm_90 ...] [--json FILE] [--markdown FILE]

Each row is one specialisation on one target: registers, spills, shared memory, the widest global load and store, the
instructions per element of each main loop. Exit code 1 when a row breaks an assertion: no spills, 128-bit loads,
registers, shared memory and instructions per element under the ceilings of that specialisation. ``--both`` adds the
oldest supported Triton, from the environment that ``make`` creates.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OLD_PYTHON = HERE.parent / ".venv-triton36" / "bin" / "python"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = 4096  # only the reductions across lanes use it


Position = tuple[int, ...]


def describe(
    value: Any, path: Position, constants: dict[Position, Any], attributes: dict[Position, Any], whole: bool
) -> Any:
    """Returns an argument's type as Triton takes it; also enters what is constant in it, and what is aligned."""
    if isinstance(value, tuple) and not whole:
        parts = enumerate(value)
        return type(value)(*(describe(part, (*path, i), constants, attributes, False) for i, part in parts))
    if not isinstance(value, str):
        constants[path] = value
        return "constexpr"
    kind, _, alignment = value.partition(":")
    if alignment:
        attributes[path] = [["tt.divisibility", int(alignment)]]
    return kind


def compile_all(targets: list[str], kernels: str) -> list[dict[str, Any]]:
    """One row per specialisation and target, compiled by this process's Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import compile_specs
    import machine_code

    rows = []
    for spec in compile_specs.specs():
        if kernels not in spec.name:
            continue
        given = spec.arguments | {"TILE": spec.tile}
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(spec.kernel.arg_names):
            whole = name.isupper() and not isinstance(given[name], str)  # known when compiled, also if it is a tuple
            signature[name] = describe(given[name], (index,), constants, attributes, whole)
        for target in targets:
            backend, arch, warp = TARGETS[target]
            start = time.perf_counter()
            compiled = triton.compile(
                ASTSource(spec.kernel, signature, constexprs=constants, attrs=attributes),
                target=GPUTarget(backend, arch, warp),
                options={"num_warps": spec.tile.num_warps, "enable_fp_fusion": True},
            )
            code = machine_code.nvidia(compiled) if backend == "cuda" else machine_code.amd(compiled)
            rows.append(
                {
                    "kernel": spec.name,
                    "case": spec.label,
                    "target": target,
                    "triton": triton.__version__,
                    "per_element": [round(n * spec.bytes_per_element / read, 1) for n, read in code.loops],
                    "instruction_ceiling": spec.instructions,
                    "register_ceiling": spec.registers,
                    "seconds": round(time.perf_counter() - start, 2),
                }
                | code._asdict()
            )
    return rows


def broken(row: dict[str, Any]) -> list[str]:
    """The assertions that a row breaks, in words."""
    out = []
    if row["spills"]:
        out.append(f"{row['spills']} spills")
    # a block of 8 warps of 64 threads has 4 elements of 16 bits each
    widest = 128 if row["target"].startswith("sm") else 64
    if row["load_bits"] < widest:
        out.append(f"loads of {row['load_bits']} bits < {widest}")
    if row["registers"] > row["register_ceiling"]:
        out.append(f"{row['registers']} registers > {row['register_ceiling']}")
    if row["shared"] > SHARED:
        out.append(f"{row['shared']} bytes of shared memory > {SHARED}")
    if row["target"].startswith("sm") and max(row["per_element"], default=1e9) > row["instruction_ceiling"]:
        out.append(f"{row['per_element']} instructions an element > {row['instruction_ceiling']}")
    return out


def table(rows: list[dict[str, Any]]) -> str:
    header = ("kernel", "case", "target", "triton", "regs", "spills", "shared", "load", "store", "instr/element", "")
    lines = [header]
    for row in rows:
        loops = " + ".join(f"{value:g}" for value in row["per_element"]) or "-"
        cells = [row["kernel"], row["case"], row["target"], row["triton"], row["registers"], row["spills"]]
        cells += [row["shared"], row["load_bits"], row["store_bits"], loops, "; ".join(broken(row)) or "ok"]
        lines.append(tuple(map(str, cells)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line per specialisation: registers and instructions on NVIDIA targets, with today's Triton; then the sums."""
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    today = rows[0]["triton"]
    for row in rows:
        if row["triton"] == today and row["target"].startswith("sm"):
            cells.setdefault((row["kernel"], row["case"]), {})[row["target"]] = row
    targets = list(next(iter(cells.values())))
    lines = [
        f"| Triton {today} | case | registers, {' / '.join(targets)} | instructions per element | load, store bits |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (kernel, case), on in cells.items():
        registers = " / ".join(str(on[target]["registers"]) for target in targets)
        counts = " / ".join(" + ".join(f"{value:g}" for value in on[target]["per_element"]) for target in targets)
        widths = f"{on[targets[0]]['load_bits']}, {on[targets[0]]['store_bits']}"
        lines.append(f"| `{kernel}` | {case} | {registers} | {counts} | {widths} |")
    lines += ["", "| | kernels compiled | with spills | break a ceiling |", "| --- | ---: | ---: | ---: |"]
    for version, target in dict.fromkeys((row["triton"], row["target"]) for row in rows):
        chosen = [row for row in rows if (row["triton"], row["target"]) == (version, target)]
        spilling, bad = (sum(map(bool, values)) for values in ((r["spills"] for r in chosen), map(broken, chosen)))
        lines.append(f"| Triton {version}, {target} | {len(chosen)} | {spilling} | {bad} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--both", action="store_true", help="also with the oldest supported Triton")
    parser.add_argument("--oldest", action="store_true", help="only with the oldest supported Triton")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write a table to this file, if nothing is left out")
    parser.add_argument("--opcodes", action="store_true", help="show what the longest loop of each row consists of")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        json.dump(compile_all(options.target, options.kernel), sys.stdout)
        return 0
    pythons = [] if options.oldest else [sys.executable]
    if options.both or options.oldest:
        if not OLD_PYTHON.exists():
            print(f"compile_report: {OLD_PYTHON} does not exist: `make compile-report` creates it", file=sys.stderr)
            return 2
        pythons.append(str(OLD_PYTHON))
    # kernels that are interpreted cannot be compiled
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [__file__, "--worker", "--target", *options.target, "--kernel", options.kernel]
    workers = [
        subprocess.Popen([python, *command], stdout=subprocess.PIPE, env=environment, text=True) for python in pythons
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        return 1
    rows = [row for output in outputs for row in json.loads(output)]
    print(table(rows))
    if options.opcodes:
        for row in rows:
            print(f"{row['kernel']} {row['case']} {row['target']}: {row['opcodes']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown and not options.kernel and len(options.target) == len(TARGETS):
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(rows))
    bad = sum(bool(broken(row)) for row in rows)
    print(f"{len(rows)} kernels compiled, {bad} break an assertion")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
