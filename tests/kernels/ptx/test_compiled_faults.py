"""Faults in compiled kernels: Triton kernels that are wrong, and the library's own with their PTX broken."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prefkern import testing
from ptx import cases, schedules, sparse
from ptx.cases import FAST, Shape
from ptx.device import Device
from ptx.faults import AddressOverflow, Divergence, Fault, Misaligned, OutOfBounds, Race, Uninitialised
from ptx.machine import Kernel

pytestmark = pytest.mark.ptx


@pytest.fixture(params=schedules.NAMES)
def schedule(request: pytest.FixtureRequest, ptx: Device) -> str:
    ptx.run.schedule, ptx.run.seed = request.param, 3
    return str(request.param)


def test_narrowing_in_place(schedule: str) -> None:
    from ptx import planted

    x = torch.randn(2, 8192)
    out = torch.empty(2, 16384, dtype=torch.bfloat16)
    planted.narrow_in_place[(2,)](x, out, 8192, 8192, LANES=1024, num_warps=8, enable_fp_fusion=True)
    assert torch.equal(out[:, :8192], x.bfloat16())
    with pytest.raises(Race, match=r"planted\.py"):
        planted.narrow_in_place[(2,)](
            x, x.view(torch.bfloat16), 8192, 8192, LANES=1024, num_warps=8, enable_fp_fusion=True
        )


def test_programs_that_meet(schedule: str) -> None:
    from ptx import planted

    x = torch.randn(4112)
    out = torch.zeros(4112)
    planted.shift[(4,)](x, out, 16, BLOCK=1024, enable_fp_fusion=True)
    assert torch.equal(out[16:], x[:-16])
    with pytest.raises(Race):
        planted.shift[(4,)](x, x, 16, BLOCK=1024, enable_fp_fusion=True)
    with pytest.raises(OutOfBounds):
        planted.shift[(4,)](x, out[:-1], 16, BLOCK=1024, enable_fp_fusion=True)


def test_sums_in_one_place(schedule: str) -> None:
    from ptx import planted

    x, out = torch.randn(4 * 256), torch.zeros(1)
    planted.total[(1,)](x, out, LANES=256, enable_fp_fusion=True)
    with pytest.raises(Race):
        planted.total[(4,)](x, out, LANES=256, enable_fp_fusion=True)
    with pytest.raises(Race):
        planted.add_in_place[(1,)](x, out, LANES=256, enable_fp_fusion=True)


def test_a_row_whose_offset_needs_64_bits(ptx: Device) -> None:
    from ptx import planted

    V, rows = 1000, 2**31 // 1008 + 9
    x = sparse.tensor((rows, 1008), torch.float32)
    x[-1] = 1.0
    out = torch.zeros(rows)
    ptx.run.only = lambda total: [5, total - 1]
    planted.sum_rows[(rows,)](x, out, V, 1008, WIDE=True, LANES=1024, enable_fp_fusion=True)
    assert (out[5], out[-1]) == (0.0, 1000.0)
    with pytest.raises(AddressOverflow, match="32-bit overflow"):
        planted.sum_rows[(rows,)](x, out, V, 1008, WIDE=False, LANES=1024, enable_fp_fusion=True)
    ptx.run.only = lambda total: [5, 6]  # near rows fit
    planted.sum_rows[(rows,)](x, out, V, 1008, WIDE=False, LANES=1024, enable_fp_fusion=True)


def test_a_tail_without_its_mask(schedule: str) -> None:
    from ptx import planted

    x = torch.randn(3, 1008)
    out = torch.zeros(3, 1008)
    planted.unmasked[(3,)](x, out, 1000, 1008, MASK=True, LANES=1024, enable_fp_fusion=True)
    assert torch.equal(out[:, :1000], x[:, :1000])
    with pytest.raises(OutOfBounds):
        planted.unmasked[(1,)](x[:1], out[:1], 1000, 1008, MASK=False, LANES=1024, enable_fp_fusion=True)
    with pytest.raises(OutOfBounds, match="in"):  # into the gap between the rows of a wider matrix
        planted.unmasked[(1,)](x[:, :1000], out[:, :1000], 1000, 1008, MASK=False, LANES=1024, enable_fp_fusion=True)


def test_a_broken_promise_of_alignment(schedule: str) -> None:
    from ptx import planted

    x, out = torch.randn(2048), torch.zeros(1024)
    planted.promised[(1,)](x, out, 6, PROMISE=1, LANES=1024, enable_fp_fusion=True)
    assert torch.equal(out, x[6:1030])
    with pytest.raises(Misaligned):
        planted.promised[(1,)](x, out, 6, PROMISE=16, LANES=1024, enable_fp_fusion=True)


def test_arguments_that_are_tuples(ptx: Device) -> None:
    from ptx import planted

    x, bias = torch.randn(2, 128)
    for given in (None, bias):
        out = torch.zeros(128)
        planted.scaled[(1,)](planted.Vector(x, given, 1.5), out, LANES=128, enable_fp_fusion=True)
        want = 1.5 * (x if given is None else x + given)
        torch.testing.assert_close(out, want)
    with pytest.raises(OutOfBounds, match=r"x\.bias"):
        planted.scaled[(1,)](planted.Vector(x, bias[:-1], 1.5), out, LANES=128, enable_fp_fusion=True)


# ------------------------------------------------------------------------------------- the library's kernels, broken

SHAPE = Shape(3, 4656, True)


@pytest.fixture(params=list(FAST))
def victim(request: pytest.FixtureRequest, ptx: Device) -> Iterator[Any]:
    """A kernel of the library: its PTX, and a function that runs a broken copy of it."""
    ptx.run.only = None
    name = request.param
    cases.case(name, SHAPE).launch()
    number = ptx.run.launches[-1].function
    assert number is not None
    whole = ptx.utils.kernels[number]

    def run(text: str) -> Exception | None:
        ptx.utils.kernels[number] = Kernel(text)
        case = cases.case(name, SHAPE)
        try:
            case.launch()
            for what, (got, want, eager) in case.results().items():
                testing.assert_not_worse(got, want, eager, name=what)
        except (Fault, AssertionError) as fault:
            return fault
        return None

    yield whole.text, run
    ptx.utils.kernels[number] = whole


def occurrences(pattern: str, text: str) -> Iterator[tuple[re.Match[str], str, str]]:
    """Yields each match with the text before and after it."""
    for found in re.finditer(pattern, text):
        yield found, text[: found.start()], text[found.end() :]


@pytest.mark.parametrize(
    "schedule", ["lockstep", *(pytest.param(name, marks=pytest.mark.slow) for name in schedules.NAMES[1:])]
)
def test_every_barrier_is_needed(victim: Any, schedule: str, ptx: Device) -> None:
    text, run = victim
    ptx.run.schedule = schedule
    for number, (_, before, after) in enumerate(occurrences(r"\tbar\.sync\s+0;", text)):
        fault = run(before + after)
        assert isinstance(fault, Race | Uninitialised), f"barrier {number} removed: {fault}"


def test_every_shared_store_is_needed(victim: Any) -> None:
    """The first reduction then reads what nobody wrote; a later one the sums of the one before it."""
    text, run = victim
    faults = [run(before + after) for _, before, after in occurrences(r"(@!?%p\d+ )?st\.shared\.[^;]*;", text)]
    assert not faults or isinstance(faults[0], Uninitialised)
    assert faults.count(None) <= 1  # a divergence's flag of infinite rows, where no row is infinite


def test_every_vector_must_be_aligned(victim: Any) -> None:
    text, run = victim
    seen = 0
    for found, before, after in occurrences(r"((?:ld|st)\.global\.v\d\.b32 [^;]*\+ )0( \][^;]*;)", text):
        fault = run(f"{before}{found[1]}4{found[2]}{after}")
        assert isinstance(fault, Misaligned), f"{found[0]}: {fault}"
        seen += 1
    assert seen


def test_every_access_has_bounds(victim: Any) -> None:
    """Each global access, moved by 2^40 bytes: every one that runs is refused."""
    text, run = victim
    refused = total = 0
    for found, before, after in occurrences(r"((?:ld|st)\.global\.[^;]*\+ )0( \][^;]*;)", text):
        refused += isinstance(run(f"{before}{found[1]}{1 << 40}{found[2]}{after}"), OutOfBounds)
        total += 1
    assert refused >= 0.8 * total  # some of the tail's never run: no lane is active


def test_a_barrier_under_a_condition(victim: Any) -> None:
    """One warp branches around each barrier."""
    text, run = victim
    found = list(occurrences(r"\tbar\.sync\s+0;", text))
    for barrier, before, after in found:
        skip = "\tmov.u32 %extra, %tid.x;\n\tsetp.lt.u32 %skip, %extra, 32;\n\t@%skip bra $around;\n"
        broken = f"{before}{skip}{barrier[0]}\n$around:\n{after}"
        broken = broken.replace("\t.reg .pred", "\t.reg .pred %skip;\n\t.reg .b32 %extra;\n\t.reg .pred", 1)
        assert isinstance(run(broken), Divergence | Race | Uninitialised)
