"""Compiles every specialisation that the launchers can ask for: all options, dtypes and alignments, with one Triton.

    python tests/kernels/ptx/sweep.py [--oldest] [--target sm_90 ...] [LAUNCHER ...]

The launchers themselves are called, on small tensors, with a device that compiles and runs nothing: so it is the JIT
that decides how a stride or a pointer specialises the kernel, as on a GPU. ``--oldest`` takes the oldest supported
Triton from the environment that ``make`` creates. Exit code 1 when one does not compile.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
OLDEST = os.environ.get("PREFKERN_OLDEST_TRITON", str(ROOT / ".venv-triton36"))


def oldest_packages() -> Path | None:
    """Returns the folder of packages with the oldest supported Triton, if it has been made."""
    return next(Path(OLDEST).glob("lib/python3*/site-packages"), None)


def environment(oldest: bool) -> dict[str, str]:
    """Returns the environment of a process in which kernels are compiled, by today's Triton or by the oldest one."""
    out = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    paths = [str(ROOT / "tests" / "kernels"), str(ROOT / "python"), out.get("PYTHONPATH", "")]
    if oldest:
        packages = oldest_packages()
        if packages is None:
            raise FileNotFoundError(f"{OLDEST} does not exist: `make test` creates it")
        paths.insert(0, str(packages))
    return out | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def compile_all(targets: list[str], names: list[str]) -> int:
    """Compiles in this process; returns how many specialisations do not compile."""
    import triton

    from ptx import device, launchers

    machine = device.install(targets[0], compile_only=True)
    start, failures, count = time.perf_counter(), 0, 0
    for target in targets:
        machine.target = target
        for name in names or list(launchers.LAUNCHERS):
            launcher = launchers.LAUNCHERS[name]
            for options in launcher.options():
                for aligned in (True, False):
                    count += 1
                    failures += not _compiles(name, launcher.make, options, aligned, target)
    seconds = time.perf_counter() - start
    print(f"Triton {triton.__version__}: {count} specialisations, {failures} do not compile, {seconds:.0f} s")
    return failures


def _compiles(name: str, make: Any, options: dict[str, Any], aligned: bool, target: str) -> bool:
    from ptx.cases import Shape

    case = make(Shape(2, 33, aligned), **options)
    try:
        case.launch()
    except Exception as error:  # whatever the compiler raises
        words = ", ".join(f"{key}={value}" for key, value in options.items())
        kind = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"FAILS {target} {name}({words}) {'aligned' if aligned else 'unaligned'}: {kind[:200]}", flush=True)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("launchers", nargs="*", metavar="LAUNCHER")
    parser.add_argument("--oldest", action="store_true", help="with the oldest supported Triton")
    parser.add_argument("--target", nargs="+", default=["sm_90"])
    parser.add_argument("--verbose", action="store_true", help="show what the compiler prints where it fails")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return int(compile_all(options.target, options.launchers) > 0)
    command = [sys.executable, "-m", "ptx.sweep", "--worker", *options.launchers, "--target", *options.target]
    noise = None if options.verbose else subprocess.DEVNULL
    return subprocess.run(command, env=environment(options.oldest), cwd=ROOT, stderr=noise, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
