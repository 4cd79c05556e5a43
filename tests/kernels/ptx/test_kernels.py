"""The library's kernels on the machine: compiled as for a GPU, run with its schedules, against float64.

pytest -m ptx tests/kernels/ptx              the fast cases
pytest -m "ptx and slow" tests/kernels/ptx   the others: more options, targets, schedules, errors of approximations
"""

import pytest
from torch import Tensor

from prefkern import testing
from ptx import cases, schedules
from ptx.cases import FAST, MORE, Case, Shape
from ptx.counting import Launch
from ptx.device import TARGETS, Device

pytestmark = pytest.mark.ptx
ROWS = 5
COLUMNS = {True: 4656, False: 4659}  # two tiles of 2048 (one of 4096) and a tail


def run(name: str, aligned: bool, ptx: Device, columns: int | None = None) -> tuple[Case, Launch]:
    """Launches a case and compares what it wrote."""
    case = cases.case(name, Shape(ROWS, columns or COLUMNS[aligned], aligned))
    case.launch()
    for what, (got, want, eager) in case.results().items():
        if got.dtype.is_floating_point:
            testing.assert_not_worse(got, want, eager.double() + _allowance(want, ptx), name=what)
        else:
            assert (got == want).all(), what
    assert len(ptx.run.launches) == 1
    return case, ptx.run.launches[0]


def _allowance(want: Tensor, ptx: Device) -> float:
    """What approximate instructions may add to the error of plain float32, which is then allowed twice.

    2^-22 is the largest relative error of ex2 and rsqrt. A gradient has it once or twice, relative to its largest
    entry; a logarithm of a sum of exponentials absolutely.
    """
    if ptx.run.approximate is None:
        return 0.0
    largest = want[want.isfinite()].abs().max().item()
    return 2.0**-21 * (max(largest, 1.0) if want.ndim == 1 else largest)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", FAST)
def test_lockstep(name: str, aligned: bool, ptx: Device) -> None:
    _, launch = run(name, aligned, ptx)
    assert launch.programs == ROWS
    assert launch.splits == 0  # no branch parts a warp


@pytest.mark.parametrize("schedule", ["backward", "random"])
@pytest.mark.parametrize("name", FAST)
def test_other_schedules(name: str, schedule: str, ptx: Device) -> None:
    ptx.run.schedule, ptx.run.seed = schedule, 7
    run(name, True, ptx)


@pytest.mark.parametrize("name", FAST)
def test_approximate_instructions_may_err(name: str, ptx: Device) -> None:
    ptx.run.approximate = 1
    run(name, True, ptx)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", schedules.NAMES)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", FAST | MORE)
def test_every_target_and_schedule(name: str, aligned: bool, schedule: str, target: str, ptx: Device) -> None:
    ptx.target = target
    ptx.run.schedule, ptx.run.seed = schedule, len(name)
    ptx.run.order = "random" if schedule == "random" else "forward"
    ptx.run.approximate = {"lockstep": None, "forward": 1, "backward": 2, "random": 3}[schedule]
    _, launch = run(name, aligned, ptx)
    assert launch.splits == 0


@pytest.mark.parametrize("name", FAST)
def test_bytes_moved_are_the_floor(name: str, ptx: Device) -> None:
    """The floor counts rows once for each pass that the kernel is said to make."""
    case, launch = run(name, True, ptx, columns=4 * 4096)
    small = 64 * 32 * ROWS  # the rows' own numbers, a sector each at worst
    assert case.read <= launch.bytes_read <= 1.02 * case.read + small
    assert case.written <= launch.bytes_written <= 1.02 * case.written + small
    assert launch.efficiency > 0.8


def test_aligned_rows_take_fewer_instructions(ptx: Device) -> None:
    """The JIT's specialisation of strides reaches the machine."""
    counts = {}
    for aligned in (True, False):
        ptx.run.launches = []
        _, launch = run("fold, held bfloat16", aligned, ptx)
        counts[aligned] = sum(launch.instructions.values())
        assert ("ld.global.v4.b32" in launch.instructions) == aligned
    assert counts[False] > 1.5 * counts[True]
