"""Asynchronous copies: a pipeline that waits and synchronises is silent; without either it races."""

import numpy as np
import pytest

from ptx import schedules, snippets
from ptx.faults import Misaligned, OutOfBounds, Race, Uninitialised, UnknownInstruction
from ptx.machine import Kernel, Run
from ptx.snippets import TID, words

# three tiles of 64 words through two buffers: out[i] = the sum over tiles of the neighbouring warp's words
PIPELINE = (
    TID.format(size=4)
    + """
    ld.param.b64 %rd20, [p1];
    add.s64 %rd21, %rd20, %rd2;
    mov.u32 %r2, smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;          // my place in a buffer
    xor.b32 %r5, %r3, 128;
    add.s32 %r6, %r2, %r5;          // the place of the other warp
    mov.b32 %r7, 4;
    cp.async.ca.shared.global [%r4], [%rd3], 4, %r7;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r4+256], [%rd3+256], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    ld.shared.b32 %r10, [%r6];
    bar.sync 0;
    cp.async.ca.shared.global [%r4], [%rd3+512], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b32 %r11, [%r6+256];
    ld.shared.b32 %r12, [%r6];
    add.s32 %r10, %r10, %r11;
    add.s32 %r10, %r10, %r12;
    st.global.b32 [%rd21], %r10;
"""
)


def run(body: str, schedule: str = "lockstep") -> np.ndarray:
    data, out = words(192), words(64)
    data[:] = np.arange(192)
    snippets.run(body, data, out, shared=512, settings=Run(schedule=schedule, seed=2))
    return out


@pytest.mark.parametrize("schedule", schedules.NAMES)
def test_a_sound_pipeline(schedule: str) -> None:
    lane = np.arange(64) ^ 32
    assert np.array_equal(run(PIPELINE, schedule), 3 * lane + 64 + 128)


@pytest.mark.parametrize("schedule", schedules.NAMES)
@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("cp.async.wait_group 1;\n    bar.sync 0;", "bar.sync 0;"),  # no wait at all
        ("cp.async.wait_group 1;", "cp.async.wait_group 2;"),  # for too few groups
        ("cp.async.wait_group 0;", "cp.async.wait_group 1;"),
        ("cp.async.wait_group 1;\n    bar.sync 0;", "cp.async.wait_group 1;"),  # the other warp has not waited
        ("[%r6];\n    bar.sync 0;", "[%r6];"),  # overwrites what a warp still reads
        ("cp.async.wait_group 0;\n    bar.sync 0;", "cp.async.wait_all;"),
        ("512], 4;\n    cp.async.commit_group;", "512], 4;\n    ld.shared.b32 %r13, [%r4];"),  # reads in flight
    ],
)
def test_a_pipeline_that_does_not_wait(line: str, instead: str, schedule: str) -> None:
    assert line in PIPELINE
    with pytest.raises((Race, Uninitialised)):  # where the reader comes first, nobody has written yet
        run(PIPELINE.replace(line, instead), schedule)


def test_what_is_not_read_is_zero_and_needs_no_memory() -> None:
    body = PIPELINE.replace("mov.b32 %r7, 4;", "setp.lt.u32 %p1, %r1, 32;\nselp.b32 %r7, 0, 4, %p1;\n")
    lane = np.arange(64) ^ 32
    want = np.where(lane < 32, 0, lane) + 2 * lane + 64 + 128
    assert np.array_equal(run(body), want)
    beyond = PIPELINE.replace("[%rd3], 4, %r7", "[%rd3+4096], 4, %r7")
    assert run(beyond.replace("mov.b32 %r7, 4;", "mov.b32 %r7, 0;")).any()
    with pytest.raises(OutOfBounds):
        run(beyond)


def test_copies_are_aligned_and_inside() -> None:
    with pytest.raises(OutOfBounds, match="shared"):
        run(PIPELINE.replace("[%r4+256], [%rd3+256], 4;", "[%r4+512], [%rd3+256], 4;"))
    with pytest.raises(Misaligned):
        run(PIPELINE.replace("[%r4+256], [%rd3+256], 4;", "[%r4+256], [%rd3+256], 8;"))
    for text in (
        "cp.async.wait_group %r1;",
        "cp.async.ca.shared.global [%r1], [%rd1], 12;",
        "cp.async.bulk.wait_group 0;",
    ):
        with pytest.raises(UnknownInstruction):
            Kernel(snippets.module(text, 1))
