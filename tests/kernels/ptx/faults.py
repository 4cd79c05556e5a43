"""Faults that the machine reports: each is an error on a GPU, or a wrong number there now and then."""


class Fault(Exception):  # noqa: N818
    """A kernel did what no GPU forgives. The message names the instruction, its source line, the program and thread."""


class Race(Fault):
    """Two threads touch a byte, one of them writes, and no barrier orders them."""


class Misaligned(Fault):
    """The address of an access is not a multiple of its width."""


class OutOfBounds(Fault):
    """An address belongs to no tensor of the launch, or lies beyond a program's shared memory."""


class Uninitialised(Fault):
    """Shared memory is read before it is written."""


class AddressOverflow(Fault):
    """An address depends on a 32-bit sum or product that did not fit in 32 bits."""


class Divergence(Fault):
    """Threads part where the instruction needs them together: a barrier, a shuffle, a warp's reduction."""


class UnknownInstruction(Exception):  # noqa: N818
    """The machine does not know the instruction, or a form of it: it stops rather than guess."""
