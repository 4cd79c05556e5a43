"""Every kernel compiles for every target with both Tritons, and the machine code is what it should be. No GPU needed:
the report runs in processes of its own, without the interpreter."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["sm_80", "sm_90", "sm_100"]


def _report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_report", ROOT / "tools" / "compile_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True], ids=["today's Triton", "oldest Triton"])
def test_machine_code(old: bool) -> None:
    report = _report()
    if old and not report.OLD_PYTHON.exists():
        pytest.skip(f"{report.OLD_PYTHON.parent.parent.name} does not exist: `make test` creates it")
    which = ["--oldest"] if old else []
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "compile_report.py", "--target", *TARGETS, *which],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert ", 0 break an assertion" in run.stdout


def test_the_report_sees_each_fault() -> None:
    report = _report()
    good = {"target": "sm_90", "spills": 0, "load_bits": 128, "registers": 64, "register_ceiling": 64}
    good |= {"shared": 32, "per_element": [7.0, 9.0], "instruction_ceiling": 9.0}
    assert report.broken(good) == []
    for fault in (
        {"spills": 1},
        {"load_bits": 64},
        {"registers": 65},
        {"shared": 65536},
        {"per_element": [7.0, 9.1]},
        {"per_element": []},
    ):
        assert len(report.broken(good | fault)) == 1, fault
