"""What the lanes of a warp do together: shuffles, reductions, votes, matrices."""

import numpy as np
import pytest

from ptx import snippets
from ptx.snippets import TID, words


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
    body = (
        TID.format(size=4)
        + "xor.b32 %r5, %r1, 7;\nshfl.sync.idx.b32 %r2, %r1, %r5, 31, -1;\nst.global.b32 [%rd3], %r2;"
    )
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
    body += (
        f"shl.b32 %r6, %r1, 4;\nadd.s32 %r6, %r6, {128 * count};\ncvt.u64.u32 %rd4, %r6;\nadd.s64 %rd5, %rd1, %rd4;\n"
    )
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
