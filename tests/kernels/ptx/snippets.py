"""Runs small hand-written kernels on numpy arrays, without Triton."""

import numpy as np

from ptx.counting import Launch
from ptx.machine import Kernel, Run
from ptx.memory import Extent

_REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<64>;
"""
# p0 + size times the thread, in %rd3
TID = "mov.u32 %r1, %tid.x;\nld.param.b64 %rd1, [p0];\nmul.wide.u32 %rd2, %r1, {size};\nadd.s64 %rd3, %rd1, %rd2;\n"


def words(count: int) -> np.ndarray:
    """Returns zeros that begin at a multiple of 32 bytes."""
    memory = np.zeros(count + 8, np.uint32)
    skip = -memory.__array_interface__["data"][0] % 32 // 4
    return memory[skip : skip + count]


def module(body: str, parameters: int, threads: int = 64, shared: int = 0) -> str:
    """Returns the PTX of a kernel with 64-bit parameters p0, p1 ..., an array ``smem`` of shared bytes, and registers
    %p, %rs, %r and %rd."""
    names = ",\n".join(f"    .param .u64 p{i}" for i in range(parameters))
    declared = f".shared .align 16 .b8 smem[{shared}];" if shared else ""
    return f"""
.version 8.7
.target sm_90a
.address_size 64
{declared}
.visible .entry kernel(
{names}
)
.reqntid {threads}
{{
{_REGISTERS}
{body}
    ret;
}}
"""


def whole(array: np.ndarray, name: str) -> Extent:
    """Returns the bytes of a contiguous array."""
    low = array.__array_interface__["data"][0]
    return Extent(low, low + array.nbytes, array.itemsize, 0, 0, name)


def run(
    body: str,
    *arguments: np.ndarray | int,
    threads: int = 64,
    grid: int = 1,
    shared: int = 0,
    settings: Run | None = None,
) -> Launch:
    """Runs a body whose parameters p0, p1 ... are the addresses of the arrays, or numbers."""
    kernel = Kernel(module(body, len(arguments), threads, shared))
    extents, bits = [], []
    for i, argument in enumerate(arguments):
        if isinstance(argument, int):
            bits.append(argument & ((1 << 64) - 1))
        else:
            extents.append(whole(argument, f"p{i}"))
            bits.append(extents[-1].low)
    return (settings or Run()).launch(kernel, (grid, 1, 1), extents, bits, 0)
