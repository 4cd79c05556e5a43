"""The machine's parts: parsing, memory, schedules, collectives, matrices, what it counts."""

import numpy as np
import pytest
from ptx import schedules, snippets, sparse
from ptx.counting import bank_conflicts
from ptx.faults import OutOfBounds, UnknownInstruction
from ptx.machine import Kernel, Run
from ptx.memory import Extent, GlobalMemory, extent
from ptx.parsing import parse
from ptx.schedules import Schedule

TID = "mov.u32 %r1, %tid.x;\nld.param.b64 %rd1, [p0];\nmul.wide.u32 %rd2, %r1, {size};\nadd.s64 %rd3, %rd1, %rd2;\n"


def words(count: int) -> np.ndarray:
    """Returns zeros that begin at a multiple of 32 bytes."""
    memory = np.zeros(count + 8, np.uint32)
    skip = -memory.__array_interface__["data"][0] % 32 // 4
    return memory[skip : skip + count]


# ------------------------------------------------------------------------------------------------------------- parsing


def test_registers_of_inner_braces_live_there_only() -> None:
    out = words(64)
    body = TID.format(size=4) + """
    mov.b32 %r2, 7;
    { .reg .b32 %t; .reg .pred %q;
      mov.b32 %t, 5; setp.eq.b32 %q, %r1, %r1; @%q add.s32 %r2, %r2, %t; }
    {
      .reg .b32 %t;
      add.s32 %r2, %r2, %t;   // noise: not the %t above
    }
    st.global.b32 [%rd3], %r2;"""
    snippets.run(body, out)
    assert (out == (12 + 0x7FC0DEAD)).all()


def test_source_lines_are_remembered() -> None:
    text = snippets.module('.loc 1 3 4 // "fold.py":88:13\nmov.b32 %r1, 0;\n.loc 1 4 1 // x.py:9:1\nadd.s32 %r1, %r1, %r1;', 0)
    program = parse(text)
    assert [i.source for i in program.code][:2] == ['"fold.py":88', "x.py:9"]


@pytest.mark.parametrize("text", [".local .align 4 .b8 depot[8];", "?;", ".reg .b128 %q;"])
def test_what_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(UnknownInstruction):
        Kernel(snippets.module(text, 1))
    with pytest.raises(UnknownInstruction, match="no `.entry`"):
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
        with pytest.raises(OutOfBounds, match="byte .* of x"):
            list(memory.locate(np.array([start, start + bad], np.uint64), 4, "here"))
    with pytest.raises(OutOfBounds):  # a vector that begins inside
        list(memory.locate(np.array([start + 24], np.uint64), 8, "here"))


def test_accesses_may_lie_in_several_tensors() -> None:
    a, b = words(64), words(64)
    a[:], b[:] = 1, 2
    out = words(64)
    body = TID.format(size=4) + """
    ld.param.b64 %rd4, [p1];
    ld.param.b64 %rd5, [p2];
    add.s64 %rd6, %rd4, %rd2;
    add.s64 %rd7, %rd5, %rd2;
    setp.lt.u32 %p1, %r1, 20;
    selp.b64 %rd8, %rd3, %rd6, %p1;
    ld.global.b32 %r2, [%rd8];
    st.global.b32 [%rd7], %r2;"""
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
    """A race on purpose, unwatched: each warp takes the next number."""
    orders = {}
    for name in schedules.NAMES:
        out = words(8)
        kernel = Kernel(snippets.module(ORDER, 1, threads=128))
        run = Run(schedule=name, seed=3)
        whole = snippets.whole(out, "out")
        try:
            run.launch(kernel, (1, 1, 1), [whole], [whole.low], 0)
        except Exception as fault:
            assert "race" in str(fault)
        orders[name] = out[1:5].tolist()
    assert orders["lockstep"] == [1, 1, 1, 1]
    assert orders["forward"][0] == 1
    assert orders["backward"][3] == 1
    assert orders["forward"][3] == orders["backward"][0] == 0  # the race was seen first


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_the_order_of_the_programs(order: str) -> None:
    out = words(256)
    body = "mov.u32 %r2, %ctaid.x;\nmad.lo.s32 %r3, %r2, 64, 0;\nmov.u32 %r1, %tid.x;\nadd.s32 %r3, %r3, %r1;\n"
    body += "ld.param.b64 %rd1, [p0];\nmul.wide.s32 %rd2, %r3, 4;\nadd.s64 %rd3, %rd1, %rd2;\nst.global.b32 [%rd3], %r3;"
    snippets.run(body, out, grid=4, settings=Run(order=order, lanes=64))
    assert np.array_equal(out, np.arange(256))


def test_lanes_that_part_meet_again() -> None:
    out = words(64)
    body = TID.format(size=4) + """
    and.b32 %r2, %r1, 3;
    mov.b32 %r3, 0;
$again:
    add.s32 %r3, %r3, 10;
    sub.s32 %r2, %r2, 1;
    setp.ge.s32 %p1, %r2, 0;
    @%p1 bra $again;
    add.s32 %r3, %r3, 1;
    st.global.b32 [%rd3], %r3;"""
    launch = snippets.run(body, out)
    assert out.tolist() == [(lane % 4 + 1) * 10 + 1 for lane in range(64)]
    assert launch.splits == 6  # two warps, three partings
    assert launch.instructions["st.global.b32"] == 2  # together again


# --------------------------------------------------------------------------------------------------------- collectives


def shuffled(mode: str, by: int, clamp: int) -> list[int]:
    out = words(32)
    body = TID.format(size=4) + f"shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;\n"
    body += "selp.b32 %r3, 100, 0, %p1;\nadd.s32 %r2, %r2, %r3;\nst.global.b32 [%rd3], %r2;"
    snippets.run(body, out, threads=32)
    return out.tolist()


def test_shuffles() -> None:
    lanes = range(32)
    assert shuffled("bfly", 5, 31) == [100 + (lane ^ 5) for lane in lanes]
    assert shuffled("up", 3, 0) == [100 + lane - 3 if lane >= 3 else lane for lane in lanes]
    assert shuffled("down", 3, 31) == [100 + lane + 3 if lane + 3 <= 31 else lane for lane in lanes]
    assert shuffled("idx", 9, 31) == [109] * 32
    eights = 31 | (24 << 8)  # segments of eight lanes
    assert shuffled("down", 2, eights) == [100 + lane + 2 if lane % 8 < 6 else lane for lane in lanes]
    assert shuffled("up", 2, 24 << 8) == [100 + lane - 2 if lane % 8 >= 2 else lane for lane in lanes]
    assert shuffled("idx", 1, eights) == [100 + lane // 8 * 8 + 1 for lane in lanes]


def test_shuffle_by_a_register() -> None:
    out = words(32)
    body = TID.format(size=4) + "xor.b32 %r5, %r1, 7;\nshfl.sync.idx.b32 %r2, %r1, %r5, 31, -1;\nst.global.b32 [%rd3], %r2;"
    snippets.run(body, out, threads=32)
    assert out.tolist() == [lane ^ 7 for lane in range(32)]


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ("add.s32", sum(range(-5, 27))),
        ("min.s32", -5),
        ("max.s32", 26),
        ("max.u32", 2**32 - 1),
        ("min.u32", 0),
        ("and.b32", 0),
        ("or.b32", 2**32 - 1),
        ("xor.b32", int(np.bitwise_xor.reduce(np.arange(-5, 27, dtype=np.int32).view(np.uint32)))),
    ],
)
def test_integer_reductions(form: str, want: int) -> None:
    out = words(64)
    body = TID.format(size=4) + "and.b32 %r5, %r1, 31;\nsub.s32 %r5, %r5, 5;\nmov.b32 %r6, -1;\n"
    body += f"redux.sync.{form} %r2, %r5, %r6;\nst.global.b32 [%rd3], %r2;"
    snippets.run(body, out)
    assert set(out.tolist()) == {want & 0xFFFFFFFF}


def test_float_reductions_treat_nan_as_asked() -> None:
    values = np.linspace(-1, 3, 64, dtype=np.float32)
    values[3] = np.nan
    for form, want in (("max.f32", 3.0), ("min.f32", -1.0), ("max.NaN.f32", np.nan)):
        data = words(64).view(np.float32)
        data[:] = values
        body = TID.format(size=4) + "ld.global.b32 %r5, [%rd3];\nmov.b32 %r6, -1;\n"
        body += f"redux.sync.{form} %r2, %r5, %r6;\nst.global.b32 [%rd3], %r2;"
        snippets.run(body, data)
        warp = 0 if form != "max.f32" else 1
        assert np.array_equal(data[32 * warp : 32 * warp + 32], np.full(32, want, np.float32), equal_nan=True)


def test_votes() -> None:
    for form, want in (("any.pred %p2", [1, 0]), ("all.pred %p2", [0, 0]), ("ballot.b32 %r2", [0b1110, 0])):
        out = words(64)
        body = TID.format(size=4) + "sub.s32 %r5, %r1, 1;\nsetp.lo.u32 %p1, %r5, 3;\n"
        body += f"vote.sync.{form}, %p1, -1;\n" + ("selp.b32 %r2, 1, 0, %p2;\n" if "pred" in form else "")
        snippets.run(body + "st.global.b32 [%rd3], %r2;", out)
        assert out.tolist() == [want[0]] * 32 + [want[1]] * 32


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices(count: int, trans: str) -> None:
    """stmatrix writes what ldmatrix reads, and the elements lie where the manual says."""
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    others = ", ".join(f"%r{30 + i}" for i in range(count))
    out = words(32 * (count + 128))
    body = TID.format(size=4 * count) + "shl.b32 %r2, %r1, 4;\nmov.u32 %r3, smem;\nadd.s32 %r3, %r3, %r2;\n"
    for i in range(count):  # two numbers a register: 2 (lane + 32 i) and the next
        body += f"add.s32 %r4, %r1, {32 * i};\nshl.b32 %r4, %r4, 1;\nadd.s32 %r5, %r4, 1;\nshl.b32 %r5, %r5, 16;\n"
        body += f"or.b32 %r{20 + i}, %r4, %r5;\n"
    body += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r3], {{{registers}}};\nbar.warp.sync -1;\n"
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{others}}}, [%r3];\n"
    for i in range(count):
        body += f"st.global.b32 [%rd3+{4 * i}], %r{30 + i};\n"
    # and the shared bytes of the matrices' rows, a lane's row each
    body += f"shl.b32 %r6, %r1, 4;\nadd.s32 %r6, %r6, {128 * count};\ncvt.u64.u32 %rd4, %r6;\nadd.s64 %rd5, %rd1, %rd4;\n"
    body += f"bar.warp.sync -1;\nsetp.lt.u32 %p1, %r1, {8 * count};\n"
    for i in range(4):
        body += f"@%p1 ld.shared.b32 %r40, [%r3+{4 * i}];\n@%p1 st.global.b32 [%rd5+{4 * i}], %r40;\n"
    snippets.run(body, out, threads=32, shared=512)
    halves = out.view(np.uint16)
    got = halves[: 64 * count].reshape(32, count, 2)
    lane, i, half = np.indices(got.shape)
    assert np.array_equal(got, 2 * (lane + 32 * i) + half)
    rows = halves[64 * count : 64 * count + 64 * count].reshape(count, 8, 8)
    i, row, column = np.indices(rows.shape)
    row, column = (column, row) if trans else (row, column)
    assert np.array_equal(rows, 2 * (4 * row + column // 2 + 32 * i) + column % 2)


# ------------------------------------------------------------------------------------------------------------ counting


def copy(step: int, vector: int = 1, threads: int = 64) -> object:
    """Loads and stores one vector a lane, the lanes ``step`` words apart."""
    data, out = words(threads * step + 8), words(threads * step + 8)
    names = ", ".join(f"%r{20 + i}" for i in range(vector))
    form = f"v{vector}.b32" if vector > 1 else "b32"
    value = f"{{{names}}}" if vector > 1 else names
    body = TID.format(size=4 * step) + "ld.param.b64 %rd4, [p1];\nadd.s64 %rd5, %rd4, %rd2;\n"
    body += f"ld.global.{form} {value}, [%rd3];\nst.global.{form} [%rd5], {value};"
    return snippets.run(body, data, out, threads=threads)


@pytest.mark.parametrize(
    ("step", "vector", "sectors", "efficiency"),
    [(1, 1, 8, 1.0), (4, 4, 32, 1.0), (2, 1, 16, 0.5), (8, 1, 64, 0.125), (8, 4, 64, 0.5), (0, 1, 2, 0.125)],
)
def test_sectors(step: int, vector: int, sectors: int, efficiency: float) -> None:
    if step == 0:  # all lanes read one word
        data, out = words(8), words(64)
        body = TID.format(size=4) + "ld.param.b64 %rd4, [p1];\nadd.s64 %rd5, %rd4, %rd2;\n"
        launch = snippets.run(body + "ld.global.b32 %r2, [%rd1];\nst.global.b32 [%rd5], %r2;", data, out)
        load, store = launch.accesses.values()
        assert (load.requests, load.requested, load.needed, load.moved) == (2, 2, 8, 32)
        assert store.moved == 256
        return
    launch = copy(step, vector)
    load, store = launch.accesses.values()
    assert load.requested == store.requested == sectors
    assert load.needed == 64 * 4 * vector
    assert load.moved == 32 * sectors
    assert launch.efficiency == efficiency


def test_moved_bytes_count_a_block_once_and_a_second_pass_again() -> None:
    data = words(64)
    once = TID.format(size=4) + "ld.global.b32 %r2, [%rd3];\nld.global.b32 %r3, [%rd3];\n"
    assert snippets.run(once, data).bytes_read == 256
    twice = TID.format(size=4) + "ld.global.b32 %r2, [%rd3];\nbra $next;\n$next:\nld.global.b32 %r3, [%rd3];\n"
    assert snippets.run(twice, data).bytes_read == 512
    unordered = TID.format(size=4) + "xor.b32 %r4, %r1, 31;\nmul.wide.u32 %rd4, %r4, 4;\nadd.s64 %rd5, %rd1, %rd4;\n"
    launch = snippets.run(unordered + "ld.global.b32 %r2, [%rd5];", data)
    assert launch.efficiency == 1.0


def test_bank_conflicts() -> None:
    lane = np.arange(32)
    warp = np.zeros(32, np.int64)
    assert bank_conflicts(lane * 4, 4, warp) == 0
    assert bank_conflicts(lane * 8, 4, warp) == 1
    assert bank_conflicts(lane * 128, 4, warp) == 31
    assert bank_conflicts(lane * 0, 4, warp) == 0  # one word for all
    assert bank_conflicts(lane * 132, 4, warp) == 0  # rows padded by a word
    assert bank_conflicts(lane * 2, 2, warp) == 0
    assert bank_conflicts(lane * 16, 16, warp) == 0  # a quarter warp at a time
    assert bank_conflicts(lane * 32, 16, warp) == 4  # two of eight lanes meet, in each quarter
    both = np.concatenate([lane * 8, lane * 4])
    assert bank_conflicts(both, 4, np.repeat([0, 1], 32)) == 1


def test_instructions_and_barriers_are_counted_per_warp_and_per_program() -> None:
    data = words(64)
    launch = snippets.run(TID.format(size=4) + "bar.sync 0;\nbar.sync 0;\nld.global.b32 %r2, [%rd3];", data, grid=3)
    assert launch.barriers == 6
    assert launch.instructions["bar.sync"] == 12
    assert launch.instructions["ld.global.b32"] == 6
    assert launch.accesses[6].requests == 6
    assert launch.programs == 3
