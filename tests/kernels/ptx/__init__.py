"""A machine that executes the PTX of Triton's kernels on a CPU, thread by thread, and reports what no GPU forgives.

A kernel takes the road that it takes on a GPU: its launcher, the JIT's specialisation of the actual arguments, TTGIR,
LLVM, PTX. Only the launch is the machine's: it runs the instructions on the memory of the CPU tensors it was given, all
programs and warps at once with numpy, and raises a `Fault` at the first race, misaligned or foreign address, read of
shared memory that nobody wrote, 32-bit overflow in an address, or barrier that part of a block never reaches.

    from ptx import device
    machine = device.install("sm_90")        # before any kernel is launched; TRITON_INTERPRET must not be set
    machine.run.schedule = "random"
    kernel[(rows,)](...)                     # CPU tensors
    machine.run.launches[-1].barriers

`parsing` reads the text, `registers` holds values, `integers`, `floats`, `conversions` say what instructions compute,
`collectives` what a warp does together, `accesses`, `matrices`, `async_copies` what reaches memory. `memory`
knows which bytes exist, `races` who may touch them, `overflow` which addresses wrapped, `schedules` who runs next,
`counting` what it cost. `machine` runs a launch, `device` makes Triton believe in it. The library's launchers are known
to `launchers` only; `cases` names what the tests run, `sweep` compiles everything, `report` shows what kernels cost.
"""
