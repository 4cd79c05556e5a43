"""Sessions on the machine, started from the ordinary test run: a process of their own, without Triton's interpreter."""

import subprocess
import sys

import pytest

from ptx import cases, launchers, sweep
from ptx.session import VARIABLE

FAST = "ptx and not slow"
TODAY, OLDEST = "today's Triton", "oldest Triton"


def pytest_on_the_machine(settings: str, oldest: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    if oldest and sweep.oldest_packages() is None:
        pytest.skip(f"{sweep.OLDEST} does not exist: `make test` creates it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = sweep.environment(oldest) | {VARIABLE: settings}
    return subprocess.run(command, env=environment, cwd=sweep.ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_fast_cases() -> None:
    """What can be found in a minute: every kernel, three schedules, their faults planted."""
    run = pytest_on_the_machine("sm_90", False, "-m", FAST, "tests/kernels/ptx")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "PTX machine (sm_90)" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_fast_kernels_with_the_oldest_triton(target: str) -> None:
    run = pytest_on_the_machine(target, True, "-m", FAST, "-k", "lockstep", "tests/kernels/ptx/test_kernels.py")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert f"PTX machine ({target})" in run.stdout


@pytest.mark.ptx
@pytest.mark.slow
@pytest.mark.parametrize("name", launchers.LAUNCHERS)
@pytest.mark.parametrize("oldest", [False, True], ids=[TODAY, OLDEST])
def test_every_specialisation_compiles(name: str, oldest: bool) -> None:
    if oldest and sweep.oldest_packages() is None:
        pytest.skip(f"{sweep.OLDEST} does not exist: `make test` creates it")
    command = [sys.executable, "-m", "ptx.sweep", "--worker", name]
    run = subprocess.run(
        command, env=sweep.environment(oldest), cwd=sweep.ROOT, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert ", 0 do not compile" in run.stdout


def test_the_sweep_reports_what_does_not_compile(capsys: pytest.CaptureFixture[str]) -> None:
    def make(shape: cases.Shape, option: int) -> cases.Case:
        def launch() -> None:
            if option == 2 and shape.aligned:
                raise RuntimeError("PassManager::run failed")

        return cases.Case(launch, dict, 0, 0)

    found = [
        sweep._compiles("kernel", make, {"option": n}, aligned, "sm_90") for n in (1, 2) for aligned in (True, False)
    ]
    assert found == [True, True, False, True]
    assert capsys.readouterr().out == "FAILS sm_90 kernel(option=2) aligned: RuntimeError: PassManager::run failed\n"
