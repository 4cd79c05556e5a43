"""The machine of a test session: chosen by an environment variable, installed once, reported at the end.

    PREFKERN_PTX="sm_90 random seed=3 approximate=1 order=backward" pytest -m ptx tests/kernels

A session on the machine must not have Triton's interpreter, so that it is a process of its own. Every word of the
variable is optional: a target, a schedule, the seed of the schedule, the seed of the errors of approximate
instructions, the order of the programs.
"""

import functools
import os
from collections import Counter
from collections.abc import Iterator

import pytest

from ptx import device, schedules

VARIABLE = "PREFKERN_PTX"


def requested() -> bool:
    """Whether this process runs kernels on the machine."""
    return VARIABLE in os.environ


@functools.cache
def machine() -> device.Device:
    """Returns the machine of this process, as the variable describes it."""
    words = os.environ.get(VARIABLE, "").split()
    target = next((word for word in words if word in device.TARGETS), "sm_90")
    made = device.install(target)
    for word in words:
        name, _, value = word.partition("=")
        if word in schedules.NAMES:
            made.run.schedule = word
        elif name in ("seed", "approximate") and value.isdigit():
            setattr(made.run, name, int(value))
        elif name == "order" and value in ("forward", "backward", "random"):
            made.run.order = value
        elif word != target:
            raise ValueError(f"{VARIABLE}: unknown word {word!r}")
    return made


@pytest.fixture
def ptx() -> Iterator[device.Device]:
    """The machine, its list of launches empty, its settings as before after the test."""
    made = machine()
    before = vars(made.run).copy()
    made.run.launches = []
    target = made.target
    yield made
    TOTALS.update(total_of(made))
    vars(made.run).update(before)
    made.target = target


TOTALS: Counter[str] = Counter()


def total_of(made: device.Device) -> Counter[str]:
    """Returns the sums over a machine's launches."""
    out: Counter[str] = Counter()
    for launch in made.run.launches:
        out["launches"] += 1
        out["programs"] += launch.programs
        out["instructions"] += sum(launch.instructions.values())
        out["barriers"] += launch.barriers
        out["disagreements"] += launch.disagreements
    return out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs the machine where the session has none: ``pytest -m ptx`` runs it."""
    if requested():
        return
    chosen = [item for item in items if item.get_closest_marker("ptx") is None]
    left_out = [item for item in items if item.get_closest_marker("ptx") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what the machine ran."""
    if TOTALS:
        counts = ", ".join(f"{count:,} {what}" for what, count in TOTALS.items())
        terminalreporter.write_line(f"PTX machine ({os.environ[VARIABLE]}): {counts}")
