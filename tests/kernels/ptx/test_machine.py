"""The machine's parts: parsing, memory, schedules."""

import numpy as np
import pytest

from ptx import schedules, snippets, sparse
from ptx.faults import OutOfBounds, Race, UnknownInstruction
from ptx.machine import Kernel, Run
from ptx.memory import Extent, GlobalMemory, extent
from ptx.parsing import parse
from ptx.schedules import Schedule
from ptx.snippets import TID, words

# ------------------------------------------------------------------------------------------------------------- parsing


def test_registers_of_inner_braces_live_there_only() -> None:
    out = words(64)
    body = (
        TID.format(size=4)
        + """
    mov.b32 %r2, 7;
    { .reg .b32 %t; .reg .pred %q;
      mov.b32 %t, 5; setp.eq.b32 %q, %r1, %r1; @%q add.s32 %r2, %r2, %t; }
    {
      .reg .b32 %t;
      add.s32 %r2, %r2, %t;   // noise: not the %t above
    }
    st.global.b32 [%rd3], %r2;"""
    )
    snippets.run(body, out)
    assert (out == (12 + 0x7FC0DEAD)).all()


def test_source_lines_are_remembered() -> None:
    text = snippets.module(
        '.loc 1 3 4 // "fold.py":88:13\nmov.b32 %r1, 0;\n.loc 1 4 1 // x.py:9:1\nadd.s32 %r1, %r1, %r1;', 0
    )
    program = parse(text)
    assert [i.source for i in program.code][:2] == ['"fold.py":88', "x.py:9"]


@pytest.mark.parametrize("text", [".local .align 4 .b8 depot[8];", "?;", ".reg .b128 %q;"])
def test_what_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(UnknownInstruction):
        Kernel(snippets.module(text, 1))
    with pytest.raises(UnknownInstruction, match=r"no `\.entry`"):
        parse(".version 8.0")


def test_too_many_arguments_are_refused() -> None:
    kernel = Kernel(snippets.module("", 1))
    with pytest.raises(ValueError, match="1 parameters, got 2"):
        Run().launch(kernel, (1, 1, 1), [], [0, 0], 0)


# -------------------------------------------------------------------------------------------------------------- memory


class View:
    """What `extent` needs of a tensor."""

    def __init__(self, array: np.ndarray) -> None:
        self.shape, self.array = array.shape, array

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self) -> int:
        return int(self.array.__array_interface__["data"][0])

    def element_size(self) -> int:
        return self.array.itemsize


def test_the_gaps_between_rows_are_outside() -> None:
    whole = np.zeros((4, 10), np.float32)
    memory = GlobalMemory([extent(View(whole[:, :7]), "x")])
    start = whole.__array_interface__["data"][0]
    good = np.array([start, start + 24, start + 40, start + 3 * 40 + 24], np.uint64)
    assert [r.name for r, _, _ in memory.locate(good, 4, "here")] == ["x"]
    for bad in (28, 36, 3 * 40 + 28):
        with pytest.raises(OutOfBounds, match=r"byte .* of x"):
            list(memory.locate(np.array([start, start + bad], np.uint64), 4, "here"))
    with pytest.raises(OutOfBounds):  # a vector that begins inside
        list(memory.locate(np.array([start + 24], np.uint64), 8, "here"))


def test_accesses_may_lie_in_several_tensors() -> None:
    a, b = words(64), words(64)
    a[:], b[:] = 1, 2
    out = words(64)
    body = (
        TID.format(size=4)
        + """
    ld.param.b64 %rd4, [p1];
    ld.param.b64 %rd5, [p2];
    add.s64 %rd6, %rd4, %rd2;
    add.s64 %rd7, %rd5, %rd2;
    setp.lt.u32 %p1, %r1, 20;
    selp.b64 %rd8, %rd3, %rd6, %p1;
    ld.global.b32 %r2, [%rd8];
    st.global.b32 [%rd7], %r2;"""
    )
    snippets.run(body, a, b, out)
    assert out.tolist() == [1] * 20 + [2] * 44


def test_a_narrow_access_refines_the_watch_of_a_tensor() -> None:
    """Neighbouring bytes of one float32, written by two warps: no race."""
    out = words(32)
    body = TID.format(size=1) + "st.global.b8 [%rd3], %r1;"
    snippets.run(body, out, threads=128)
    assert np.array_equal(out.view(np.uint8), np.arange(128))


def test_a_row_beyond_32_bits_of_a_tensor_that_nobody_could_allocate() -> None:
    torch = pytest.importorskip("torch")
    width = 128256
    rows = 2**31 // width + 3
    far = sparse.tensor((rows * 100, width), torch.float32)  # 860 GB
    far[rows, 5] = 7.0
    low = far.data_ptr()
    whole = Extent(low, low + far.numel() * 4, 4, 0, 0, "far")
    kernel = Kernel(
        snippets.module(
            f"""
    ld.param.b64 %rd1, [p0];
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd2, %r2, {width};
    mov.u32 %r1, %tid.x;
    cvt.u64.u32 %rd3, %r1;
    add.s64 %rd2, %rd2, %rd3;
    shl.b64 %rd2, %rd2, 2;
    add.s64 %rd2, %rd1, %rd2;
    ld.global.b32 %r3, [%rd2];
    add.f32 %r3, %r3, 0f3F800000;
    st.global.b32 [%rd2], %r3;""",
            1,
        )
    )
    run = Run(only=lambda total: [rows, total - 1])
    launch = run.launch(kernel, (rows * 100, 1, 1), [whole], [low], 0)
    assert launch.programs == 2
    assert far[rows, 5] == 8.0
    assert far[rows, :64].sum() == 71.0
    assert far[rows * 100 - 1, :65].tolist() == [1.0] * 64 + [0.0]


# ----------------------------------------------------------------------------------------------------------- schedules


def test_schedules_choose_warps_in_their_order() -> None:
    ready = np.array([[False, True, True, True], [True, False, False, True]])
    assert np.array_equal(Schedule("lockstep").turn(ready).warps, ready)
    assert Schedule("forward").turn(ready).warps.nonzero()[1].tolist() == [1, 0]
    assert Schedule("backward").turn(ready).warps.nonzero()[1].tolist() == [3, 3]
    chosen = Schedule("random", 1)
    seen = {tuple(chosen.turn(ready).warps.nonzero()[1].tolist()) for _ in range(200)}
    assert seen == {(a, b) for a in (1, 2, 3) for b in (0, 3)}
    again = [Schedule("random", 4).turn(ready).budget for _ in range(2)]
    assert again[0] == again[1]
    done = np.array([[False, False], [False, True]])
    assert Schedule("random").turn(done).warps.tolist() == done.tolist()
    with pytest.raises(ValueError, match="lockstep, forward, backward, random"):
        Schedule("sideways")


ORDER = """
    mov.u32 %r1, %tid.x;
    shr.u32 %r2, %r1, 5;
    ld.param.b64 %rd1, [p0];
    ld.global.b32 %r3, [%rd1];
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    add.s32 %r3, %r3, 1;
    st.global.b32 [%rd3+4], %r3;
    and.b32 %r4, %r1, 31;
    setp.eq.b32 %p1, %r4, 0;
    @%p1 st.global.b32 [%rd1], %r3;
"""


def test_the_schedule_decides_who_comes_first() -> None:
    """A race on purpose: each warp takes the next number, until the race is seen."""
    orders = {}
    for name in schedules.NAMES:
        out = words(8)
        kernel = Kernel(snippets.module(ORDER, 1, threads=128))
        run = Run(schedule=name, seed=3)
        whole = snippets.whole(out, "out")
        with pytest.raises(Race):
            run.launch(kernel, (1, 1, 1), [whole], [whole.low], 0)
        orders[name] = out[1:5].tolist()
    assert orders["lockstep"] == [1, 1, 1, 1]
    assert orders["forward"][0] == 1
    assert orders["backward"][3] == 1
    assert orders["forward"][3] == orders["backward"][0] == 0  # the race was seen first


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_the_order_of_the_programs(order: str) -> None:
    out = words(256)
    body = "mov.u32 %r2, %ctaid.x;\nmad.lo.s32 %r3, %r2, 64, 0;\nmov.u32 %r1, %tid.x;\nadd.s32 %r3, %r3, %r1;\n"
    body += (
        "ld.param.b64 %rd1, [p0];\nmul.wide.s32 %rd2, %r3, 4;\nadd.s64 %rd3, %rd1, %rd2;\nst.global.b32 [%rd3], %r3;"
    )
    snippets.run(body, out, grid=4, settings=Run(order=order, lanes=64))
    assert np.array_equal(out, np.arange(256))


def test_lanes_that_part_meet_again() -> None:
    out = words(64)
    body = (
        TID.format(size=4)
        + """
    and.b32 %r2, %r1, 3;
    mov.b32 %r3, 0;
$again:
    add.s32 %r3, %r3, 10;
    sub.s32 %r2, %r2, 1;
    setp.ge.s32 %p1, %r2, 0;
    @%p1 bra $again;
    add.s32 %r3, %r3, 1;
    st.global.b32 [%rd3], %r3;"""
    )
    launch = snippets.run(body, out)
    assert out.tolist() == [(lane % 4 + 1) * 10 + 1 for lane in range(64)]
    assert launch.splits == 6  # two warps, three partings
    assert launch.instructions["st.global.b32"] == 2  # together again
