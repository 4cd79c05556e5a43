"""Faults planted by hand: each is found, of its kind and under every schedule; its sound twin runs in silence."""

import re

import numpy as np
import pytest

from ptx import schedules, snippets
from ptx.faults import Fault, Race, Uninitialised
from ptx.faulty import ALL, SETUP, Planted
from ptx.machine import Run


def run(planted: Planted, body: str, schedule: str) -> None:
    p0, p1 = np.zeros((2, 64 + 4), np.float32)
    arrays = [aligned(array) for array in (p0, p1)]
    settings = Run(schedule=schedule, seed=5, strict=planted.strict)
    snippets.run(SETUP + body, *arrays, threads=64, grid=planted.grid, shared=512, settings=settings)


def aligned(memory: np.ndarray) -> np.ndarray:
    """Returns 64 elements that begin at a multiple of 16 bytes."""
    skip = -memory.__array_interface__["data"][0] % 16 // 4
    return memory[skip : skip + 64]


@pytest.mark.parametrize("schedule", schedules.NAMES)
@pytest.mark.parametrize("name", ALL)
def test_a_planted_fault_is_found(name: str, schedule: str) -> None:
    planted = ALL[name]
    assert planted.wrong != planted.mended
    with pytest.raises(Fault) as found:
        run(planted, planted.wrong, schedule)
    kinds = [planted.kind]
    if planted.kind is Race and schedule != "lockstep":
        kinds.append(Uninitialised)  # the reader came first: the same barrier is missing
    assert type(found.value) in kinds, found.value
    assert "`" in str(found.value)  # the instruction is named
    assert not re.search(r"\bprogram -", str(found.value))


@pytest.mark.parametrize("schedule", schedules.NAMES)
@pytest.mark.parametrize("name", ALL)
def test_its_sound_twin_is_silent(name: str, schedule: str) -> None:
    run(ALL[name], ALL[name].mended, schedule)


def test_there_are_faults_enough() -> None:
    assert len(ALL) >= 60
    assert {planted.kind for planted in ALL.values()} == set(Fault.__subclasses__())


def test_lanes_that_disagree_are_counted() -> None:
    memory = np.zeros(68, np.float32)
    body = (
        SETUP
        + "@%p2 st.shared.b32 [%r9], %r1;\nbar.sync 0;\nld.shared.b32 %r20, [%r9];\n@%p1 st.global.b32 [%rd1], %r20;"
    )
    out = []
    for schedule in ("lockstep", "backward"):
        array = aligned(memory)
        launch = snippets.run(body, array, array, shared=512, settings=Run(schedule=schedule))
        assert launch.disagreements >= 30
        out.append(int(array.view(np.uint32)[0]))
    assert out == [31, 0]  # any lane may win: the schedules try the last and the first
