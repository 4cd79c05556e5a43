"""Faults planted by hand in small kernels, each beside a sound twin."""

from typing import NamedTuple

from ptx.faults import AddressOverflow, Divergence, Fault, Misaligned, OutOfBounds, Race, Uninitialised

SETUP = """
    ld.param.b64 %rd1, [p0];
    ld.param.b64 %rd2, [p1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r9, smem;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;       // p0 + 4 tid
    add.s64 %rd5, %rd2, %rd3;       // p1 + 4 tid
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r9, %r3;          // smem + 4 tid
    xor.b32 %r5, %r3, 128;
    add.s32 %r6, %r9, %r5;          // the place of the thread one warp further
    xor.b32 %r5, %r3, 4;
    add.s32 %r7, %r9, %r5;          // of the next lane
    shr.u32 %r10, %r1, 5;           // warp
    setp.eq.b32 %p1, %r1, 0;
    setp.eq.b32 %p2, %r10, 0;
"""


class Planted(NamedTuple):
    """A kernel of two warps over p0 [64] and p1 [64] float32 and 512 bytes of shared memory, wrong and mended."""

    kind: type[Fault]
    wrong: str
    mended: str
    grid: int = 1
    strict: bool = False


def without(text: str, line: str) -> str:
    assert line in text
    return text.replace(line, "", 1)


EXCHANGE = "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r20, [%r6];\nst.global.b32 [%rd4], %r20;"
REUSE = f"{EXCHANGE}\nbar.sync 0;\nst.shared.b32 [%r4], %r20;\nbar.sync 0;\nld.shared.b32 %r21, [%r6];"
LANES = "st.shared.b32 [%r4], %r1;\nbar.warp.sync -1;\nld.shared.b32 %r20, [%r7];"
GLOBAL = "st.global.b32 [%rd4], %r1;\nbar.sync 0;\nxor.b32 %r20, %r3, 128;\ncvt.u64.u32 %rd20, %r20;\n"
GLOBAL += "add.s64 %rd21, %rd1, %rd20;\nld.global.b32 %r21, [%rd21];"
PROGRAM = "mad.lo.s32 %r20, %r2, 32, %r1;\nmul.wide.s32 %rd20, %r20, 4;\nadd.s64 %rd21, %rd1, %rd20;\n"
PROGRAM += "setp.lt.u32 %p3, %r1, 32;\n@%p3 st.global.b32 [%rd21], %r1;"
SUM = "st.shared.b32 [%r9], %r10;\nbar.sync 0;\nld.shared.b32 %r20, [%r9];"
ONE = "@%p1 st.shared.b32 [%r9], %r1;\nbar.sync 0;\nld.shared.b32 %r20, [%r9];"
LOOP = """
    mov.b32 %r30, 0;
$top:
    st.shared.b32 [%r4], %r30;
    bar.sync 0;
    ld.shared.b32 %r31, [%r6];
    bar.sync 0;
    add.s32 %r30, %r30, 1;
    setp.lt.s32 %p4, %r30, 3;
    @%p4 bra $top;
"""
FAR = "mov.b32 %r20, {row};\nmul.lo.s32 %r21, %r20, {stride};\nmul.wide.s32 %rd20, %r21, 4;\n"
FAR += "add.s64 %rd21, %rd1, %rd20;\n"
FIRST = "setp.eq.b32 %p3, %r2, 1;\nand.pred %p3, %p3, %p1;\n"  # the first thread of program 1
TWO = "shl.b32 %r20, %r1, 3;\nadd.s32 %r21, %r9, %r20;\nst.shared.b32 [%r4], %r1;\n"
SHIFTED = "mov.b32 %r20, {row};\nshl.b32 %r21, %r20, 20;\ncvt.s64.s32 %rd20, %r21;\nadd.s64 %rd21, %rd1, %rd20;\n"

RACES = {
    "read of another warp's write, no barrier": Planted(Race, without(EXCHANGE, "bar.sync 0;"), EXCHANGE),
    "write over what another warp still reads": Planted(
        Race, REUSE.replace("%r20;\nbar.sync 0;\nst.shared", "%r20;\nst.shared"), REUSE
    ),
    "second exchange without its barrier": Planted(
        Race, REUSE.replace("%r20;\nbar.sync 0;\nld.shared.b32 %r21", "%r20;\nld.shared.b32 %r21"), REUSE
    ),
    "a warp's barrier is not the block's": Planted(Race, EXCHANGE.replace("bar.sync 0", "bar.warp.sync -1"), EXCHANGE),
    "lanes of a warp without its barrier": Planted(Race, without(LANES, "bar.warp.sync -1;"), LANES),
    "lanes of a warp, write after read": Planted(
        Race,
        f"{LANES}\nst.shared.b32 [%r4], %r20;",
        f"{LANES}\nbar.warp.sync -1;\nst.shared.b32 [%r4], %r20;",
    ),
    "a shuffle is no barrier": Planted(
        Race, LANES.replace("bar.warp.sync -1", "shfl.sync.bfly.b32 %r22, %r1, 1, 31, -1"), LANES
    ),
    "two warps write one place": Planted(Race, SUM, ONE),
    "two warps write one place in turn": Planted(
        Race, "@%p2 st.shared.b32 [%r9], %r10;\n@!%p2 st.shared.b32 [%r9], %r10;", ONE
    ),
    "lanes of a warp write one place differently": Planted(
        Race, "@%p2 st.shared.b32 [%r9], %r1;", "@%p2 st.shared.b32 [%r9], %r10;", strict=True
    ),
    "lanes of a warp write one global place differently": Planted(
        Race, "@%p2 st.global.b32 [%rd1], %r1;", "@%p2 st.global.b32 [%rd1], %r10;"
    ),
    "loop without the barrier at its end": Planted(Race, LOOP.replace("[%r6];\n    bar.sync 0;", "[%r6];"), LOOP),
    "loop without the barrier at its start": Planted(Race, LOOP.replace("%r30;\n    bar.sync 0;", "%r30;"), LOOP),
    "part of a word": Planted(
        Race,
        EXCHANGE.replace("bar.sync 0;\nld.shared.b32 %r20", "ld.shared.b8 %r20"),
        EXCHANGE.replace("ld.shared.b32 %r20", "ld.shared.b8 %r20"),
    ),
    "a vector over a neighbour's word": Planted(
        Race,
        f"{TWO}st.shared.v2.b32 [%r21], {{%r1, %r1}};",
        f"{TWO}bar.sync 0;\nst.shared.v2.b32 [%r21], {{%r1, %r1}};",
    ),
    "global memory without a barrier": Planted(Race, without(GLOBAL, "bar.sync 0;"), GLOBAL),
    "global memory, write after read": Planted(
        Race, GLOBAL + "\nst.global.b32 [%rd4], %r21;", GLOBAL + "\nbar.sync 0;\nst.global.b32 [%rd4], %r21;"
    ),
    "programs write one place": Planted(Race, PROGRAM.replace("%r2, 32", "%r2, 31"), PROGRAM, grid=2),
    "a program reads what another writes": Planted(
        Race, f"{PROGRAM}\nld.global.b32 %r22, [%rd1];", f"{PROGRAM}\nld.global.b32 %r22, [%rd2];", grid=2
    ),
    "a program writes what others have read": Planted(
        Race,
        f"ld.global.b32 %r22, [%rd1];\n{FIRST}@%p3 st.global.b32 [%rd1], %r1;",
        f"ld.global.b32 %r22, [%rd1];\n{FIRST}@%p3 st.global.b32 [%rd2], %r1;",
        grid=2,
    ),
}
BARRIERS = {
    "one warp leaves before the barrier": Planted(Divergence, "@%p2 ret;\nbar.sync 0;", "bar.sync 0;\n@%p2 ret;"),
    "one warp jumps over the barrier": Planted(
        Divergence, "@%p2 bra $after;\nbar.sync 0;\n$after:", "bar.sync 0;\n@%p2 bra $after;\n$after:"
    ),
    "one lane jumps over the barrier": Planted(
        Divergence, "@%p1 bra $after;\nbar.sync 0;\n$after:", "@%p1 bra $after;\n$after:\nbar.sync 0;"
    ),
    "warps at different barriers": Planted(
        Divergence,
        "@%p2 bra $other;\nbar.sync 0;\nbra $after;\n$other:\nbar.sync 0;\n$after:",
        "@%p2 bra $other;\nbra $after;\n$other:\n$after:\nbar.sync 0;",
    ),
    "a loop whose length differs between warps": Planted(
        Divergence,
        LOOP.replace("setp.lt.s32 %p4, %r30, 3", "add.s32 %r40, %r10, 3;\nsetp.lt.s32 %p4, %r30, %r40"),
        LOOP,
    ),
    "a shuffle by part of a warp": Planted(
        Divergence,
        "@%p1 bra $after;\nshfl.sync.bfly.b32 %r22, %r1, 1, 31, -1;\n$after:",
        "shfl.sync.bfly.b32 %r22, %r1, 1, 31, -1;\n@%p1 bra $after;\n$after:",
    ),
    "a shuffle under a predicate that splits the warp": Planted(
        Divergence, "@%p1 shfl.sync.bfly.b32 %r22, %r1, 1, 31, -1;", "@%p2 shfl.sync.bfly.b32 %r22, %r1, 1, 31, -1;"
    ),
    "a reduction by part of a warp": Planted(
        Divergence,
        "@%p1 ret;\nmov.b32 %r23, -1;\nredux.sync.max.s32 %r22, %r1, %r23;",
        "mov.b32 %r23, -1;\nredux.sync.max.s32 %r22, %r1, %r23;",
    ),
    "a vote by part of a warp": Planted(
        Divergence, "@%p1 ret;\nvote.sync.any.pred %p5, %p2, -1;", "vote.sync.any.pred %p5, %p2, -1;"
    ),
    "a warp's barrier by part of it": Planted(
        Divergence, "@%p1 ret;\nbar.warp.sync -1;", "bar.warp.sync -1;\n@%p1 ret;"
    ),
    "a matrix load by part of a warp": Planted(
        Divergence,
        "st.shared.b32 [%r4], %r1;\nbar.sync 0;\n@%p1 ret;\nshl.b32 %r20, %r1, 4;\nand.b32 %r20, %r20, 112;\n"
        "add.s32 %r21, %r9, %r20;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r22}, [%r21];",
        "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nshl.b32 %r20, %r1, 4;\nand.b32 %r20, %r20, 112;\n"
        "add.s32 %r21, %r9, %r20;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r22}, [%r21];",
    ),
}
VECTOR = "shl.b32 %r20, %r1, 3;\nand.b32 %r20, %r20, 127;\nadd.s32 %r21, %r9, %r20;\n"
ALIGNMENT = {
    "a global vector one word off": Planted(
        Misaligned, "ld.global.v2.b32 {%r20, %r21}, [%rd1+4];", "ld.global.v2.b32 {%r20, %r21}, [%rd1+8];"
    ),
    "a vector of four, two words off": Planted(
        Misaligned,
        "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd1+8];",
        "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd1+16];",
    ),
    "a word at an odd half": Planted(Misaligned, "ld.global.b32 %r20, [%rd1+2];", "ld.global.b16 %rs1, [%rd1+2];"),
    "a half at an odd byte": Planted(Misaligned, "ld.global.b16 %rs1, [%rd1+3];", "ld.global.b8 %rs1, [%rd1+3];"),
    "a wide store": Planted(Misaligned, "@%p1 st.global.b64 [%rd1+4], %rd3;", "@%p1 st.global.b64 [%rd1+8], %rd3;"),
    "some lanes only": Planted(
        Misaligned, "ld.global.b64 %rd20, [%rd4];", "and.b64 %rd21, %rd4, -8;\nld.global.b64 %rd20, [%rd21];"
    ),
    "a shared vector": Planted(
        Misaligned,
        f"{VECTOR}@%p2 st.shared.v2.b32 [%r21+4], {{%r1, %r1}};",
        f"{VECTOR}and.b32 %r22, %r1, 15;\nsetp.eq.b32 %p3, %r22, %r1;\n@%p3 st.shared.v2.b32 [%r21+8], {{%r1, %r1}};",
    ),
    "a matrix row": Planted(
        Misaligned,
        "shl.b32 %r20, %r1, 3;\nand.b32 %r20, %r20, 56;\nadd.s32 %r21, %r9, %r20;\n"
        "@%p2 stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r21], {%r1};",
        "shl.b32 %r20, %r1, 4;\nand.b32 %r20, %r20, 112;\nadd.s32 %r21, %r9, %r20;\n"
        "@%p2 stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r21], {%r1};",
    ),
}
BOUNDS = {
    "one element beyond a tensor": Planted(
        OutOfBounds, "ld.global.b32 %r20, [%rd1+256];", "ld.global.b32 %r20, [%rd1+252];"
    ),
    "one element before a tensor": Planted(
        OutOfBounds, "ld.global.b32 %r20, [%rd1+-4];", "ld.global.b32 %r20, [%rd1+0];"
    ),
    "a vector across the end": Planted(
        OutOfBounds,
        "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd1+256];",
        "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd1+240];",
    ),
    "the last lane only": Planted(OutOfBounds, "ld.global.b32 %r20, [%rd4+4];", "ld.global.b32 %r20, [%rd4];"),
    "a mask that is one too wide": Planted(
        OutOfBounds,
        "setp.lt.u32 %p3, %r1, 64;\n@%p3 st.global.b32 [%rd4+4], %r1;",
        "setp.lt.u32 %p3, %r1, 63;\n@%p3 st.global.b32 [%rd4+4], %r1;",
    ),
    "a null pointer": Planted(
        OutOfBounds,
        "mov.b64 %rd20, 0;\nld.global.b32 %r20, [%rd20];",
        "mov.b64 %rd20, %rd1;\nld.global.b32 %r20, [%rd20];",
    ),
    "the program beyond the last row": Planted(
        OutOfBounds,
        "mul.wide.u32 %rd20, %r2, 256;\nadd.s64 %rd21, %rd1, %rd20;\nld.global.b32 %r20, [%rd21];",
        "mul.wide.u32 %rd20, %r2, 128;\nadd.s64 %rd21, %rd1, %rd20;\nld.global.b32 %r20, [%rd21];",
        grid=2,
    ),
    "shared memory beyond its end": Planted(
        OutOfBounds, "st.shared.b32 [%r4+260], %r1;", "st.shared.b32 [%r4+256], %r1;"
    ),
    "a shared vector across the end": Planted(
        OutOfBounds,
        "@%p1 st.shared.v4.b32 [smem+512], {%r1, %r1, %r1, %r1};",
        "@%p1 st.shared.v4.b32 [smem+496], {%r1, %r1, %r1, %r1};",
    ),
}
INITIALISATION = {
    "nobody wrote": Planted(Uninitialised, without(EXCHANGE, "st.shared.b32 [%r4], %r1;"), EXCHANGE),
    "the other warp did not write": Planted(
        Uninitialised, EXCHANGE.replace("st.shared", "@%p2 st.shared"), EXCHANGE.replace("[%r6]", "[%r4]")
    ),
    "a byte of the word is missing": Planted(
        Uninitialised, EXCHANGE.replace("st.shared.b32 [%r4], %r1", "st.shared.b16 [%r4], %r1"), EXCHANGE
    ),
    "the word behind": Planted(
        Uninitialised,
        "@%p1 st.shared.b32 [smem], %r1;\nbar.sync 0;\nld.shared.v2.b32 {%r20, %r21}, [smem];",
        "@%p1 st.shared.v2.b32 [smem], {%r1, %r1};\nbar.sync 0;\nld.shared.v2.b32 {%r20, %r21}, [smem];",
    ),
    "another program's shared memory is not mine": Planted(
        Uninitialised,
        "setp.eq.b32 %p3, %r2, 0;\n@%p3 st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r20, [%r4];",
        "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r20, [%r4];",
        grid=2,
    ),
    "a row of a matrix": Planted(
        Uninitialised,
        "@%p2 st.shared.b32 [%r4], %r1;\nbar.sync 0;\nshl.b32 %r20, %r1, 4;\nand.b32 %r20, %r20, 240;\n"
        "add.s32 %r21, %r9, %r20;\nldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r22, %r23}, [%r21];",
        "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nshl.b32 %r20, %r1, 4;\nand.b32 %r20, %r20, 240;\n"
        "add.s32 %r21, %r9, %r20;\nldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r22, %r23}, [%r21];",
    ),
}
LOADED = "\nld.global.b32 %r22, [%rd21];"
OVERFLOW = {
    "a product": Planted(
        AddressOverflow, FAR.format(row=65536, stride=65536) + LOADED, FAR.format(row=2, stride=8) + LOADED
    ),
    "a product that comes back into the tensor": Planted(
        AddressOverflow,
        FAR.format(row=65537, stride=65536 * 65536 // 65536) + "add.s64 %rd21, %rd21, -262144;" + LOADED,
        FAR.format(row=2, stride=8) + LOADED,
    ),
    "a sum": Planted(
        AddressOverflow,
        "mov.b32 %r20, 0x7fffffff;\nadd.s32 %r21, %r20, 1;\nadd.s32 %r21, %r21, 0x7fffffff;\nadd.s32 %r21, %r21, 1;\n"
        "mul.wide.s32 %rd20, %r21, 4;\nadd.s64 %rd21, %rd1, %rd20;" + LOADED,
        "mov.b32 %r20, 0x7ffffffe;\nadd.s32 %r21, %r20, 1;\nsub.s32 %r21, %r21, 0x7fffffff;\n"
        "mul.wide.s32 %rd20, %r21, 4;\nadd.s64 %rd21, %rd1, %rd20;" + LOADED,
    ),
    "a shift": Planted(AddressOverflow, SHIFTED.format(row=4096) + LOADED, SHIFTED.format(row=0) + LOADED),
    "a multiply-add": Planted(
        AddressOverflow,
        "mov.b32 %r20, 1073741824;\nmad.lo.s32 %r21, %r20, 4, %r1;\nmul.wide.s32 %rd20, %r21, 4;\n"
        "add.s64 %rd21, %rd1, %rd20;" + LOADED,
        "mov.b32 %r20, 0;\nmad.lo.s32 %r21, %r20, 4, %r1;\nmul.wide.s32 %rd20, %r21, 4;\nadd.s64 %rd21, %rd1, %rd20;"
        + LOADED,
    ),
    "active lanes only": Planted(
        AddressOverflow,
        "shl.b32 %r20, %r10, 31;\nadd.s32 %r21, %r20, %r20;\nadd.s32 %r21, %r21, %r1;\nmul.wide.s32 %rd20, %r21, 4;\n"
        "add.s64 %rd21, %rd1, %rd20;\n@!%p2 ld.global.b32 %r22, [%rd21];",
        "shl.b32 %r20, %r10, 31;\nadd.s32 %r21, %r20, %r20;\nadd.s32 %r21, %r21, %r1;\nmul.wide.s32 %rd20, %r21, 4;\n"
        "add.s64 %rd21, %rd1, %rd20;\n@%p2 ld.global.b32 %r22, [%rd21];",
    ),
    "in a loop": Planted(
        AddressOverflow,
        "mov.b32 %r20, 1;\n$double:\nshl.b32 %r20, %r20, 1;\nadd.s32 %r30, %r20, 0;\nsetp.ne.b32 %p4, %r20, 0;\n"
        "@%p4 bra $double;\nmul.wide.s32 %rd20, %r30, 4;\nadd.s64 %rd21, %rd1, %rd20;" + LOADED,
        "mov.b32 %r20, 1;\n$double:\nshl.b32 %r20, %r20, 1;\nadd.s32 %r30, %r20, 0;\nsetp.ne.b32 %p4, %r20, 8;\n"
        "@%p4 bra $double;\nmul.wide.s32 %rd20, %r30, 4;\nadd.s64 %rd21, %rd1, %rd20;" + LOADED,
    ),
}
ALL = {
    f"{family}: {name}": planted
    for family, group in {
        "race": RACES,
        "barrier": BARRIERS,
        "alignment": ALIGNMENT,
        "bounds": BOUNDS,
        "initialisation": INITIALISATION,
        "overflow": OVERFLOW,
    }.items()
    for name, planted in group.items()
}
